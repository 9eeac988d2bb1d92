"""Oracles: the definitions over all tokens of a global batch at once, in fp64, however the tokens were split."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_stability.histogram import NUM_BINS, histogram
from ds_stability.statistics import (
    FIELDS,
    INDEX,
    STEP_FIELDS,
    TOKEN_FIELDS,
    VECTOR_SIZE,
    StepSums,
    as_metrics,
    gradient_metrics,
    noise_scale_terms,
    non_finite_fields,
    realized_weight,
    token_metrics,
    variance_ratio,
    variances,
)

MODEL_FIELDS = ("entropy", "top1_mass", "log_partition", "high_frequency_mass", "loss")


def make_tokens(rng, count):
    """Per-token values of a global batch, as columns by name."""
    surprisal = rng.gamma(1.5, 2.0, count)
    weight = np.exp(-rng.uniform(0.0, 3.0) * np.clip((surprisal - 3.0) / 2.5, -3, 3))
    values = {"tokens": np.ones(count), "surprisal": surprisal, "surprisal_sq": surprisal**2, "weight": weight}
    values |= {"weighted_surprisal": weight * surprisal, "weighted_surprisal_sq": weight * surprisal**2}
    values |= {"weight_sq": weight**2} | {name: rng.gamma(2.0, 1.0, count) for name in MODEL_FIELDS}
    return values


def pack(values, rows=slice(None)):
    vector = np.zeros(VECTOR_SIZE)
    for name in TOKEN_FIELDS:
        vector[INDEX[name]] = values[name][rows].sum()
    vector[len(FIELDS) :] = histogram(values["surprisal"][rows]).astype(float).ravel()
    return vector


def sums_of(**fields):
    vector = np.zeros(VECTOR_SIZE)
    for name, value in fields.items():
        vector[INDEX[name]] = value
    return StepSums(vector)


def expected_metrics(values):
    """token_metrics by definition, from the tokens themselves."""
    s, w = values["surprisal"], values["weight"]
    mean, weighted_mean = s.mean(), np.average(s, weights=w)
    variance, weighted = ((s - mean) ** 2).mean(), np.average((s - weighted_mean) ** 2, weights=w)
    expected = {f"stability/{name}": values[name].mean() for name in MODEL_FIELDS if name != "loss"}
    return expected | {
        "loss": values["loss"].mean(),
        "cross_entropy": mean,
        "stability/surprisal": mean,
        "stability/surprisal_variance": variance,
        "stability/weighted_surprisal_variance": weighted,
        "stability/variance_ratio": weighted / variance,
        "stability/effective_tokens": w.sum() ** 2 / (len(s) * (w**2).sum()),
        "stability/tokens": float(len(s)),
    }


def test_layout_is_unique_and_below_4_kb():
    assert len(set(FIELDS)) == len(FIELDS) == len(TOKEN_FIELDS) + len(STEP_FIELDS)
    assert len(FIELDS) + 3 * NUM_BINS == VECTOR_SIZE and VECTOR_SIZE * 8 <= 4096
    vector = np.arange(VECTOR_SIZE, dtype=float)
    sums = StepSums(vector)
    assert [sums[name] for name in FIELDS] == list(range(len(FIELDS)))
    assert sums.bins.shape == (NUM_BINS, 3) and sums.bins[2, 1] == len(FIELDS) + 7


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1), st.integers(2, 400), st.lists(st.floats(0.0, 1.0), max_size=12))
def test_metrics_do_not_depend_on_how_tokens_are_split(seed, count, cuts):
    """Ranks and micro-batches of any size, empty ones too, against the definition over the whole batch."""
    values = make_tokens(np.random.default_rng(seed), count)
    edges = [0, *sorted(round(cut * count) for cut in cuts), count]
    sums = StepSums(sum(pack(values, slice(a, b)) for a, b in zip(edges, edges[1:], strict=False)))
    metrics = token_metrics(sums, high_frequency_known=True)
    expected = expected_metrics(values)
    assert metrics.keys() == expected.keys()
    for key, value in expected.items():
        assert metrics[key] == pytest.approx(value, rel=1e-9, abs=1e-9), key
    assert variance_ratio(sums) == metrics["stability/variance_ratio"]
    assert realized_weight(sums, 0.5) == pytest.approx(values["weight"].mean() / 0.5)
    np.testing.assert_allclose(sums.bins, histogram(values["surprisal"]), rtol=1e-9, atol=1e-9)


def test_high_frequency_mass_is_none_until_the_set_is_known():
    sums = StepSums(pack(make_tokens(np.random.default_rng(0), 10)))
    assert token_metrics(sums, high_frequency_known=False)["stability/high_frequency_mass"] is None


def test_weights_of_one_give_ratio_one_and_all_tokens_effective():
    values = make_tokens(np.random.default_rng(1), 300)
    s, ones = values["surprisal"], np.ones(300)
    values |= {"weight": ones, "weight_sq": ones, "weighted_surprisal": s, "weighted_surprisal_sq": s**2}
    metrics = token_metrics(StepSums(pack(values)), True)
    assert metrics["stability/variance_ratio"] == 1.0
    assert metrics["stability/effective_tokens"] == pytest.approx(1.0)


def test_one_token_has_no_ratio_and_no_negative_variance():
    values = {name: np.array([0.1]) for name in TOKEN_FIELDS} | {"tokens": np.ones(1), "weight": np.array([0.3])}
    values |= {"surprisal_sq": values["surprisal"] ** 2, "weighted_surprisal": 0.3 * values["surprisal"]}
    values["weighted_surprisal_sq"] = 0.3 * values["surprisal"] ** 2
    sums = StepSums(pack(values))
    assert variances(sums) == (pytest.approx(0.0, abs=1e-15), pytest.approx(0.0, abs=1e-15))
    assert min(variances(sums)) >= 0.0


def test_without_tokens_everything_is_none():
    sums = StepSums(np.zeros(VECTOR_SIZE))
    metrics = token_metrics(sums, high_frequency_known=True)
    assert metrics.pop("stability/tokens") == 0
    assert set(metrics.values()) == {None}
    assert realized_weight(sums, 1.0) is None and variance_ratio(sums) is None and noise_scale_terms(sums) is None
    assert variances(sums) == (None, None) and sums.per_token("entropy") is None and sums.finite
    gradient = gradient_metrics(sums)
    assert gradient["stability/gradient_cosine"] is None and gradient["stability/update_ratio"] is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("index", [*range(len(FIELDS)), len(FIELDS), VECTOR_SIZE - 1])
def test_one_bad_number_anywhere_is_seen_and_named(bad, index):
    vector = pack(make_tokens(np.random.default_rng(2), 50))
    assert StepSums(vector).finite and non_finite_fields(StepSums(vector)) == []
    vector[index] = bad
    sums = StepSums(vector + pack(make_tokens(np.random.default_rng(3), 50)))  # the other rank is fine
    assert not sums.finite
    assert non_finite_fields(sums) == [FIELDS[index] if index < len(FIELDS) else "surprisal_histogram"]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", [name for name in FIELDS if name not in ("tokens", "micro_batches")])  # those are counts
def test_metrics_of_a_skipped_step_are_computed_and_become_null(bad, name):
    """A skipped step has a metrics line: nothing may raise on its sums, and nothing in it may be non-finite."""
    vector = pack(make_tokens(np.random.default_rng(4), 50))
    vector[len(TOKEN_FIELDS) : len(FIELDS)] = 2.0
    vector[INDEX[name]] = bad
    sums = StepSums(vector)
    noise_scale_terms(sums)
    metrics = as_metrics(token_metrics(sums, True) | gradient_metrics(sums))
    assert all(value is None or math.isfinite(value) for value in metrics.values())


def test_opposite_infinities_of_two_ranks_are_seen():
    vector = np.zeros(VECTOR_SIZE)
    vector[0] = np.inf
    other = np.zeros(VECTOR_SIZE)
    other[0] = -np.inf
    with np.errstate(invalid="ignore"):
        assert not StepSums(vector + other).finite


def test_as_metrics_keeps_finite_values_and_none():
    given_values = {"a": 1, "b": None, "c": math.nan, "d": math.inf, "e": -math.inf, "f": -2.5, "g": 0.0}
    assert as_metrics(given_values) == {"a": 1, "b": None, "c": None, "d": None, "e": None, "f": -2.5, "g": 0.0}


def test_gradient_metrics_are_norm_cosine_and_update_ratio():
    rng = np.random.default_rng(5)
    gradient, mean, update, parameter = rng.normal(size=(4, 1000)) * np.array([[2.0], [0.3], [1e-3], [5.0]])
    mean += 0.1 * gradient
    parts = np.array_split(np.arange(1000), 3)  # three ranks' partitions
    fields = {"grad_sq": (gradient, gradient), "grad_dot_mean": (gradient, mean), "mean_sq": (mean, mean)}
    fields |= {"update_sq": (update, update), "parameter_sq": (parameter, parameter)}
    metrics = gradient_metrics(sums_of(**{key: sum((a * b)[p].sum() for p in parts) for key, (a, b) in fields.items()}))
    norm = np.linalg.norm
    assert metrics["grad_norm"] == pytest.approx(norm(gradient))
    assert metrics["stability/gradient_cosine"] == pytest.approx(gradient @ mean / norm(gradient) / norm(mean))
    assert metrics["stability/update_ratio"] == pytest.approx(norm(update) / norm(parameter))


@pytest.mark.parametrize("sizes, scale", [([16] * 4, 1.0), ([4] * 8, 0.125), ([64] * 2, 512.0), ([2, 2, 30, 30], 1.0)])
def test_noise_scale_terms_recover_a_known_covariance(sizes, scale):
    """Per-token gradients g + noise with tr(Sigma) = 9 and |g|^2 = 4: both terms are unbiased over many steps."""
    rng = np.random.default_rng(6)
    dimension, steps = 20, 4000
    deviations = np.sqrt(9.0 * np.arange(1, dimension + 1) / np.arange(1, dimension + 1).sum())
    truth = np.full(dimension, math.sqrt(4.0 / dimension))
    terms = []
    for _ in range(steps):
        tokens = np.array(sizes)[:, None]
        means = truth + rng.normal(size=(len(sizes), dimension)) * deviations / np.sqrt(tokens)
        reduced = scale * (tokens * means).sum(0)  # whatever the trainer divides by, its sum over tokens is `coefficient`
        terms.append(noise_scale_terms(sums_of(
            tokens=sum(sizes), micro_batches=len(sizes), micro_grad_sq=(tokens * means**2).sum(),
            grad_sq=(reduced**2).sum(), coefficient=scale * sum(sizes),
        )))  # fmt: skip
    trace, gradient_sq = np.mean(terms, axis=0)
    errors = np.std(terms, axis=0) / math.sqrt(steps)
    assert abs(trace - 9.0) < 4 * errors[0] and errors[0] < 0.15
    assert abs(gradient_sq - 4.0) < 4 * errors[1] and errors[1] < 0.15


@pytest.mark.parametrize("field", ["micro_batches", "tokens", "coefficient"])
def test_noise_scale_needs_two_micro_batches_tokens_and_a_coefficient(field):
    fields = {"micro_batches": 2.0, "tokens": 8.0, "coefficient": 1.0, "micro_grad_sq": 3.0, "grad_sq": 1.0}
    assert noise_scale_terms(sums_of(**fields)) is not None
    assert noise_scale_terms(sums_of(**{**fields, field: 1.0 if field == "micro_batches" else 0.0})) is None
