"""Trains small models with and without a probe between the steps, and writes what the tests compare.

Usage: deepspeed --num_gpus N probe_worker.py OUT CASE ...   (rank 0 writes OUT/CASE.json, and OUT/DONE last)
"""

import gc
import hashlib
import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import deepspeed
import numpy as np
import torch
from deepspeed.runtime.zero.partition_parameters import GatheredParameters
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

from ds_stability.gathered import standalone_module, whole
from ds_stability.probe import Probe
from ds_stability.run_dir import RunDir

VOCAB, STEPS, GAS, BATCH, LENGTH = 97, 6, 2, 2, 12
ARGUMENTS = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
OUT, NAMES = Path(ARGUMENTS[0]), ARGUMENTS[1:]
CASES = {
    "llama": {},
    "llama_bf16": {"bf16": True},
    "llama_persistent": {"persistence": 100_000, "evaluate": True},
    "llama_evaluate": {"evaluate": True, "prefetch": 2000, "reuse": 0},
    "llama_offload": {"offload": True, "prefetch": 1000},
    "llama_checkpointing": {"checkpointing": False},
    "gpt2_tied": {"arch": "gpt2"},
    "gpt2_reentrant": {"arch": "gpt2", "checkpointing": True, "prefetch": 1000},
    "llama_lora": {"lora": True},
    "llama_lora_checkpointing": {"lora": True, "checkpointing": False, "prefetch": 1000},
    "llama_frozen": {"lr": 0.0},
    "llama_stage2": {"stage": 2},
    "llama_stage0": {"stage": 0},
}


class IdTokenizer:
    """Decodes ids to numbers; enough of a tokenizer for the probe."""

    eos_token_id = 1
    all_special_ids = [0, 1]
    added_tokens_decoder = {}  # so that 2, LlamaConfig's default end token, is a word like any other

    def decode(self, ids):
        return " ".join(map(str, ids))


def build_model(case):
    torch.manual_seed(0)
    if case.get("arch") == "gpt2":
        from transformers import GPT2Config, GPT2LMHeadModel

        model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_positions=64, n_embd=32, n_layer=2, n_head=2,
                                           initializer_range=0.2))  # fmt: skip
    else:
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
                             attention_dropout=0.1, initializer_range=0.2)  # fmt: skip
        model = LlamaForCausalLM(config)
    # What a user's model may bring: sampling settings that the probe must neither use nor change.
    model.generation_config.temperature = 0.01
    model.generation_config.do_sample = True
    model.generation_config.repetition_penalty = 5.0
    if "checkpointing" in case:
        model.config.use_cache = False
        model.gradient_checkpointing_enable({"use_reentrant": case["checkpointing"]})
        if case["checkpointing"] or case.get("lora"):
            model.enable_input_require_grads()
    if case.get("lora"):
        from peft import LoraConfig, get_peft_model

        targets = LoraConfig(r=4, lora_dropout=0.1, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        model = get_peft_model(model, targets)
    return model


def build_engine(case):
    config = {
        "train_micro_batch_size_per_gpu": BATCH,
        "gradient_accumulation_steps": GAS,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": case.get("lr", 1e-2), "torch_adam": True, "weight_decay": 0.0}},
        "zero_optimization": {"stage": case.get("stage", 3)},
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": case.get("bf16", False)},
    }
    if case.get("stage", 3) == 3:
        config["zero_optimization"] |= {
            "stage3_param_persistence_threshold": case.get("persistence", 0),
            "stage3_prefetch_bucket_size": case.get("prefetch", 0),
            "stage3_max_reuse_distance": case.get("reuse", 10**9),
            "reduce_bucket_size": 10_000,
        }
    if case.get("offload"):
        config["zero_optimization"] |= {"offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}}
    model = build_model(case)
    parameters = [p for p in model.parameters() if p.requires_grad]
    return deepspeed.initialize(model=model, model_parameters=parameters, config=config)[0]


def batches(rank, world):
    generator = torch.Generator().manual_seed(7)
    data = torch.randint(2, VOCAB, (STEPS, GAS, world * BATCH, LENGTH), generator=generator)
    return data[:, :, rank * BATCH : (rank + 1) * BATCH]


def make_probe(engine, name, seed=0):
    prompts = torch.randint(2, VOCAB, (7, 5), generator=torch.Generator().manual_seed(3)).tolist()
    prompts[3] = prompts[3][:2]  # another length: another batch
    config = SimpleNamespace(interval=2, num_prompts=7, max_new_tokens=10, max_gather_gib=20.0)
    return Probe(engine, IdTokenizer(), config, {5, 6, 7}, RunDir(OUT / name), prompts, seed=seed)


def snapshot(engine):
    """Everything that a probe could disturb and that another step would read."""
    module = engine.module
    hooks = [(list(m._forward_hooks), list(m._forward_pre_hooks), list(m._backward_hooks)) for m in module.modules()]
    state = {
        "hooks": hooks,
        "attributes": [sorted((k, id(v)) for k, v in vars(m).items()) for m in module.modules()],
        "buffers": [(n, id(b), b._version) for n, b in module.named_buffers()],
        "training": [m.training for m in module.modules()],
        "config": engine.module.config.to_dict(),
        "generation": str(module.generation_config),
        "random": (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()),
    }
    if engine.zero_optimization_partition_weights():
        coordinator = engine.optimizer.parameter_offload.get_param_coordinator()
        settled = {"INFLIGHT": "AVAILABLE"}
        state["status"] = [settled.get(p.ds_status.name, p.ds_status.name) for p in module.parameters()]
        state["active"] = [sorted(p.ds_active_sub_modules) for p in module.parameters()]
        state["ds_ids"] = [m.ds_id for m in module.modules()]
        private = {k.removeprefix("_PartitionedParameterCoordinator__"): v for k, v in vars(coordinator).items()}
        state["coordinator"] = [private[name] for name in ("step_id", "trace_mode", "n_available_params")]
        state["trace"] = [m.ds_id for m in private["submodule_order"]]
        for name in ("param_order", "param_queue"):
            state[name] = [(entry.param.ds_id, entry.step_id_last_used_at) for entry in private[name] or []]
        state["inflight"] = len(module.ds_inflight_param_registry)
    return state


class Counter:
    """Counts calls of a method while it is entered."""

    def __init__(self, owner, name):
        self.owner, self.name, self.calls = owner, name, 0

    def __enter__(self):
        self.original = getattr(self.owner, self.name)

        def counted(*args, **kwargs):
            self.calls += 1
            return self.original(*args, **kwargs)

        setattr(self.owner, self.name, counted)
        return self

    def __exit__(self, *_):
        setattr(self.owner, self.name, self.original)


def weights(engine):
    with whole(engine, engine.module.parameters()):
        return [p.detach().clone() for p in engine.module.parameters()]


def train(name, case, probing):
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    engine = build_engine(case)
    random.seed(rank), np.random.seed(rank), torch.manual_seed(rank)
    probe = make_probe(engine, name) if probing else None
    result = {"losses": [], "metrics": {}, "disturbed": [], "fetches": 0, "gathers": 0, "inflight": 0}
    for step, micro_batches in enumerate(batches(rank, world), start=1):
        engine.train()
        for ids in micro_batches:
            loss = engine(input_ids=ids, labels=ids).loss
            engine.backward(loss)
            engine.step()
            result["losses"].append(loss.item())
        if case.get("evaluate"):
            engine.eval()
            with torch.no_grad():
                result["losses"].append(engine(input_ids=ids, labels=ids).loss.item())
        if probing and probe.due(step):
            before = snapshot(engine)
            result["inflight"] += before.get("inflight", 0)
            with Counter(PartitionedParameterCoordinator, "fetch_sub_module") as fetches:
                with Counter(GatheredParameters, "__enter__") as gathers:
                    result["metrics"][step] = probe.run(step)
            after = snapshot(engine)
            result["disturbed"] += [key for key in before if before[key] != after[key]]
            result["fetches"] += fetches.calls
            result["gathers"] += gathers.calls
    return engine, result, weights(engine)


def check_scope(engine):
    """Things done inside the scope that must not outlive it."""
    before = snapshot(engine)
    original = engine.module.forward
    try:
        with standalone_module(engine) as module:
            random.random(), np.random.rand(), torch.rand(3)
            first = next(module.modules())
            first.some_cache = torch.zeros(3)
            module.config.get_text_config()
            module.__dict__["forward"] = lambda *a, **k: None
            inside = [p.numel() for p in module.parameters()]
            raise KeyError("inside")
    except KeyError:
        pass
    after = snapshot(engine)
    assert engine.module.forward == original
    assert min(inside) > 0, inside
    return [key for key in before if before[key] != after[key]]


def run_case(name):
    case = CASES[name]
    _, plain, plain_weights = train(name, case, probing=False)
    engine, probed, probed_weights = train(name, case, probing=True)
    equal = [torch.equal(a, b) for a, b in zip(plain_weights, probed_weights, strict=True)]
    moved = any(not torch.equal(a, b) for a, b in zip(plain_weights, initial_weights(case), strict=True))
    return {
        "equal_weights": all(equal),
        "equal_losses": plain["losses"] == probed["losses"],
        "moved": moved,
        "losses": probed["losses"],
        "metrics": probed["metrics"],
        "disturbed": probed["disturbed"],
        "scope_disturbed": check_scope(engine),
        "fetches": probed["fetches"],
        "gathers": probed["gathers"],
        "inflight": probed["inflight"],
        "limited": limited(engine),
        "failed": failed(engine),
        "disagreements": disagreements(case, probed_weights, probe_rows(name)),
    }


def initial_weights(case):
    return weights(build_engine(case))


def limited(engine):
    """What a probe returns when its limit forbids it."""
    probe = make_probe(engine, "limit")
    probe.config.max_gather_gib = 1e-9
    return [probe.run(1), probe.run(2)]


def failed(engine):
    """What each rank hears when one of them cannot generate."""
    probe = make_probe(engine, "failed")
    if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
        probe.engine.module.generate = out_of_luck
    before = snapshot(engine)
    try:
        message = str(probe.run(1))
    except RuntimeError as error:
        message = str(error)
    disturbed = [key for key, value in snapshot(engine).items() if before[key] != value]
    vars(engine.module).pop("generate", None)
    return message, disturbed


def out_of_luck(*_, **__):
    raise MemoryError("out of luck")


def probe_rows(name):
    torch.distributed.barrier()  # rank 0 has written them
    return [json.loads(line) for line in RunDir(OUT / name).sample_file(STEPS).read_text().splitlines()]


@torch.no_grad()
def disagreements(case, final_weights, rows):
    """Where the last probe's samples are not what a plain model with the same weights says, scored without a cache."""
    model = build_model(case).eval()
    for parameter, value in zip(model.parameters(), final_weights, strict=True):
        parameter.copy_(value)
    wrong = []
    for row in rows:
        prompt, text = row["prompt_ids"], row["completion_ids"] + [1] * (row["finish_reason"] == "eos")
        logits = model(input_ids=torch.tensor([prompt + text])).logits[0, len(prompt) - 1 : -1].double()
        entropy = torch.distributions.Categorical(logits=logits).entropy().mean().item()
        generator = torch.Generator().manual_seed(seed_of(row["prompt_index"]))
        uniform = torch.rand(10, generator=generator, dtype=torch.float64)
        for t, token in enumerate(text):
            cumulative = logits[t].softmax(0).cumsum(0).tolist()
            below = cumulative[token - 1] if token else 0.0
            sampled = below - 1e-6 <= uniform[t].item() <= cumulative[token] + 1e-6
            likeliest = logits[t, token].item() >= logits[t].max().item() - 1e-5
            if not (likeliest if row["decoding"] == "greedy" else sampled):
                wrong.append(["token", row["decoding"], row["prompt_index"], t])
        if abs(entropy - row["entropy"]) > 1e-5:
            wrong.append(["entropy", row["entropy"], entropy])
        if (row["finish_reason"] == "length") != (len(row["completion_ids"]) == 10):
            wrong.append(["finish_reason", row])
    return wrong


def seed_of(prompt_index):
    return int.from_bytes(hashlib.sha256(f"0/{prompt_index}".encode()).digest()[:7], "big")


def main():
    gc.freeze()  # DeepSpeed collects garbage for every engine: the imports need not be walked each time
    deepspeed.init_distributed()
    rank = torch.distributed.get_rank()
    for name in NAMES:
        mine = run_case(name)
        every = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(every, mine)
        if rank == 0:
            (OUT / f"{name}.json").write_text(json.dumps(every))
    torch.distributed.barrier()
    if rank == 0:
        (OUT / "DONE").write_text("")


if __name__ == "__main__":
    main()
