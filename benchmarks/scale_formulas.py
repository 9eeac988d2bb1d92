"""How memory, traffic and files grow: the formulas of docs/scale.md, for a LLaMA-like decoder under ZeRO-3 and AdamW.

Bytes unless said otherwise. P parameters, N ranks, b bytes of a weight (2 in bf16, 4 in fp32). Nothing here measures;
benchmarks/scale.py holds these against what was counted.
"""

from dataclasses import dataclass, replace

FP32 = 4
CHUNK_ELEMENTS = 2**24  # ds_stability/loss.py, CHUNK_ELEMENTS_DEFAULT: fp32 elements of one chunk of logits on an accelerator
CHUNK_COPIES = 3  # of a chunk that live together in token_statistics: the logits, shifted, their exponentials


@dataclass(frozen=True)
class Shape:
    """A LLaMA-like decoder without biases, with separate input and output embeddings."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int

    @property
    def kv_hidden(self) -> int:
        return self.hidden // self.heads * self.kv_heads

    def layer(self) -> list[int]:
        """Elements of a layer's weights, in the order in which forward uses them."""
        d, k, f = self.hidden, self.kv_hidden, self.intermediate
        return [d, d * d, k * d, k * d, d * d, d, f * d, f * d, d * f]

    def weights(self) -> list[int]:
        """Elements of every weight, in the order of forward."""
        table = self.vocabulary * self.hidden
        return [table, *(self.layer() * self.layers), self.hidden, table]

    def registered(self) -> list[int]:
        """The same elements in the order in which the module lists its parameters: a layer's norms come last."""
        first, *inner = self.layer()
        return [self.weights()[0], *([*inner[:4], *inner[5:], first, inner[4]] * self.layers), *self.weights()[-2:]]

    @property
    def parameters(self) -> int:
        return sum(self.weights())


@dataclass(frozen=True)
class Run:
    """How a model is trained. `tokens`: of one micro-batch of one rank; `sequences` of them make the batch."""

    ranks: int
    ranks_per_node: int = 8
    weight_bytes: int = 2
    tokens: int = 8192
    accumulation: int = 1
    checkpointing: bool = True
    averaging: bool = True
    init_decay: bool = False
    reduce_bucket: int = 200_000_000
    persistence_threshold: int = 1_000_000
    max_reuse_distance: int = 1_000_000_000
    sub_group_size: int = 1_000_000_000
    vector_bytes: int = 8 * 213

    @property
    def nodes(self) -> int:
        return -(-self.ranks // self.ranks_per_node)


# ---- memory ---------------------------------------------------------------------------------------------------------


def partition(shape: Shape, run: Run) -> int:
    """Elements of one rank's share: every weight is cut into N equal parts, the last one padded."""
    return sum(-(-size // run.ranks) for size in shape.weights())


def largest_sub_group(shape: Shape, run: Run) -> int:
    """Elements that the optimizer steps at once: a sub-group is closed by the weight with which it reaches its size."""
    groups, current = [0], 0
    for size in shape.registered():
        current += -(-size // run.ranks)
        if current >= run.sub_group_size:
            groups.append(current)
            current = 0
    return max([*groups, current])


def held(shape: Shape, run: Run) -> dict[str, int]:
    """What a rank holds between two steps, by part."""
    share, b = partition(shape, run), run.weight_bytes
    return {
        "weights": b * share,
        "gradients": b * share,
        "master": FP32 * share,
        "moments": 2 * FP32 * share,
        "averaging": FP32 * share if run.averaging else 0,
        "init_decay": FP32 * share if run.init_decay else 0,
        "persistent": b * sum(persistent(shape, run)),
        "bucket": b * run.reduce_bucket,
        "high_frequency": FP32 * shape.vocabulary,
    }


def persistent(shape: Shape, run: Run) -> list[int]:
    """Weights so small that every rank keeps them whole."""
    return [size for size in shape.weights() if size <= run.persistence_threshold]


def in_step(shape: Shape, run: Run) -> dict[str, int]:
    """What comes on top inside the optimizer's step: the fp32 gradient, and the update meter's copy in every 10th step."""
    group = largest_sub_group(shape, run)
    return {"fp32 gradient": FP32 * group, "update meter": FP32 * group}


def activations(shape: Shape, run: Run) -> dict[str, int]:
    """What autograd keeps of a forward in bf16 (transformers' LLaMA with torch's fused attention), by part.

    Per token and layer, unless it is recomputed: two norms with an fp32 copy of their input (12 D), their outputs (4 D),
    query, key, value (2 D + 4 K), attention's output (2 D), four tensors of the MLP (8 F), fp32 logsumexp per head, 1/rms twice.
    """
    d, b, tokens = shape.hidden, run.weight_bytes, run.tokens
    if b != 2:
        raise ValueError("counted for bf16 only")
    layer = tokens * (20 * d + 4 * shape.kv_hidden + 8 * shape.intermediate + 4 * shape.heads + 8)
    kept = b * tokens * d * shape.layers if run.checkpointing else layer * shape.layers
    return {
        "layers": kept,
        "layer recomputed": layer if run.checkpointing else 0,
        "last norm and head": tokens * (8 * d + 4),
        "logits": b * tokens * shape.vocabulary,
        "loss": 12 * tokens,  # coefficient and label
    }


def working(shape: Shape, run: Run) -> dict[str, int]:
    """What a step needs beside the model's state, where it needs most: an estimate without the temporaries of single operations."""
    parts = activations(shape, run)
    chunks = CHUNK_COPIES * FP32 * min(CHUNK_ELEMENTS, run.tokens * shape.vocabulary)
    # At the head: logits, their gradient and a chunk; in a layer: what is recomputed of it. Not both at once.
    peak = max(2 * parts["logits"] + chunks, parts["layer recomputed"])
    return {
        "gathered weights": run.weight_bytes * gathered(shape, run)[1],
        "kept activations": parts["layers"] + parts["last norm and head"] + parts["loss"],
        "head or layer": peak,
    }


def total(shape: Shape, run: Run) -> int:
    """Bytes of a rank at its fullest: state, and the larger of a micro-batch's and the optimizer step's needs."""
    return sum(held(shape, run).values()) + max(sum(working(shape, run).values()), sum(in_step(shape, run).values()))


# ---- the wire -------------------------------------------------------------------------------------------------------


def order_of_use(shape: Shape, run: Run) -> list[tuple[int, int]]:
    """(number of the weight, its elements) as one micro-batch uses them: forward, then backward, layers recomputed or not."""
    sizes = shape.weights()
    uses = list(enumerate(sizes))
    per_layer = len(shape.layer())
    layers = [uses[1 + per_layer * i : 1 + per_layer * (i + 1)] for i in range(shape.layers)]
    backward = [uses[-1], uses[-2]]
    for layer in reversed(layers):
        backward += (layer if run.checkpointing else []) + layer[::-1]
    return uses + backward + [uses[0]]


def gathered(shape: Shape, run: Run) -> tuple[int, int]:
    """(elements gathered for a micro-batch, most of them whole at a time), padding included.

    DeepSpeed releases a weight after its use unless it comes again within `max_reuse_distance` elements
    (deepspeed/runtime/zero/partitioned_param_coordinator.py, __params_to_release).
    """
    uses = order_of_use(shape, run)
    padded = [-(-size // run.ranks) * run.ranks for size in shape.weights()]
    whole: set[int] = set()
    sent = now = most = 0
    for position, (weight, size) in enumerate(uses):
        if size <= run.persistence_threshold:
            continue
        if weight not in whole:
            whole.add(weight)
            sent, now = sent + padded[weight], now + padded[weight]
            most = max(most, now)
        if not _comes_again(uses, position, run.max_reuse_distance):
            whole.discard(weight)
            now -= padded[weight]
    return sent, most


def _comes_again(uses: list[tuple[int, int]], position: int, distance: int) -> bool:
    traversed = 0
    for weight, size in uses[position + 1 :]:
        if traversed >= distance:
            return False
        if weight == uses[position][0]:
            return True
        traversed += size
    return False


def messages(shape: Shape, run: Run) -> dict[str, int]:
    """Bytes of the whole tensors in the collectives of one optimizer step."""
    b = run.weight_bytes
    return {
        "gathers": run.accumulation * b * gathered(shape, run)[0],
        "reduce-scatters": run.accumulation * b * partition(shape, run) * run.ranks,
        "persistent": b * sum(-(-size // run.ranks) * run.ranks for size in persistent(shape, run)),
        "ds_stability": run.vector_bytes,
    }


def sent_by_rank(shape: Shape, run: Run) -> dict[str, float]:
    """Bytes that a rank sends in one optimizer step with ring algorithms: (N - 1) / N of what is gathered or scattered,
    twice that of what is all-reduced (Patarasuk and Yuan 2009)."""
    share = (run.ranks - 1) / run.ranks
    return {name: share * size * (2 if name == "ds_stability" else 1) for name, size in messages(shape, run).items()}


def sent_with_gloo(shape: Shape, run: Run) -> float:
    """The same with gloo on CPUs, whose reduce-scatter sends as much as an all-reduce."""
    parts = sent_by_rank(shape, run)
    return sum(parts.values()) + parts["reduce-scatters"]


def sent_by_node(shape: Shape, run: Run) -> float:
    """Bytes that leave a node in one optimizer step: in a ring ordered by nodes only one link of a node's ranks crosses."""
    return sum(sent_by_rank(shape, run).values()) if run.nodes > 1 else 0.0


def flops(shape: Shape, run: Run) -> float:
    """Operations of a rank in one micro-batch: 6 for each weight and token (forward 2, backward 4), 2 more where layers are
    recomputed; attention's own products are left out, and the input embedding has none."""
    weights = shape.parameters - shape.vocabulary * shape.hidden
    return (8 if run.checkpointing else 6) * weights * run.tokens


# ---- the disk -------------------------------------------------------------------------------------------------------


def stored(shape: Shape, run: Run) -> dict[str, int]:
    """Bytes of a checkpoint of all ranks, of the 16-bit weights that Trainer saves beside it, and of an export."""
    share = partition(shape, run) * run.ranks
    extra = FP32 * share * (run.averaging + run.init_decay)
    return {
        "optimizer": 3 * FP32 * share,
        "ds_stability": extra,
        "weights beside it": run.weight_bytes * shape.parameters,
        "export": run.weight_bytes * shape.parameters,
    }


def with_ranks(run: Run, ranks: int) -> Run:
    return replace(run, ranks=ranks)
