"""Whether a model keeps the documents of one block apart: asked of a small model of its class, not of its signature.

transformers 5 reads document borders from `position_ids`, in attention layers that are written for it. A convolution, a
recurrence, or an attention that makes its own mask runs across them without a word.
"""

import copy
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

LEAK, SHIFT = 1e-4, 1e-2  # of the logits' standard deviation; rounding stays below a tenth of these, a leak is above 0.1
MAX_PARAMETERS = 150_000_000  # of the small model: a second or two on a CPU
VOCABULARY, LAYERS, FEW, INNER = 64, 8, 4, 64
FIRST, SECOND = 7, 9  # tokens of the two documents
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks", "decoder_layers", "encoder_layers")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads", "decoder_attention_heads")
_KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "multi_query_group_num", "swa_num_key_value_heads")
_WIDTHS = ("hidden_size", "d_model", "n_embd", "emb_dim")
_ALIKE = ("word_embed_proj_dim", "embedding_size", "lru_width", "attention_hidden_size", "mamba_n_heads", "mamba_num_heads", "n_mamba_heads",
          "mamba_d_ssm", "swa_num_attention_heads", "linear_num_key_heads", "linear_num_value_heads")  # fmt: skip
_ONE = ("n_group", "topk_group", "num_expert_group", "n_groups", "mamba_n_groups", "mamba_ngroups")


@dataclass(frozen=True)
class Borders:
    """What the probe saw, as shares of the logits' standard deviation; `model` is the class's name.

    positions: whether the model's forward takes `position_ids`.

    leak: how far the second document's logits move when the first is changed; shift: how far they are from those of the
    second alone; future: how far logits move when a later token is changed. None where no small model could be built, or
    run (`reason`).
    """

    model: str
    positions: bool = True
    leak: float | None = None
    shift: float | None = None
    future: float | None = None
    reason: str | None = None

    @property
    def known(self) -> bool:
        return self.leak is not None

    @property
    def apart(self) -> bool:
        return self.known and self.leak < LEAK and self.shift < SHIFT

    @property
    def causal(self) -> bool:
        return not self.known or self.future < LEAK


def probe_borders(config: Any, build: Callable[..., torch.nn.Module], attention: str | None = None) -> Borders:
    """Build a small model of `config`'s kind and try it; the random state of the caller stays as it was.

    Args:
        config: the model's config; it is not changed.
        build: `build(config, attn_implementation=...)` makes a model with random weights, on the CPU, unpartitioned.
        attention: the implementation that the run asks for. FlashAttention is stood in for by a CPU function that is given the
            same arguments; the documents then stand in one row, as it only sees borders there.
    """
    flash, name, positions, reasons = is_flash(attention), type(config).__name__.removesuffix("Config"), True, []
    implementation = _flash_stand_in() if flash else attention if attention in ("eager", "sdpa") else None
    for narrow in (True, False):
        try:
            small = shrink(config, narrow)
            with torch.device("meta"):
                model = build(copy.deepcopy(small), attn_implementation=implementation)
            name, positions = type(model).__name__, takes_positions(model)
            parameters = sum(parameter.numel() for parameter in model.parameters())
            if parameters > MAX_PARAMETERS:
                raise ValueError(f"a small one has {parameters / 1e6:,.0f} million weights")
            with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
                torch.manual_seed(0)
                model = build(small, attn_implementation=implementation).float().eval()
                _spread(model)
                return Borders(name, positions, *_measure(model, flash))
        except Exception as error:  # any of some 190 classes may refuse a shrunk config, each in its own way
            reasons.append(f"{type(error).__name__}: {' '.join(str(error).split())[:120]}")
    return Borders(name, positions, reason=reasons[0])


def is_flash(attention: str | None) -> bool:
    """Whether this is an implementation of FlashAttention, for which transformers reads borders in batches of one row only."""
    return attention is not None and "flash" in attention


def _flash_stand_in() -> str:
    """The name under which `_attend` is registered in transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import flash_attention_mask

    name = "ds_stability_borders"
    AttentionInterface.register(name, _attend)
    AttentionMaskInterface.register(name, flash_attention_mask)
    return name


def _attend(module, query, key, value, attention_mask, scaling=None, position_ids=None, **kwargs):
    """Attention [B, T, H, D] of [B, H, T, D] that knows documents as FlashAttention does: by `position_ids`, in one row."""
    length = query.shape[2]
    allowed = torch.ones(length, length, dtype=torch.bool)
    if module.is_causal:
        allowed = allowed.tril()
    if position_ids is not None and len(query) == 1:
        document = (position_ids.reshape(-1, length)[0] == 0).cumsum(0)
        allowed &= document[:, None] == document[None]
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=allowed, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2).contiguous(), None


def shrink(config: Any, narrow: bool) -> Any:
    """A copy of `config` with as few layers as show all its kinds, few experts and words, and, if `narrow`, few heads."""
    config = copy.deepcopy(config)
    for part in _parts(config):
        changes = _sizes(part.to_dict(), narrow)
        for key, value in changes.items():
            setattr(part, key, value)
        part.use_cache = False
    return config


def _parts(config: Any) -> list[Any]:
    """The config and the configs within it, as those of vision and text."""
    inner = [getattr(config, name, None) for name in config.sub_configs]
    return [config, *(part for child in inner if child is not None for part in _parts(child))]


def _sizes(values: dict[str, Any], narrow: bool) -> dict[str, Any]:
    """The keys of a config that change, with their new values."""
    changes = _layers(values)
    for key, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | list):
            continue
        if key.startswith("vocab_size") or key == "n_words":
            changes[key] = VOCABULARY
        elif isinstance(value, list):
            if "intermediate" in key:
                changes[key] = [INNER] * len(changes.get(key, value))
        elif key == "n_inner" or (value > INNER and ("intermediate" in key or "ffn" in key)):
            changes[key] = INNER
        elif ("expert" in key and ("per_tok" in key or "top" in key)) or key in ("moe_topk", "moe_k"):
            changes[key] = min(value, 2)
        elif key.endswith("experts") and "shared" not in key:
            changes[key] = min(value, FEW)
        elif key in _ONE:
            changes[key] = 1
        elif key == "num_kv_shared_layers":
            changes[key] = 0
        elif key.endswith("token_id") and value >= VOCABULARY:
            changes[key] = 3
    for key, value in (("pad_token_id", 2), ("bos_token_id", 0), ("eos_token_id", 1)):
        if values.get(key) is not None:
            changes[key] = value
    return changes | (_heads(values) if narrow else {})


def _layers(values: dict[str, Any]) -> dict[str, Any]:
    """Fewer layers: the first ones, up to where each kind has appeared."""
    changes: dict[str, Any] = {}
    for name in _LAYERS:
        total = values.get(name)
        if not isinstance(total, int) or total < 1:
            continue
        lists = {key: value for key, value in values.items() if isinstance(value, list | tuple | str) and len(value) == total}
        seen = [max(value.index(kind) for kind in value) + 1 for value in lists.values()]
        keep = changes[name] = min(total, max([LAYERS, *seen]))
        changes |= {key: value[:keep] for key, value in lists.items()}
        for key, value in values.items():
            if key not in lists and isinstance(value, list) and ("layer" in key or "idx" in key) and all(type(item) is int for item in value):
                changes[key] = [item for item in value if item < keep]
    return changes


def _heads(values: dict[str, Any]) -> dict[str, Any]:
    """Fewer heads of the same size, and a width that fits them."""
    numbers = {key: value for key, value in values.items() if isinstance(value, int) and not isinstance(value, bool) and value > 0}
    widths = [numbers[key] for key in _WIDTHS if key in numbers]
    heads = next((numbers[key] for key in _HEADS if key in numbers), None)
    if not widths:
        return {}
    common = math.gcd(*widths) if heads is None else math.gcd(heads, *widths)
    divisors = [number for number in range(1, common + 1) if common % number == 0]
    kept = max(divisors) // 256 if heads is None else heads // FEW
    factor = max((number for number in divisors if number <= kept), default=1)
    factor = max(divisors) if factor == 1 and heads is not None else factor
    changes = {key: numbers[key] // factor for key in (*_HEADS, *_WIDTHS, *_ALIKE) if numbers.get(key, 1) % factor == 0 and key in numbers}
    for key in _KEY_HEADS:
        if key in numbers and heads is not None:
            changes[key] = math.gcd(numbers[key], heads // factor)
    return changes


def _spread(model: torch.nn.Module) -> None:
    """Weights at which every path through a layer moves the logits: HF's 0.02 in a small width would hide a leak."""
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            parameter.normal_(std=parameter.shape[-1] ** -0.5)


def takes_positions(model: torch.nn.Module) -> bool:
    """Whether the model's forward names `position_ids`."""
    return "position_ids" in inspect.signature(model.forward).parameters


def _measure(model: torch.nn.Module, flat: bool) -> tuple[float, float, float]:
    """(leak, shift, future) of a model with VOCABULARY words; `flat` runs one row at a time."""
    generator = torch.Generator().manual_seed(0)
    first, other, second, later = (torch.randint(5, VOCABULARY, (n,), generator=generator) for n in (FIRST, FIRST, SECOND, SECOND))
    later[:-1] = second[:-1]
    other[-1], later[-1] = first[-1] % 50 + 6, second[-1] % 50 + 6  # another token than the one that stands there
    rows = torch.stack([torch.cat(pair) for pair in ((first, second), (other, second), (first, later))])
    packed = _logits(model, rows, torch.cat([torch.arange(FIRST), torch.arange(SECOND)]), flat)
    alone = _logits(model, second[None], torch.arange(SECOND), flat)
    scale = alone.std()

    def moved(left: torch.Tensor, right: torch.Tensor) -> float:
        return float((left - right).abs().max() / scale)

    return (moved(packed[0, FIRST:], packed[1, FIRST:]), moved(packed[0, FIRST:], alone[0]), moved(packed[0, :-1], packed[2, :-1]))


def _logits(model: torch.nn.Module, ids: torch.Tensor, positions: torch.Tensor, flat: bool) -> torch.Tensor:
    """[B, T, V] logits of rows of ids, as training calls the model."""
    if flat and len(ids) > 1:
        return torch.cat([_logits(model, row[None], positions, flat) for row in ids])
    inputs = {"input_ids": ids}
    if takes_positions(model):
        inputs["position_ids"] = positions.expand(len(ids), -1).contiguous()
    logits = model(**inputs).logits
    if not torch.isfinite(logits).all():
        raise ValueError("its logits are not finite")
    return logits
