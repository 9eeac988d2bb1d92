"""How the documents of a run share blocks: the model is asked whether it keeps them apart, before anything is tokenized."""

import dataclasses
from typing import Any

import torch
import torch.distributed as dist

from ds_stability.console import agree, global_rank
from ds_stability.data.border_probe import LEAK, Borders, is_flash, probe_borders
from ds_stability.data.long_documents import truncation_line
from ds_stability.data.packing import StreamingBlocks
from ds_stability.errors import UserError
from ds_stability.launchers.arguments import Command


def settle_packing(command: Command, config: Any) -> tuple[Command, Borders]:
    """The command with `packing` decided, and what was seen of the model. Collective: rank 0 asks, all ranks do the same.

    Call it while no DeepSpeed config is set in transformers, which would partition the small model.

    Raises:
        UserError: on every rank; the model sees later tokens.
    """
    found = [agree(lambda: _ask(command, config) if global_rank() == 0 else None)]
    if dist.is_initialized():
        dist.broadcast_object_list(found, src=0)
    borders: Borders = found[0]
    if not borders.causal and not is_flash(command.model.attn_implementation):  # the stand-in may be what does not mask
        raise UserError(f"{borders.model} sees the tokens that it is to predict (a later token moves earlier logits by {borders.future:.0%} of "
                        "their spread): it is no causal language model as configured (is_decoder?)")  # fmt: skip
    packing = command.spec.packing
    if packing == "auto":
        packing = "pack" if borders.apart and borders.causal else "pad"
    elif packing == "pack" and not borders.apart and global_rank() == 0:
        print(f"note: --packing pack: {_why(borders)}; the documents of a block are trained in each other's context", flush=True)
    return dataclasses.replace(command, spec=dataclasses.replace(command.spec, packing=packing)), borders


def _ask(command: Command, config: Any) -> Borders:
    from transformers import AutoModelForCausalLM

    def build(small: Any, **options: Any) -> torch.nn.Module:
        return AutoModelForCausalLM.from_config(small, trust_remote_code=command.model.trust_remote_code, **options)

    return probe_borders(config, build, command.model.attn_implementation)


def _why(borders: Borders) -> str:
    if not borders.known:
        return f"whether {borders.model} keeps the documents of a block apart could not be tried ({borders.reason})"
    if borders.leak >= LEAK:
        return f"{borders.model} lets a document see the one before it (its logits move by {borders.leak:.0%} of their spread)"
    return f"{borders.model} takes a document in a block for another than by itself (its logits move by {borders.shift:.0%} of their spread)"


def say_packing(command: Command, borders: Borders, facts: dict[str, Any]) -> None:
    """Say on rank 0 what padding and truncation cost, where they cost anything."""
    if global_rank() != 0:
        return
    train = facts.get("train", {})
    share = train.get("padding_share")
    cost = f"; {share:.0%} of the tokens are padding" if share is not None else ""
    if command.spec.packing == "pad" and command.data.packing == "auto":
        print(f"note: {_why(borders)}: every document gets rows of its own (--packing pad){cost}", flush=True)
    elif share is not None:
        print(f"note: {'--packing pad' if command.spec.packing == 'pad' else 'chats are packed whole'}{cost}", flush=True)
    if train.get("truncation"):
        print(f"warning: {train['truncation']}", flush=True)


def say_stream(stream: StreamingBlocks) -> None:
    """Say on rank 0 what truncation did in the part of a stream that was read last."""
    line = truncation_line(stream.planner.counts, stream.block_size, stream.rules)
    if line is not None and global_rank() == 0:
        print(f"warning: {line}; counted over the last pass", flush=True)


def flatten(inputs: dict[str, Any]) -> dict[str, Any]:
    """Rows [B, T] as one row [1, B T]: transformers reads borders for FlashAttention in batches of one row only.

    A row's first label is masked, so no token is predicted across the seam, and the positions of each row start at 0.
    """
    return {name: value.reshape(1, -1) if isinstance(value, torch.Tensor) and value.dim() == 2 else value for name, value in inputs.items()}


def needs_flattening(model: torch.nn.Module) -> bool:
    """Whether the model attends by FlashAttention."""
    return is_flash(model.config.get_text_config()._attn_implementation)
