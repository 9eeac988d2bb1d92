"""Steps for the feedback controller, made from the surprisal of their tokens."""

import numpy as np

from ds_stability.controller import FeedbackController
from ds_stability.histogram import histogram
from ds_stability.statistics import FIELDS, INDEX, VECTOR_SIZE, StepSums


def step_sums(surprisal, setting=None, weight=None):
    """Global sums of a step whose tokens had `surprisal`, under the law's weights (or the given ones)."""
    if weight is None:
        weight = np.exp(-setting.gain * np.clip((surprisal - setting.mu) / setting.sigma, -3.0, 3.0))
    vector = np.zeros(VECTOR_SIZE)
    columns = {"tokens": np.ones_like(surprisal), "surprisal": surprisal, "surprisal_sq": surprisal**2}
    columns |= {"weight": weight, "weight_sq": weight**2}
    columns |= {"weighted_surprisal": weight * surprisal, "weighted_surprisal_sq": weight * surprisal**2}
    for name, column in columns.items():
        vector[INDEX[name]] = column.sum()
    vector[len(FIELDS) :] = histogram(surprisal).ravel()
    return StepSums(vector)


def controller(level, warmup_steps=10, **kwargs):
    return FeedbackController(level if callable(level) else lambda step: level, warmup_steps, **kwargs)
