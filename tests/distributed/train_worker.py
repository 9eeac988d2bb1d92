"""Runs a list of short trainings under the real `deepspeed` launcher and saves what the tests compare.

Usage: deepspeed --num_gpus N train_worker.py SPEC.json OUT_DIR. SPEC is {"runs": [RUN, ...]}; see train_data.py, `DEFAULTS`, for a RUN.
Rank 0 writes OUT_DIR/NAME.pt (weights, losses, metrics, state, collectives) and, last, OUT_DIR/DONE.
"""

import json
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import deepspeed
import torch
from deepspeed import comm as dist

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
from host_syncs import HostSyncs  # noqa: E402
from train_data import DEFAULTS, build_model, held_out, micro_batches, num_items  # noqa: E402
from worker_job import begin, end  # noqa: E402

import ds_stability  # noqa: E402
from ds_stability import collective  # noqa: E402


def base_config(run, world):
    config = {
        "train_micro_batch_size_per_gpu": run["micro"],
        "gradient_accumulation_steps": run["gas"],
        "train_batch_size": run["micro"] * run["gas"] * world,
        "gradient_clipping": run["clip"],
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 3, "reduce_bucket_size": 3000, "stage3_param_persistence_threshold": 0},
    }
    optimizer = {"adamw": {"type": "AdamW", "params": {"lr": run["lr"], "weight_decay": 0.01, "torch_adam": True}},
                 "sgd": {"type": "SGD", "params": {"lr": run["lr"]}},
                 "cpuadam": {"type": "AdamW", "params": {"lr": run["lr"], "weight_decay": 0.01}}}  # fmt: skip
    config["optimizer"] = optimizer[run["optimizer"]]
    for key, value in run["ds"].items():
        config[key] = {**config.get(key, {}), **value} if isinstance(value, dict) else value
    return config


def gathered_weights(engine):
    weights = {}
    for name, parameter in engine.module.named_parameters():
        full = deepspeed.utils.safe_get_full_fp32_param(parameter)
        weights[name] = (parameter.detach().float() if full is None else full).cpu().clone()
    return weights


def make_engine(run, world):
    model = build_model(run)
    if run["checkpointing"]:
        model.gradient_checkpointing_enable({"use_reentrant": run["checkpointing"] == "reentrant"})
    if run["freeze"]:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(run["freeze"] not in name)
        model.enable_input_require_grads()
    config = base_config(run, world)
    trainable = [p for p in model.parameters() if p.requires_grad]
    if run["engine"] == "plain":
        return deepspeed.initialize(model=model, model_parameters=trainable, config=config)[0]
    block = run["other_block"] if run["other_block"] and dist.get_rank() == 1 else run["stability"]
    config = {**config, "stability": block}
    if run["died"]:
        die_in_backward(run, model, config, trainable)
    if run["via_args"]:
        path = Path(sys.argv[2]) / f"{run['name']}.{dist.get_rank()}.json"
        text = json.dumps(config)
        path.write_text(f"{text[:-1]},\n  # as DeepSpeed reads it\n}}" if run["comments"] else text)
        engine = ds_stability.initialize(SimpleNamespace(**{run["via_args"]: str(path)}), model, model_parameters=trainable)[0]
    else:
        engine = ds_stability.initialize(model=model, model_parameters=trainable, config=config)[0]
    assert isinstance(engine, deepspeed.DeepSpeedEngine)
    if run["high_frequency"]:
        engine.stability.set_high_frequency(run["high_frequency"], run["vocab"])
    if run["held_out"]:
        engine.stability.set_held_out(held_out(run, dist.get_rank()))
    return engine


def die_in_backward(run, model, config, trainable):
    """An engine of `model` that a user gives up, as after running out of memory."""
    engine = ds_stability.initialize(model=model, model_parameters=trainable, config=config)[0]
    ids, labels = next(iter(micro_batches(run, 0, 0, dist.get_world_size())))
    handle = model.get_output_embeddings().weight.register_hook(interrupted)
    try:
        engine.backward(engine(input_ids=ids, labels=labels).loss)
    except KeyboardInterrupt:
        handle.remove()
    assert any(parameter._backward_hooks for parameter in model.parameters())
    engine.destroy()
    model.zero_grad()
    assert not any(parameter._backward_hooks for parameter in model.parameters())


def interrupted(grad):
    raise KeyboardInterrupt


def stray_pass(engine, run, step, world):
    """An evaluation that forgot `torch.no_grad()`: what it sees is not training."""
    was = engine.module.training
    engine.eval()
    ids, labels = next(iter(micro_batches(run, 500 + step, dist.get_rank(), world)))
    assert torch.is_tensor(engine(input_ids=ids, labels=labels).logits)
    engine.module.train(was)


def poison_hook(engine, run, step, micro, rank):
    """Multiplies what the embedding (or, "at": "logits", the output layer) gives in one micro-batch, or in all of a step."""
    poison = run["poison"]
    if not poison or poison["step"] not in (step, "all") or poison["rank"] not in (rank, "all"):
        return None
    if poison.get("micro", micro) != micro or poison.get("at") == "loss":
        return None
    value, logits = float(poison["value"]), poison.get("at") == "logits"
    place = engine.module.get_output_embeddings() if logits else engine.module.get_input_embeddings()
    return place.register_forward_hook(lambda module, args, out: out * value)


def loss_factor(run, step, micro, rank):
    """What a spike of the loss itself ("at": "loss") multiplies it with."""
    poison = run["poison"] or {"at": None}
    struck = poison.get("at") == "loss" and poison["step"] == step and poison["micro"] == micro and poison["rank"] in (rank, "all")
    return float(poison["value"]) if struck else 1.0


def train_step(engine, run, step, rank, world, syncs):
    """Losses of the micro-batches; `syncs` gets how often the host would have waited, before the step and in it."""
    total = num_items(run, step, world) if run["num_items"] else None
    losses = []
    if run["shrink"] and run["shrink"]["step"] == step:
        setting = engine.stability.loss.setting
        engine.stability.loss.setting = replace(setting, mean_weight=setting.mean_weight / run["shrink"]["by"])
    for micro, (ids, labels) in enumerate(micro_batches(run, step, rank, world)):
        hook = poison_hook(engine, run, step, micro, rank)
        if run["stray"]:
            stray_pass(engine, run, step, world)
        extra = {"num_items_in_batch": total} if run["num_items"] else {}
        with watching(run) as before:
            loss = engine(input_ids=ids.to(engine.device), labels=labels.to(engine.device), **extra).loss
            if hook is not None:
                hook.remove()
            factor = loss_factor(run, step, micro, rank)
            if run["direct"]:
                loss.backward()
            elif run["num_items"]:
                engine.backward(loss * world, scale_wrt_gas=False)
            else:
                engine.backward(loss if factor == 1.0 else loss * factor)
        with watching(run) as inside:
            engine.step()
        syncs.append((before.places, inside.places))
        losses.append(float(loss.detach()))
    return losses


def watching(run):
    return HostSyncs().watching() if run["syncs"] else nullcontext(HostSyncs())


def evaluate(engine, run, world):
    engine.eval()
    with torch.no_grad():
        for ids, labels in micro_batches(run, 999, dist.get_rank(), world):
            engine(input_ids=ids.to(engine.device), labels=labels.to(engine.device))
    engine.train()


def collectives():
    from deepspeed.comm.comm import comms_logger

    return {op: {size: row[0] for size, row in sizes.items()} for op, sizes in comms_logger.get_raw_data().items()}


def execute(run, out, rank, world):
    collective.HEAR_SECONDS = run["hear_seconds"]
    engine = make_engine(run, world)
    losses, metrics, history, counts, syncs, first = [], [], [], [], [], 0
    if run["load"]:
        path, _ = engine.load_checkpoint(run["load"])
        assert path is not None
        first = engine.global_steps
    for step in range(first, run["steps"]):
        losses.append(train_step(engine, run, step, rank, world, syncs))
        if run["engine"] == "ours":
            metrics.append({"step": engine.global_steps, **engine.stability.metrics})
            history.append(engine.stability.state_dict() if run["history"] else None)
        if run["evaluate"]:
            evaluate(engine, run, world)
        if run["ds"].get("comms_logger"):
            counts.append(collectives())
        if run["save_at"] == engine.global_steps:
            engine.save_checkpoint(str(out / f"{run['name']}_checkpoint"))
    result = {"weights": gathered_weights(engine), "losses": losses, "metrics": metrics, "collectives": counts,
              "syncs": syncs, "skipped": engine.skipped_steps, "grad_norm": engine.get_global_grad_norm()}  # fmt: skip
    if run["engine"] == "ours":
        result["state"] = engine.stability.state_dict()
        states = [None] * world
        torch.distributed.all_gather_object(states, result["state"]["stabilizers"])
        result["states"], result["history"] = states, history
        result["decisions"] = [None] * world
        torch.distributed.all_gather_object(result["decisions"], [bool(row.get("skipped")) for row in metrics])
    if rank == 0:
        torch.save(result, out / f"{run['name']}.pt")
    engine.destroy()


def main():
    spec, out, rank, world = begin()
    for run in spec["runs"]:
        run = {**DEFAULTS, **run}
        try:
            execute(run, out, rank, world)
        except (ds_stability.UserError, ds_stability.SkippedStepsError) as error:
            (out / f"{run['name']}.error.{rank}").write_text(f"{type(error).__name__}: {error}")
    end(out)


if __name__ == "__main__":
    sys.argv = [a for a in sys.argv if not a.startswith("--local_rank")]
    main()
