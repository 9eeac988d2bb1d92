"""What benchmarks/performance.py measures: the ways to train, the cases with their targets, and the axes of growth.

A case is JSON-ready: performance_worker.py reads it. Times are ratios of a turn of an arm to the turn of plain DeepSpeed in the
same round, so that what happens once in ten steps (`statistics.interval` 10, the update ratio) counts with its share of a
turn of ten steps.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

PLAIN, TRL, LIGER = "plain DeepSpeed", "TRL, chunked loss", "Liger, fused loss"
AGAIN = "plain DeepSpeed, once more"  # how far two equal engines are apart
HEADLESS = "plain DeepSpeed without head and loss"  # its memory: what no loss can get below
LEVEL_0, INTERVAL_10, LEVEL_5 = "level 0", "level 0, statistics.interval 10", "level 0.5"
CHUNKED, ALL_FOUR = "level 0.5, loss_path chunked", "level 0.5, all four stabilizers"
TRITON = "level 0.5, loss_kernel triton"
_AT_ONCE = {"warmup_steps": 0, "ramp_steps": 1}  # the level acts from the first steps on
_FAMILIES = {"feedback": {}, "clipping": {}, "averaging": {}, "regularization": {}}

#: Arm -> whose loss it trains on, and its `stability` block (None: plain DeepSpeed's engine).
ARMS: dict[str, dict[str, Any]] = {
    PLAIN: {"loss": "own", "stability": None},
    AGAIN: {"loss": "own", "stability": None},
    LEVEL_0: {"loss": "own", "stability": {"level": 0.0}},
    INTERVAL_10: {"loss": "own", "stability": {"level": 0.0, "statistics": {"interval": 10}}},
    LEVEL_5: {"loss": "own", "stability": {"level": 0.5, "controller": _AT_ONCE}},
    CHUNKED: {"loss": "own", "stability": {"level": 0.5, "controller": _AT_ONCE, "loss_path": "chunked"}},
    ALL_FOUR: {"loss": "own", "stability": {"level": 0.5, "controller": _AT_ONCE, "stabilizers": _FAMILIES}},
    TRITON: {"loss": "triton", "stability": {"level": 0.5, "controller": _AT_ONCE, "loss_kernel": "triton"}},
    TRL: {"loss": "trl", "stability": None},
    LIGER: {"loss": "liger", "stability": None},
    HEADLESS: {"loss": "none", "stability": None},
}
NEED_CUDA = (TRITON, LIGER)
REFERENCES = (TRL, LIGER)  # engines of others that an arm is compared with, beside plain DeepSpeed


@dataclass(frozen=True)
class Target:
    """Largest allowed ratios to plain DeepSpeed; `copy`: one fp32 copy of the gradient partition may come on top."""

    time: float
    activation: float | None = None
    copy: bool = False


@dataclass(frozen=True)
class Case:
    """One model and batch. `model`: keys of LlamaConfig; `arms`: those that take turns; `steps`: of a turn; `memory`: arms whose
    memory is measured, each alone, over `memory_steps`: 2 at least, as moments and averages are there from the second on;
    `zero`: keys of `zero_optimization` in place of the shipped ones."""

    title: str
    model: Mapping[str, Any]
    bf16: bool
    batch_size: int
    block_size: int
    targets: Mapping[str, Target]
    arms: Sequence[str]
    memory: Sequence[str] = ()
    zero: Mapping[str, Any] = field(default_factory=dict)
    rounds: int = 20
    steps: int = 10
    warmup_steps: int = 5
    profile_steps: int = 5
    memory_steps: int = 3
    step_seconds: float = 0.1  # roughly, of plain DeepSpeed on two cores: for the time that is left

    def spec(self) -> dict[str, Any]:
        """For performance_worker.py, without what is only judged afterwards."""
        kept = {
            key: value
            for key, value in asdict(self).items()
            if key not in ("targets", "arms", "memory", "step_seconds")
        }
        return kept | {"arms": {name: ARMS[name] for name in self.arms}}

    @property
    def steps_in_turns(self) -> int:
        """Steps of all arms where they take turns, with warm-up, counting and profile."""
        counted = 1 + self.profile_steps if self.profile_steps else 0
        arms = [arm for arm in self.arms if arm not in NEED_CUDA]  # the estimate is for CPUs
        return len(arms) * (self.warmup_steps + self.rounds * self.steps + counted)


def llama(
    vocabulary: int, hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int, tied: bool
) -> dict[str, Any]:
    return {"vocab_size": vocabulary, "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
            "num_key_value_heads": kv_heads, "intermediate_size": intermediate, "tie_word_embeddings": tied,
            "max_position_embeddings": 8192}  # fmt: skip


def tiny(vocabulary: int = 2048, tied: bool = False) -> dict[str, Any]:
    """The model of ds_configs/models/llama_tiny.json."""
    return llama(vocabulary, 128, 3, 4, 2, 384, tied)


def cases(quick: bool = False) -> dict[str, Case]:
    """Name -> case. `quick`: the same arms on models of seconds, for a smoke test whose figures mean nothing."""
    if quick:
        return {"quick": Case(
            "smoke test", llama(512, 32, 1, 2, 1, 64, tied=True), False, 2, 32,
            {LEVEL_0: Target(1.10, 1.1), LEVEL_5: Target(1.0, 0.7), ALL_FOUR: Target(1.1, 0.7, copy=True)},
            (PLAIN, LEVEL_0, LEVEL_5, ALL_FOUR, TRITON, TRL, LIGER), (PLAIN, LEVEL_5, TRITON), rounds=3, steps=2, warmup_steps=2,
            profile_steps=1, memory_steps=2,
        )}  # fmt: skip
    large, few = (PLAIN, LEVEL_5, CHUNKED, ALL_FOUR, TRITON, TRL, LIGER), (PLAIN, LEVEL_5, ALL_FOUR, TRITON, TRL, LIGER)
    smollm2 = llama(49_152, 576, 30, 9, 3, 1536, tied=True)
    return {
        "observe": Case(
            "tiny LLaMA, vocabulary 2,048, fp32", tiny(), False, 4, 128,
            {LEVEL_0: Target(1.10, 1.1), INTERVAL_10: Target(1.02), ALL_FOUR: Target(1.10, 1.1, copy=True)},
            (PLAIN, AGAIN, LEVEL_0, INTERVAL_10, LEVEL_5, CHUNKED, ALL_FOUR, TRITON, TRL, LIGER),
            (PLAIN, LEVEL_0, LEVEL_5, ALL_FOUR, TRITON, TRL, LIGER), rounds=40,
        ),
        "smollm2": Case(
            "SmolLM2-135M, vocabulary 49,152, bf16",
            smollm2, True, 2, 256,
            {LEVEL_5: Target(1.0, 0.7), ALL_FOUR: Target(1.10, 0.7, copy=True)}, large, (*large, HEADLESS),
            rounds=16, steps=1, warmup_steps=2, profile_steps=1, memory_steps=2, step_seconds=4.0,
        ),
        "freed": Case(
            "SmolLM2-135M, weights freed after use, bf16", smollm2, True, 2, 256,
            {}, (PLAIN, LEVEL_5, ALL_FOUR), (PLAIN, LEVEL_5, ALL_FOUR, HEADLESS),
            {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0},  # what is prefetched for backward is kept, too
            rounds=6, steps=1, warmup_steps=2, profile_steps=1, memory_steps=2, step_seconds=5.0,
        ),
        "vocabulary": Case(
            "fresh LLaMA, vocabulary 151,936, fp32", llama(151_936, 256, 2, 4, 2, 768, tied=True), False, 4, 512,
            {LEVEL_5: Target(0.95, 0.4), ALL_FOUR: Target(1.10, 0.4, copy=True)}, few, few,
            rounds=5, steps=1, warmup_steps=1, profile_steps=1, memory_steps=2, step_seconds=12.0,
        ),
    }  # fmt: skip


@dataclass(frozen=True)
class Point:
    """One place on an axis of growth: a case of three arms on `ranks` processes."""

    x: float
    case: Case
    ranks: int | None = None  # None: as many as the benchmark runs on


AXES = {"sequence": "tokens of a sequence", "vocabulary": "words of the vocabulary", "ranks": "ranks",
        "parameters": "parameters"}  # fmt: skip
GROWTH_ARMS = (PLAIN, LEVEL_0, LEVEL_5)


def growth(quick: bool = False, max_ranks: int = 4) -> dict[str, list[Point]]:
    """Axis -> points, smallest first. `max_ranks`: 4, or the GPUs of the machine."""

    def point(model: dict[str, Any], batch_size: int, block_size: int, steps: int) -> Case:
        tokens, words = batch_size * block_size, model["vocab_size"]
        seconds = 0.03 + tokens * words / 4e7 + tokens * block_size / 2e7 + parameters(model) / 1e8
        return Case("", model, False, batch_size, block_size, {}, GROWTH_ARMS, rounds=48 if seconds < 0.1 else 24, steps=steps, warmup_steps=3,
                    profile_steps=0, step_seconds=seconds)  # fmt: skip

    if quick:
        small = [(x, Case("", llama(x, 32, 1, 2, 1, 64, tied=True), False, 1, 32, {}, (PLAIN, LEVEL_5), rounds=3, steps=1,
                          warmup_steps=1, profile_steps=0)) for x in (256, 1024)]  # fmt: skip
        return {"vocabulary": [Point(x, case) for x, case in small]}
    shapes = [(128, 3, 4, 2, 384), (256, 4, 4, 2, 768), (384, 6, 6, 3, 1024), (512, 8, 8, 4, 1408)]
    models = [llama(4096, *shape, tied=False) for shape in shapes]
    return {
        "sequence": [Point(n, point(tiny(), 1, n, max(1, 512 // n))) for n in (128, 256, 512, 1024, 2048, 4096)],
        "vocabulary": [
            Point(v, point(tiny(v, tied=True), 1, 128, 2 if v > 2**15 else 4))
            for v in (2048, 8192, 32_768, 131_072, 262_144)
        ],
        "ranks": [Point(n, point(tiny(), 4, 128, 4), n) for n in (1, 2, 4) if n <= max_ranks],
        "parameters": [Point(parameters(model), point(model, 2, 128, 2)) for model in models],
    }


def parameters(model: Mapping[str, Any]) -> int:
    """Weights of a LLaMA without biases."""
    width, inner, heads = model["hidden_size"], model["intermediate_size"], model["num_attention_heads"]
    keys = width // heads * model["num_key_value_heads"]
    layer = 2 * width * width + 2 * width * keys + 3 * width * inner + 2 * width
    return (
        model["num_hidden_layers"] * layer
        + width
        + (1 if model["tie_word_embeddings"] else 2) * width * model["vocab_size"]
    )
