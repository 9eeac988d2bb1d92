"""How often the harness's 95 % intervals hold the truth, by simulation, where it is known.

    python benchmarks/interval_coverage.py [--output docs/results] [--figures 4000]

Made-up figures go through the functions that the report calls (eval/spread.py), many at once; and, with seeds that differ as real
runs do, as cells through the report's own analysis. Prints tables and writes OUTPUT/coverage.json.

The figure of seed s on unit u at one level is mean + a_s + b_u + e_su, with a of one seed, b of one unit in all seeds, e its own;
levels are independent. A share has this sum in a probit (a latent normal), which keeps its mean exact.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import common
import numpy as np
from scipy import special

from ds_stability.eval.records import Measured
from ds_stability.eval.report import analyze
from ds_stability.eval.report_cells import Cell, Evaluation, Key
from ds_stability.eval.spread import (
    Spread,
    half_width,
    recovered,
    share_bounds,
    spread_of,
    standard_error,
    weighted,
)
from ds_stability.run_dir import write_json_atomic

SEEDS, UNITS, BETWEEN = (2, 3, 5, 10), (8, 32, 128, 512), (0.0, 0.1, 0.3, 0.6, 0.9)
ISSUE = {"seed_sd": 0.08, "unit_sd": 0.05, "rest_sd": 0.05, "units": 32}
LEVELS = np.linspace(0.0, 1.0, 5)
SLOPE = (LEVELS - LEVELS.mean()) / ((LEVELS - LEVELS.mean()) ** 2).sum()
CONTRASTS = {"group": np.array([1.0, 0, 0, 0, 0]), "difference": np.array([-1.0, 1.0, 0, 0, 0]), "trend": SLOPE}
SHARES = {0.005: 0.02, 0.02: 0.1, 0.1: 0.3, 0.5: 0.5, 0.98: 0.9}  # of a group, and of the one that it is compared to
LATENT, TOKENS = (0.0, 0.05, 0.2, 0.5), 64
LATENT_UNITS = 0.2  # between units, of the variance without the seeds'
AT_ONCE = 4_000_000  # numbers drawn at once: bounds memory
RESAMPLES = 400
METHODS = ("group", "difference", "satterthwaite group", "satterthwaite difference", "bootstrap group", "bootstrap difference")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default=str(common.REPOSITORY / "docs" / "results"))
    parser.add_argument("--figures", type=int, default=4000, help="simulated for each cell of the grid")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.figures < 100:
        parser.error(f"--figures {arguments.figures}: allowed are numbers from 100")
    started, rng = time.monotonic(), np.random.default_rng(arguments.seed)
    result = common.describe_measurement("coverage", {"seed": arguments.seed}, {"figures": arguments.figures, "confidence": 0.95, "resamples": RESAMPLES})
    result |= {"report": [real_runs(seeds, rng) for seeds in SEEDS[:3]], "grid": grid(arguments.figures, rng),
               "shares": shares(arguments.figures // 2, rng), "single": single(arguments.figures, rng)}  # fmt: skip
    result["seconds"] = round(time.monotonic() - started, 1)
    output = common.output_folder(arguments.output)
    write_json_atomic(output / "coverage.json", result)
    for title, table in tables(result).items():
        print(f"{title}\n\n{common.text_table(*table)}\n")
    print(output / "coverage.json")
    return 0


def batches(figures: int, numbers: int) -> Iterator[int]:
    """Sizes of batches of `figures` that hold `numbers` each."""
    size = max(1, AT_ONCE // numbers)
    yield from (min(size, figures - first) for first in range(0, figures, size))


def holds(low: np.ndarray, high: np.ndarray, truth: float) -> np.ndarray:
    return (low <= truth) & (truth <= high)


# ---- through the report: seeds that differ as real runs do --------------------------------------------------------------


def real_runs(seeds: int, rng: np.random.Generator, figures: int = 300, rounds: int = 5) -> dict[str, Any]:
    """Coverage of groups and differences as the report's analysis gives them, and of methods that were not taken."""
    found: dict[str, list] = {name: [] for name in ("group", "difference", "error")}
    others: dict[str, list] = {f"{method} {kind}": [] for method in ("satterthwaite", "bootstrap") for kind in ("group", "difference")}
    for _ in range(rounds):
        table = ISSUE["seed_sd"] * rng.normal(size=(figures, 2, seeds, 1)) + ISSUE["unit_sd"] * rng.normal(size=(figures, 2, 1, ISSUE["units"]))
        table = 1.0 + table + ISSUE["rest_sd"] * rng.normal(size=(figures, 2, seeds, ISSUE["units"]))
        for row in analyze(evaluation(table)).rows:
            if row["level"] == 0.0:
                found["group"].append(row["ci_low"] <= 1.0 <= row["ci_high"])
                found["error"].append(row["stderr"] ** 2)
            else:
                found["difference"].append(row["difference_low"] <= 0.0 <= row["difference_high"])
        for kind, y in (("group", table[:, 0] - 1.0), ("difference", table[:, 1] - table[:, 0])):
            others[f"satterthwaite {kind}"] += list(np.abs(y.mean(axis=(1, 2))) <= satterthwaite(spread_of(y.mean(axis=2), y)))
            others[f"bootstrap {kind}"] += list(holds(*bootstrap(y, rng), 0.0))
    truth = ISSUE["seed_sd"] ** 2 / seeds + ISSUE["unit_sd"] ** 2 / ISSUE["units"] + ISSUE["rest_sd"] ** 2 / seeds / ISSUE["units"]
    shares = {name: float(np.mean(hits)) for name, hits in (found | others).items() if name != "error"}
    return {"seeds": seeds, "figures": figures * rounds, **ISSUE, **shares, "error_ratio": float(np.sqrt(np.mean(found["error"]) / truth))}


def evaluation(table: np.ndarray) -> Evaluation:
    """Cells of two levels whose figures are `table`, [figures, levels, seeds, units]."""
    names = [str(unit) for unit in range(table.shape[-1])]
    cells = []
    for level, seed in itertools.product(range(table.shape[1]), range(table.shape[2])):
        rows, measured = {}, {}
        for number, totals in enumerate(table[:, level, seed]):
            key = Key(f"figure_{number}", None, "held_out")
            measured[key] = Measured(key.metric, names, totals, np.ones(len(totals)), split="held_out", unit="nats")
            rows[key] = {"metric": key.metric, "split": "held_out", "value": measured[key].value, "n": len(totals), "unit": "nats", "note": None}
        cells.append(Cell(f"{level}-{seed}", Path(f"{level}-{seed}"), {"run": {}}, rows, measured, "a", "feedback", float(level), seed))
    return Evaluation("made up", Path(), cells)


def satterthwaite(spread: Spread) -> np.ndarray:
    """Half-width with Satterthwaite's degrees of freedom (1946, Biometrics Bulletin 2, 110)."""
    seeds, units = spread.seeds - 1, spread.units - 1
    total = standard_error(spread) ** 2
    freedom = total**2 / (spread.by_seed**2 / seeds + spread.by_unit**2 / units + spread.rest**2 / seeds / units)
    return -special.stdtrit(freedom, 0.025) * np.sqrt(total)


def bootstrap(y: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Percentile interval over resampled seeds crossed with resampled units, of [figures, S, U]: (low, high)."""
    weights = [rng.multinomial(size, np.full(size, 1 / size), size=RESAMPLES) / size for size in y.shape[1:]]
    means = np.einsum("fsb,bs->fb", y @ weights[1].T, weights[0])
    low, high = np.quantile(means, [0.025, 0.975], axis=1)
    return low, high


# ---- the grid ------------------------------------------------------------------------------------------------------------


def grid(figures: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Normal figures: of the variance that is not between seeds, half is the unit's in all seeds."""
    rows = []
    for seeds, units, between in itertools.product(SEEDS, UNITS, BETWEEN):
        sd = np.sqrt([between, (1 - between) / 2, (1 - between) / 2])
        hits: dict[str, list] = {kind: [] for kind in CONTRASTS}
        halves: dict[str, list] = {kind: [] for kind in CONTRASTS}
        for size in batches(figures, seeds * units * len(LEVELS)):
            shape = (size, seeds, len(LEVELS), units)
            y = sd[0] * rng.normal(size=(*shape[:3], 1)) + sd[1] * rng.normal(size=(size, 1, *shape[2:])) + sd[2] * rng.normal(size=shape)
            for kind, weights in CONTRASTS.items():
                mixed = weighted(y[..., weights != 0, :], np.ones_like(y[..., weights != 0, :]), weights[weights != 0])
                values = mixed.mean(axis=-1)
                half = half_width(spread_of(values, mixed))
                hits[kind] += list(np.abs(values.mean(axis=-1)) <= half)
                halves[kind] += list(half)
        ideal = 1.959964 * np.sqrt(sd[0] ** 2 / seeds + sd[1] ** 2 / units + sd[2] ** 2 / seeds / units)
        rows += [{"kind": kind, "seeds": seeds, "units": units, "between": between, "coverage": float(np.mean(hits[kind])),
                  "width": float(np.median(halves[kind]) / ideal / np.linalg.norm(weights))} for kind, weights in CONTRASTS.items()]  # fmt: skip
    return rows


def shares(figures: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Shares of 0/1 units, and of units of TOKENS tokens: of a group, and of its difference to another."""
    rows = []
    for tokens, seeds, units, between in itertools.product((1, TOKENS), (1, *SEEDS), UNITS, LATENT):
        if (seeds == 1 and between > 0) or tokens * units > 128 * TOKENS:
            continue
        for share, other in SHARES.items():
            hits: dict[str, list] = {"group": [], "difference": []}
            for size in batches(figures, seeds * units * 2):
                units_own = rng.normal(size=(size, 1, units))  # a unit is as hard at every level
                parts = [Share(draw_shares(goal, tokens, between, units_own, seeds, rng)) for goal in (share, other)]
                hits["group"] += list(holds(*parts[0].bounds, share))
                hits["difference"] += list(holds(*share_difference(*parts), share - other))
            rows += [{"kind": kind, "tokens": tokens, "seeds": seeds, "units": units, "between": between, "share": share,
                      "coverage": float(np.mean(found))} for kind, found in hits.items()]  # fmt: skip
    return rows


def draw_shares(share: float, tokens: int, between: float, units_own: np.ndarray, seeds: int, rng: np.random.Generator) -> np.ndarray:
    """[figures, seeds, units], of mean `share`; `between` and LATENT_UNITS are shares of latent variances."""
    seed, unit = (np.sqrt(part / (1 - part)) for part in (between, LATENT_UNITS))
    latent = special.ndtri(share) * np.sqrt(1 + seed**2 + unit**2) + seed * rng.normal(size=(len(units_own), seeds, 1)) + unit * units_own
    chance = special.ndtr(latent)
    return (rng.random(chance.shape) < chance).astype(float) if tokens == 1 else rng.binomial(tokens, chance) / tokens


class Share:
    """A group's share of [figures, seeds, units], as contrasts.py takes it."""

    def __init__(self, y: np.ndarray) -> None:
        self.y, self.seeds = y, y.mean(axis=-1)
        self.value = self.seeds.mean(axis=-1)
        self.bounds = share_bounds(self.value, half_width(spread_of(self.seeds, y)), y.shape[-1])


def share_difference(one: Share, two: Share) -> tuple[np.ndarray, np.ndarray]:
    value, half = one.value - two.value, half_width(spread_of(one.seeds - two.seeds, one.y - two.y))
    low, high = recovered(value, [(1.0, one.value, *one.bounds), (-1.0, two.value, *two.bounds)])
    return np.where(half > 0, value - half, low), np.where(half > 0, value + half, high)


def single(figures: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    """One model, one seed: over units only."""
    rows = []
    for kind, units in itertools.product(("normal", "skewed", *SHARES), UNITS):
        hits: list = []
        for size in batches(figures, units):
            shape = (size, 1, units)
            if isinstance(kind, float):
                y, truth = (rng.random(shape) < kind).astype(float), kind
                low, high = Share(y).bounds
            else:
                y, truth = (rng.normal(size=shape), 0.0) if kind == "normal" else (rng.exponential(size=shape), 1.0)
                half = half_width(spread_of(y.mean(axis=-1), y))
                low, high = y.mean(axis=(1, 2)) - half, y.mean(axis=(1, 2)) + half
            hits += list(holds(low, high, truth))
        rows.append({"kind": str(kind), "units": units, "coverage": float(np.mean(hits))})
    return rows


# ---- tables --------------------------------------------------------------------------------------------------------------


def tables(result: dict[str, Any]) -> dict[str, tuple[list[str], list[list[str]]]]:
    """Title -> (header, rows)."""
    return {
        "Seeds that differ as real runs do, through the report": report_table(result["report"]),
        "Groups, differences and trends: lowest and highest coverage over all numbers of units": grid_table(result["grid"]),
        "Width of the interval relative to one that knows the variances, 32 units": width_table(result["grid"]),
        "Shares of 0.005 to 0.98: lowest coverage over all shares and 1 to 10 seeds": shares_table(result["shares"]),
        "One model, over its units": single_table(result["single"]),
    }


def report_table(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    header = ["seeds", "groups", "differences", "groups, Satterthwaite", "differences, Satterthwaite", "groups, bootstrap",
              "differences, bootstrap", "standard error over true"]  # fmt: skip
    return header, [[str(row["seeds"]), *(f"{row[name]:.2f}" for name in METHODS), f"{row['error_ratio']:.2f}"] for row in rows]


def grid_table(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    table = []
    for kind, seeds in itertools.product(CONTRASTS, SEEDS):
        found = [[row["coverage"] for row in rows if (row["kind"], row["seeds"], row["between"]) == (kind, seeds, between)] for between in BETWEEN]
        table.append([f"{kind}, {seeds} seeds", *(_span(part) for part in found)])
    return ["variance between seeds", *(f"{between:g}" for between in BETWEEN)], table


def width_table(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    found = {(row["seeds"], row["between"]): f"{row['width']:.1f}" for row in rows if row["kind"] == "group" and row["units"] == 32}
    return (["variance between seeds", *(f"{between:g}" for between in BETWEEN)],
            [[f"{seeds} seeds", *(found[seeds, between] for between in BETWEEN)] for seeds in SEEDS])  # fmt: skip


def shares_table(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    table = []
    for kind, tokens, units in itertools.product(("group", "difference"), (1, TOKENS), UNITS):
        found = [[row["coverage"] for row in rows if (row["kind"], row["tokens"], row["units"], row["between"]) == (kind, tokens, units, between)]
                 for between in LATENT]  # fmt: skip
        name = f"{units} 0/1 units" if tokens == 1 else f"{units} units of {tokens} tokens"
        if any(found):
            table.append([f"{kind}, {name}", *(f"{min(part):.2f}" for part in found)])
    return ["latent variance between seeds", *(f"{between:g}" for between in LATENT)], table


def single_table(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    found = {(row["kind"], row["units"]): f"{row['coverage']:.2f}" for row in rows}
    names = {"normal": "normal", "skewed": "skewed (exponential)", **{str(share): f"0/1 units, share {share:g}" for share in SHARES}}
    return ["units", *map(str, UNITS)], [[name, *(found[kind, units] for units in UNITS)] for kind, name in names.items()]


def _span(values: Sequence[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}" if values else "-"


if __name__ == "__main__":
    sys.exit(main())
