"""A plain transformers Trainer script, run several times in one launch; writes what test_trainer.py compares.

Usage: deepspeed --num_gpus N trainer_worker.py SPEC.json OUT. SPEC is {"runs": [RUN, ...]}; see `DEFAULTS` for a RUN.
Each run trains into OUT/NAME. Rank 0 writes OUT/NAME.pt and, last, OUT/DONE; an error of ours goes to OUT/NAME.error.RANK.
"""

import json
import shutil
import sys
from pathlib import Path

import deepspeed
import torch
import transformers
from accelerate.state import AcceleratorState
from deepspeed import comm as dist
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from worker_job import begin, end

PLAIN_INITIALIZE, PLAIN_CALLBACKS = deepspeed.initialize, list(transformers.trainer.DEFAULT_CALLBACKS)
PLAIN_METHODS = [Trainer.train, Trainer.evaluate, Trainer.predict]

import ds_stability  # noqa: E402
import ds_stability.integrations.transformers as integration  # noqa: E402

REPOSITORY = Path(__file__).resolve().parents[2]
VOCAB, LENGTH = 97, 16
DEFAULTS = {
    "enable": True,
    "block": None,  # the stability block; None: the config has none
    "block_of_rank": None,  # one block per rank
    "config": "zero3_cpu.json",
    "steps": 4,
    "accumulation": 2,
    "arguments": {},  # more TrainingArguments
    "lora": False,
    "trainer": "Trainer",
    "evaluation": None,  # names of evaluation sets; None: no evaluation
    "resume": None,  # {"run": name, "step": n}: continue a copy of that run's folder from checkpoint-n
    "evaluate_after": False,  # a prediction, then an evaluation, after the training
    "evaluate_only": False,
    "save_averaged": False,  # save_model() with the average of the weights, into OUT/NAME/average
    "poison": False,  # weights that are NaN from the start
}


class PreferenceTrainer(Trainer):
    """As DPO does: a loss of its own from the logits, with the model's loss computed and ignored."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        loss = outputs.logits.float().logsumexp(-1).mean()
        return (loss, outputs) if return_outputs else loss


class NoLabelsTrainer(Trainer):
    """As TRL's trainers do: the model's loss is never computed."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(input_ids=inputs["input_ids"])
        loss = outputs.logits.float().logsumexp(-1).mean()
        return (loss, outputs) if return_outputs else loss


class FunctionTrainer(Trainer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs, compute_loss_func=lambda outputs, labels, num_items_in_batch: outputs.logits.float().mean())


class FirstTrainer(Trainer):
    """On every rank it believes to be the first process, as under Axolotl on CPUs."""

    def is_world_process_zero(self):
        return True


TRAINERS = {cls.__name__: cls for cls in (Trainer, FirstTrainer, PreferenceTrainer, NoLabelsTrainer, FunctionTrainer)}


class Sequences(torch.utils.data.Dataset):
    """Zipf-like token ids with uneven masks, so that surprisal is skewed and ranks count different numbers of tokens."""

    def __init__(self, rows, seed):
        weights = 1.0 / torch.arange(1, VOCAB + 1).float()
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.multinomial(weights, rows * LENGTH, replacement=True, generator=generator).view(rows, LENGTH)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        labels = self.ids[index].clone()
        labels[: index % 5] = -100
        return {"input_ids": self.ids[index], "labels": labels}


def build_model(run):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, hidden_size=32, intermediate_size=56, num_hidden_layers=2,
                                         num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64,
                                         use_cache=False, initializer_range=0.2))  # fmt: skip
    if run["poison"]:
        torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    if run["lora"]:
        from peft import LoraConfig, get_peft_model

        if run["arguments"].get("activation_checkpointing"):
            model.enable_input_require_grads()
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]))
    return model


def build_trainer(run, folder, rank):
    config = json.loads((REPOSITORY / "ds_configs" / run["config"]).read_text())
    del config["stability"]
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    block = run["block_of_rank"][rank] if run["block_of_rank"] else run["block"]
    if block is not None:
        config["stability"] = block
    arguments = {
        "output_dir": str(folder), "deepspeed": config, "use_cpu": True, "report_to": "none", "disable_tqdm": True,
        "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "max_steps": run["steps"], "learning_rate": 1e-2,
        "gradient_accumulation_steps": run["accumulation"], "logging_steps": 1, "save_strategy": "no", "seed": 0,
        **run["arguments"],
    }  # fmt: skip
    evaluation = {name: Sequences(8, 100 + index) for index, name in enumerate(run["evaluation"] or [])}
    if len(evaluation) == 1:
        evaluation = next(iter(evaluation.values()))
    return TRAINERS[run["trainer"]](model=build_model(run), args=TrainingArguments(**arguments),
                                    train_dataset=Sequences(64, 0), eval_dataset=evaluation or None)  # fmt: skip


def full_weights(engine):
    weights = {}
    for name, parameter in engine.module.named_parameters():
        full = deepspeed.utils.safe_get_full_fp32_param(parameter)
        if full is None:  # frozen: no optimizer holds it
            with deepspeed.zero.GatheredParameters([parameter]):
                full = parameter.detach().float().clone()
        weights[name] = full.cpu().clone()
    return weights


def facts(trainer, engine):
    """What a trained run is judged by."""
    return {
        "weights": full_weights(engine),
        "log": trainer.state.log_history,
        "engine": type(engine).__name__,
        "is_deepspeed": isinstance(engine, deepspeed.DeepSpeedEngine),
        "is_accelerators": trainer.accelerator.deepspeed_engine_wrapped.engine is engine,
        "unwraps": trainer.accelerator.unwrap_model(engine) is trainer.model,
        "world": [trainer.accelerator.num_processes, engine.world_size, engine.zero_optimization_stage()],
        "undone": deepspeed.initialize is PLAIN_INITIALIZE and transformers.trainer.DEFAULT_CALLBACKS == PLAIN_CALLBACKS
        and [Trainer.train, Trainer.evaluate, Trainer.predict] == PLAIN_METHODS,
        "trainable": [name for name, parameter in engine.module.named_parameters() if parameter.requires_grad],
    }


def execute(run, out, rank):
    folder, checkpoint = out / run["name"], None
    if run["resume"]:
        if rank == 0:
            shutil.copytree(out / run["resume"]["run"], folder)
        dist.barrier()
        checkpoint = str(folder / f"checkpoint-{run['resume']['step']}")
    if run["enable"]:
        integration.enable()
        integration.enable()
    try:
        trainer = build_trainer(run, folder, rank)
        if not run["evaluate_only"]:
            trainer.train(resume_from_checkpoint=checkpoint)
        if run["evaluate_after"]:
            trainer.predict(Sequences(8, 7))
        if run["evaluate_after"] or run["evaluate_only"]:
            trainer.evaluate()
    finally:
        integration.disable()
    engine = trainer.model_wrapped
    if run["evaluate_only"]:
        if rank == 0:
            torch.save({"log": trainer.state.log_history, "engine": type(engine).__name__}, out / f"{run['name']}.pt")
        return
    result = facts(trainer, engine)
    stability = ds_stability.engine_of(trainer.model)
    if run["save_averaged"]:
        with stability.stability.averaged_weights():
            result["averages"] = full_weights(engine)
            trainer.save_model(str(folder / "average"))
    result["extended"] = stability is not None
    if stability is not None:
        result["state"] = stability.stability.state_dict()
        states = [None] * dist.get_world_size()
        dist.all_gather_object(states, result["state"])
        result["same_on_ranks"] = all(state == states[0] for state in states)
    if rank == 0:
        torch.save(result, out / f"{run['name']}.pt")
    engine.destroy()


def main():
    spec, out, rank, _ = begin()
    untouched = deepspeed.initialize is PLAIN_INITIALIZE and transformers.trainer.DEFAULT_CALLBACKS == PLAIN_CALLBACKS
    for run in spec["runs"]:
        AcceleratorState._reset_state()  # it keeps the first DeepSpeed config of a process
        run = {**DEFAULTS, **run}
        try:
            execute(run, out, rank)
        except (ds_stability.UserError, ds_stability.SkippedStepsError) as error:
            (out / f"{run['name']}.error.{rank}").write_text(f"{type(error).__name__}: {error}")
    end(out, json.dumps({"import_changes_nothing": untouched}))


if __name__ == "__main__":
    sys.argv = [argument for argument in sys.argv if not argument.startswith("--local_rank")]
    main()
