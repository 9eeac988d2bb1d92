"""When do generated texts leave the band of the reference text, and what does that say? Pure functions; no torch.

The bands. The reference text is cut into pieces as long as the probe's texts, each ended by its first end token. R = 2,000
times, as many pieces as the probe has texts are drawn with replacement, and the statistic is taken over them; the band runs
from the .5 % to the 99.5 % quantile (percentile bootstrap, Efron and Tibshirani 1993), widened by `share_tolerance` on both
sides. So it holds what natural text of the same size would show. Text alone has no entropy: that band is (1 -+
`entropy_tolerance`) times the model's own cross-entropy on the pieces, at the moment of the check. A calibrated model
generates with the entropy that it has on text (E[H] = E[s]); a collapsed one is surer of itself than it may be.

The causes, from samples at temperature 1 (`decide`):

    cause               all samples   end tokens      end tokens        besides
                        hit the cap   in the inputs   among the labels
    eos_masked          yes           some            none
    no_document_ends    yes           none            none              the reference text has ends, 10 or more were due
    padding_supervised  no            -               > 3 times due     samples end more often than pieces of the text do
    collapse            -             -               -                 entropy below its band, or repetition or
                                                                        high-frequency share above (these two do not count
                                                                        where eos_masked or no_document_ends explains them)
    spread              -             -               -                 entropy above, or high-frequency share below
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from ds_stability.alarm_config import AlarmConfig
from ds_stability.text_metrics import high_frequency_share, seq_rep_n

CAUSES = ("eos_masked", "no_document_ends", "padding_supervised", "collapse", "spread")
RESAMPLES, QUANTILE = 2000, 0.005
DUE = 10.0  # end tokens that must have been due before their absence says something: exp(-10) by chance
EXCESS = 3.0  # times as many end tokens among the labels as in the reference text
MIN_PIECES = 4


@dataclass(frozen=True)
class Band:
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.low:.3g} to {self.high:.3g}"


@dataclass(frozen=True)
class Bands:
    """What groups of `texts` pieces of natural text show. `end_rate`: pieces that end; `end_share`: end tokens a token."""

    repetition: Band | None
    high_frequency: Band | None
    end_rate: Band
    end_share: float
    texts: int


@dataclass(frozen=True)
class Reading:
    """One check. None where a number is not known (or not finite): it then speaks neither for nor against.

    Of the samples: entropy (nats), repetition (seq-rep-4), high_frequency (share), end_rate. `cross_entropy`: of the model on
    the reference text, nats. Counts so far, over all ranks: end tokens and tokens among the inputs, and among the labels.
    """

    entropy: float | None
    cross_entropy: float | None
    repetition: float | None
    high_frequency: float | None
    end_rate: float | None
    end_inputs: int
    inputs: int
    end_labels: int
    labels: int


def reference_bands(pieces: Sequence[tuple[Sequence[int], bool]], texts: int, high_frequency_ids: Collection[int] | None,
                    special_ids: Collection[int], tolerance: float, seed: int = 0) -> Bands:  # fmt: skip
    """From pieces (token ids without the end token, whether it ended) of the reference text; `texts` of the probe.

    Raises:
        ValueError: fewer than MIN_PIECES pieces.
    """
    if len(pieces) < MIN_PIECES:
        raise ValueError(f"{len(pieces)} pieces of reference text, at least {MIN_PIECES} are needed")
    chosen_RK = np.random.default_rng(seed).integers(len(pieces), size=(RESAMPLES, texts))
    repeated = [seq_rep_n(ids, 4) for ids, _ in pieces]
    ended = np.array([float(end) for _, end in pieces])
    tokens = sum(len(ids) for ids, _ in pieces) + int(ended.sum())
    frequent = None
    if high_frequency_ids is not None:
        shares = [high_frequency_share([ids], high_frequency_ids, special_ids) for ids, _ in pieces]
        frequent = _band([s.total for s in shares], [s.count for s in shares], chosen_RK, tolerance)
    return Bands(
        repetition=_band([r or 0.0 for r in repeated], [r is not None for r in repeated], chosen_RK, tolerance),
        high_frequency=frequent,
        end_rate=_band(ended, np.ones(len(pieces)), chosen_RK, 0.0),
        end_share=float(ended.sum()) / max(tokens, 1),
        texts=texts,
    )


def _band(totals, counts, chosen_RK: np.ndarray, tolerance: float) -> Band | None:
    """Quantiles of sum / count over the groups; None if no group has a count."""
    totals, counts = np.asarray(totals, dtype=float)[chosen_RK].sum(1), np.asarray(counts, dtype=float)[chosen_RK].sum(1)
    means = totals[counts > 0] / counts[counts > 0]
    if not len(means):
        return None
    low, high = np.quantile(means, [QUANTILE, 1.0 - QUANTILE])
    return Band(float(low) - tolerance, float(high) + tolerance)


def decide(reading: Reading, bands: Bands, config: AlarmConfig) -> dict[str, str | None]:
    """For each cause a sentence if it is there, "" if it is not, None if that cannot be told."""
    sentences = _label_causes(reading, bands)
    run_on = bool(sentences["eos_masked"] or sentences["no_document_ends"])
    entropy, center = _known(reading.entropy), _known(reading.cross_entropy)
    band = None if center is None else Band((1 - config.entropy_tolerance) * center, (1 + config.entropy_tolerance) * center)
    around = f"(around the model's cross-entropy on the reference text, {center:.3g} nats)" if center is not None else ""
    parts = {
        "collapse": [
            _outside("generation entropy", entropy, band, -1, " nats", around),
            "" if run_on else _outside("seq-rep-4 of the samples", reading.repetition, bands.repetition, 1),
            "" if run_on else _outside("high-frequency share of the samples", reading.high_frequency, bands.high_frequency, 1),
        ],
        "spread": [
            _outside("generation entropy", entropy, band, 1, " nats", around),
            _outside("high-frequency share of the samples", reading.high_frequency, bands.high_frequency, -1),
        ],
    }
    meanings = {"collapse": "collapse: the model puts its mass on fewer texts than there are",
                "spread": "spread: the model's texts are less certain than the reference text"}  # fmt: skip
    for cause, found in parts.items():
        said = [part for part in found if part]
        unknown = all(part is None for part in found)
        sentences[cause] = f"{meanings[cause]}; {'; '.join(said)}" if said else None if unknown else ""
    return sentences


def _label_causes(reading: Reading, bands: Bands) -> dict[str, str | None]:
    """What the end tokens say: mistakes of masking and packing."""
    rate = _known(reading.end_rate)
    if rate is None:
        return {"eos_masked": None, "no_document_ends": None, "padding_supervised": None}
    capped, due = rate == 0.0, reading.inputs * bands.end_share
    all_capped = f"all {bands.texts} samples ran into max_new_tokens"
    masked = missing = padded = ""
    if capped and reading.end_inputs > 0 and reading.end_labels == 0 and reading.labels > 0:
        masked = (f"end token masked: {all_capped}, and none of the {reading.end_inputs} end tokens trained on was a label; the model "
                  "cannot learn to stop: check the label mask (padding with the end token hides it too)")  # fmt: skip
    if capped and reading.end_inputs == 0 and due >= DUE:
        missing = (f"documents without ends: {all_capped}, and the {reading.inputs} tokens trained on hold no end token where the reference "
                   f"text has {due:.0f} in as many; check how documents are joined")  # fmt: skip
    expected = reading.labels * bands.end_share
    if rate > bands.end_rate.high and reading.end_labels > EXCESS * max(expected, DUE):
        padded = (f"padding supervised: {rate:.0%} of the samples end, against at most {bands.end_rate.high:.0%} of the reference text's pieces, and "
                  f"{reading.end_labels / reading.labels:.1%} of the labels are end tokens, against {bands.end_share:.2%} of its tokens; check that "
                  "padding is masked")  # fmt: skip
    return {"eos_masked": masked, "no_document_ends": missing, "padding_supervised": padded}


def _outside(name: str, value: float | None, band: Band | None, side: int, unit: str = "", remark: str = "") -> str | None:
    """The sentence's part if `value` is above (side 1) or below (-1) the band, "" if not, None where it is not known."""
    value = _known(value)
    if value is None or band is None:
        return None
    if not (value > band.high if side > 0 else value < band.low):
        return ""
    where = "above" if side > 0 else "below"
    return f"{name} {value:.3g}{unit} is {where} the band {band}{f' {remark}' if remark else ''}"


def _known(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


class Watch:
    """Says each cause once: after `patience` checks in a row that show it, and again only after as many that do not.

    Attributes:
        active: the causes that were said and have not gone since.
    """

    def __init__(self, patience: int):
        self.patience, self.active = patience, set()
        self._runs = dict.fromkeys(CAUSES, 0)  # checks in a row against the present state

    def update(self, sentences: dict[str, str | None]) -> list[str]:
        """The causes that begin with this check. An unknown one (None) changes nothing."""
        begun = []
        for cause in CAUSES:
            sentence = sentences[cause]
            if sentence is None:
                continue
            changes = bool(sentence) != (cause in self.active)
            self._runs[cause] = self._runs[cause] + 1 if changes else 0
            if self._runs[cause] >= self.patience:
                self._runs[cause] = 0
                self.active ^= {cause}
                begun += [cause] if sentence else []
        return begun

    def state_dict(self) -> dict:
        return {"active": sorted(self.active), "runs": dict(self._runs)}

    def load_state_dict(self, state: dict) -> None:
        self.active, self._runs = set(state["active"]), dict(state["runs"])
