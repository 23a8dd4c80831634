"""Uncertainty of means over questions: percentile bootstrap intervals, paired differences. Pure functions on arrays.

Questions are resampled with replacement (Efron 1979); a paired difference resamples questions, both systems together,
so that what is hard for both cancels. Where a system was trained several times, its training seeds are resampled too,
independently of the questions (crossed bootstrap, Owen 2007). What seeds add, linearised, is spread by a factor of
sqrt(n / (n - 1)), because the variance of n seeds resampled is (n - 1) / n of what it should be, of two the half; with
few it can only be rough. Where a share is 0 or 1 throughout, its limits are the exact ones of that many hits (Clopper
and Pearson 1934); with very few hits they are too narrow.
Everything is drawn from a seed: the same values give the same interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
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

    `p_value` is twice the share of resampled differences at or beyond zero on the rarer side, at least 2 / samples.
    """

    mean: float
    low: float
    high: float
    p_value: float


def bootstrap_mean(
    values: Sequence[float] | np.ndarray,
    confidence: float = 0.95,
    samples: int = 10_000,
    seed: int = 0,
    most: float | None = None,
) -> Interval:
    """Mean of `values` (n,) with its percentile bootstrap interval.

    most: the values are shares between 0 and this; the limits are exact where all of them are one of the two.

    >>> bootstrap_mean([0.5, 0.5, 0.5])
    Interval(mean=0.5, low=0.5, high=0.5)
    >>> [round(x, 2) for x in bootstrap_mean([1.0] * 10, most=1)]
    [1.0, 0.69, 1.0]

    Raises ValueError for no values or values that are not finite.
    """
    array = _checked(values, confidence, samples)
    if most is not None and (edge := edge_limits(float(array.mean()) / most, len(array), confidence)):
        return Interval(float(array.mean()), *(most * limit for limit in edge))
    low, high = _limits(_resampled_means(array, samples, seed), confidence)
    return Interval(float(array.mean()), low, high)


def edge_limits(share: float, n: int, confidence: float = 0.95) -> tuple[float, float] | None:
    """Exact limits of a share that is 0 or 1 in all of n questions; None for any other share.

    >>> [round(limit, 3) for limit in edge_limits(0.0, 100)], edge_limits(0.5, 100)
    ([0.0, 0.036], None)
    """
    if share not in (0.0, 1.0):
        return None
    far = ((1 - confidence) / 2) ** (1 / n)
    return (0.0, 1 - far) if share == 0.0 else (far, 1.0)


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
    return Difference(float(array.mean()), low, high, _two_sided(means))


def crossed_mean(
    values: np.ndarray,
    sizes: np.ndarray | None = None,
    confidence: float = 0.95,
    samples: int = 10_000,
    seed: int = 0,
    most: float | None = None,
) -> Interval:
    """Sum of `values` over the sum of `sizes`, both (seeds, questions), with its crossed bootstrap interval.

    sizes: default ones, which makes it the mean; a cell of size 0 is one without a value. most: as in `bootstrap_mean`;
    it is the questions that are counted, not how often each was asked.

    >>> crossed_mean(np.array([[1.0, 1.0], [1.0, 1.0]]))
    Interval(mean=1.0, low=1.0, high=1.0)

    Raises ValueError when the shapes differ, nothing is left, or a number is not finite.
    """
    whole, resampled = _crossed(values, sizes, samples, seed)
    asked = values.shape[1] if sizes is None else int((np.asarray(sizes) > 0).any(axis=0).sum())
    if most is not None and (edge := edge_limits(whole / most, asked, confidence)):
        return Interval(whole, *(most * limit for limit in edge))
    low, high = _limits(resampled, confidence)
    if (np.asarray(values) >= 0).all():  # two seeds that differ much would lead out of the range
        low = max(0.0, low)
    return Interval(whole, low, high if most is None else min(most, high))


def crossed_difference(
    a: np.ndarray,
    b: np.ndarray,
    a_sizes: np.ndarray | None = None,
    b_sizes: np.ndarray | None = None,
    confidence: float = 0.95,
    samples: int = 10_000,
    seed: int = 0,
) -> Difference:
    """How much higher `a` is than `b` as `crossed_mean` measures them, paired by question, and by seed where both have
    as many seeds; a system with one seed is the same in every resample of seeds.

    Raises ValueError as `crossed_mean`, and when the questions are not equally many or both have several seeds, but
    not the same number.
    """
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"a paired difference needs equally many questions, not {a.shape[1]} and {b.shape[1]}")
    if a.shape[0] != b.shape[0] and 1 not in (a.shape[0], b.shape[0]):
        raise ValueError(f"{a.shape[0]} and {b.shape[0]} seeds cannot be paired; compare the same ones")
    whole_a, means_a = _crossed(a, a_sizes, samples, seed)
    whole_b, means_b = _crossed(b, b_sizes, samples, seed)
    means = means_a - means_b
    low, high = _limits(means, confidence)
    return Difference(whole_a - whole_b, low, high, _two_sided(means))


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted for testing all of them together (Holm 1979), in their order.

    >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    """
    order = np.argsort(p_values, kind="stable")
    scaled = np.asarray(p_values, dtype=float)[order] * (len(p_values) - np.arange(len(p_values)))
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(scaled))
    return adjusted.tolist()


def _crossed(values: np.ndarray, sizes: np.ndarray | None, samples: int, seed: int) -> tuple[float, np.ndarray]:
    """The ratio of sums and its resamples (samples,). A resample whose sizes sum to 0 has the ratio of the whole."""
    if samples < 1:
        raise ValueError(f"samples must be at least 1, not {samples}")
    values = np.asarray(values, dtype=np.float64)
    sizes = np.ones_like(values) if sizes is None else np.asarray(sizes, dtype=np.float64)
    if values.ndim != 2 or values.shape != sizes.shape:
        raise ValueError(f"values and sizes are (seeds, questions), not {values.shape} and {sizes.shape}")
    if not (np.isfinite(values).all() and np.isfinite(sizes).all()):
        raise ValueError("a value is not finite; give it size 0 and value 0 instead")
    if not sizes.sum():
        raise ValueError("there are no values")
    seeds, questions = _draws(values.shape[0], samples, seed, 1), _draws(values.shape[1], samples, seed, 2)
    top, bottom = questions @ values.T, questions @ sizes.T  # (samples, seeds)
    all_bottom = bottom.sum(axis=1)
    whole = float(values.sum() / sizes.sum())
    ratio = np.divide(top.sum(axis=1), all_bottom, out=np.full(samples, whole), where=all_bottom > 0)
    if (n := values.shape[0]) > 1:
        share = np.divide(top - ratio[:, None] * bottom, all_bottom[:, None], out=np.zeros_like(top),
                          where=all_bottom[:, None] > 0)  # fmt: skip
        ratio = ratio + math.sqrt(n / (n - 1)) * ((seeds - 1) * share).sum(axis=1)
    return whole, ratio


@lru_cache(maxsize=16)
def _draws(n: int, samples: int, seed: int, stream: int) -> np.ndarray:
    """(samples, n): how often each of n things is in each resample; kept, so that systems are resampled together."""
    return np.random.default_rng([seed, stream]).multinomial(n, np.full(n, 1 / n), size=samples).astype(np.float32)


def _two_sided(means: np.ndarray) -> float:
    rarer = min((means <= 0).mean(), (means >= 0).mean())
    return float(min(1.0, max(2 * rarer, 2 / len(means))))


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
