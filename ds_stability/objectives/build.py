"""From the block's `objective` to what the loss optimizes: once per run, or once per micro-batch."""

import random

import torch

from ds_stability.errors import StabilityConfigError
from ds_stability.loss import IGNORE_INDEX
from ds_stability.objectives import token
from ds_stability.objectives.config import (
    CrossEntropy,
    EntropyRegularized,
    Focal,
    Gem,
    LabelSmoothing,
    Objectives,
    ReverseKL,
    Tofu,
    UnlikelihoodSequence,
    UnlikelihoodToken,
)
from ds_stability.objectives.reverse_kl import Reference, reverse_kl
from ds_stability.objectives.rows import MicroBatch, micro_batch
from ds_stability.objectives.unlikelihood import repeated_ngrams, sequence_level, token_level
from ds_stability.weighted_loss import Objective, RowObjective, cross_entropy


def token_objective(config: Objectives) -> Objective:
    """The function of a token's logits and label; plain cross-entropy for an objective that prepares each micro-batch."""
    match config:
        case LabelSmoothing(smoothing=smoothing):
            return token.label_smoothing(smoothing)
        case Focal(gamma=gamma):
            return token.focal(gamma)
        case Tofu(gamma=gamma, beta=beta):
            return token.tofu(gamma, beta)
        case EntropyRegularized(coefficient=coefficient):
            return token.entropy_regularized(coefficient)
        case Gem(beta=beta, h=h):
            return token.gem(beta, h)
        case CrossEntropy() | UnlikelihoodToken() | UnlikelihoodSequence() | ReverseKL():
            return cross_entropy


class Preparation:
    """What an objective does before the forward of each training micro-batch.

    Args:
        config: an objective of `objectives.config.PREPARED`.
        engine: the engine that trains.

    Raises:
        StabilityConfigError: the reference model cannot be loaded or does not fit.
    """

    def __init__(self, config: Objectives, engine):
        self.config = config
        self.reference = Reference(config.reference, engine) if isinstance(config, ReverseKL) else None

    def on_own_text(self, step: int) -> bool:
        """Whether optimizer step `step` (skipped ones counted) trains on generated text; the same on every rank."""
        if not isinstance(self.config, UnlikelihoodSequence):
            return False
        return random.Random(f"unlikelihood {step}").random() < self.config.probability

    def prepare(self, engine, inputs: dict, own_text: bool) -> tuple[dict, Objective | RowObjective]:
        """(keyword arguments for the forward, the micro-batch's objective). Collective where weights are partitioned."""
        match self.config:
            case UnlikelihoodToken(alpha=alpha):
                return inputs, token_level(alpha, micro_batch(inputs))
            case ReverseKL(coefficient=coefficient, cross_entropy=weight):
                return inputs, reverse_kl(coefficient, weight, self.reference.logits(inputs))
            case UnlikelihoodSequence() if own_text:
                return self._own_text(engine, inputs)
        return inputs, cross_entropy

    def _own_text(self, engine, inputs: dict) -> tuple[dict, RowObjective]:
        """The micro-batch's prefixes, continued greedily by the model, in place of the micro-batch."""
        batch = micro_batch(inputs)
        _check_context(engine, self.config, min(self.config.prefix_tokens, batch.input_ids_BT.shape[1]))
        ids_BT = continue_greedily(engine, prefixes(batch, inputs.get("labels"), self.config.prefix_tokens), self.config)
        prefix = ids_BT.shape[1] - self.config.max_new_tokens
        repeated_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
        repeated_BT[:, prefix:] = repeated_ngrams(ids_BT[:, prefix:], self.config.n)
        labels_BT = ids_BT.clone()
        labels_BT[:, :prefix] = IGNORE_INDEX
        replaced = {"input_ids": ids_BT, "labels": labels_BT}
        if inputs.get("num_items_in_batch") is not None:  # of the step: every micro-batch of it generates as many tokens
            count = ids_BT.shape[0] * self.config.max_new_tokens * engine.gradient_accumulation_steps()
            replaced["num_items_in_batch"] = count * engine.seq_dp_world_size
        kept = {key: value for key, value in inputs.items() if key in ("use_cache", "return_dict")}
        return {**kept, **replaced}, sequence_level(repeated_BT)


def refuse_unprepared() -> None:
    """Called when a forward that was not prepared is trained on after all."""
    raise StabilityConfigError(
        "a forward in eval mode is trained on, after others that were trained on in train mode, and the objective is prepared for "
        "training forwards alone: call engine.train() before it"
    )


def prefixes(batch: MicroBatch, labels_BT: torch.Tensor | None, length: int) -> torch.Tensor:
    """[B, <= length]: the first tokens of each row that are not padding, cut to the shortest row.

    Padding is what the attention mask leaves out, and what stands behind a row's last label. A row of padding alone counts as whole.
    """
    present_BT = batch.present_BT
    if labels_BT is not None:
        supervised_BT = (labels_BT != IGNORE_INDEX).long()
        present_BT = present_BT & (supervised_BT.flip(1).cumsum(1).flip(1) > 0)
    empty_B1 = ~present_BT.any(1, keepdim=True)
    present_BT = present_BT | empty_B1
    width = min(length, int(present_BT.sum(1).min()))
    order_BT = (~present_BT).to(torch.int8).argsort(dim=1, stable=True)  # what is present first, in its order
    return batch.input_ids_BT.gather(1, order_BT[:, :width])


def _check_context(engine, config: UnlikelihoodSequence, prefix: int) -> None:
    """Raises StabilityConfigError: the model's context is too short for the longest prefix and what is generated."""
    from ds_stability.gathered import base_model

    context = getattr(base_model(engine.module).config.get_text_config(), "max_position_embeddings", None)
    if context is not None and prefix + config.max_new_tokens > context:
        raise StabilityConfigError(
            f"stability.objective.max_new_tokens: {config.max_new_tokens} is not allowed; must be at most {max(context - prefix, 0)}, as the "
            f"model's context is {context} and a prefix has {prefix} tokens"
        )


def continue_greedily(engine, start_BT: torch.Tensor, config: UnlikelihoodSequence) -> torch.Tensor:
    """[B, prefix + max_new_tokens]: each row of `start_BT` and exactly `max_new_tokens` more. Collective under ZeRO-3."""
    from transformers import GenerationConfig

    from ds_stability.gathered import base_model, standalone_module

    with standalone_module(engine) as module:
        base_model(module).generation_config = GenerationConfig()
        return module.generate(
            input_ids=start_BT, attention_mask=torch.ones_like(start_BT), synced_gpus=False,
            # No end token: every text gets its whole budget, as in the paper.
            generation_config=GenerationConfig(do_sample=False, max_new_tokens=config.max_new_tokens, use_cache=True,
                                               eos_token_id=None, pad_token_id=0),
        ).clone()  # fmt: skip
