import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ds_stability.errors import UserError
from ds_stability.probe import (
    Sample,
    TokenPicker,
    _check_prompts,
    _end_ids,
    measure,
    prompts_from_blocks,
    prompts_from_file,
    uniform_numbers,
)
from ds_stability.text_metrics import Mean


def pick(scores, uniform):
    """The token that the picker leaves for one row of scores."""
    picker = TokenPicker(3, torch.tensor([[0.99, uniform]], dtype=torch.float64))
    left = picker(torch.zeros(1, 4, dtype=torch.long), torch.tensor([scores]))  # one token was generated: column 1
    assert torch.isfinite(left).sum() == 1
    return left.argmax().item()


@given(st.lists(st.floats(-20, 20), min_size=2, max_size=30), st.floats(0, 1, exclude_max=True))
def test_the_token_is_the_inverse_of_the_cumulative_distribution(scores, uniform):
    probabilities = torch.tensor(scores, dtype=torch.float32).double().softmax(0).tolist()
    token = pick(scores, uniform)
    assert probabilities[token] > 0
    below = math.fsum(probabilities[:token])
    assert below - 1e-9 <= uniform <= below + probabilities[token] + 1e-9


def test_impossible_tokens_are_never_drawn_and_add_nothing_to_the_entropy():
    scores = [-math.inf, 0.0, -math.inf, 0.0, -math.inf]
    assert [pick(scores, u) for u in (0.0, 0.499, 0.5, math.nextafter(1.0, 0.0))] == [1, 1, 3, 3]
    picker = TokenPicker(1, None)
    picker(torch.zeros(1, 1, dtype=torch.long), torch.tensor([scores]))
    assert picker.entropies[0].item() == pytest.approx(math.log(2))


def test_sampling_follows_the_distribution():
    probabilities = torch.tensor([0.5, 0.2, 0.2, 0.07, 0.03], dtype=torch.float64)
    uniforms = torch.cat([uniform_numbers(0, prompt, 64) for prompt in range(200)])
    count = len(uniforms)
    scores = probabilities.log().float().repeat(count, 1)
    picker = TokenPicker(1, uniforms[:, None])
    tokens = picker(torch.zeros(count, 1, dtype=torch.long), scores).argmax(-1)
    observed = torch.bincount(tokens, minlength=5).double()
    chi_square = ((observed - count * probabilities) ** 2 / (count * probabilities)).sum().item()
    assert chi_square < 18.5  # .999 quantile at 4 degrees of freedom
    entropy = -(probabilities * probabilities.log()).sum().item()
    assert picker.entropies[0].mean().item() == pytest.approx(entropy, abs=1e-6)


def test_greedy_leaves_the_scores_alone():
    scores = torch.randn(2, 7)
    assert TokenPicker(1, None)(torch.zeros(2, 1, dtype=torch.long), scores) is scores


def test_a_diverged_model_does_not_break_the_probe():
    assert pick([math.nan, 1.0, 2.0], 0.3) in (0, 1, 2)


def test_uniform_numbers_depend_on_seed_and_prompt_and_not_on_the_global_state():
    torch.manual_seed(0)
    first = uniform_numbers(1, 2, 8)
    torch.manual_seed(9)
    assert torch.equal(first, uniform_numbers(1, 2, 8))
    assert torch.equal(first[:5], uniform_numbers(1, 2, 5))
    others = [uniform_numbers(seed, prompt, 8) for seed, prompt in ((2, 2), (1, 3), (12, 0), (1, 20))]
    assert all(not torch.equal(first, other) for other in others)
    assert ((first >= 0) & (first < 1)).all() and first.dtype == torch.float64


def sample(ids, entropy=Mean(2.0, 2), index=0, reason="length"):
    return Sample(index, "sample", [1], ids, reason, entropy)


def test_measure_weighs_tokens_and_texts_correctly():
    samples = [sample([5, 5, 5, 5, 5], Mean(5.0, 5)), sample([6, 7], Mean(6.0, 2)), sample([], Mean(3.0, 1), reason="eos")]
    assert measure(samples, {5}, {7}) == {
        "entropy": 14.0 / 8,
        "seq_rep_4": 0.5,  # one text has two 4-grams, both the same; the others are too short
        "distinct_2": 2 / 5,
        "high_frequency_share": 5 / 6,
        "end_rate": 1 / 3,
    }


def test_measures_that_do_not_exist_are_none():
    assert measure([sample([], Mean(0.0, 0))], None, ()) == {
        "entropy": None,
        "seq_rep_4": None,
        "distinct_2": None,
        "high_frequency_share": None,
        "end_rate": 0.0,
    }


def test_prompts_are_spread_over_the_blocks():
    blocks = [[100 * b + t for t in range(10)] for b in range(8)]
    assert prompts_from_blocks(blocks, 4, 3) == [[100 * b, 100 * b + 1, 100 * b + 2] for b in (0, 2, 4, 6)]
    assert prompts_from_blocks(iter(blocks), 8, 10) == blocks


@given(st.integers(1, 6), st.integers(1, 12), st.integers(1, 30), st.integers(1, 13))
def test_prompts_do_not_overlap(num_blocks, block_length, num_prompts, prompt_length):
    blocks = [[100 * b + t for t in range(block_length)] for b in range(num_blocks)]
    available = num_blocks * (block_length // prompt_length)
    if num_prompts > available:
        with pytest.raises(UserError, match="num_prompts"):
            prompts_from_blocks(blocks, num_prompts, prompt_length)
        return
    prompts = prompts_from_blocks(blocks, num_prompts, prompt_length)
    assert [len(prompt) for prompt in prompts] == [prompt_length] * num_prompts
    tokens = [token for prompt in prompts for token in prompt]
    assert len(set(tokens)) == len(tokens)
    assert all(b - a == 1 for prompt in prompts for a, b in zip(prompt, prompt[1:]))
    assert prompts == prompts_from_blocks(blocks, num_prompts, prompt_length)


class WordTokenizer:
    bos_token, eos_token, eos_token_id = None, "<|eos|>", 0
    all_special_ids = [0]
    added_tokens_decoder = {9: "<|end_of_turn|>"}

    def __call__(self, text, verbose=True):
        return {"input_ids": [len(word) for word in text.split()]}


def test_prompts_from_a_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a bb\n\n  \nccc\r\nd é\n", encoding="utf-8")
    assert prompts_from_file(path, WordTokenizer()) == [[1, 2], [3], [1, 1]]
    assert prompts_from_file(path, WordTokenizer(), 2) == [[1, 2], [3]]


@pytest.mark.parametrize("content, expected", [(None, "cannot be read"), (b"", "no prompt"), (b"a\xff", "UTF-8")])
def test_bad_prompt_files(tmp_path, content, expected):
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=expected) as error:
        prompts_from_file(path, WordTokenizer())
    assert "probe.prompts_file" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("declared, expected", [(None, [0]), (0, [0]), (2, [0]), (9, [0, 9]), ([2, 9], [0, 9])])
def test_end_ids_are_special_tokens_only(declared, expected):
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=declared))
    assert _end_ids(WordTokenizer(), model) == expected


def fake_model(context):
    config = SimpleNamespace()
    if context is not None:
        config.max_position_embeddings = context
    config.get_text_config = lambda: config
    return SimpleNamespace(config=config, can_generate=lambda: True)


@pytest.mark.parametrize("prompts", [[], [[1], []]])
def test_empty_prompts_are_refused(prompts):
    with pytest.raises(UserError):
        _check_prompts(prompts, 4, fake_model(64))


def test_prompts_must_leave_room_in_the_context():
    _check_prompts([[1], [1] * 60], 4, fake_model(64))
    _check_prompts([[1] * 1000], 4, fake_model(None))
    with pytest.raises(UserError, match="probe.max_new_tokens is 5"):
        _check_prompts([[1], [1] * 60], 5, fake_model(64))
