"""The engines of benchmarks/performance.py: one model and batch, trained as plain DeepSpeed, ds_stability, TRL or Liger do it.

Shape suffixes: B batch, T tokens of a sequence, D hidden size.
"""

import json
from typing import Any

import common
import deepspeed
import torch
import torch.distributed as dist
from transformers.modeling_outputs import CausalLMOutput

import ds_stability
from ds_stability.engine import StabilityMixin

DS_CONFIG = common.REPOSITORY / "ds_configs" / "loop_zero3.json"


class Trainer:
    """One arm of one case: `step()` is a whole optimizer step.

    Args:
        case: as `performance_cases.Case.spec` makes it.
        arm: {"loss": "own", "triton" (our own with its kernels), "trl", "liger" or "none" (no head either); "stability": a block, or None
            for plain DeepSpeed}.

    Raises:
        ImportError: the arm's library is not installed.
        RuntimeError: its loss needs CUDA and there is none.
    """

    def __init__(self, case: dict[str, Any], arm: dict[str, Any]):
        model = build_model(case)
        self.inputs: dict[str, Any] = {"use_cache": False}
        if arm["loss"] == "trl":
            use_trl_loss(model)
            self.inputs = {"fused_lm_head": True}
        elif arm["loss"] == "liger":
            use_liger_loss(model)
        elif arm["loss"] == "none":
            model = Headless(model)
        elif arm["loss"] == "triton":
            require_cuda()  # its interpreter would do for an answer, not for a time
        config = ds_config(case)
        arguments = {
            "model": model,
            "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True),
            "config": config,
        }
        if arm["stability"] is None:
            self.engine = deepspeed.initialize(**arguments)[0]
        else:
            config["stability"] = arm["stability"]
            self.engine = ds_stability.initialize(**arguments)[0]
            words = case["model"]["vocab_size"]
            self.engine.stability.set_high_frequency(list(range(words // 50)), words)
        self.inputs |= random_batch(case, self.engine.device)

    def step(self) -> None:
        loss = self.engine(**self.inputs).loss
        self.engine.backward(loss)
        self.engine.step()

    @property
    def loss_path(self) -> str | None:
        """The path that the block resolved to; None for an engine without one."""
        return self.engine.stability.config.loss_path if isinstance(self.engine, StabilityMixin) else None

    def copy_bytes(self) -> int:
        """Bytes of the averaging's means on this rank: the one stated copy of the gradient partition."""
        if self.loss_path is None or self.engine.stability.averaging is None:
            return 0
        return sum(mean.numel() * mean.element_size() for mean in self.engine.stability.averaging.means.values())

    def moment_bytes(self) -> int:
        """Bytes of what the base optimizer keeps for each parameter of this rank's partition; 0 before its first step."""
        kept = [value for state in self.engine.basic_optimizer.state.values() for value in state.values()]
        return sum(value.numel() * value.element_size() for value in kept if isinstance(value, torch.Tensor))


class Headless(torch.nn.Module):
    """A model without its head, trained on the mean square of its hidden states: what no loss can get below."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model.model

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, use_cache: bool) -> CausalLMOutput:
        hidden_BTD = self.model(input_ids=input_ids, use_cache=use_cache).last_hidden_state
        return CausalLMOutput(loss=hidden_BTD.float().square().mean())


def build_model(case: dict[str, Any]) -> torch.nn.Module:
    """A fresh LLaMA, the same weights on every rank and in every arm."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**case["model"], use_cache=False, bos_token_id=None, eos_token_id=None))
    return model.to(torch.bfloat16 if case["bf16"] else torch.float32).train()


def ds_config(case: dict[str, Any]) -> dict[str, Any]:
    """ds_configs/loop_zero3.json (`reduce_bucket_size` 5e6) with the case's batch, precision and changes of ZeRO."""
    config = json.loads(DS_CONFIG.read_text(encoding="utf-8"))
    for key in ("optimizer", "stability"):
        config.pop(key)
    config["zero_optimization"] |= case["zero"]
    return config | {"train_micro_batch_size_per_gpu": case["batch_size"], "bf16": {"enabled": case["bf16"]}}


def random_batch(case: dict[str, Any], device: torch.device) -> dict[str, torch.Tensor]:
    """Random tokens, other ones on each rank: neither time nor memory depends on what is learned."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    ids = torch.randint(0, case["model"]["vocab_size"], (case["batch_size"], case["block_size"]), generator=generator)
    return {"input_ids": ids.to(device), "labels": ids.to(device)}


def use_trl_loss(model: torch.nn.Module) -> None:
    """The loss of TRL's SFTTrainer (SFTConfig loss_type "nll", whose older name is "chunked_nll"), with the outputs it asks for."""
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))


def require_cuda() -> None:
    if not torch.cuda.is_available():
        raise RuntimeError("no CUDA")


def use_liger_loss(model: torch.nn.Module) -> None:
    """Liger's fused linear cross-entropy, and nothing else of Liger: the rest of the model is as in the other arms."""
    require_cuda()
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    apply_liger_kernel_to_llama(rope=False, rms_norm=False, swiglu=False, cross_entropy=False, fused_linear_cross_entropy=True,
                                model=model)  # fmt: skip


def announce_zero3(case: dict[str, Any]) -> Any:
    """Tell transformers that ZeRO-3 is on, as Trainer does, for as long as the answer lives: TRL gathers its head only then.

    After the models are built, which transformers would otherwise build in parts.
    """
    from transformers.integrations import HfDeepSpeedConfig

    return HfDeepSpeedConfig(ds_config(case))
