"""Metrics of samples: repetition, concentration, diversity, words, neighbours.

This module holds the names only, so that a suite can be checked without loading numpy or scipy; score_samples.py measures.
"""

FINISH = ("eos_rate", "length_cap_rate", "non_finite_rate", "tokens_per_text", "generation_entropy", "generation_surprisal")
REPETITION = ("seq_rep_1", "seq_rep_2", "seq_rep_3", "seq_rep_4", "tail_loop_rate")
TOP_K = (10, 50, 100, 200, 1000)
CONCENTRATION = ("high_frequency_share", *(f"top_{k}_share" for k in TOP_K))
WORDS = ("high_frequency_word_share", "words_per_text", "no_words_rate", "mtld", "hdd")
DISTINCT = ("distinct_1", "distinct_2", "distinct_3", "distinct_4")
COMPRESSION = ("compression_ratio",)
POOLED = ("output_entropy_1", "output_entropy_2", "zipf_exponent", "kl_unigram", "kl_unigram_reverse", "kl_bigram",
          "kl_bigram_reverse", "mode_coverage")  # fmt: skip
SELF_BLEU = ("self_bleu_4",)
NEIGHBOURS = ("vendi_score", "knn_coverage")

#: Every name that a suite may ask for, in the order of the tables.
METRIC_NAMES = (*FINISH, *REPETITION, *CONCENTRATION, *WORDS, *DISTINCT, *COMPRESSION, *POOLED, *SELF_BLEU, *NEIGHBOURS)
