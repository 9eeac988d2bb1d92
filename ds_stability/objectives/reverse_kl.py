"""KL(p || r) of the model p to a frozen reference model r, beside cross-entropy.

The reverse direction, in which KL penalties of fine-tuning are used (Ziegler et al. 2019, arXiv 1909.08593; Gu et al. 2024,
arXiv 2306.08543): it charges the model for mass where the reference has none. The reference runs once per micro-batch under
no_grad, in an engine of its own that is partitioned as the trained one is; its logits, in its dtype, are kept until the
micro-batch's backward. Shape suffixes: N tokens of the micro-batch, C tokens of a chunk, V vocabulary.
"""

import torch
import torch.nn.functional as F

from ds_stability.errors import StabilityConfigError, UserError
from ds_stability.weighted_loss import Objective, RowObjective, cross_entropy

#: Arguments of a forward that decide what the logits are; labels are not among them.
INPUTS = ("input_ids", "attention_mask", "position_ids")


def reverse_kl(coefficient: float, ce_weight: float, reference_NV: torch.Tensor) -> RowObjective:
    """ce_weight * CE + coefficient * sum_j p_j (log p_j - log r_j)."""

    def at(rows) -> Objective:
        chosen_CV = reference_NV[rows]

        def objective(logits_CV, labels_C):
            loss_C = coefficient * divergence(logits_CV, chosen_CV.float())
            return loss_C + ce_weight * cross_entropy(logits_CV, labels_C) if ce_weight else loss_C

        return objective

    return RowObjective(at, reference_NV.shape[0])


def divergence(logits_CV: torch.Tensor, reference_CV: torch.Tensor) -> torch.Tensor:
    """KL(p || r) in nats, [C]. Where p is exactly 0 nothing is added; where r alone is 0 it is infinite."""
    possible_CV = logits_CV != -torch.inf
    log_p_CV = F.log_softmax(logits_CV, -1).masked_fill(~possible_CV, 0.0)
    log_r_CV = F.log_softmax(reference_CV, -1).masked_fill(~possible_CV, 0.0)
    return (torch.softmax(logits_CV, -1) * (log_p_CV - log_r_CV)).sum(-1)


class Reference:
    """A frozen causal LM in a DeepSpeed engine without an optimizer.

    Args:
        name: folder or hub name.
        engine: the engine that trains; the reference takes its precision, and is partitioned if it is.

    Raises:
        StabilityConfigError: no model could be loaded, or its vocabulary is another one.
    """

    def __init__(self, name: str, engine):
        from ds_stability.console import agree
        from ds_stability.gathered import base_model, is_partitioned

        dtype = torch.bfloat16 if engine.bfloat16_enabled() else torch.float16 if engine.fp16_enabled() else torch.float32
        model = agree(lambda: _load(name, dtype))
        width = base_model(engine.module).config.get_text_config().vocab_size
        if model.config.get_text_config().vocab_size != width:
            raise StabilityConfigError(
                f"stability.objective.reference {name}: has a vocabulary of {model.config.get_text_config().vocab_size}, the trained "
                f"model one of {width}; give a model with the same tokenizer"
            )
        self.engine = _frozen_engine(model, engine, is_partitioned(engine))

    @torch.no_grad()
    def logits(self, inputs: dict) -> torch.Tensor:
        """[N, V] for the micro-batch `inputs`. A collective under ZeRO-3."""
        given = {key: inputs[key] for key in INPUTS if inputs.get(key) is not None}
        logits_BTV = self.engine(**given, use_cache=False).logits
        return logits_BTV.reshape(-1, logits_BTV.shape[-1])


def _load(name: str, dtype: torch.dtype):
    from ds_stability.weights import load_causal_lm

    try:
        model = load_causal_lm(name, f"stability.objective.reference {name}", dtype=dtype)
    except UserError as error:
        raise StabilityConfigError(str(error)) from None
    model.config.get_text_config().use_cache = False  # transformers ignores borders of packed documents with a cache
    return model.eval().requires_grad_(False)


def _frozen_engine(model, engine, partitioned: bool):
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": engine.train_micro_batch_size_per_gpu(),
        "zero_optimization": {"stage": 3 if partitioned else 0},
        "bf16": {"enabled": bool(engine.bfloat16_enabled())},
        "fp16": {"enabled": bool(engine.fp16_enabled())},
        "steps_per_print": 10**9,
    }
    if not partitioned:
        model.to(engine.device)
    frozen = deepspeed.initialize(model=model, config=config)[0]
    frozen.eval()
    return frozen
