"""How each metric compares models: which way is better, and between what kind of models it means anything.

docs/reference.md has this table. A metric without a direction is shown and compared, and
no model is marked as the best in it.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from .report_cells import Key

LOWER, HIGHER, HUMAN, ZERO = "lower", "higher", "as human text", "near 0"
TOKENS, SET, TRAIN = "tokens", "set", "train"  # what two models must share besides their text: tokenizer, high-frequency set, training text


NEEDS = {TOKENS: "tokenizer", SET: "high-frequency set", TRAIN: "training text"}


class Measure(NamedTuple):
    """best: LOWER, HIGHER, HUMAN (nearest to the same figure of the human continuations), ZERO (nearest to 0), or None.

    reason: why. needs: of TOKENS, SET and TRAIN, what both models must have in common to be compared.
    """

    best: str | None
    reason: str
    needs: tuple[str, ...] = ()


_HUMAN = "neither more nor less of it than people write"
# By name, or by its beginning where that ends in _; the longest that fits counts.
MEASURES: Mapping[str, Measure] = {
    "bits_per_byte": Measure(LOWER, "a better prediction of the same bytes, whatever the tokens"),
    "cross_entropy": Measure(LOWER, "a better prediction of the same tokens", (TOKENS,)),
    "calibration_gap": Measure(ZERO, "as sure as it is right", (TOKENS,)),
    "predictive_entropy": Measure(None, "sure of right or of wrong tokens: read calibration_gap", (TOKENS,)),
    "top1_mass": Measure(None, "as predictive_entropy", (TOKENS,)),
    "high_frequency_mass": Measure(None, "as predictive_entropy", (TOKENS, SET)),
    "context_information": Measure(None, "more is no better where it is wrong", (TOKENS,)),
    "rep_l_": Measure(None, "right repetitions count, too", (TOKENS,)),
    "wrep_l_": Measure(LOWER, "wrong predictions that repeat what came before", (TOKENS,)),
    "non_finite_": Measure(LOWER, "NaN or Inf is a broken model"),
    "memorization_gap": Measure(None, "the two texts differ in more than whether they were trained on"),
    "eos_rate": Measure(None, "the suite's cap on tokens decides it", (TOKENS,)),
    "length_cap_rate": Measure(None, "the suite's cap on tokens decides it", (TOKENS,)),
    "tokens_per_text": Measure(None, "the suite's cap on tokens decides it", (TOKENS,)),
    "words_per_text": Measure(None, "the suite's cap on tokens decides it", (TOKENS,)),
    "generation_": Measure(None, "no human has one", (TOKENS,)),
    "seq_rep_": Measure(HUMAN, _HUMAN, (TOKENS,)),
    "tail_loop_rate": Measure(HUMAN, _HUMAN, (TOKENS,)),
    "high_frequency_share": Measure(HUMAN, _HUMAN, (TOKENS, SET)),
    "high_frequency_word_share": Measure(HUMAN, _HUMAN, (TRAIN,)),
    "top_": Measure(HUMAN, _HUMAN, (TOKENS, TRAIN)),
    "distinct_": Measure(HUMAN, _HUMAN, (TOKENS,)),
    "compression_ratio": Measure(HUMAN, _HUMAN),
    "self_bleu_": Measure(HUMAN, _HUMAN, (TOKENS,)),
    "vendi_score": Measure(HUMAN, _HUMAN, (TOKENS,)),
    "knn_": Measure(HUMAN, "as other human text", (TOKENS,)),
    "output_entropy_": Measure(HUMAN, _HUMAN, (TOKENS,)),
    "zipf_exponent": Measure(HUMAN, _HUMAN, (TOKENS,)),
    "kl_": Measure(HUMAN, "no nearer to the training text than people are", (TOKENS, TRAIN)),
    "mode_coverage": Measure(HUMAN, _HUMAN, (TOKENS,)),
    "no_words_rate": Measure(HUMAN, _HUMAN),
    "mtld": Measure(HUMAN, _HUMAN),
    "hdd": Measure(HUMAN, _HUMAN),
    "sentence_length": Measure(HUMAN, _HUMAN),
    "sentence_length_": Measure(LOWER, "a distance to human text"),
    "words_per_sentence_end": Measure(HUMAN, _HUMAN),
    "texts_without_sentence_end": Measure(HUMAN, "the cap cuts people's texts, too"),
    "punctuation_per_word": Measure(HUMAN, _HUMAN),
    "punctuation_total_variation": Measure(LOWER, "a distance to human text"),
    "minimal_pairs": Measure(HIGHER, "share of right choices"),
    "minimal_pairs_": Measure(HIGHER, "share of right choices"),
    "synthetic_": Measure(None, "each has an exact value of its own: docs/theory.md"),
}
OTHER = Measure(None, "its direction is not known")


def measure_of(key: Key, settings: Mapping[str, Any] | None = None) -> Measure:
    """What a figure compares; `settings` of its row say so of downstream tasks (`higher_is_better`)."""
    better = (settings or {}).get("higher_is_better")
    if isinstance(better, bool):
        return Measure(HIGHER if better else LOWER, "as the task says")
    if "_pass_" in key.metric:
        return Measure(HIGHER, "share of items solved")
    if key.metric in MEASURES:
        return MEASURES[key.metric]
    begun = [name for name in MEASURES if name.endswith("_") and key.metric.startswith(name)]
    return MEASURES[max(begun, key=len)] if begun else OTHER
