"""Objectives that belong to one micro-batch, and what they are made from.

Shape suffixes: B sequences, T positions, N = B * T tokens of the micro-batch in order, C tokens of a chunk, V vocabulary.
"""

from dataclasses import dataclass

import torch

from ds_stability.errors import StabilityConfigError


@dataclass(frozen=True)
class MicroBatch:
    """What the model is given. `starts_BT`: position at which the document of each position begins.

    `present_BT`: False where padding stands.
    """

    input_ids_BT: torch.Tensor
    starts_BT: torch.Tensor
    present_BT: torch.Tensor


def micro_batch(inputs: dict) -> MicroBatch:
    """From the keyword arguments of a forward: `input_ids`, and `position_ids` (documents) and `attention_mask` (padding).

    Raises:
        StabilityConfigError: there are no token ids.
    """
    ids_BT = inputs.get("input_ids")
    if not isinstance(ids_BT, torch.Tensor) or ids_BT.dim() != 2:
        raise StabilityConfigError("stability.objective needs the token ids: call the engine with input_ids [batch, sequence]")
    places_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device).expand_as(ids_BT)
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    present_BT = mask.bool() if mask is not None and mask.dim() == 2 else torch.ones_like(ids_BT, dtype=torch.bool)
    starts_BT = torch.zeros_like(ids_BT)
    if positions is not None and positions.dim() == 2:  # a position of 0 begins a document; left padding may repeat it
        starts_BT = torch.where(positions.expand_as(ids_BT) == 0, places_BT, 0).cummax(dim=1).values
    return MicroBatch(ids_BT, starts_BT, present_BT)
