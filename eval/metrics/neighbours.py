"""Diversity and fidelity in a feature space: Vendi score, k-NN recall and coverage against human references.

Features: tf-idf of 1-, 2- and 3-grams of token ids, hashed with a sign to 1,024 dimensions (Weinberger et al. 2009,
arXiv 0902.2206), rows of length 1. The idf is log((1 + D) / (1 + d)) + 1 over the D references, so that it is the same for
all models; without references over the texts themselves. Sources: Friedman and Dieng 2023 (arXiv 2210.02410);
Kynkaanniemi et al. 2019 (arXiv 1904.06991); Naeem et al. 2020 (arXiv 2002.09797).
"""

import numpy as np

from ..records import Measured
from .layout import SELF_NOTE, SUBSAMPLE_TEXTS, Layout
from .ngrams import Corpus, dense

DIMENSIONS = 1024
MAX_N = 3
RECALL_K, COVERAGE_K = 3, 5  # as in the papers
TOLERANCE = 1e-12  # squared distance below which two texts are the same: rows have length 1


def mix(values: np.ndarray) -> np.ndarray:
    """splitmix64's finalizer on uint64: a fixed hash, the same on every machine."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def hashed_grams(corpus: Corpus) -> tuple[np.ndarray, np.ndarray]:
    """(text, uint64 hash) of every 1-, 2- and 3-gram."""
    token = mix(corpus.tokens.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15))
    texts, hashes = [corpus.text_of], [token]
    at = token.copy()
    for n in range(2, MAX_N + 1):
        positions = corpus.gram_starts(n)
        at[positions] = mix(at[positions] * np.uint64(31) + token[positions + n - 1])
        texts.append(corpus.text_of[positions])
        hashes.append(at[positions])
    return np.concatenate(texts), np.concatenate(hashes)


class Features:
    """The map from texts to vectors, with the idf of some documents."""

    def __init__(self, documents: Corpus):
        text, hashes = hashed_grams(documents)
        self.documents = len(documents.lengths)
        self.known = np.unique(hashes)
        numbers, types = dense(hashes)
        pairs = np.unique(text * max(1, types) + numbers)
        self.frequency = np.bincount(pairs % max(1, types), minlength=types)

    def __call__(self, corpus: Corpus) -> np.ndarray:
        """fp64 [T, 1024], rows of length 1; a text without tokens is a row of zeros."""
        text, hashes = hashed_grams(corpus)
        frequency = np.zeros(len(hashes))
        if len(self.known):
            place = np.minimum(np.searchsorted(self.known, hashes), len(self.known) - 1)
            frequency = np.where(self.known[place] == hashes, self.frequency[place], 0)
        idf = np.log((1 + self.documents) / (1 + frequency)) + 1.0
        sign = 1.0 - 2.0 * ((hashes >> np.uint64(10)) & np.uint64(1)).astype(np.float64)
        slot = (hashes % np.uint64(DIMENSIONS)).astype(np.int64)
        rows = np.bincount(text * DIMENSIONS + slot, sign * idf, len(corpus.lengths) * DIMENSIONS)
        rows = rows.astype(np.float64).reshape(len(corpus.lengths), DIMENSIONS)  # bincount of nothing gives whole numbers
        norm = np.linalg.norm(rows, axis=1, keepdims=True)
        return np.divide(rows, norm, out=np.zeros_like(rows), where=norm > 0)


def vendi_score(features: np.ndarray) -> float:
    """exp of the entropy of the eigenvalues of X X' / n, [n, d] with rows of length 1: effective number of texts, 1..n.

    X'X / n has the same eigenvalues but for zeros: the smaller of the two (the dual form where d < n) is taken.
    """
    n, d = features.shape
    return _vendi_of_kernel(features @ features.T if n <= d else features.T @ features, n)


def _vendi_of_kernel(kernel: np.ndarray, n: int) -> float:
    eigenvalues = np.linalg.eigvalsh(kernel / n)
    eigenvalues = eigenvalues[eigenvalues > 0]
    return float(np.exp(max(0.0, -(eigenvalues * np.log(eigenvalues)).sum())))


def squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Between rows of length 1, [len(a), len(b)]; below the tolerance it is 0, so that equal texts are at distance 0."""
    squared = 2.0 - 2.0 * (a @ b.T)
    return np.where(squared < TOLERANCE, 0.0, squared)


def radii(within: np.ndarray, k: int) -> np.ndarray:
    """Squared distance of each point to its k-th nearest other one; NaN for k points or fewer."""
    if len(within) <= k:
        return np.full(len(within), np.nan)
    others = within.copy()
    np.fill_diagonal(others, np.inf)
    return np.partition(others, k - 1, axis=1)[:, k - 1]


def knn_recall(reference_sample: np.ndarray, sample_radii: np.ndarray) -> float:
    """Share of references inside the k-NN ball of at least one sample; squared distances [references, samples]."""
    if np.isnan(sample_radii).any() or not reference_sample.size:
        return float("nan")
    return float((reference_sample <= sample_radii * (1 + 1e-9)).any(axis=1).mean())


def knn_coverage(reference_sample: np.ndarray, reference_radii: np.ndarray) -> float:
    """Share of references whose own k-NN ball (among references) holds at least one sample."""
    if np.isnan(reference_radii).any() or not reference_sample.size:
        return float("nan")
    return float((reference_sample <= reference_radii[:, None] * (1 + 1e-9)).any(axis=1).mean())


def measure_neighbours(layout: Layout) -> list[Measured]:
    """vendi_score, knn_recall and knn_coverage of the subsample, with jackknife units.

    Where references come in they are taken as given: the intervals say how sure we are of the model, not of the references.
    """
    texts = layout.subsample[layout.lengths[layout.subsample] > 0]
    order = np.random.default_rng(layout.context.seed).permutation(len(layout.references.lengths))
    places = np.sort(order[layout.references.lengths[order] > 0][:SUBSAMPLE_TEXTS])
    settings = {"texts": len(texts), "subsample": SUBSAMPLE_TEXTS, "features": f"hashed 1-{MAX_N}-gram tf-idf of token ids",
                "dimensions": DIMENSIONS, "idf": "references" if len(places) else "the texts"}  # fmt: skip
    if not len(texts):
        return [layout.null(name, "no text with tokens", settings=settings, unit=unit)
                for name, unit in (("vendi_score", "texts"), ("knn_recall", "share"), ("knn_coverage", "share"))]  # fmt: skip
    corpus, chosen = layout.corpus_of(texts), layout.references.select(places)
    features = Features(chosen if len(places) else corpus)
    samples, fold = features(corpus), layout.folds_of(texts)
    compared = _against_references(layout, samples, features(chosen), fold, settings)
    return [_vendi(layout, samples, fold, settings), *compared]


def _vendi(layout: Layout, samples: np.ndarray, fold: np.ndarray, settings: dict[str, object]) -> Measured:
    kernel = samples @ samples.T

    def score(kept: np.ndarray) -> float:
        return _vendi_of_kernel(kernel[np.ix_(kept, kept)], int(kept.sum())) if kept.any() else float("nan")

    without = np.array([score(fold != f) for f in range(layout.folds)])
    return layout.jackknife("vendi_score", score(np.ones(len(samples), dtype=bool)), without, "texts", settings, settings["texts"])


def _against_references(layout: Layout, samples: np.ndarray, references: np.ndarray, fold: np.ndarray,
                        settings: dict[str, object]) -> list[Measured]:
    """Balls keep their radii while folds of samples are left out: a k-th neighbor is no smooth function of its sample, and
    the jackknife of one is twice too wide; so it is a third too wide (simulated)."""
    across = squared_distances(references, samples)
    sample_radii = radii(squared_distances(samples, samples), RECALL_K)
    reference_radii = radii(squared_distances(references, references), COVERAGE_K)

    def both(kept: np.ndarray) -> tuple[float, float]:
        return knn_recall(across[:, kept], sample_radii[kept]), knn_coverage(across[:, kept], reference_radii)

    values = both(np.ones(len(samples), dtype=bool))
    without = np.array([both(fold != f) for f in range(layout.folds)])
    note = SELF_NOTE if layout.is_reference else None
    rows = []
    for i, (name, k) in enumerate((("knn_recall", RECALL_K), ("knn_coverage", COVERAGE_K))):
        stated = settings | {"k": k, "references": len(references)}
        if np.isfinite(values[i]):
            rows.append(layout.jackknife(name, values[i], without[:, i], "share", stated, stated["texts"], note))
        else:
            needed = f"more than {k} texts and one reference" if i == 0 else f"more than {k} references and one text"
            rows.append(layout.null(name, f"needs {needed}; there are {len(samples)} texts, {len(references)} references",
                                    settings=stated))  # fmt: skip
    return rows
