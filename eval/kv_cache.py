"""A key-value cache that is allocated once, at the length that a batch can reach.

transformers' DynamicCache joins old and new keys at every step, which copies the whole cache once per token; its StaticCache
attends over the full length at every step. This one writes in place and shows the filled part: the same numbers.
"""

import inspect
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class RightSizedLayer(DynamicLayer):
    """Keys and values of one layer with full attention, in buffers [B, heads, capacity, head size]."""

    def __init__(self, capacity: int):
        super().__init__()
        self.capacity, self.length = capacity, 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.key_buffer = self._empty_like(key_states)
            self.value_buffer = self._empty_like(value_states)  # its head size may differ
        end = self.length + key_states.shape[-2]
        self.key_buffer[:, :, self.length : end] = key_states
        self.value_buffer[:, :, self.length : end] = value_states
        self.length = end
        self.keys, self.values = self.key_buffer[:, :, :end], self.value_buffer[:, :, :end]
        return self.keys, self.values

    def _empty_like(self, states: torch.Tensor) -> torch.Tensor:
        return states.new_empty(*states.shape[:2], self.capacity, states.shape[3])


def right_sized_cache(model: Any, capacity: int) -> DynamicCache | None:
    """A cache for one batch of at most `capacity` positions, prompt included; None: the model makes its own.

    That is so where any layer is not plain full attention (sliding windows, state spaces, recurrences).
    """
    if model.config.is_encoder_decoder or "past_key_values" not in inspect.signature(model.forward).parameters:
        return None
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))  # as `generate` would make it
    if not cache.layers or any(type(layer) is not DynamicLayer for layer in cache.layers):
        return None
    cache.layers = [RightSizedLayer(capacity) for _ in cache.layers]
    return cache
