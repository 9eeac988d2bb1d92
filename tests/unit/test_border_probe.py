"""The probe of document borders: what it finds in families that keep documents apart and in others; what a launch makes of it."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parent))
from test_packing import make_store, tiny_model  # noqa: E402

from ds_stability.data.border_probe import MAX_PARAMETERS, _flash_stand_in, probe_borders, shrink  # noqa: E402
from ds_stability.data.packing import PackedBlocks  # noqa: E402
from ds_stability.errors import UserError  # noqa: E402
from ds_stability.launchers import packing  # noqa: E402
from ds_stability.launchers.arguments import parse_command  # noqa: E402

REPOSITORY = Path(__file__).resolve().parents[2]


def probe(config, attention=None):
    return probe_borders(config, lambda small, **options: AutoModelForCausalLM.from_config(small, **options), attention)


#: Full-size configs: the probe makes them small.
APART = {
    "llama": lambda: transformers.LlamaConfig(hidden_size=8192, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8),
    "qwen3_moe": transformers.Qwen3MoeConfig, "deepseek_v3": transformers.DeepseekV3Config,
    "gpt2": transformers.GPT2Config, "gpt_neox": transformers.GPTNeoXConfig,
}  # fmt: skip
LEAKS = {"falcon": transformers.FalconConfig, "opt": transformers.OPTConfig, "gpt_oss": transformers.GptOssConfig, "bloom": transformers.BloomConfig,
         "jamba": transformers.JambaConfig, "qwen3_next": transformers.Qwen3NextConfig, "xglm": transformers.XGLMConfig,
         "lfm2": lambda: transformers.Lfm2Config(num_hidden_layers=4, layer_types=["full_attention", "conv", "conv", "full_attention"])}  # fmt: skip


@pytest.mark.parametrize("family", APART)
def test_families_that_keep_documents_apart(family):
    borders = probe(APART[family]())
    assert borders.apart and borders.causal and borders.positions, borders


@pytest.mark.parametrize("family", LEAKS)
def test_families_that_do_not(family):
    borders = probe(LEAKS[family]())
    assert borders.known and not borders.apart and borders.causal, borders
    assert borders.leak > 0.1 or borders.shift > 0.1
    assert borders.positions == (family != "bloom")


def test_flash_attention_is_stood_in_for():
    """In rows of their own documents are apart for FlashAttention where the layers hand `position_ids` down."""
    assert probe(transformers.LlamaConfig(), "flash_attention_2").apart
    assert probe(transformers.OPTConfig(), "flash_attention_3").apart
    assert not probe(transformers.Lfm3Config(), "flash_attention_2").apart


def test_an_encoder_is_no_causal_model():
    assert not probe(transformers.BertConfig()).causal
    assert probe(transformers.BertConfig(is_decoder=True)).causal


def test_the_caller_sees_nothing_of_it():
    config = transformers.LlamaConfig()
    before, state = json.dumps(config.to_dict(), default=str), torch.get_rng_state()
    first = probe(config)
    assert json.dumps(config.to_dict(), default=str) == before and torch.equal(torch.get_rng_state(), state)
    assert probe(config) == first


def test_a_model_that_cannot_be_made_small_is_unknown():
    def build(config, **options):
        raise KeyError("no such key")

    borders = probe_borders(transformers.LlamaConfig(), build)
    assert not borders.known and not borders.apart and borders.causal and "no such key" in borders.reason
    huge = torch.nn.Linear(MAX_PARAMETERS, 1, device="meta")
    huge.config = None
    assert "million weights" in probe_borders(transformers.LlamaConfig(), lambda config, **options: huge).reason


def test_layers_are_kept_up_to_where_each_kind_has_appeared():
    kinds = ["sliding_attention"] * 11 + ["full_attention"] + ["sliding_attention"] * 20
    small = shrink(transformers.Gemma3TextConfig(num_hidden_layers=32, layer_types=kinds), narrow=True)
    assert small.num_hidden_layers == 12 and small.layer_types == kinds[:12] and small.hidden_size == 1152


@pytest.fixture
def command(tmp_path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    return parse_command(["--config_name", "ds_configs/models/llama_tiny.json", "--dataset_name", "builtin:prose", "--deepspeed",
                          "ds_configs/zero3_cpu.json", "--output_dir", str(tmp_path / "run")])  # fmt: skip


@pytest.mark.parametrize("given, config, settled, said", [
    ("auto", transformers.LlamaConfig, "pack", ""),
    ("auto", transformers.OPTConfig, "pad", "note: OPTForCausalLM lets a document see the one before it (its logits move by"),
    ("pack", transformers.OPTConfig, "pack", "the documents of a block are trained in each other's context"),
    ("pad", transformers.LlamaConfig, "pad", "note: --packing pad; 25% of the tokens are padding"),
])  # fmt: skip
def test_a_launch_packs_pads_or_says_so(command, capsys, given, config, settled, said):
    command.data.packing = given
    asked = dataclasses.replace(command, spec=dataclasses.replace(command.spec, packing=given))
    decided, borders = packing.settle_packing(asked, config())
    assert decided.spec.packing == settled
    packing.say_packing(decided, borders, {"train": {"padding_share": 0.25} if settled == "pad" else {}})
    out = capsys.readouterr().out
    assert said in out and out.count("\n") == bool(said)


def test_a_model_that_sees_the_future_is_refused(command):
    with pytest.raises(UserError, match="BertLMHeadModel sees the tokens that it is to predict"):
        packing.settle_packing(command, transformers.BertConfig())


def test_rows_as_one_row_for_flash_attention():
    """The loss, the labels and each token's logits survive; two rows at once, which transformers takes for unpacked, leak."""
    blocks = PackedBlocks(make_store([[11, 12, 13, 14], [9, 8, 7, 6, 5], [21, 22, 23], [4, 5, 6, 7, 8, 9]]), 9, 2)
    batch = {key: torch.stack([block[key] for block in blocks]) for key in blocks[0]}
    flat = packing.flatten(batch | {"flag": torch.tensor(3)})
    assert flat["input_ids"].shape == flat["labels"].shape == flat["position_ids"].shape == (1, 18) and flat["flag"].shape == ()
    plain, flash = tiny_model("llama", "sdpa"), tiny_model("llama", _flash_stand_in())
    assert not packing.needs_flattening(plain)
    flash.config._attn_implementation = "flash_attention_2"
    assert packing.needs_flattening(flash)
    flash.config._attn_implementation = _flash_stand_in()
    with torch.no_grad():
        right, flattened, sdpa, wrong = plain(**batch), flash(**packing.flatten(batch)), plain(**packing.flatten(batch)), flash(**batch)
    for output in (flattened, sdpa):
        torch.testing.assert_close(output.logits.reshape(right.logits.shape), right.logits)
        torch.testing.assert_close(output.loss, right.loss)
    assert not torch.allclose(wrong.logits, right.logits, atol=1e-4)
