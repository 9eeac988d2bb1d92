"""Whole cells of strange models, in this process: NaN, nothing but the end token, one prompt, a run on the synthetic language."""

import json
import random

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ds_stability.data import DataSpec, load_blocks
from ds_stability.data.synthetic import SyntheticLanguage
from ds_stability.data.tokenizer import train_bpe
from ds_stability.errors import UserError
from ds_stability.eval import run as eval_run
from ds_stability.eval.cell import describe_run

WORDS = "the quick brown fox jumps over a lazy dog while seven bright stars shine on cold water near old stone walls".split()
SUITE = {
    "name": "tiny", "batch_size": 4, "max_new_tokens": 8, "prompts": {"count": 4, "tokens": 4},
    "text": {"held_out_windows": 4, "train_windows": 4, "window": 16}, "minimal_pairs": {"per_phenomenon": 1},
    "exact_match": {"task": "arithmetic", "samples": 8, "limit": 1},
}  # fmt: skip


def prose(seed, words=400):
    draw = random.Random(seed)
    return " ".join(draw.choice(WORDS) for _ in range(words)) + "."


def tiny(tokenizer, seed=0):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=0, eos_token_id=1, pad_token_id=2))  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe([prose(0)], 300)


@pytest.fixture
def evaluate(tmp_path, tokenizer):
    """`evaluate(model, flags..., suite changes)` gives {(metric, decoding, split): row} of the cell."""

    def run(model, *flags, held_out=None, **changes):
        model.save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        (tmp_path / "held.txt").write_text(prose(1) if held_out is None else held_out)
        (tmp_path / "suite.yaml").write_text(json.dumps({**SUITE, **changes}))
        eval_run.main(["--model", str(tmp_path / "model"), "--cell_names", "cell", "--suite", str(tmp_path / "suite.yaml"),
                       "--held_out_file", str(tmp_path / "held.txt"), "--output_dir", str(tmp_path / "out"), *flags])  # fmt: skip
        return read(tmp_path / "out" / "cells" / "cell")

    return run


def read(cell):
    assert (cell / "DONE").exists()
    rows = json.loads((cell / "scores.json").read_text(), parse_constant=pytest.fail)["rows"]
    return {(row["metric"], row["decoding"], row["split"]): row for row in rows}


def test_a_model_that_gives_nan_has_nulls_and_their_reasons(evaluate, tokenizer):
    model = tiny(tokenizer)
    with torch.no_grad():
        model.model.norm.weight.fill_(3e38)  # finite, as weights that are not are refused; the logits are inf - inf
    rows = evaluate(model)
    for decoding in ("greedy", "sample", "beam_4"):
        assert rows["non_finite_rate", decoding, None]["value"] == 1.0
        row = rows["distinct_2", decoding, None]
        assert row["value"] is None and row["note"]
    for key in (("cross_entropy", None, "held_out"), ("bits_per_byte", None, "held_out"), ("minimal_pairs", None, None),
                ("exact_match_pass_1", "sample", None)):  # fmt: skip
        assert rows[key]["value"] is None and rows[key]["note"], key
    assert rows["distinct_2", "reference", None]["value"] > 0


def test_a_model_that_only_ends(evaluate, tokenizer):
    model = tiny(tokenizer)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.model.embed_tokens.weight.fill_(1.0)
        model.lm_head.weight[1] = 50.0
    rows = evaluate(model)
    for decoding in ("greedy", "sample"):
        assert rows["eos_rate", decoding, None]["value"] == 1.0
        assert rows["no_words_rate", decoding, None]["value"] == 1.0
        assert rows["high_frequency_word_share", decoding, None]["value"] is None
        assert rows["distinct_2", decoding, None]["value"] is None


def test_one_text_and_one_prompt(evaluate, tokenizer):
    rows = evaluate(tiny(tokenizer), held_out="the quick brown fox jumps over a lazy dog", prompts={"count": 1, "tokens": 4})
    row = rows["tokens_per_text", "greedy", None]
    assert row["units"] == 1 and row["value"] > 0 and row["stderr"] is None and row["note"]


def test_prompts_beyond_the_context_are_refused_before_anything_is_generated(evaluate, tokenizer, tmp_path):
    with pytest.raises(UserError, match="context is 128"):
        evaluate(tiny(tokenizer), max_new_tokens=126)
    assert not list((tmp_path / "out").rglob("rank-*"))


def test_what_is_wrong_with_the_last_model_is_told_before_the_first_is_evaluated(evaluate, tokenizer, tmp_path):
    small = tiny(tokenizer)
    small.config.max_position_embeddings = 10  # positions are rotary: no weight changes its shape
    small.save_pretrained(tmp_path / "small")
    tokenizer.save_pretrained(tmp_path / "small")
    with pytest.raises(UserError, match="^cell second: prompt 1 has .* context is 10"):
        evaluate(tiny(tokenizer), "--model", str(tmp_path / "model"), str(tmp_path / "small"), "--cell_names", "first", "second")
    assert not list((tmp_path / "out").rglob("rank-*")) and not list((tmp_path / "out").rglob("DONE"))


def test_a_file_of_the_suite_that_is_missing_is_named_by_its_key(evaluate, tokenizer):
    with pytest.raises(UserError, match=r"^suite tiny: prompts.file .*nowhere.txt: no such file"):
        evaluate(tiny(tokenizer), prompts={"source": "file", "file": "nowhere.txt"})


def test_only_the_metrics_asked_for(evaluate, tokenizer):
    rows = evaluate(tiny(tokenizer), metrics=["eos_rate", "distinct_2"], decodings={"greedy": None}, exact_match=None,
                    minimal_pairs={"enabled": False}, text={"held_out_windows": 0, "train_windows": 0})  # fmt: skip
    assert set(rows) == {(metric, decoding, None) for metric in ("eos_rate", "distinct_2") for decoding in ("greedy", "reference")}


@pytest.fixture
def synthetic_run(tmp_path):
    """The folder of a run on the synthetic language, as launchers/train.py leaves it (the model has learned nothing)."""
    language = SyntheticLanguage(seed=0)
    tokenizer = language.tokenizer()
    spec = DataSpec(dataset_name="builtin:synthetic", synthetic_tokens=20_000)
    run = tmp_path / "runs" / "synthetic"
    run.mkdir(parents=True)
    facts = load_blocks(spec, tokenizer, 64)[2]
    (run / "manifest.json").write_text(json.dumps({
        "config": {"stability": {"level": 0.25}}, "seeds": {"seed": 1}, "data": facts, "working_directory": str(tmp_path)}))
    tiny(tokenizer).save_pretrained(run / "final")
    tokenizer.save_pretrained(run / "final")
    return run


def test_a_run_on_the_synthetic_language(synthetic_run, tmp_path):
    suite = {**SUITE, "name": "s", "prompts": {"count": 6, "tokens": 0}, "minimal_pairs": {"enabled": False}, "exact_match": None}
    (tmp_path / "suite.yaml").write_text(json.dumps(suite))
    command = ["--suite", str(tmp_path / "suite.yaml"), "--output_dir", str(tmp_path / "out")]
    eval_run.main(["--model", str(synthetic_run), *command])
    rows = read(tmp_path / "out" / "cells" / "synthetic")
    assert any(metric.startswith("synthetic") or "grammatical" in metric for metric, _, _ in rows)
    # The language is at least as hard as its entropy rate, and an untrained model is near the uniform distribution.
    assert rows["cross_entropy", None, "held_out"]["value"] > SyntheticLanguage(seed=0).entropy_rate()
    cell = json.loads((tmp_path / "out" / "cells" / "synthetic" / "cell.json").read_text())
    assert cell["run"]["level"] == 0.25 and cell["run"] == describe_run(str(synthetic_run))
    samples = [json.loads(line) for line in (tmp_path / "out" / "cells" / "synthetic" / "samples.jsonl").read_text().splitlines()]
    assert {row["prompt"] for row in samples} == set(range(6))


def test_text_of_another_run_serves_a_model_that_has_none(synthetic_run, tmp_path):
    model = tmp_path / "plain"
    (synthetic_run / "final").rename(model)
    suite = {**SUITE, "synthetic": True, "minimal_pairs": {"enabled": False}, "exact_match": None,
             "prompts": {"count": 3, "tokens": 0}, "decodings": {"greedy": None}}  # fmt: skip
    (tmp_path / "suite.yaml").write_text(json.dumps(suite))
    command = ["--model", str(model), "--suite", str(tmp_path / "suite.yaml"), "--output_dir", str(tmp_path / "out"),
               "--cell_names", "cell"]  # fmt: skip
    with pytest.raises(UserError, match="needs held-out text; give --held_out_file FILE or --text_from RUN"):
        eval_run.main(command)
    eval_run.main([*command[:-1], "other", "--text_from", str(synthetic_run)])
    assert read(tmp_path / "out" / "cells" / "other")["cross_entropy", None, "train"]["value"] > 0
