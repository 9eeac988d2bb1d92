"""Choice of the next token: against transformers' warpers, an exact enumeration, and what a text's key must fix."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from ds_stability.errors import UserError
from ds_stability.eval import decoding as decoding_module
from ds_stability.eval.decoding import (
    DEFAULT_DECODINGS,
    Decoding,
    key_seed,
    next_tokens,
    prefix_sums,
    sample_key,
    token_scores,
    uniform_numbers,
)

FIRST_NUMBERS = [0.20827503665041514, 0.07282599863154882, 0.3333552317747801, 0.7594978399233218]
SAMPLED = [Decoding("t", "sample", temperature=t, top_p=p, top_k=k)
           for t in (1.0, 0.7, 1.6) for p in (1.0, 0.95, 0.3) for k in (0, 1, 5, 1000)]  # fmt: skip


def logits(rows: int, vocabulary: int, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


def warped_probabilities(scores: torch.Tensor, decoding: Decoding) -> torch.Tensor:
    """What transformers' own generate would draw from."""
    scores = scores.double()
    if decoding.temperature != 1:
        scores = TemperatureLogitsWarper(decoding.temperature)(None, scores)
    if decoding.top_k:
        scores = TopKLogitsWarper(decoding.top_k)(None, scores)
    if decoding.top_p < 1:
        scores = TopPLogitsWarper(decoding.top_p)(None, scores)
    return scores.softmax(dim=-1)


@pytest.mark.parametrize("decoding", SAMPLED, ids=lambda d: f"T{d.temperature}-p{d.top_p}-k{d.top_k}")
def test_sampling_inverts_the_distribution_of_transformers_warpers(decoding):
    """Exact: numbers on a fine grid give each token exactly its share of the grid, one point more or less."""
    points = 4000
    grid = (torch.arange(points, dtype=torch.float64) + 0.5) / points
    for seed in range(3):
        scores = logits(1, 37, seed)
        expected = warped_probabilities(scores, decoding)[0]
        tokens, _, _, finite = next_tokens(scores.expand(points, -1), decoding, grid)
        counts = torch.bincount(tokens, minlength=37)
        assert finite.all()
        assert (counts[expected == 0] == 0).all()
        assert (counts - points * expected).abs().max() <= 1.0 + 1e-6
        assert (tokens.diff() >= 0).all()  # in the order of the vocabulary


@pytest.mark.parametrize("name", ["sample", "top_p_95", "top_k_40"])
def test_samples_of_keys_fit_the_distribution(name):
    decoding, draws = DEFAULT_DECODINGS[name], 20000
    scores = logits(1, 60, seed=5)
    expected = warped_probabilities(scores, decoding)[0].numpy()
    numbers = torch.tensor([uniform_numbers(sample_key(0, name, i, 0), 1)[0] for i in range(draws)])
    counts = torch.bincount(next_tokens(scores.expand(draws, -1), decoding, numbers)[0], minlength=60).numpy()
    common = draws * expected >= 5
    assert counts[expected == 0].sum() == 0
    observed = np.append(counts[common], counts[~common].sum())
    wanted = draws * np.append(expected[common], expected[~common].sum())
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    assert stats.chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue > 1e-4


def test_statistics_are_of_the_untruncated_distribution():
    scores = logits(8, 50)
    probabilities = scores.double().softmax(-1)
    entropy = -(probabilities * probabilities.log()).sum(-1)
    for decoding in (DEFAULT_DECODINGS["greedy"], DEFAULT_DECODINGS["top_k_40"], DEFAULT_DECODINGS["top_p_95"]):
        uniforms = torch.linspace(0, 0.99, 8, dtype=torch.float64)
        tokens, logprob, entropy_B, _ = next_tokens(scores, decoding, uniforms)
        torch.testing.assert_close(entropy_B, entropy, rtol=1e-13, atol=0)
        torch.testing.assert_close(logprob, probabilities.gather(1, tokens[:, None]).squeeze(1).log(), rtol=1e-12, atol=1e-13)
        for given_scores, own in zip(token_scores(scores, tokens), (logprob, entropy_B), strict=False):
            assert torch.equal(given_scores, own)
    assert torch.equal(next_tokens(scores, DEFAULT_DECODINGS["greedy"])[0], scores.argmax(-1))


def test_entropy_of_a_collapsed_model_keeps_its_small_numbers():
    scores = torch.zeros(1, 1000)
    scores[0, 3] = 25.0
    q = 999 * math.exp(-25.0)
    _, _, entropy, _ = next_tokens(scores, DEFAULT_DECODINGS["greedy"])
    assert entropy.item() == pytest.approx(q * 26.0, rel=1e-3, abs=0)


@pytest.mark.parametrize("decoding", [*SAMPLED, DEFAULT_DECODINGS["greedy"]], ids=str)
def test_padded_vocabulary_is_never_drawn_and_adds_nothing(decoding):
    scores = torch.cat([torch.full((6, 3), -math.inf), logits(6, 10), torch.full((6, 4), -math.inf)], dim=1)
    uniforms = torch.tensor([0.0, 1e-300, 0.3, 0.7, 0.999999, 1 - 2**-53], dtype=torch.float64)
    tokens, logprob, entropy, finite = next_tokens(scores, decoding, uniforms)
    assert finite.all() and ((tokens >= 3) & (tokens < 13)).all()
    inner = next_tokens(scores[:, 3:13], decoding, uniforms)
    assert torch.equal(tokens - 3, inner[0])
    torch.testing.assert_close((logprob, entropy), inner[1:3], rtol=1e-12, atol=1e-14)


def test_largest_number_gives_the_last_token_that_has_probability():
    """1 - 2^-53 times a sum may round to the sum itself."""
    for size in range(1, 200):
        scores = torch.cat([torch.zeros(1, size), torch.full((1, 5), -math.inf)], dim=1)
        tokens, *_ = next_tokens(scores, DEFAULT_DECODINGS["sample"], torch.tensor([1 - 2**-53], dtype=torch.float64))
        assert tokens.item() == size - 1


@pytest.mark.parametrize("name", ["greedy", "sample", "top_p_95", "top_k_40"])
def test_rows_that_are_not_finite_leave_the_others_untouched(name):
    scores = logits(6, 50)
    uniforms = torch.linspace(0.1, 0.9, 6, dtype=torch.float64)
    whole = next_tokens(scores, DEFAULT_DECODINGS[name], uniforms)
    broken = scores.clone()
    broken[1, 7], broken[2], broken[4, 3] = math.nan, -math.inf, math.inf
    tokens, logprob, entropy, finite = next_tokens(broken, DEFAULT_DECODINGS[name], uniforms)
    assert finite.tolist() == [True, False, False, True, False, True]
    for ours, expected in zip((tokens, logprob, entropy), whole, strict=False):
        assert torch.equal(ours[finite], expected[finite])
        assert (ours[~finite] == 0).all()


def test_ties_with_the_last_kept_token_are_kept():
    scores = torch.tensor([[2.0, 1.0, 1.0, 0.0, -5.0]])
    grid = ((torch.arange(1000, dtype=torch.float64) + 0.5) / 1000)
    for decoding in (Decoding("k", "sample", top_k=2), Decoding("p", "sample", top_p=0.7)):
        tokens = next_tokens(scores.expand(1000, -1), decoding, grid)[0]
        assert set(tokens.tolist()) == {0, 1, 2}


@pytest.mark.parametrize("name", ["greedy", "sample", "top_p_95", "top_k_40"])
def test_chunks_of_rows_change_no_bit(name, monkeypatch):
    scores, uniforms = logits(9, 64), torch.rand(9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    whole = next_tokens(scores, DEFAULT_DECODINGS[name], uniforms)
    monkeypatch.setattr(decoding_module, "CPU_ELEMENTS", 2 * 64)
    for ours, expected in zip(next_tokens(scores, DEFAULT_DECODINGS[name], uniforms), whole, strict=True):
        assert torch.equal(ours, expected)


def drawn_over_everything(scores: torch.Tensor, decoding: Decoding, uniforms: torch.Tensor) -> torch.Tensor:
    """By sorting and summing the whole vocabulary, as an accelerator does it."""
    shifted = decoding_module._shifted(scores, *decoding_module._peaks(scores))
    exponentials = shifted.exp()
    return decoding_module._draw(decoding_module._truncated(shifted, exponentials, decoding), uniforms.unsqueeze(-1)).squeeze(-1)


@pytest.mark.parametrize("vocabulary", [37, 1024, 5000, 49152])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_truncated_draws_are_those_over_the_whole_vocabulary(vocabulary, dtype):
    """bf16: hundreds of ties at every border. Sharp, usual and flat logits; a padded end."""
    rows = 24
    for seed, scale in enumerate((8.0, 1.0, 0.02)):
        scores = (scale * logits(rows, vocabulary, seed)).to(dtype)
        scores[:, -5:] = -math.inf
        uniforms = torch.rand(rows, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        uniforms[:3] = torch.tensor([0.0, 0.5, 1 - 2**-53])
        for decoding in (*(d for d in SAMPLED if d.top_k or d.top_p < 1), Decoding("n", "sample", top_p=0.999999)):
            if vocabulary < 49152 or decoding in (SAMPLED[4], SAMPLED[2], SAMPLED[18]):  # sorting it takes long
                ours = next_tokens(scores, decoding, uniforms)[0]
                assert torch.equal(ours, drawn_over_everything(scores, decoding, uniforms)), (decoding, scale)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([0.0, -0.5, -1.0, -1.0000001, -3.0, -40.0, -800.0, -math.inf]), min_size=1, max_size=30),
       st.integers(0, 40), st.sampled_from([0.01, 0.5, 0.9, 1.0]), st.sampled_from([0.1, 1.0, 3.0]),
       st.floats(0, 1, exclude_max=True))  # fmt: skip
def test_truncated_draws_of_tied_and_missing_tokens(values, top_k, top_p, temperature, uniform):
    scores, number = torch.tensor([[*values, 0.0]]), torch.tensor([uniform], dtype=torch.float64)
    decoding = Decoding("d", "sample", temperature=temperature, top_p=top_p, top_k=top_k)
    assert torch.equal(next_tokens(scores, decoding, number)[0], drawn_over_everything(scores, decoding, number))


def test_doubling_sums_are_cumulative_sums():
    """The path of an accelerator, on the CPU under another name for the device."""

    class Elsewhere(torch.Tensor):
        device = torch.device("meta")

    values = torch.rand(3, 1001, dtype=torch.float64)
    ours = prefix_sums(values.as_subclass(Elsewhere)).as_subclass(torch.Tensor)
    torch.testing.assert_close(ours, values.cumsum(-1), rtol=1e-13, atol=0)
    assert (ours.diff(dim=-1) >= 0).all()


def test_numbers_are_fixed_for_good():
    """Philox-4x64-10 as published, not a numpy detail: a sample drawn today is the one drawn in ten years."""
    first = uniform_numbers("0/sample/0/0", 4)
    assert first.tolist() == FIRST_NUMBERS
    assert uniform_numbers("0/sample/0/0", 1000)[:4].tolist() == first.tolist()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**40), st.sampled_from(["a", "b"]), st.integers(0, 10**6), st.integers(0, 100), st.integers(1, 50))
def test_numbers_depend_on_every_part_of_the_key(seed, name, prompt, sample, count):
    key = sample_key(seed, name, prompt, sample)
    numbers = uniform_numbers(key, count)
    assert numbers.dtype == np.float64 and numbers.shape == (count,) and ((numbers >= 0) & (numbers < 1)).all()
    others = [sample_key(seed + 1, name, prompt, sample), sample_key(seed, name + "x", prompt, sample),
              sample_key(seed, name, prompt + 1, sample), sample_key(seed, name, prompt, sample + 1)]  # fmt: skip
    for other in others:
        assert uniform_numbers(other, count)[0] != numbers[0] and key_seed(other) != key_seed(key)
    assert 0 <= key_seed(key) < 2**63


def test_numbers_are_uniform_and_independent_between_keys():
    first = np.array([uniform_numbers(f"7/sample/{i}/0", 2) for i in range(4000)])
    assert stats.kstest(first[:, 0], "uniform").pvalue > 1e-4
    assert abs(np.corrcoef(first.T)[0, 1]) < 0.06
    assert abs(np.corrcoef(first[:-1, 0], first[1:, 0])[0, 1]) < 0.06


def test_defaults_and_round_trip():
    assert list(DEFAULT_DECODINGS) == ["greedy", "sample", "top_p_95", "top_k_40", "beam_4"]
    for name, decoding in DEFAULT_DECODINGS.items():
        assert Decoding.parse(name, None) is decoding
        assert Decoding.parse(name, decoding.to_dict()) == decoding
    assert Decoding.parse("mine", {"kind": "sample", "top_p": 0.9}).top_p == 0.9


@pytest.mark.parametrize(
    "name, mapping, parts",
    [
        ("mine", None, ["decodings.mine", "greedy"]),
        ("m", {"kind": "nucleus"}, ["decodings.m.kind", "nucleus", "sample"]),
        ("m", {}, ["decodings.m.kind", "None"]),
        ("m", {"kind": "sample", "topp": 0.9}, ["decodings.m.topp", "top_p"]),
        ("m", {"kind": "sample", "top_p": 0}, ["decodings.m.top_p", "0"]),
        ("m", {"kind": "sample", "top_p": 1.5}, ["decodings.m.top_p", "1.5"]),
        ("m", {"kind": "sample", "top_p": "0.9"}, ["decodings.m.top_p", "'0.9'"]),
        ("m", {"kind": "sample", "temperature": 0}, ["decodings.m.temperature", "above 0"]),
        ("m", {"kind": "sample", "temperature": math.nan}, ["decodings.m.temperature", "nan"]),
        ("m", {"kind": "sample", "top_k": 2.5}, ["decodings.m.top_k", "2.5"]),
        ("m", {"kind": "sample", "top_k": True}, ["decodings.m.top_k", "True"]),
        ("m", {"kind": "sample", "num_beams": 4}, ["decodings.m.num_beams", "4"]),
        ("m", {"kind": "beam"}, ["decodings.m.num_beams", "2 or more"]),
        ("m", {"kind": "greedy", "temperature": 0.7}, ["decodings.m.temperature", "no effect"]),
        ("m", [1], ["decodings.m", "[1]"]),
    ],
)
def test_bad_settings_are_one_clear_line(name, mapping, parts):
    with pytest.raises(UserError) as error:
        Decoding.parse(name, mapping)
    message = str(error.value)
    assert "\n" not in message and all(part in message for part in parts), message
