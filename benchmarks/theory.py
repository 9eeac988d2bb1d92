"""The claim on the synthetic language: does stabilized training minimize forward KL while entropy falls? Exact, in seconds.

    python benchmarks/theory.py                 measure, write docs/results/theory.json, fill in docs/theory.md
    python benchmarks/theory.py --render        fill in docs/theory.md from the results file only
    python benchmarks/theory.py --check         change nothing; exit code 1 if the page is out of date

No network is trained. A *tabular* model has free next-token probabilities in every context; its stationary point under the
feedback law of this project (token weights, clip, and gain solved for the level) is found by iteration in fp64.
"""

import argparse
import json
import math
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import common
import numpy as np

from ds_stability.data.synthetic import SyntheticLanguage
from ds_stability.histogram import EDGES, NUM_BINS, quadrature, solve_gain, token_weight
from ds_stability.run_dir import write_atomic, write_json_atomic

PAGE = common.REPOSITORY / "docs" / "theory.md"
RESULTS = common.REPOSITORY / "docs" / "results" / "theory.json"
LEVELS = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
EXPONENTS = (0.25, 0.5, 0.75, 0.9, 1.0, 1.25)
SENTENCES = (1_000, 10_000, 100_000)
GAIN_MAX = 8.0
STEPS, TOLERANCE = 4000, 1e-10
FLOOR = 1e-280  # a probability that has left the representable range stays there
_MARKED = re.compile(r"(<!-- generated: theory_(\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


@dataclass(frozen=True)
class Contexts:
    """Next-token distributions of contexts, flattened over the tokens that can follow.

    context: number of the context of each entry, [E], ascending; q: probability of the token there, [E]; share: how often
    the context occurs among tokens, [contexts].
    """

    context: np.ndarray
    q: np.ndarray
    share: np.ndarray

    @property
    def mass(self) -> np.ndarray:
        """Joint probability of context and token, [E]."""
        return self.share[self.context] * self.q

    def per_context(self, values: np.ndarray) -> np.ndarray:
        return np.bincount(self.context, weights=values, minlength=len(self.share))

    def normalized(self, log_p: np.ndarray) -> np.ndarray:
        """log p, [E], with each context's probabilities summing to 1."""
        peak = np.full(len(self.share), -np.inf)
        np.maximum.at(peak, self.context, log_p)
        shifted = log_p - peak[self.context]
        return np.maximum(shifted - np.log(self.per_context(np.exp(shifted)))[self.context], math.log(FLOOR))

    def mean(self, values: np.ndarray) -> float:
        """Mean over contexts of the sum over tokens of `values` [E]."""
        return float(self.share[self.context] @ values)


def language_contexts(language: SyntheticLanguage) -> tuple[Contexts, np.ndarray]:
    """(contexts, context of each state of the automaton or -1 for the end). States with one distribution are one context:
    they have the same solution."""
    shares: dict[bytes, float] = {}
    distributions: list[np.ndarray] = []
    context_of = np.full(len(language.stationary()), -1)
    for state, share in enumerate(language.stationary()):
        if share > 0:
            distribution = language._distribution(state)
            key = distribution.tobytes()
            if key not in shares:
                shares[key] = 0.0
                distributions.append(distribution[distribution > 0])
            context_of[state] = list(shares).index(key)
            shares[key] += share
    return _flatten(distributions, list(shares.values())), context_of


def sample_contexts(sentences: Sequence[Sequence[int]]) -> Contexts:
    """Every prefix of the sentences as a context of its own; prefixes with the same counts as one."""
    counts: dict[tuple[int, ...], Counter[int]] = {}
    for sentence in sentences:
        for position, token in enumerate(sentence):
            counts.setdefault(tuple(sentence[:position]), Counter())[token] += 1
    alike = Counter(tuple(sorted(counter.values())) for counter in counts.values())
    return _flatten([np.array(key) / sum(key) for key in alike], [sum(key) * number for key, number in alike.items()])


def _flatten(distributions: list[np.ndarray], shares: Sequence[float]) -> Contexts:
    context = np.repeat(np.arange(len(distributions)), [len(distribution) for distribution in distributions])
    share = np.array(shares, dtype=np.float64)
    return Contexts(context, np.concatenate(distributions), share / share.sum())


def law_weights(contexts: Contexts, log_p: np.ndarray, level: float) -> tuple[np.ndarray, dict[str, float]]:
    """log w [E] of the feedback law at this state of the model, and the gain, mu and sigma behind it.

    mu and sigma are the moments of surprisal over the data, and the gain is the law's own solution on its histogram.
    """
    surprisal, mass = -log_p, contexts.mass
    mu = float(mass @ surprisal)
    sigma = math.sqrt(max(float(mass @ (surprisal - mu) ** 2), 1e-12))
    bins = np.searchsorted(EDGES, surprisal, side="right")
    columns = (mass, mass * surprisal, mass * surprisal**2)
    points, masses = quadrature(np.stack([np.bincount(bins, weights=column, minlength=NUM_BINS) for column in columns], axis=1))
    gain, saturated = solve_gain(points, masses, 1.0 - level, GAIN_MAX, mu, sigma)
    log_w = np.log(token_weight(surprisal, gain, mu, sigma))
    return log_w, {"gain": gain, "mu": mu, "sigma": sigma, "saturated": float(saturated)}


def stationary_point(contexts: Contexts, log_weight: Callable[[np.ndarray], np.ndarray], damping: float = 0.1) -> tuple[np.ndarray, float]:
    """(log p [E], residual) of p = q w(p) / sum q w(p) in each context, by damped iteration from p = q.

    p moves a part of the way in log space, as small training steps would: a full step can jump past a solution. The
    residual is the largest total variation distance, over contexts, between p and q w(p) / sum q w(p).
    """
    log_q = np.log(contexts.q)
    log_p, residual = log_q.copy(), math.inf
    for _ in range(STEPS):
        aim = contexts.normalized(log_q + log_weight(log_p))
        residual = float(0.5 * contexts.per_context(np.abs(np.exp(aim) - np.exp(log_p))).max())
        if residual < TOLERANCE:
            break
        log_p = contexts.normalized((1.0 - damping) * log_p + damping * aim)
    return log_p, residual


def divergences(contexts: Contexts, log_p: np.ndarray) -> dict[str, float]:
    """Means over the contexts of the data, nats per token: KL both ways, entropies, and the mass of the likeliest token."""
    log_q, p = np.log(contexts.q), np.exp(log_p)
    largest = np.zeros(len(contexts.share))
    np.maximum.at(largest, contexts.context, p)
    return {
        "forward_kl": contexts.mean(contexts.q * (log_q - log_p)),
        "reverse_kl": contexts.mean(p * (log_p - log_q)),
        "entropy": contexts.mean(-p * log_p),
        "data_entropy": contexts.mean(-contexts.q * log_q),
        "top1_mass": float(contexts.share @ largest),
    }


def own_stream(language: SyntheticLanguage, contexts: Contexts, context_of: np.ndarray, log_p: np.ndarray) -> dict[str, float]:
    """What the model itself writes: exact entropy per token, tokens of a sentence, frequent tokens, mass of the 100 modes."""
    tokens, p = np.concatenate([np.flatnonzero(language._distribution(int(state))) for state in _first_states(contexts, context_of)]), np.exp(log_p)
    table = np.zeros((len(contexts.share), language.vocab_size))
    table[contexts.context, tokens] = p
    entropies = contexts.per_context(-p * log_p)
    visits = np.zeros(len(context_of))
    visits[0] = 1.0
    for state in _topological(language):
        for arc in language._arcs[state].values():
            visits[arc.target] += visits[state] * table[context_of[state], language._groups[arc.group]].sum()
    inside = context_of >= 0
    length = visits[inside].sum()
    unigram = np.bincount(context_of[inside], weights=visits[inside], minlength=len(table)) @ table / length
    true_unigram = language.unigram()
    order = np.argsort(-true_unigram, kind="stable")
    frequent = order[: np.searchsorted(np.cumsum(true_unigram[order]), 0.5) + 1]
    modes = [math.exp(sum(math.log(max(table[context_of[state], token], FLOOR)) for state, token in zip(language._states(ids), ids, strict=False)))
             for ids, _ in language.modes(100)]  # fmt: skip
    return {
        "own_entropy": float(visits[inside] @ entropies[context_of[inside]] / length),
        "mean_length": float(length),
        "high_frequency_share": float(unigram[frequent].sum()),
        "mode_mass": math.fsum(modes),
    }


def _first_states(contexts: Contexts, context_of: np.ndarray) -> list[int]:
    return [int(np.flatnonzero(context_of == index)[0]) for index in range(len(contexts.share))]


def _topological(language: SyntheticLanguage) -> list[int]:
    """States in an order in which each comes after all that lead to it."""
    waiting = Counter(arc.target for arcs in language._arcs for arc in arcs.values())
    order = [0]
    for state in order:
        for arc in language._arcs[state].values():
            waiting[arc.target] -= 1
            if waiting[arc.target] == 0:
                order.append(arc.target)
    return order


def at_level(contexts: Contexts, level: float) -> tuple[np.ndarray, dict[str, float]]:
    """The stationary point of the law at a level: log p, and its figures."""
    log_p, residual = stationary_point(contexts, lambda log_p: law_weights(contexts, log_p, level)[0])
    law = law_weights(contexts, log_p, level)[1]
    return log_p, {"level": level, "residual": residual, **law, "exponent": law["gain"] / law["sigma"], **divergences(contexts, log_p)}


def fixed_exponent(contexts: Contexts, exponent: float) -> dict[str, float]:
    """The stationary point for w = p^exponent (no clip, sigma held fixed), and its distance from q^(1 / (1 - exponent))."""
    log_p, residual = stationary_point(contexts, lambda log_p: exponent * log_p, damping=0.5)
    row: dict[str, Any] = {"exponent": exponent, "residual": residual, **divergences(contexts, log_p)}
    if log_p.min() <= math.log(FLOOR) + 1.0:  # it was still growing when the numbers ended
        row["forward_kl"] = None
    row["objective"] = contexts.mean(contexts.q * (1.0 - np.exp(exponent * log_p)) / exponent)
    row["objective_at_data"] = contexts.mean(contexts.q * (1.0 - contexts.q**exponent) / exponent)
    if exponent < 1.0:
        closed = np.exp(contexts.normalized(np.log(contexts.q) / (1.0 - exponent)))
        row["from_closed_form"] = float(np.abs(closed - np.exp(log_p)).max())
    return row


def measure() -> dict[str, Any]:
    started = time.time()
    language = SyntheticLanguage(0)
    contexts, context_of = language_contexts(language)
    levels = []
    for level in LEVELS:
        log_p, row = at_level(contexts, level)
        levels.append(row | own_stream(language, contexts, context_of, log_p))
    samples = []
    for number in SENTENCES:
        sentences = language.sample(n_sentences=number, seed=0)
        prefixes = sample_contexts(sentences)
        # What the language itself is unsure of at the same prefixes: what a model that had learned it would show.
        true = sum(language.state_entropies[state] for ids in sentences for state in language._states(ids)[:-1])
        true /= sum(map(len, sentences))
        for level in (0.0, 0.5, 0.9):
            samples.append({"sentences": number, "true_entropy": float(true), **at_level(prefixes, level)[1]})
    head = common.describe_measurement("theory", {"language": 0, "sample": 0}, {"gain_max": GAIN_MAX, "contexts": len(contexts.share)})
    return head | {"levels": levels, "exponents": [fixed_exponent(contexts, a) for a in EXPONENTS], "samples": samples,
                   "seconds": time.time() - started}  # fmt: skip


def _table(rows: list[dict[str, Any]], columns: dict[str, tuple[str, str]]) -> str:
    """Columns: title -> (key, format)."""
    cells = [["unbounded" if row.get(key) is None else format(row[key], digits) for key, digits in columns.values()] for row in rows]
    return common.markdown_table(list(columns), cells)


def levels_table(result: dict[str, Any]) -> str:
    sigma = result["levels"][0]["sigma"]
    rows = [row | {"predicted": row["gain"] / (sigma + row["gain"])} for row in result["levels"]]
    return _table(rows, {"level": ("level", "g"), "gain": ("gain", ".2f"), "sigma": ("sigma", ".2f"), "a = gain / sigma": ("exponent", ".2f"),
                         "gain / (sigma_0 + gain)": ("predicted", ".2f"), "forward KL": ("forward_kl", ".3f"), "reverse KL": ("reverse_kl", ".3f"),
                         "entropy": ("entropy", ".3f"), "top-1 mass": ("top1_mass", ".3f")})  # fmt: skip


def streams_table(result: dict[str, Any]) -> str:
    return _table(result["levels"], {"level": ("level", "g"), "entropy of its own stream": ("own_entropy", ".3f"),
                                     "high-frequency share": ("high_frequency_share", ".3f"), "mass of the language's 100 modes": ("mode_mass", ".4f"),
                                     "tokens of a sentence": ("mean_length", ".1f")})  # fmt: skip


def exponents_table(result: dict[str, Any]) -> str:
    rows = [row | {"from_closed_form": format(row["from_closed_form"], ".0e") if row["exponent"] < 1 else "-"} for row in result["exponents"]]
    return _table(rows, {"a": ("exponent", "g"), "forward KL": ("forward_kl", ".3f"), "entropy": ("entropy", ".3f"), "top-1 mass": ("top1_mass", ".3f"),
                         "objective": ("objective", ".4f"), "objective at p = q": ("objective_at_data", ".4f"),
                         "off the closed form by at most": ("from_closed_form", "s")})  # fmt: skip


def samples_table(result: dict[str, Any]) -> str:
    return _table(result["samples"], {"training sentences": ("sentences", ",d"), "level": ("level", "g"), "entropy of the language": ("true_entropy", ".3f"),
                                      "entropy of the model": ("entropy", ".3f"), "forward KL to the sample": ("forward_kl", ".3f")})  # fmt: skip


def provenance(result: dict[str, Any]) -> str:
    return (f"```bash\n{result['command']}\n```\n\nExact, fp64; random are only the training sentences of the last table. Largest "
            f"residual of a stationary point: {max(row['residual'] for row in [*result['levels'], *result['samples']]):.0e}.")  # fmt: skip


TABLES = {"levels": levels_table, "streams": streams_table, "exponents": exponents_table, "samples": samples_table, "provenance": provenance}


def filled(text: str, result: dict[str, Any]) -> str:
    """The page with every generated part made anew."""
    return _MARKED.sub(lambda match: f"{match[1]}\n{TABLES[match[2]](result)}\n\n{match[3]}", text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--render", action="store_true", help="fill in the page from the results file only")
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if the page is out of date")
    arguments = parser.parse_args()
    if not (arguments.render or arguments.check):
        write_json_atomic(RESULTS, measure())
    result, before = json.loads(RESULTS.read_text(encoding="utf-8")), PAGE.read_text(encoding="utf-8")
    after = filled(before, result)
    if arguments.check:
        if after != before:
            print(f"error: {PAGE.name} is out of date; run python benchmarks/theory.py --render", file=sys.stderr)
        return int(after != before)
    write_atomic(PAGE, after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
