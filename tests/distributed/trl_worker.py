"""Plain TRL scripts, run several times in one launch; writes what test_trl.py compares.

Usage: deepspeed --num_gpus N trl_worker.py SPEC.json OUT. SPEC is {"runs": [RUN, ...]}; see `DEFAULTS` for a RUN.
Each run trains into OUT/NAME. Rank 0 writes OUT/NAME.pt and, last, OUT/DONE; an error of ours goes to OUT/NAME.error.RANK.
"""

import json
import os
import pydoc_data.topics
import sys
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}

import deepspeed  # noqa: E402
import torch  # noqa: E402
from accelerate.state import AcceleratorState  # noqa: E402
from datasets import Dataset  # noqa: E402
from deepspeed import comm as dist  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer  # noqa: E402
from worker_job import begin, end  # noqa: E402

import ds_stability  # noqa: E402
import ds_stability.integrations.transformers as integration  # noqa: E402
from ds_stability.data.tokenizer import train_bpe  # noqa: E402

REPOSITORY = Path(__file__).resolve().parents[2]
PLAIN_LOSS = SFTTrainer.compute_loss
VOCAB = 300
DEFAULTS = {"enable": True, "trainer": "sft", "block": None, "steps": 3, "arguments": {}, "lora": False, "evaluate": False}


def sentences():
    text = pydoc_data.topics.topics["assignment"].split(". ")
    return [" ".join(sentence.split())[:80] for sentence in text if len(sentence) > 20][:64]


def prepare(folder):
    """A tokenizer and a random model on disk, as a TRL script would find them."""
    torch.manual_seed(0)
    tokenizer = train_bpe(sentences(), VOCAB)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, hidden_size=32, intermediate_size=56, num_hidden_layers=2,
                                         num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=256,
                                         initializer_range=0.2, bos_token_id=0, eos_token_id=1, pad_token_id=2))  # fmt: skip
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def build_trainer(run, out):
    config = json.loads((REPOSITORY / "ds_configs" / "zero3_cpu.json").read_text())
    del config["stability"]
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    if run["block"] is not None:
        config["stability"] = run["block"]
    arguments = {
        "output_dir": str(out / run["name"]), "deepspeed": config, "use_cpu": True, "report_to": "none", "disable_tqdm": True,
        "bf16": False, "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "max_steps": run["steps"],
        "gradient_accumulation_steps": 2, "learning_rate": 1e-2, "logging_steps": 1, "save_strategy": "no",
        "gradient_checkpointing": False, "max_length": 64, **run["arguments"],
    }  # fmt: skip
    texts, model = sentences(), str(out / "model")
    if run["trainer"] == "dpo":
        rows = [{"prompt": a, "chosen": b, "rejected": c} for a, b, c in zip(texts, texts[1:], texts[2:], strict=False)]
        return DPOTrainer(model=model, args=DPOConfig(**arguments), train_dataset=Dataset.from_list(rows))
    lora = None
    if run["lora"]:
        from peft import LoraConfig

        lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    held_out = Dataset.from_list([{"text": text} for text in texts[:8]]) if run["evaluate"] else None
    return SFTTrainer(model=model, args=SFTConfig(**arguments), eval_dataset=held_out, peft_config=lora,
                      train_dataset=Dataset.from_list([{"text": text} for text in texts]))  # fmt: skip


def trained_weights(engine):
    return {name: deepspeed.utils.safe_get_full_fp32_param(parameter).cpu().clone()
            for name, parameter in engine.module.named_parameters() if parameter.requires_grad}  # fmt: skip


def execute(run, out, rank):
    if run["enable"]:
        integration.enable()
    try:
        trainer = build_trainer(run, out)
        trainer.train()
    finally:
        integration.disable()
    engine = trainer.model_wrapped
    result = {
        "weights": trained_weights(engine),
        "log": trainer.state.log_history,
        "extended": ds_stability.engine_of(trainer.model) is engine,
        "undone": SFTTrainer.compute_loss is PLAIN_LOSS,
    }
    if rank == 0:
        torch.save(result, out / f"{run['name']}.pt")
    engine.destroy()


def main():
    spec, out, rank, _ = begin()
    if rank == 0:
        prepare(out / "model")
    dist.barrier()
    for run in spec["runs"]:
        AcceleratorState._reset_state()  # it keeps the first DeepSpeed config of a process
        run = {**DEFAULTS, **run}
        try:
            execute(run, out, rank)
        except ds_stability.UserError as error:
            (out / f"{run['name']}.error.{rank}").write_text(f"{type(error).__name__}: {error}")
    end(out)


if __name__ == "__main__":
    sys.argv = [argument for argument in sys.argv if not argument.startswith("--local_rank")]
    main()
