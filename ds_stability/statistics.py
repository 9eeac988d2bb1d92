"""The packed vector of one optimizer step: what is in it, and what is derived from its global sums.

Every statistic is a sum, kept with its count until the last moment; only global sums are divided. The vector has
`VECTOR_SIZE` doubles (under 4 KB) and crosses the ranks in one all-reduce.
"""

import math
from collections.abc import Mapping

import numpy as np

from ds_stability.histogram import NUM_BINS

#: Sums over the supervised tokens of a micro-batch, in the order in which `loss.py` stacks them.
TOKEN_FIELDS = (
    "tokens",
    "surprisal",
    "surprisal_sq",
    "weight",
    "weighted_surprisal",
    "weighted_surprisal_sq",
    "weight_sq",
    "entropy",
    "top1_mass",
    "log_partition",
    "high_frequency_mass",
    "loss",
)
#: Sums over micro-batches and over this rank's share of the reduced gradient.
STEP_FIELDS = (
    "grad_sq",  # |reduced gradient|^2, loss scale divided out
    "grad_dot_mean",  # <reduced gradient, running mean>, where averaging keeps one
    "mean_sq",  # |running mean|^2
    "micro_grad_sq",  # sum over micro-batches of tokens * |gradient of the mean loss over its own tokens|^2
    "micro_batches",  # how many of them had a supervised token
    "coefficient",  # sum over micro-batches of (d loss / d token loss) * tokens, over world size
    "update_sq",  # |parameter update|^2, of the last measured step since it was last sent
    "parameter_sq",  # |parameters|^2 before these updates
    "stop_requests",  # ranks that were asked to stop after this step (preemption.py)
    "seconds",  # since the last step ended (collective.py, `Pace`)
)
FIELDS = TOKEN_FIELDS + STEP_FIELDS
INDEX = {name: index for index, name in enumerate(FIELDS)}
VECTOR_SIZE = len(FIELDS) + 3 * NUM_BINS


class StepSums:
    """Global sums of one optimizer step, by name, with the surprisal histogram `bins` [NUM_BINS, 3]."""

    def __init__(self, vector: np.ndarray):
        self.vector = np.asarray(vector, dtype=np.float64)
        self.bins = self.vector[len(FIELDS) :].reshape(NUM_BINS, 3)

    def __getitem__(self, name: str) -> float:
        return float(self.vector[INDEX[name]])

    @property
    def finite(self) -> bool:
        """False as soon as one number on one rank was not finite: a sum keeps NaN and Inf."""
        return bool(np.isfinite(self.vector).all())

    def per_token(self, name: str) -> float | None:
        return self[name] / self["tokens"] if self["tokens"] > 0 else None


def realized_weight(sums: StepSums, mean_weight: float) -> float | None:
    """Mean token weight of the step over the one that was predicted for it, by which the loss was divided; None without tokens."""
    return sums["weight"] / sums["tokens"] / mean_weight if sums["tokens"] > 0 else None


def variance_ratio(sums: StepSums) -> float | None:
    """Var_w(s) / Var(s) over the global batch (design section 3); None without tokens or without variance."""
    variance, weighted = variances(sums)
    return weighted / variance if variance is not None and variance > 0.0 else None


def variances(sums: StepSums) -> tuple[float | None, float | None]:
    """(plain, weighted) variance of surprisal in nats^2 over the global batch; (None, None) without tokens."""
    if sums["tokens"] <= 0 or sums["weight"] <= 0:
        return None, None
    mean, square = sums["surprisal"] / sums["tokens"], sums["surprisal_sq"] / sums["tokens"]
    w_mean = sums["weighted_surprisal"] / sums["weight"]
    w_square = sums["weighted_surprisal_sq"] / sums["weight"]
    return max(square - mean**2, 0.0), max(w_square - w_mean**2, 0.0)


def token_metrics(sums: StepSums, high_frequency_known: bool) -> dict[str, float | None]:
    """The token statistics of a step under their metric keys; None where undefined."""
    variance, weighted = variances(sums)
    effective = None
    if sums["weight_sq"] > 0:
        # Kish's effective sample size, as a share of the tokens: (sum w)^2 / (n sum w^2).
        effective = sums["weight"] ** 2 / (sums["tokens"] * sums["weight_sq"])
    return {
        "loss": sums.per_token("loss"),
        "cross_entropy": sums.per_token("surprisal"),
        "stability/surprisal": sums.per_token("surprisal"),
        "stability/surprisal_variance": variance,
        "stability/weighted_surprisal_variance": weighted,
        "stability/variance_ratio": variance_ratio(sums),
        "stability/effective_tokens": effective,
        "stability/entropy": sums.per_token("entropy"),
        "stability/top1_mass": sums.per_token("top1_mass"),
        "stability/log_partition": sums.per_token("log_partition"),
        "stability/high_frequency_mass": sums.per_token("high_frequency_mass") if high_frequency_known else None,
        "stability/tokens": sums["tokens"],
    }


def noise_scale_terms(sums: StepSums) -> tuple[float, float] | None:
    """Unbiased (trace of the per-token gradient covariance, squared norm of the true gradient) of one step.

    McCandlish et al. 2018 (arXiv 1812.06162, appendix A.1): with |G_b|^2 measured at b tokens (one micro-batch of one
    rank; token-weighted mean over them) and |G_B|^2 at B tokens (the global batch),
    |G|^2 = (B |G_B|^2 - b |G_b|^2) / (B - b) and tr(Sigma) = (|G_b|^2 - |G_B|^2) / (1/b - 1/B).
    Single-step values may be negative: average the two terms separately before dividing them.

    Returns None when there are fewer than two micro-batches or no tokens.
    """
    count, tokens = sums["micro_batches"], sums["tokens"]
    if count < 2 or tokens <= 0 or sums["coefficient"] <= 0:
        return None
    small_size, big_size = tokens / count, tokens
    small = sums["micro_grad_sq"] / tokens
    big = sums["grad_sq"] / sums["coefficient"] ** 2
    trace = (small - big) / (1.0 / small_size - 1.0 / big_size)
    gradient_sq = (big_size * big - small_size * small) / (big_size - small_size)
    return trace, gradient_sq


def gradient_metrics(sums: StepSums) -> dict[str, float | None]:
    """Norm of the reduced gradient (before clipping), its cosine with the running mean, and the update ratio."""
    norm = math.sqrt(sums["grad_sq"])
    mean_norm = math.sqrt(sums["mean_sq"])
    cosine = sums["grad_dot_mean"] / (norm * mean_norm) if norm > 0 and mean_norm > 0 else None
    ratio = math.sqrt(sums["update_sq"] / sums["parameter_sq"]) if sums["parameter_sq"] > 0 else None
    return {"grad_norm": norm, "stability/gradient_cosine": cosine, "stability/update_ratio": ratio}


def non_finite_fields(sums: StepSums) -> list[str]:
    """Names of the sums that are not finite, for the message of a skipped step."""
    names = [name for name, index in INDEX.items() if not math.isfinite(sums.vector[index])]
    return names + ([] if np.isfinite(sums.bins).all() else ["surprisal_histogram"])


def as_metrics(values: Mapping[str, float | None]) -> dict[str, float | None]:
    """The same mapping with every non-finite value replaced by None (JSON null)."""
    return {key: value if value is None or math.isfinite(value) else None for key, value in values.items()}
