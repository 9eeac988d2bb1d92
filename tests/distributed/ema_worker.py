"""Short trainings with an average of the weights, beside a brute-force one of the gathered weights.

Usage: as train_worker.py, SPEC.json OUT_DIR. Each run trains without the average, with it, and again from a checkpoint in the
middle. Rank 0 writes OUT_DIR/NAME.pt and, last, OUT_DIR/DONE.
"""

import sys
from pathlib import Path

import torch
from deepspeed import comm as dist

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
from train_data import DEFAULTS, micro_batches  # noqa: E402
from train_worker import gathered_weights, make_engine, train_step  # noqa: E402
from worker_job import begin, end  # noqa: E402

from ds_stability.export import gather_state_dict  # noqa: E402

DECAY, STEPS, HALF = 0.3, 5, 3


def bits(tensors):
    """Copies that compare by their bits: a NaN is equal to itself."""
    views = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
    return [tensor.detach().clone().contiguous().view(views[tensor.element_size()]) for tensor in tensors]


def same(one, other):
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def local_state(engine):
    """Everything of this rank that training goes on from: masters, partitions of the parameters, optimizer state."""
    optimizer = engine.optimizer
    tensors = list(engine.stability.gradients.partitions())
    for state in optimizer.optimizer.state.values():
        tensors += [value for value in state.values() if torch.is_tensor(value)]
    for parameter in engine.module.parameters():
        tensors.append(parameter.ds_tensor if hasattr(parameter, "ds_tensor") else parameter)
    return bits(tensors)


def logits(engine, run, world):
    engine.eval()
    with torch.no_grad():
        ids = next(iter(micro_batches(run, 999, 0, world)))[0]
        result = engine(input_ids=ids.to(engine.device)).logits.float().cpu()
    engine.train()
    return result


def brute_force(average, weights, update):
    """fp64, by the formula."""
    decay = min(DECAY, (1 + update) / (10 + update))
    return {name: decay * average[name] + (1 - decay) * weights[name].double() for name in average}


def inside(engine, run, world):
    """What the model is inside averaged_weights(), and whether all is as before afterwards."""
    before, plain = local_state(engine), logits(engine, run, world)
    with engine.stability.averaged_weights():
        found = {"masters": gathered_weights(engine), "logits": logits(engine, run, world), "state": gather_state_dict(engine)}
        refused = []
        for attempt in (engine.step, lambda: engine.save_checkpoint("never"), lambda: engine.load_checkpoint("never")):
            try:
                attempt()
            except RuntimeError as error:
                refused.append(str(error))
        found["refused"], found["metrics"] = refused, engine.stability.evaluation_metrics()
    found["same_bits"] = same(before, local_state(engine))
    found["same_logits"] = torch.equal(plain, logits(engine, run, world))
    state = gather_state_dict(engine)
    for failing in ((0, 1), (0,)):
        try:
            with engine.stability.averaged_weights():
                logits(engine, run, world)
                if dist.get_rank() in failing:
                    raise KeyError
        except KeyError:
            pass
        if len(failing) == 1:
            engine.stability.evaluation_metrics()  # a collective
        after, logits_after = gather_state_dict(engine), logits(engine, run, world)  # collectives: on every rank, whatever they give
        found[f"same_after_error_on_{len(failing)}"] = (
            torch.equal(plain, logits_after) and same(before, local_state(engine))
            and (state is None or same(bits(state.values()), bits(after.values()))))  # fmt: skip
    found["plain_logits"] = plain
    return found


def train(run, world, rank, out, load=None, averaged=True):
    stability = {**run["stability"], "ema": {"decay": DECAY}} if averaged else run["stability"]
    engine = make_engine({**run, "stability": stability}, world)
    result, average, update = {"losses": [], "decays": [], "inside": {}}, None, 0
    if load is not None:
        engine.load_checkpoint(load)
    elif averaged:
        average = {name: weight.double() for name, weight in gathered_weights(engine).items()}
    for step in range(engine.global_steps, STEPS):
        result["losses"].append(train_step(engine, run, step, rank, world, []))
        if averaged:
            result["decays"].append(engine.stability.metrics.get("stability/weight_average_decay"))
        if average is not None and not engine.stability.metrics.get("skipped"):
            update += 1
            average = brute_force(average, gathered_weights(engine), update)
        if averaged and engine.global_steps in (HALF, STEPS):
            found = inside(engine, run, world)
            if average is not None:
                found["expected"] = average
            result["inside"][engine.global_steps] = found
        if averaged and load is None and engine.global_steps == HALF:
            engine.save_checkpoint(str(out / f"{run['name']}_checkpoint"))
    result["end"] = local_state(engine)
    if averaged:
        result["average"] = bits(engine.stability.ema.tensors.values())
        result["updates"] = engine.stability.ema.updates
    engine.destroy()
    return result


def execute(run, out, rank, world):
    plain = train(run, world, rank, out, averaged=False)
    whole = train(run, world, rank, out)
    resumed = train(run, world, rank, out, load=str(out / f"{run['name']}_checkpoint"))
    checks = {
        "same_trajectory": repr(plain["losses"]) == repr(whole["losses"]) and same(plain["end"], whole["end"]),
        "resumed": same(whole["average"], resumed["average"]) and same(whole["end"], resumed["end"])
        and whole["updates"] == resumed["updates"] and whole["losses"][HALF:] == resumed["losses"],
        "elements": sum(tensor.numel() for tensor in whole["average"]),
        "exact": all(found["same_bits"] and found["same_logits"] for found in whole["inside"].values()),
        "after_error": all(found[f"same_after_error_on_{ranks}"] for found in whole["inside"].values() for ranks in (1, 2)),
    }  # fmt: skip
    everywhere = [None] * world
    torch.distributed.all_gather_object(everywhere, checks)
    if rank == 0:
        kept = {key: whole[key] for key in ("inside", "decays", "updates")}
        torch.save({**kept, "checks": everywhere}, out / f"{run['name']}.pt")


def main():
    spec, out, rank, world = begin()
    for run in spec["runs"]:
        execute({**DEFAULTS, **run}, out, rank, world)
    end(out)


if __name__ == "__main__":
    main()
