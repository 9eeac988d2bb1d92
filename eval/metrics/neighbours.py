"""Diversity and fidelity in a feature space: Vendi score, and coverage of human references.

Features: tf-idf of 1-, 2- and 3-grams of token ids, one dimension for each n-gram (nothing is hashed), rows of length 1. The
idf is log(D / d) + 1 over the D references and the text itself, so that it is the same for all models; without references
over the texts. Sources: Friedman and Dieng 2023 (arXiv 2210.02410); Naeem et al. 2020 (arXiv 2002.09797). Their k-NN
recall is left out on purpose: its balls are those of the samples, so that noise, which lies far from itself, covers everything.
"""

import numpy as np
from scipy import sparse

from ..records import Measured
from .layout import SELF_NOTE, SUBSAMPLE_TEXTS, Layout
from .ngrams import Corpus, gram_numbers

MAX_N = 3
COVERAGE_K = 5  # as in the paper
TOLERANCE = 1e-12  # squared distance below which two texts are the same: rows have length 1
NOTHING_IN_COMMON = 2.0  # squared distance of two texts that share no n-gram
FEATURES = f"tf-idf of 1- to {MAX_N}-grams of token ids"


def tf_idf(texts: Corpus, references: Corpus) -> tuple[sparse.csr_array, sparse.csr_array]:
    """fp64 [T, n-grams] and [R, n-grams], rows of length 1; a text without tokens is a row of zeros."""
    both = texts + references
    rows, columns, types = [], [], 0
    for positions, numbers in gram_numbers(both, MAX_N):
        rows.append(both.text_of[positions])
        columns.append(numbers + types)
        types += int(numbers.max(initial=-1)) + 1
    row, column = np.concatenate(rows), np.concatenate(columns)
    counts = sparse.csr_array((np.ones(len(row)), (row, column)), shape=(len(both.lengths), max(1, types)))
    counts.sum_duplicates()
    number = len(texts.lengths)
    documents = counts[number:] if len(references.lengths) else counts
    occurs_in = np.bincount(documents.indices, minlength=counts.shape[1])[counts.indices]
    # Of a text that is no document: it is counted as one more. Else documents would be nearer to each other than to others.
    one_more = np.repeat(np.arange(counts.shape[0]) < counts.shape[0] - documents.shape[0], np.diff(counts.indptr))
    counts.data *= np.log((documents.shape[0] + one_more) / (occurs_in + one_more)) + 1.0
    length = np.sqrt(np.bincount(np.repeat(np.arange(counts.shape[0]), np.diff(counts.indptr)), counts.data**2, counts.shape[0]))
    counts.data /= np.repeat(length, np.diff(counts.indptr))
    return counts[:number], counts[number:]


def inner(a: sparse.csr_array, b: sparse.csr_array) -> np.ndarray:
    """Inner products of all rows, fp64 [len(a), len(b)]."""
    return (a @ b.T).toarray()


def vendi_score(kernel: np.ndarray) -> float:
    """exp of the entropy of the eigenvalues of kernel / n, [n, n] with a diagonal of 1: effective number of texts, 1..n."""
    eigenvalues = np.linalg.eigvalsh(kernel / len(kernel))
    eigenvalues = eigenvalues[eigenvalues > len(kernel) * np.finfo(np.float64).eps]  # what rounding leaves of 0
    return float(np.exp(max(0.0, -(eigenvalues * np.log(eigenvalues)).sum())))


def squared_distances(kernel: np.ndarray) -> np.ndarray:
    """Between rows of length 1, from their inner products; below the tolerance it is 0, so that equal texts are at distance 0."""
    squared = NOTHING_IN_COMMON - 2.0 * kernel
    return np.where(squared < TOLERANCE, 0.0, squared)


def radii(within: np.ndarray, k: int) -> np.ndarray:
    """Squared distance of each point to its k-th nearest other one; NaN for k points or fewer."""
    if len(within) <= k:
        return np.full(len(within), np.nan)
    others = within.copy()
    np.fill_diagonal(others, np.inf)
    return np.partition(others, k - 1, axis=1)[:, k - 1]


def inside_balls(reference_sample: np.ndarray, reference_radii: np.ndarray) -> np.ndarray:
    """Whether a sample lies in the k-NN ball of a reference (among references), bool [references, samples]; never one that
    shares no n-gram with it."""
    near = reference_sample <= reference_radii[:, None] * (1 + 1e-9)
    return near & (reference_sample < NOTHING_IN_COMMON)


def measure_neighbours(layout: Layout) -> list[Measured]:
    """vendi_score and knn_coverage of the subsample, with jackknife units.

    Where references come in they are taken as given: the intervals say how sure we are of the model, not of the references.
    """
    texts = layout.subsample[layout.lengths[layout.subsample] > 0]
    order = np.random.default_rng(layout.context.seed).permutation(len(layout.references.lengths))
    places = np.sort(order[layout.references.lengths[order] > 0][:SUBSAMPLE_TEXTS])
    settings = {"texts": len(texts), "subsample": SUBSAMPLE_TEXTS, "features": FEATURES, "idf": "references" if len(places) else "the texts"}
    if not len(texts):
        return [layout.null(name, "no text with tokens", settings=settings, unit=unit)
                for name, unit in (("vendi_score", "texts"), ("knn_coverage", "share"))]  # fmt: skip
    samples, references = tf_idf(layout.corpus_of(texts), layout.references.select(places))
    fold = layout.folds_of(texts)
    return [_vendi(layout, samples, fold, settings), _coverage(layout, samples, references, fold, settings)]


def _vendi(layout: Layout, samples: sparse.csr_array, fold: np.ndarray, settings: dict[str, object]) -> Measured:
    kernel = inner(samples, samples)

    def without(left_out: int) -> float:
        kept = np.flatnonzero(fold != left_out)
        return vendi_score(kernel[np.ix_(kept, kept)]) if len(kept) else float("nan")

    return layout.jackknife("vendi_score", vendi_score(kernel), without, fold, "texts", settings)


def _coverage(layout: Layout, samples: sparse.csr_array, references: sparse.csr_array, fold: np.ndarray,
              settings: dict[str, object]) -> Measured:  # fmt: skip
    """knn_coverage: share of references whose k-NN ball holds at least one sample."""
    settings = settings | {"k": COVERAGE_K, "references": references.shape[0]}
    if references.shape[0] <= COVERAGE_K:
        return layout.null("knn_coverage", f"needs more than {COVERAGE_K} references; there are {references.shape[0]}", settings=settings)
    inside = inside_balls(squared_distances(inner(references, samples)), radii(squared_distances(inner(references, references)), COVERAGE_K))

    def without(left_out: int) -> float:
        kept = inside[:, fold != left_out]
        return float(kept.any(axis=1).mean()) if kept.size else float("nan")

    note = SELF_NOTE if layout.is_reference else None
    return layout.jackknife("knn_coverage", float(inside.any(axis=1).mean()), without, fold, "share", settings, note)
