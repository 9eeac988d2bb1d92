"""Time to score 10,000 texts of 128 tokens on one core, against code built on nltk and sacrebleu, in one run.

    python benchmarks/metric_speed.py [--output runs/metric_speed] [--texts 10000] [--tokens 128]

All metrics of samples with their intervals are timed together. Then single metrics, ours and the
other code in turns on the same texts: distinct-n and seq-rep-n by nltk.ngrams, unigram and bigram entropy by
nltk.FreqDist, self-BLEU by sacrebleu, and by nltk, on the same subsample (once: they take minutes). Both must agree on
the values. Ours does more than the other code in that time: distinct-n and seq-rep-n come together, with tail loops, and
pooled metrics with their jackknife folds.
Texts are drawn from a Zipf law with repetitions of phrases put in. Writes OUTPUT/metric_speed.json.
"""

import os

# One core: numerical libraries read these when they load.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"

import argparse  # noqa: E402
import logging  # noqa: E402
import math  # noqa: E402
import statistics  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable, Sequence  # noqa: E402
from typing import Any, NamedTuple  # noqa: E402

import common  # noqa: E402
import numpy as np  # noqa: E402

from ds_stability.eval.intervals import row  # noqa: E402
from ds_stability.eval.metrics import DISTINCT, METRIC_NAMES, REPETITION  # noqa: E402
from ds_stability.eval.metrics.diversity import measure_entropy  # noqa: E402
from ds_stability.eval.metrics.layout import SUBSAMPLE_TEXTS, Layout  # noqa: E402
from ds_stability.eval.metrics.pools import make_pools  # noqa: E402
from ds_stability.eval.metrics.score_samples import score_samples  # noqa: E402
from ds_stability.eval.records import Sample, ScoringContext  # noqa: E402
from ds_stability.run_dir import write_json_atomic  # noqa: E402

VOCABULARY, PER_PROMPT, SEED = 8000, 8, 0
MAX_N = 4
Scores = dict[str, float]


def main() -> int:
    arguments = parse_arguments()
    started = time.monotonic()
    load_libraries()
    samples, context = make_samples(arguments.texts, arguments.tokens)
    score_samples(samples[: 8 * PER_PROMPT], context)  # what loads lazily loads now
    print(f"all {len(METRIC_NAMES)} metrics of {len(samples)} texts", flush=True)
    whole = [time_all(samples, context) for _ in range(arguments.rounds)]
    print(f"  {medians(whole)['processor_seconds']:.2f} s of one core", flush=True)
    pairs = [compare(pair, arguments.rounds) for pair in comparisons(samples, context)]
    settings = {key: getattr(arguments, key) for key in ("texts", "tokens", "rounds")}
    settings |= {"samples_per_prompt": PER_PROMPT, "vocabulary": VOCABULARY, "subsample": SUBSAMPLE_TEXTS, "threads": 1}
    result = common.describe_measurement("metric_speed", {"seed": SEED}, settings)
    result["versions"] |= library_versions()
    result["seconds"] = round(time.monotonic() - started, 1)
    result |= {"all": {"metrics": len(METRIC_NAMES), "rounds": whole, **medians(whole)}, "comparisons": pairs}
    output = common.output_folder(arguments.output)
    write_json_atomic(output / "metric_speed.json", result)
    print_result(result)
    print(f"\n{output / 'metric_speed.json'}")
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="runs/metric_speed")
    parser.add_argument("--texts", type=int, default=10_000)
    parser.add_argument("--tokens", type=int, default=128, help="tokens of each text")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each measurement")
    arguments = parser.parse_args()
    for name, least in (("texts", 8 * PER_PROMPT), ("tokens", 8), ("rounds", 1)):
        if vars(arguments)[name] < least:
            parser.error(f"--{name} {vars(arguments)[name]}: allowed are numbers from {least}")
    return arguments


def load_libraries() -> None:
    """Load what is compared with, or end with one line."""
    try:
        import nltk.translate.bleu_score  # noqa: F401
        import sacrebleu  # noqa: F401
    except ImportError as error:
        print(f"error: {error.name} is missing: pip install nltk sacrebleu", file=sys.stderr)
        raise SystemExit(2) from error


def library_versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("nltk", "sacrebleu", "scipy")}


def make_samples(texts: int, tokens: int) -> tuple[list[Sample], ScoringContext]:
    """`texts` samples of `tokens` tokens, 8 of each prompt, and as many references as prompts."""
    rng = np.random.default_rng(SEED)
    share = 1.0 / np.arange(1, VOCABULARY + 1)
    share /= share.sum()
    words = ["".join(map(chr, rng.integers(97, 123, rng.integers(2, 9)))) for _ in range(VOCABULARY)]
    ids = rng.choice(VOCABULARY, size=(texts + texts // PER_PROMPT, tokens), p=share)
    for row_T in ids[: texts // 4]:  # every fourth text repeats its beginning
        row_T[-tokens // 4 :] = row_T[: len(row_T[-tokens // 4 :])]
    rng.shuffle(ids[:texts])
    written = [" ".join(words[i] for i in row_T) for row_T in ids]
    samples = [Sample(i // PER_PROMPT, "sample", i % PER_PROMPT, 0, ids[i].tolist(), written[i], "length", 4.0 * tokens,
                      -4.1 * tokens, tokens) for i in range(texts)]  # fmt: skip
    frequent = np.searchsorted(np.cumsum(share), 0.5) + 1
    context = ScoringContext(VOCABULARY, (), tuple(range(frequent)), tuple(words[:frequent]),
                             tuple(tuple(row_T.tolist()) for row_T in ids[texts:]), tuple(written[texts:]),
                             np.maximum(1, (share * 5e6)).astype(np.int64))  # fmt: skip
    return samples, context


def timed(work: Callable[[], Any]) -> tuple[dict[str, float], Any]:
    """(wall and processor seconds, what `work` gave)."""
    wall, processor = time.perf_counter(), time.process_time()
    value = work()
    return {"wall_seconds": time.perf_counter() - wall, "processor_seconds": time.process_time() - processor}, value


def medians(rounds: Sequence[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(one[key] for one in rounds) for key in ("wall_seconds", "processor_seconds")}


def time_all(samples: list[Sample], context: ScoringContext) -> dict[str, float]:
    """Every metric with its interval; wall time on a busy machine holds the others' turns, processor time does not."""
    return timed(lambda: [row(measured) for measured in score_samples(samples, context)])[0]


# ---- the same figures by other code ---------------------------------------------------------------------------------


class Comparison(NamedTuple):
    """The same figures in two ways: `ours()` has at least the names of `theirs()`, equal within `tolerance` (relative)."""

    what: str
    by: str
    ours: Callable[[], Scores]
    theirs: Callable[[], Scores]
    tolerance: float = 1e-9
    slow: bool = False


def comparisons(samples: list[Sample], context: ScoringContext) -> list[Comparison]:
    layout = Layout.of(samples, context)
    texts = [sample.token_ids for sample in layout.samples]  # in memory, for the other code
    chosen = [texts[i] for i in layout.subsample]
    self_bleu = f"self-BLEU-4 of {len(chosen)} texts"

    def scored(*names: str) -> Callable[[], Scores]:
        return lambda: {m.metric: m.value for m in score_samples(samples, context, names) if m.value is not None}

    def entropy() -> Scores:
        fresh = Layout.of(samples, context)
        return {m.metric: m.value for m in measure_entropy(fresh, make_pools(fresh)) if m.value is not None}

    return [
        Comparison("distinct-1..4", "nltk.ngrams", scored(*DISTINCT), lambda: nltk_distinct(layout, texts)),
        Comparison("seq-rep-1..4", "nltk.ngrams", scored(*REPETITION), lambda: nltk_seq_rep(texts)),
        Comparison("output entropy, 1- and 2-grams", "nltk.FreqDist", entropy, lambda: nltk_entropy(layout, texts)),
        Comparison(self_bleu, "sacrebleu", scored("self_bleu_4"), lambda: sacrebleu_self_bleu(chosen), slow=True),
        # nltk's smoothing 3 is sacrebleu's "exp", but for texts without one match.
        Comparison(self_bleu, "nltk", scored("self_bleu_4"), lambda: nltk_self_bleu(chosen), 1e-6, slow=True),
    ]


def nltk_distinct(layout: Layout, texts: list[list[int]]) -> Scores:
    """Groups of equal token count, read in block order, n-grams within a text."""
    from nltk import ngrams

    size = layout.group_tokens
    stream = [(int(i), token) for i in layout.block_order for token in texts[i]]
    distinct, total = [0] * MAX_N, [0] * MAX_N
    for start in range(0, len(stream) - size + 1, size):
        parts: dict[int, list[int]] = {}
        for text, token in stream[start : start + size]:
            parts.setdefault(text, []).append(token)
        for n in range(1, MAX_N + 1):
            grams = [gram for part in parts.values() for gram in ngrams(part, n)]
            distinct[n - 1] += len(set(grams))
            total[n - 1] += len(grams)
    return {f"distinct_{n + 1}": distinct[n] / total[n] for n in range(MAX_N)}


def nltk_seq_rep(texts: list[list[int]]) -> Scores:
    from nltk import ngrams

    values: dict[str, list[float]] = {f"seq_rep_{n}": [] for n in range(1, MAX_N + 1)}
    for text in texts:
        for n in range(1, MAX_N + 1):
            grams = list(ngrams(text, n))
            values[f"seq_rep_{n}"].append(1.0 - len(set(grams)) / len(grams))
    return {name: math.fsum(found) / len(found) for name, found in values.items()}


def nltk_entropy(layout: Layout, texts: list[list[int]]) -> Scores:
    """Value only: without the 20 jackknife folds that ours computes as well."""
    from nltk import FreqDist, ngrams

    size = layout.pool_tokens
    stream = [(i, token) for i, text in enumerate(texts) for token in text]
    values: dict[str, list[float]] = {"output_entropy_1": [], "output_entropy_2": []}
    for start in range(0, len(stream) - size + 1, size):
        parts: dict[int, list[int]] = {}
        for text, token in stream[start : start + size]:
            parts.setdefault(text, []).append(token)
        for n in (1, 2):
            counts = FreqDist(gram for part in parts.values() for gram in ngrams(part, n))
            total = counts.N()
            plug_in = -math.fsum(c / total * math.log2(c / total) for c in counts.values())
            values[f"output_entropy_{n}"].append(plug_in + (counts.B() - 1) / (2 * total * math.log(2)))
    return {name: math.fsum(found) / len(found) for name, found in values.items()}


def sacrebleu_self_bleu(texts: list[list[int]]) -> Scores:
    """Value only, as above."""
    from sacrebleu.metrics import BLEU

    logging.getLogger("sacrebleu").setLevel(logging.ERROR)  # it advises another metric at every text
    bleu = BLEU(smooth_method="exp", tokenize="none", effective_order=False)
    words = [" ".join(map(str, text)) for text in texts]
    scores = [bleu.sentence_score(word, words[:i] + words[i + 1 :]).score / 100 for i, word in enumerate(words)]
    return {"self_bleu_4": math.fsum(scores) / len(scores)}


def nltk_self_bleu(texts: list[list[int]]) -> Scores:
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

    smoothing = SmoothingFunction().method3
    scores = [sentence_bleu(texts[:i] + texts[i + 1 :], text, smoothing_function=smoothing) for i, text in enumerate(texts)]
    return {"self_bleu_4": math.fsum(scores) / len(scores)}


def compare(pair: Comparison, rounds: int) -> dict[str, Any]:
    """Both in turns; the ratio of their processor times in each round, and its median.

    Raises:
        SystemExit: the values differ: then the times compare nothing.
    """
    print(f"{pair.what}, by {pair.by}", flush=True)
    ours, theirs, ratios = [], [], []
    for _ in range(1 if pair.slow else rounds):
        seconds, values = timed(pair.ours)
        their_seconds, their_values = timed(pair.theirs)
        for name, value in their_values.items():
            if not math.isclose(values[name], value, rel_tol=pair.tolerance):
                raise SystemExit(f"error: {name} is {values[name]} here and {value} by {pair.by}")
        ours.append(seconds)
        theirs.append(their_seconds)
        ratios.append(their_seconds["processor_seconds"] / seconds["processor_seconds"])
    print(f"  {statistics.median(ratios):.1f} times our processor time", flush=True)
    return {"what": pair.what, "by": pair.by, "values": their_values, "ours": medians(ours), "theirs": medians(theirs),
            "ratios": ratios, "ratio": statistics.median(ratios)}  # fmt: skip


def speed_table(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(header, rows), one row per comparison."""
    header = ["metric", "by", "ours (s)", "theirs (s)", "ratio"]
    body = [[pair["what"], pair["by"], common.number(pair["ours"]["processor_seconds"], 2),
             common.number(pair["theirs"]["processor_seconds"], 2), common.number(pair["ratio"], 1)]
            for pair in result["comparisons"]]  # fmt: skip
    return header, body


def print_result(result: dict[str, Any]) -> None:
    whole, settings = result["all"], result["settings"]
    print(f"\nall {whole['metrics']} metrics with intervals, {settings['texts']} texts of {settings['tokens']} tokens: "
          f"{whole['processor_seconds']:.2f} s of one core ({whole['wall_seconds']:.2f} s on the clock)\n")  # fmt: skip
    print(common.text_table(*speed_table(result)))


if __name__ == "__main__":
    sys.exit(main())
