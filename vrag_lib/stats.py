"""Uncertainty of means over questions: percentile bootstrap intervals, paired differences. Pure functions on arrays.

Questions are resampled with replacement (Efron 1979); a paired difference resamples questions, both systems together,
so that what is hard for both cancels. Everything is drawn from a seed: the same values give the same interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_DRAWS_AT_ONCE = 4_000_000
"""Random indices held in memory together."""


class Interval(NamedTuple):
    """A mean and the limits of its interval, in the unit of the values."""

    mean: float
    low: float
    high: float


class Difference(NamedTuple):
    """Mean of `a - b`, the limits of its interval, and a two-sided p-value.

    `p_value` is twice the share of resampled differences at or beyond zero on the rarer side, at least 1 / samples.
    """

    mean: float
    low: float
    high: float
    p_value: float


def bootstrap_mean(
    values: Sequence[float] | np.ndarray, confidence: float = 0.95, samples: int = 10_000, seed: int = 0
) -> Interval:
    """Mean of `values` (n,) with its percentile bootstrap interval.

    >>> bootstrap_mean([0.5, 0.5, 0.5])
    Interval(mean=0.5, low=0.5, high=0.5)

    Raises ValueError for no values or values that are not finite.
    """
    array = _checked(values, confidence, samples)
    low, high = _limits(_resampled_means(array, samples, seed), confidence)
    return Interval(float(array.mean()), low, high)


def paired_difference(
    a: Sequence[float] | np.ndarray,
    b: Sequence[float] | np.ndarray,
    confidence: float = 0.95,
    samples: int = 10_000,
    seed: int = 0,
) -> Difference:
    """How much better `a` (n,) is than `b` (n,) on the same n questions in the same order.

    >>> paired_difference([1.0, 1.0, 0.0], [0.0, 0.0, 0.0]).mean
    0.6666666666666666

    Raises ValueError when the lengths differ, there are no values, or one is not finite.
    """
    if len(a) != len(b):
        raise ValueError(f"a paired difference needs equally many values, not {len(a)} and {len(b)}")
    array = _checked(a, confidence, samples) - _checked(b, confidence, samples)
    means = _resampled_means(array, samples, seed)
    low, high = _limits(means, confidence)
    rarer = min((means <= 0).mean(), (means >= 0).mean())
    return Difference(float(array.mean()), low, high, float(min(1.0, max(2 * rarer, 1 / samples))))


def _checked(values: Sequence[float] | np.ndarray, confidence: float, samples: int) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not len(array):
        raise ValueError(f"values must be a non-empty list of numbers, not of shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"value {int(np.flatnonzero(~np.isfinite(array))[0])} is not finite")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence lies between 0 and 1, not {confidence}")
    if samples < 1:
        raise ValueError(f"samples must be at least 1, not {samples}")
    return array


def _resampled_means(array: np.ndarray, samples: int, seed: int) -> np.ndarray:
    """(samples,) means of resamples of `array` (n,)."""
    rng = np.random.default_rng(seed)
    n = len(array)
    step = max(1, _DRAWS_AT_ONCE // n)
    sizes = [min(step, samples - start) for start in range(0, samples, step)]
    return np.concatenate([array[rng.integers(0, n, (size, n))].mean(axis=1) for size in sizes])


def _limits(means: np.ndarray, confidence: float) -> tuple[float, float]:
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
