"""Loading of models: what is found in a folder, what is refused, and weights that are spread over memory and disk."""

import gc
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from ds_stability.data.frequency import HighFrequencySet
from ds_stability.data.tokenizer import tokenizer_hash, train_bpe, word_tokenizer
from ds_stability.errors import UserError
from ds_stability.eval.decoding import DEFAULT_DECODINGS
from ds_stability.eval.generation import Generator
from ds_stability.eval.loading import end_ids, fingerprint, load, model_folder

TEXT = ["the quick brown fox jumps over the lazy dog, and the dog sleeps on " * 4] * 3


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny model with a vocabulary padded beyond its tokenizer, in two weight files."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_bpe(TEXT, 270)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer) + 6, hidden_size=64, intermediate_size=128,
                                         num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=128,
                                         bos_token_id=0, eos_token_id=1, pad_token_id=2))  # fmt: skip
    model.save_pretrained(folder, max_shard_size="300KB")
    tokenizer.save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def refused(*parts: str, path, **settings) -> None:
    with pytest.raises(UserError) as error:
        load(path, "cpu", **settings)
    message = str(error.value)
    assert "\n" not in message and all(part in message for part in parts), message


def test_what_a_folder_holds(saved):
    loaded = load(str(saved), "cpu")
    assert (loaded.eos_ids, loaded.pad_id, loaded.special_ids) == ((1,), 2, (0, 1, 2))
    assert (loaded.context_length, loaded.vocab_size, loaded.high_frequency) == (128, len(loaded.tokenizer) + 6, None)
    assert loaded.device == torch.device("cpu") and loaded.folder == saved and not loaded.model.training
    reference = LlamaForCausalLM.from_pretrained(saved)
    for ours, theirs in zip(loaded.model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_dtypes(saved, copy):
    assert load(saved, "cpu").model.dtype == torch.float32
    assert load(saved, "cpu", dtype="bfloat16").model.dtype == torch.bfloat16
    LlamaForCausalLM.from_pretrained(saved, dtype=torch.bfloat16).save_pretrained(copy)
    assert load(copy, "cpu").model.dtype == torch.bfloat16  # as stored
    assert load(copy, "cpu", dtype="float32").model.dtype == torch.float32
    refused("--dtype int8", "auto, float32, bfloat16, float16", path=saved, dtype="int8")


@pytest.mark.parametrize("gib", [1e-4, 5e-4])
def test_weights_on_disk_give_the_same_logits_and_texts(saved, gib):
    """All of them on disk, and a part."""
    whole, spread = load(saved, "cpu"), load(saved, "cpu", max_memory_gib=gib)
    places = set(spread.model.hf_device_map.values())
    assert "disk" in places and (gib < 2e-4 or len(places) > 1)
    ids = torch.arange(3, 43).reshape(4, 10)
    with torch.no_grad():
        assert torch.equal(whole.model(ids).logits, spread.model(ids).logits)
    keys = ["0/x/0/0", "0/x/1/0"]
    for name in ("sample", "beam_4"):
        texts = [Generator(m.model, m.eos_ids, m.pad_id).generate_keyed([[5, 6], [7]], DEFAULT_DECODINGS[name], keys, 5)
                 for m in (whole, spread)]  # fmt: skip
        assert texts[0] == texts[1]


def test_offloaded_weights_are_removed_with_the_model(saved, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    loaded = load(saved, "cpu", dtype="bfloat16", max_memory_gib=1e-4)  # another dtype is written anew
    assert list(tmp_path.glob("ds_stability_offload_*"))
    del loaded
    gc.collect()
    assert not list(tmp_path.glob("ds_stability_offload_*"))


def test_high_frequency_set_of_the_folder(copy):
    tokenizer = train_bpe(TEXT, 270)
    frequent = HighFrequencySet((5, 9), 0.5, 0.51, 100, 270, "corpus", tokenizer_hash(tokenizer))
    frequent.save(str(copy / "high_frequency.json"))
    assert load(copy, "cpu").high_frequency == frequent
    HighFrequencySet((5, 9), 0.5, 0.51, 100, 270, "corpus", "0" * 64).save(str(copy / "high_frequency.json"))
    refused("high_frequency.json", "another tokenizer", path=copy)
    HighFrequencySet((5, 10**6), 0.5, 0.51, 100, 270).save(str(copy / "high_frequency.json"))
    refused("high_frequency.json", "1000000", path=copy)


def test_folders_without_a_model(tmp_path, copy):
    refused("no such folder", path=tmp_path / "nothing")
    refused("holds no model", "config.json", path=tmp_path)
    (tmp_path / "file").write_text("")
    refused("no such folder", path=tmp_path / "file")
    (tmp_path / "adapter_config.json").write_text("{}")
    refused("PEFT adapter", "merge_and_unload", path=tmp_path)
    first = sorted(copy.glob("*.safetensors"))[0]
    first.unlink()
    refused("1 of ", first.name, path=copy)
    for file in copy.glob("model*"):
        file.unlink()
    refused("no weights", "model.safetensors", path=copy)


def test_broken_files(copy):
    index = copy / "model.safetensors.index.json"
    text = index.read_text()
    index.write_text(text[:100])
    refused("model.safetensors.index.json is no index", path=copy)
    index.write_text(text)
    first = sorted(copy.glob("*.safetensors"))[0]
    first.write_bytes(first.read_bytes()[:1000])
    refused("cannot be loaded", path=copy)


def test_config_that_is_no_causal_language_model(copy):
    (copy / "config.json").write_text(json.dumps({"model_type": "no_such_architecture"}))
    refused("cannot be loaded", "no_such_architecture", path=copy)
    (copy / "config.json").write_text("{")
    refused("cannot be loaded", path=copy)


def test_code_from_the_repository_is_not_run_unasked(copy):
    config = json.loads((copy / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}}
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "own.py").write_text("raise SystemExit('it was run')\n")
    refused("--trust_remote_code", path=copy)


def test_missing_weight_is_no_random_number(copy):
    file = next(f for f in copy.glob("*.safetensors") if "model.norm.weight" in load_file(f))
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    index = json.loads((copy / "model.safetensors.index.json").read_text())
    del index["weight_map"]["model.norm.weight"]
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    refused("1 missing", "model.norm.weight", path=copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    refused("1 missing (model.norm.weight), 9 of another shape", path=copy)


def test_tokenizer_that_disagrees(copy):
    larger = word_tokenizer([f"w{i}" for i in range(400)])
    larger.save_pretrained(copy)
    refused("tokenizer has id 403", "'w399'", "logits end at", path=copy)
    for file in copy.glob("tokenizer*"):
        file.unlink()
    refused("--model", "tokenizer", path=copy)


def test_memory_and_gpus_that_make_no_sense(saved):
    refused("--max_memory_gib 0", "above 0", path=saved, max_memory_gib=0)
    with pytest.raises(UserError, match="--gpus_per_model 2: GPU 1 is wanted"):
        if torch.cuda.device_count() > 1:
            pytest.skip("has two GPUs")
        load(saved, "cuda:0", gpus_per_model=2)


def test_name_that_is_neither_folder_nor_reachable(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused("--model some-owner/some-model", "no such folder, and no model of the hub", path="some-owner/some-model")
    for path in ("/no/such/folder", "./runs/x", "runs/x/final", "a b"):
        with pytest.raises(UserError, match="no such folder$"):
            model_folder(path)


def test_end_tokens_are_special_ones(saved):
    loaded = load(saved, "cpu")
    loaded.model.generation_config.eos_token_id = [1, 2, 77]  # 77 is a word here
    assert end_ids(loaded.tokenizer, loaded.model) == (1, 2)
    loaded.model.generation_config.eos_token_id, loaded.tokenizer.eos_token = None, None
    assert end_ids(loaded.tokenizer, loaded.model) == ()


def test_fingerprint_is_of_what_decides_the_outputs(saved, copy):
    first = fingerprint(saved)
    assert first == fingerprint(str(copy)) and len(first) == 64
    (copy / "README.md").write_text("a card")
    (copy / "metrics.jsonl").write_text("{}")
    assert fingerprint(copy) == first
    file = sorted(copy.glob("*.safetensors"))[-1]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    changed = fingerprint(copy)
    assert changed != first
    content[-1] ^= 1
    file.write_bytes(content)
    assert fingerprint(copy) == first
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    assert fingerprint(copy) != first
