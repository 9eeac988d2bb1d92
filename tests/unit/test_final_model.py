"""The end of a run: what is prepared before step 1, what the card says, and what stays when the export fails."""

import json
from types import SimpleNamespace as Bag

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from ds_stability import export_run
from ds_stability.config import StabilityConfig
from ds_stability.data.frequency import HighFrequencySet
from ds_stability.data.tokenizer import train_bpe
from ds_stability.errors import UserError
from ds_stability.export import write_description, write_export
from ds_stability.launchers import final_model
from ds_stability.launchers.final_model import exported_step, prepare_final
from ds_stability.launchers.setup_model import _prepare_generation
from ds_stability.model_card import card_of, model_card
from ds_stability.run_dir import RunDir

FREQUENT = HighFrequencySet((5, 6), 0.5, 0.5, 100, 270)


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = train_bpe(["the quick brown fox jumps over the lazy dog " * 8] * 3, 270)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    return tokenizer


@pytest.fixture
def model():
    return LlamaForCausalLM(LlamaConfig(vocab_size=280, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
                                        max_position_embeddings=32, bos_token_id=0, eos_token_id=1, pad_token_id=2))  # fmt: skip


@pytest.fixture
def rank_zero(monkeypatch):
    monkeypatch.setattr(final_model.dist, "get_rank", lambda: 0)


def test_generation_keeps_the_bases_sampling_and_stops_at_turns(model, tokenizer):
    model.generation_config = GenerationConfig(do_sample=True, temperature=0.6, top_p=0.9, eos_token_id=[9], use_cache=False)
    _prepare_generation(model, tokenizer, keeps_cache=True)
    settings = model.generation_config
    assert (settings.do_sample, settings.temperature, settings.top_p, settings.use_cache) == (True, 0.6, 0.9, True)
    assert settings.eos_token_id == [9, tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")]


def test_a_model_without_a_cache_gets_none(model, tokenizer):
    model.generation_config.use_cache = False
    _prepare_generation(model, tokenizer, keeps_cache=False)
    assert model.generation_config.use_cache is False


def test_the_description_is_an_export_without_weights(model, tokenizer, tmp_path):
    model.config.use_cache = False  # as while training
    write_description(model, tokenizer, tmp_path / "description", keeps_cache=True)
    config = json.loads((tmp_path / "description" / "config.json").read_text())
    assert config["use_cache"] is True and config["architectures"] == ["LlamaForCausalLM"] and model.config.use_cache is False
    write_export(model, model.state_dict(), tmp_path / "final", tokenizer, {}, None)
    described, exported = ({path.name for path in (tmp_path / name).iterdir()} for name in ("description", "final"))
    assert exported - described == {"model.safetensors", "README.md"} and described < exported


def test_what_a_resumed_run_lacks_is_written_again(model, tokenizer, tmp_path, rank_zero):
    run = RunDir(tmp_path)
    prepare_final(run, model, tokenizer, FREQUENT, True)
    assert HighFrequencySet.load(str(tmp_path / "high_frequency.json")) == FREQUENT
    (tmp_path / "high_frequency.json").unlink()
    final_model.keep_frequent(run, FREQUENT)
    assert HighFrequencySet.load(str(tmp_path / "high_frequency.json")) == FREQUENT


def test_too_little_room_for_the_export_is_refused(model, tokenizer, tmp_path, rank_zero, monkeypatch):
    monkeypatch.setattr(final_model.shutil, "disk_usage", lambda path: Bag(free=1000))
    with pytest.raises(UserError, match="--output_dir.*GiB free, and the exported model alone takes"):
        prepare_final(RunDir(tmp_path), model, tokenizer, FREQUENT, True)


@pytest.mark.parametrize(("loads_best", "best", "step"), [(True, "x/checkpoint-4", 4), (True, None, 9), (False, "x/checkpoint-4", 9)])
def test_the_card_names_the_steps_of_the_weights_in_it(loads_best, best, step):
    trainer = Bag(args=Bag(load_best_model_at_end=loads_best), state=Bag(best_model_checkpoint=best, best_global_step=4, global_step=9))
    assert exported_step(trainer) == step
    card = model_card(card_of(StabilityConfig.parse({"level": 0.5}).to_dict(), exported_step(trainer), 9, None))
    assert f"| steps | {step} |" in card and ("the best of the evaluations in 9 steps" in card) == (step == 4)


def test_the_card_says_what_was_averaged():
    block = StabilityConfig.parse({"level": 0.5, "ema": {"decay": 0.99}}).to_dict()
    assert "averaged\\_steps | 7" in model_card(card_of(block, 9, 9, 7))


def test_a_failed_merge_keeps_the_adapter(model, tokenizer, tmp_path, monkeypatch):
    from peft import LoraConfig, PeftModel, get_peft_model

    import ds_stability.export as export

    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    expected = {name: value.clone() for name, value in adapted.state_dict().items() if "lora_" in name}

    def fails(*_):
        raise AttributeError("no attribute 'weight'")

    monkeypatch.setattr(export, "merge_adapter", fails)
    with pytest.raises(AttributeError):
        write_export(adapted, adapted.state_dict(), tmp_path / "final", tokenizer, {}, None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]
    loaded = PeftModel.from_pretrained(LlamaForCausalLM(model.config), tmp_path / "adapter")
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in expected.items()) and expected


def test_export_runs_a_models_own_code_only_where_a_flag_says_so(tmp_path):
    manifest = {"config": {"model": {"trust_remote_code": True}}}
    with pytest.raises(UserError, match="was trained with --trust_remote_code; read that code, then give --trust_remote_code here too"):
        export_run._model(manifest, tmp_path / "description", torch.float32, trust_remote_code=False)
