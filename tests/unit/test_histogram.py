"""Oracles: np.histogram, the exact variance ratio over every token, closed forms, and a fine scan of the gain."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from ds_stability import histogram as hist
from ds_stability.histogram import EDGES, NUM_BINS, histogram, mean_weight, quadrature, solve_gain, token_weight

GAINS = np.linspace(0.0, 8.0, 9)
TOKENS = 5_000


def exact_ratio(surprisal, gain, mu, sigma, masses=None):
    """Var_w(s) / Var(s) from its definition, over all tokens."""
    masses = np.ones_like(surprisal) if masses is None else masses
    weights = masses * np.exp(-gain * np.clip((surprisal - mu) / sigma, -3.0, 3.0))
    mean, weighted_mean = (np.sum(w * surprisal) / np.sum(w) for w in (masses, weights))
    variance = np.sum(masses * (surprisal - mean) ** 2) / np.sum(masses)
    return np.sum(weights * (surprisal - weighted_mean) ** 2) / np.sum(weights) / variance


def quantiles(distribution, tokens=TOKENS):
    """A sample without sampling noise."""
    return distribution.ppf((np.arange(tokens) + 0.5) / tokens)


def mixture(*parts):
    return np.concatenate([quantiles(distribution, round(share * TOKENS)) for share, distribution in parts])


DISTRIBUTIONS = {
    "exponential 0.3": quantiles(stats.expon(scale=0.31)),
    "exponential 1": quantiles(stats.expon(scale=1.0)),
    "exponential 4": quantiles(stats.expon(scale=4.0)),
    "lognormal -1 1": quantiles(stats.lognorm(1.0, scale=np.exp(-1.0))),
    "lognormal 0 0.6": quantiles(stats.lognorm(0.6, scale=1.0)),
    "lognormal 0.5 0.8": quantiles(stats.lognorm(0.8, scale=np.exp(0.5))),
    "lognormal 1 0.5": quantiles(stats.lognorm(0.5, scale=np.e)),
    "pretrained": mixture((0.4, stats.loguniform(1e-6, 0.1)), (0.6, stats.gamma(1.5, scale=2.5))),
    "well fitted": mixture((0.8, stats.loguniform(1e-6, 0.1)), (0.2, stats.gamma(2.0, scale=2.0))),
    "fine-tuned": mixture((0.9, stats.expon(scale=0.02)), (0.1, stats.expon(scale=0.8))),
    "two modes": mixture((0.5, stats.expon(scale=0.2)), (0.5, stats.gamma(9.0, scale=0.8))),
}


def test_edges_increase_and_are_finer_near_zero():
    assert EDGES.shape == (NUM_BINS - 1,) and EDGES[-1] == 24.0
    assert (np.diff(np.concatenate([[0.0], EDGES])) > 0).all() and (np.diff(EDGES, n=2) > 0).all()


@settings(deadline=None, max_examples=100)
@given(st.lists(st.one_of(st.floats(0.0, 40.0), st.sampled_from(EDGES.tolist())), min_size=1, max_size=200))
def test_bins_agree_with_numpy(values):
    surprisal = np.array(values)
    outer = np.concatenate([[-np.inf], EDGES, [np.inf]])
    bins = histogram(surprisal)
    assert bins.shape == (NUM_BINS, 3) and bins.dtype == np.float64
    for column, weights in enumerate((None, surprisal, surprisal**2)):
        np.testing.assert_allclose(bins[:, column], np.histogram(surprisal, outer, weights=weights)[0], rtol=1e-12)


def test_tokens_outside_the_edges_fall_into_the_outer_bins():
    bins = histogram(np.array([-1e-7, 0.0, 24.0, 1e4]))
    assert bins[0, 0] == 2 and bins[-1, 0] == 2 and bins[-1, 1] == 1e4 + 24.0


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("shift", [0.0, 0.2])
def test_ratio_and_mean_weight_from_bins_are_exact_to_1e3(name, shift):
    surprisal = DISTRIBUTIONS[name]
    # The controller's mu and sigma are EMAs of earlier steps: never quite those of these tokens.
    mu, sigma = surprisal.mean() + shift * surprisal.std(), surprisal.std() * (1.0 + shift)
    assert surprisal.std() >= 0.3
    points, masses = quadrature(histogram(surprisal))
    for gain in GAINS:
        ratio = hist.variance_ratio(points, masses, gain, mu, sigma)
        assert ratio == pytest.approx(exact_ratio(surprisal, gain, mu, sigma), abs=1e-3), gain
        exact = token_weight(surprisal, gain, mu, sigma).mean()
        assert mean_weight(points, masses, gain, mu, sigma) == pytest.approx(exact, rel=0.02), gain


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(0.0, 30.0), min_size=1, max_size=60))
def test_quadrature_keeps_the_first_three_moments_of_the_histogram(values):
    surprisal = np.array(values)
    points, masses = quadrature(histogram(surprisal))
    assert np.sum(masses) == pytest.approx(len(values), rel=1e-12)
    assert np.sum(masses * points) == pytest.approx(np.sum(surprisal), rel=1e-9, abs=1e-9)
    assert np.sum(masses * points**2) == pytest.approx(np.sum(surprisal**2), rel=1e-6, abs=1e-6)


def test_token_weight_is_clipped_at_three_deviations():
    weights = token_weight(np.array([-50.0, 2.0 - 3 * 0.5, 2.0, 2.0 + 3 * 0.5, 60.0]), 0.7, 2.0, 0.5)
    np.testing.assert_allclose(weights, np.exp(-0.7 * np.array([-3.0, -3.0, 0.0, 3.0, 3.0])), rtol=1e-12)


@pytest.mark.parametrize("gain", [0.25, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_exponential_without_clipping_gives_the_closed_form(monkeypatch, gain, scale):
    monkeypatch.setattr(hist, "Z_MAX", np.inf)
    surprisal = np.linspace(0.0, 40.0 * scale, 200_001)
    masses = np.exp(-surprisal / scale)
    ratio = hist.variance_ratio(surprisal, masses, gain, scale, scale)
    assert ratio == pytest.approx(1.0 / (1.0 + gain) ** 2, rel=1e-3)


@pytest.mark.parametrize("gain", [0.5, 1.0, 3.0, 8.0])
def test_gaussian_without_clipping_gives_one_for_every_gain(monkeypatch, gain):
    monkeypatch.setattr(hist, "Z_MAX", np.inf)
    surprisal = np.linspace(-10.0, 30.0, 40_001)  # wide enough for a shift of gain * sigma
    masses = np.exp(-0.5 * (surprisal - 10.0) ** 2)
    assert hist.variance_ratio(surprisal, masses, gain, 10.0, 1.0) == pytest.approx(1.0, abs=1e-9)


def test_ratio_of_constant_surprisal_is_one():
    points, masses = quadrature(histogram(np.full(10, 3.0)))
    assert hist.variance_ratio(points, masses, 2.0, 3.0, 1e-6) == pytest.approx(1.0)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("target", [0.9, 0.75, 0.5, 0.25, 0.1])
def test_solved_gain_reaches_the_target_on_the_tokens_themselves(name, target):
    surprisal = DISTRIBUTIONS[name]
    mu, sigma = surprisal.mean(), surprisal.std()
    gain, saturated = solve_gain(*quadrature(histogram(surprisal)), target, 8.0, mu, sigma)
    assert 0.0 < gain <= 8.0
    if saturated:
        assert gain == 8.0 and exact_ratio(surprisal, 8.0, mu, sigma) > target - 1e-3
    else:
        assert exact_ratio(surprisal, gain, mu, sigma) == pytest.approx(target, abs=1.5e-3)


@pytest.mark.parametrize("target", [1.0, 1.5])
def test_target_one_needs_no_gain(target):
    points, masses = quadrature(histogram(DISTRIBUTIONS["exponential 1"]))
    assert solve_gain(points, masses, target, 8.0, 1.0, 1.0) == (0.0, False)


@pytest.mark.parametrize("gain_max", [2.0, 8.0])
def test_a_target_out_of_reach_saturates(gain_max):
    points, masses = quadrature(histogram(DISTRIBUTIONS["exponential 1"]))
    assert solve_gain(points, masses, 0.0, gain_max, 1.0, 1.0) == (gain_max, True)
    assert solve_gain(np.array([3.0]), np.array([5.0]), 0.5, gain_max, 3.0, 1e-6) == (gain_max, True)


def test_left_skewed_surprisal_is_solved_on_the_falling_branch():
    """The ratio rises to above 4 before it falls: a search from gain 0 that follows the slope would end at 0."""
    surprisal = np.concatenate([quantiles(stats.norm(2.0, 0.2), 500), quantiles(stats.norm(8.0, 0.5), 9500)])
    mu, sigma = surprisal.mean(), surprisal.std()
    assert stats.skew(surprisal) < -1 and exact_ratio(surprisal, 0.5, mu, sigma) > 1.5
    gain, saturated = solve_gain(*quadrature(histogram(surprisal)), 0.5, 8.0, mu, sigma)
    assert not saturated and exact_ratio(surprisal, gain, mu, sigma) == pytest.approx(0.5, abs=0.01)
    assert exact_ratio(surprisal, gain - 0.1, mu, sigma) > 0.52 and exact_ratio(surprisal, gain + 0.1, mu, sigma) < 0.48


# Falls through 0.3 at a gain near 0.65, rises above it again, falls for good near 3.45.
CROSSED_TWICE = np.array([2.2, 5.57, 10.05, 12.97]), np.array([0.00708, 0.23073, 0.00658, 0.02536])


@pytest.mark.parametrize("gain_max, falls, expected", [(8.0, 2, 3.45), (2.0, 1, 0.65)])
def test_the_falling_crossing_at_the_largest_gain_is_taken(gain_max, falls, expected):
    """Within gain_max 2 the ratio ends above the target: the rising crossing in between is not an answer."""
    points, masses = CROSSED_TWICE
    mu = np.average(points, weights=masses)
    sigma = np.sqrt(np.average((points - mu) ** 2, weights=masses))
    scan = np.arange(0.0, gain_max + 0.005, 0.01)
    ratios = np.array([exact_ratio(points, gain, mu, sigma, masses) for gain in scan])
    crossings = scan[np.flatnonzero((ratios[1:] <= 0.3) & (ratios[:-1] > 0.3))]
    assert len(crossings) == falls and (ratios[-1] > 0.3) == (falls == 1), "the example no longer shows what it should"
    gain, saturated = solve_gain(points, masses, 0.3, gain_max, mu, sigma)
    assert not saturated
    assert gain == pytest.approx(expected, abs=0.1) and gain == pytest.approx(crossings[-1], abs=0.011)
    assert exact_ratio(points, gain, mu, sigma, masses) == pytest.approx(0.3, abs=1e-9)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.floats(0.0, 20.0), st.floats(0.01, 1.0)), min_size=2, max_size=6),
    st.floats(0.02, 0.98),
    st.sampled_from([2.0, 8.0]),
)
def test_solved_gain_agrees_with_a_scan(atoms, target, gain_max):
    points, masses = np.array(atoms).T
    assume(np.ptp(points) > 1e-3)
    mu = np.average(points, weights=masses)
    sigma = np.sqrt(max(np.average((points - mu) ** 2, weights=masses), 1e-4))
    gain, saturated = solve_gain(points, masses, target, gain_max, mu, sigma)

    def ratio(at):
        return hist.variance_ratio(points, masses, at, mu, sigma)

    scan = np.linspace(0.0, gain_max, 129)  # the same grid: a dip between two of its points is nobody's crossing
    values = np.array([ratio(at) for at in scan])
    falls = [i for i in range(128) if values[i] > target >= values[i + 1]]
    assert saturated == (not falls)
    if saturated:
        assert gain == gain_max
    else:
        assert scan[falls[-1]] <= gain <= scan[falls[-1] + 1]
        assert ratio(gain) == pytest.approx(target, abs=1e-6)
