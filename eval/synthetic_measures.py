"""From the records of a SyntheticTask to figures; which is what, and over which units, is said at each."""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from .records import Measured, jackknife_units
from .synthetic_scores import kl

if TYPE_CHECKING:
    from pathlib import Path

    from .synthetic_scores import Record, SyntheticTask

DISTANCES = (("1", 1, 1), ("2", 2, 2), ("3", 3, 3), ("4_to_6", 4, 6), ("7_up", 7, 10**9))  # words from the noun
ATTRACTORS = (("0", 0, 0), ("1_up", 1, 10**9))  # nouns of the other number in between


def measure(task: "SyntheticTask", records: "list[Record]", scratch: "Path") -> list[Measured]:
    figures = _Figures(task, records)
    return [*figures.on_true_prefixes(), *figures.agreement(), *figures.of_samples(), *figures.on_training(),
            *figures.modes(), *_tables(task, figures, scratch)]  # fmt: skip


class _Figures:
    """Records by kind. What is not finite, or longer than the context, is left out; the note counts it."""

    def __init__(self, task: "SyntheticTask", records: "list[Record]") -> None:
        self.task = task
        self.records: dict[str, list[Any]] = {kind: [] for kind in task.items}
        self.notes: dict[str, str | None] = {}
        for record in records:
            self.records[record["kind"]].append(record)
        for kind, found in self.records.items():
            cut = sum(record.get("cut", False) for record in found)
            lost = sum(not record["finite"] for record in found) - cut
            notes = [f"{count} of {len(found)} left out: {why}"
                     for count, why in ((lost, "the model gave NaN or Inf"), (cut, "they do not fit into its context")) if count]  # fmt: skip
            self.notes[kind] = "; ".join(notes) or (None if found else "nothing to measure")
            self.records[kind] = [record for record in found if record["finite"]]

    def mean(self, metric: str, kind: str, total: Callable | str, count: Callable | str | float = 1.0, unit: str = "nats",
             **settings: Any) -> Measured:  # fmt: skip
        """Sum of `total` over sum of `count` over records, which are the units."""
        found = self.records[kind]
        totals, counts = ([_value(what, record) for record in found] for what in (total, count))
        return Measured(f"synthetic_{metric}", [record["id"] for record in found], totals, counts, unit=unit,
                        settings={"sample": kind, **settings}, note=self.notes[kind])  # fmt: skip

    def on_true_prefixes(self) -> list[Measured]:
        """Per token of sentences drawn from the language; units are sentences."""
        return [
            self.mean("cross_entropy", "truth", "cross_entropy", "tokens"),
            self.mean("forward_kl", "truth", "forward_kl", "tokens"),
            self.mean("entropy", "truth", "entropy", "tokens"),
            self.mean("entropy_gap", "truth", lambda r: r["entropy"] - r["true_entropy"], "tokens",
                      entropy_rate=self.task.language.entropy_rate()),
            self.mean("impossible_mass", "truth", "impossible_mass", "tokens", unit="share"),
        ]  # fmt: skip

    def agreement(self) -> list[Measured]:
        """Share of sites at which the right number has more mass than the wrong one (ties half), teacher-forced; and the
        right number's share of the two masses. Units are sentences."""

        def won(site: list[float]) -> float:
            return 0.5 * (1.0 + np.sign(site[2] - site[3]))

        def share(site: list[float]) -> float:
            return site[2] / (site[2] + site[3]) if site[2] + site[3] > 0 else 0.5

        figures = [self._sites("agreement_accuracy", won), self._sites("agreement_mass", share)]
        for place, bins in (("distance", DISTANCES), ("attractors", ATTRACTORS)):
            index = 0 if place == "distance" else 1
            for name, low, high in bins:
                figures.append(self._sites(f"agreement_accuracy_{place}_{name}", won, lambda site, i=index, a=low, b=high: a <= site[i] <= b))
        return figures

    def _sites(self, metric: str, score: Callable, chosen: Callable = lambda site: True) -> Measured:
        def sites(record: "Record") -> list[list[float]]:
            return [site for site in record["sites"] if chosen(site)]

        measured = self.mean(metric, "truth", lambda r: float(sum(map(score, sites(r)))), lambda r: float(len(sites(r))), "share", chance=0.5)
        if measured.value is None and measured.note is None:
            measured.note = "no such site in the sentences"
        return measured

    def of_samples(self) -> list[Measured]:
        """Of the model's own sentences, which are the units. Reverse KL: at the prefixes that the language allows.

        grammatical: share that are complete sentences of the language (one cut off at the cap is none). errors_per_token:
        impossible tokens per token up to and including the first one. reverse_kl: KL(p || (1 - eps) true + eps uniform);
        reverse_kl_possible: the same to the true distribution itself, of p over the possible tokens alone.
        """
        cap = {"max_new_tokens": self.task.max_new_tokens}
        epsilon = {"epsilon": self.task.settings.epsilon}
        return [
            self.mean("grammatical", "samples", lambda r: float(r["grammatical"]), unit="share", **cap),
            self.mean("errors_per_token", "samples", lambda r: float(r["wrong"]), "possible_tokens", "errors per token", **cap),
            self.mean("own_entropy", "samples", "entropy", "tokens"),
            self.mean("reverse_kl", "samples", "reverse_kl", "possible_tokens", **epsilon),
            self.mean("reverse_kl_possible", "samples", "reverse_kl_possible", "possible_tokens"),
            self.mean("own_impossible_mass", "samples", "impossible_mass", "possible_tokens", unit="share"),
            self.mean("sample_length", "samples", "tokens", unit="tokens", true=self.task.language.mean_length, **cap),
        ]

    def on_training(self) -> list[Measured]:
        """Divergences from the empirical distribution of the training sentences.

        forward_kl_corpus: E over training sentences of log empirical - log p of the whole sentence, per token; the
        quantity that maximum likelihood minimizes. *_prefixes: of the next token at prefixes seen min_count times or
        more, each weighted by how often it was seen; the reverse against counts with alpha added. Units: sentences, prefixes.
        """
        settings = self.task.settings
        where = {"min_count": settings.min_count, "max_prefixes": settings.max_prefixes}
        return [
            self.mean("forward_kl_corpus", "training", lambda r: r["empirical_logprob"] - r["logprob"], "tokens"),
            self.mean("forward_kl_prefixes", "prefixes", lambda r: r["count"] * r["forward_kl"], "count", **where),
            self.mean("reverse_kl_prefixes", "prefixes", lambda r: r["count"] * r["reverse_kl"], "count", **where, alpha=settings.alpha),
        ]

    def modes(self) -> list[Measured]:
        """Mass of the language's k most probable sentences under the model (exact: one unit, no spread), and the share of them
        that the samples hold (pooled, jackknife over batches of samples)."""
        k, found = self.task.settings.modes, self.records["modes"]
        true_logprobs = np.array([logprob for _, logprob in self.task.items["modes"]])
        settings = {"k": k, "true_mass": float(np.exp(true_logprobs).sum())}
        if found and self.notes["modes"] is None:
            mass = float(np.exp([record["logprob"] for record in found]).sum())
            measured = Measured("synthetic_mode_mass", ["all"], [mass], [1.0], settings=settings, note="exact: a sum over the modes")
        else:  # a sum with a summand missing is no sum
            measured = Measured.null("synthetic_mode_mass", self.notes["modes"] or "nothing to measure", settings=settings)
        return [measured, self._mode_coverage(k, true_logprobs)]

    def _mode_coverage(self, k: int, true_logprobs: np.ndarray) -> Measured:
        modes = {tuple(ids) for ids, _ in self.task.items["modes"]}
        batches: dict[str, set[tuple[int, ...]]] = {}
        for record in self.records["samples"]:
            batches.setdefault(record["unit"], set()).update({tuple(record["ids"])} & modes)
        sizes = Counter(record["unit"] for record in self.records["samples"])
        number = len(self.records["samples"])
        expected = float(-np.expm1(number * np.log1p(-np.exp(true_logprobs))).mean()) if k else 0.0
        settings = {"k": k, "samples": number, "expected_of_the_language": expected, "method": "pooled, jackknife over batches"}

        def share(left_out: str | None) -> float:
            return len(set().union(*(found for unit, found in batches.items() if unit != left_out))) / len(modes)

        return pooled("synthetic_mode_coverage", sizes, share, "share", settings, self.notes["samples"])


def _value(what: Callable | str | float, record: "Record") -> float:
    if isinstance(what, str):
        return record[what]
    return what(record) if callable(what) else what


def pooled(metric: str, sizes: Mapping[str, float], without: Callable[[str | None], float], unit: str, settings: dict[str, Any],
           note: str | None) -> Measured:  # fmt: skip
    """`without(None)`, the statistic of all batches together, with jackknife units from `without(batch)`; one batch has no spread.

    Args:
        sizes: how much of what the statistic is of is in each batch.
    """
    if not sizes:
        return Measured.null(metric, note or "nothing to measure", unit=unit, settings=settings)
    value = without(None)
    if len(sizes) == 1:
        return Measured(metric, ["all"], [value], [1.0], unit=unit, settings=settings, note=note)
    totals, counts = jackknife_units(value, [without(batch) for batch in sizes], list(sizes.values()))
    return Measured(metric, list(sizes), totals, counts, unit=unit, settings=settings, note=note)


def _tables(task: "SyntheticTask", figures: _Figures, scratch: "Path") -> list[Measured]:
    """KL between the model's own unigrams and bigrams and those of the training sentences, both ways.

    The model's are mean distributions over its samples (E p_t, by the token before), not counts of what was drawn. The
    side in the denominator has alpha added to each cell, in counts; bigrams are next tokens given the one before, weighted
    by how often that one stands there in the first of the two.
    """
    units = dict.fromkeys(record["unit"] for record in figures.records["samples"])
    batches = {unit: np.load(task.mass_path(scratch, unit)) for unit in units}
    settings = {"alpha": task.settings.alpha, "method": "pooled, jackknife over batches of samples"}
    sizes = {unit: table.sum() for unit, table in batches.items()}  # tokens
    counts, everything = task.training_bigrams, sum(batches.values())
    measured = []
    for name, reduce in (("unigram", lambda table: table.sum(axis=0, keepdims=True)), ("bigram", lambda table: table)):
        for direction in ("forward", "reverse"):

            def divergence(left_out: str | None, reduce: Callable = reduce, forward: bool = direction == "forward") -> float:
                # Differences of sums of probabilities: what rounding leaves below 0 is 0.
                model = reduce(everything if left_out is None else np.maximum(everything - batches[left_out], 0.0))
                data = np.zeros_like(model)
                empirical = reduce(counts)
                data[: empirical.shape[0], : empirical.shape[1]] = empirical
                first, second = (data, model) if forward else (model, data)
                return conditional_kl(first, second, task.settings.alpha)

            measured.append(pooled(f"synthetic_{direction}_kl_{name}", sizes, divergence, "nats", settings, figures.notes["samples"]))
    return measured


def conditional_kl(first: np.ndarray, second: np.ndarray, alpha: float) -> float:
    """Mean over rows, weighted by `first`'s totals, of KL(first's row || second's row with `alpha` added to each cell)."""
    totals = first.sum(axis=1)
    seen = totals > 0
    smooth = second[seen] + alpha
    rows = kl(first[seen] / totals[seen, None], smooth / smooth.sum(axis=1, keepdims=True))
    return float(totals[seen] @ rows / totals.sum())
