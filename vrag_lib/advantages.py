"""From rewards to what a token's log-prob is pushed by: advantages, loss weights, the clipped objective, KL.

Deviations: the paper gives no formula for its advantages; the default is the released code's (mean and unbiased
standard deviation of the group, 1e-6 added). A reward that is NaN (a judge that failed) takes no part in its group and
gives no advantage, where the released code would wait for ever (trap S2). The mask of trained tokens comes from the
record, so environment tokens never appear here (T11).

Pure functions on arrays; those of the loss take NumPy arrays and torch tensors alike. Notation: N trajectories in
groups of G (the group of one question stands together), n trained tokens of a batch, one after the other.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

EPSILON = 1e-6
"""Added to a group's standard deviation before dividing (released code, core_algos)."""


def group_relative(rewards: Sequence[float], group_size: int, std: bool = True) -> np.ndarray:
    """Reward minus the mean of its group (N,), over the group's unbiased standard deviation if `std`.

    A group of one has mean 0 and deviation 1, as in the released code; equal rewards give 0.

    Two questions with two trajectories each; the second question tells nothing:

    >>> group_relative([1, 0, 0.5, 0.5], 2).round(3)
    array([ 0.707, -0.707,  0.   ,  0.   ])
    >>> group_relative([1, 0, 0.5, 0.5], 2, std=False)
    array([ 0.5, -0.5,  0. ,  0. ])
    >>> group_relative([0.25], 1, std=False)
    array([0.25])
    """
    groups = _groups(rewards, group_size)
    if group_size == 1:
        return _known(groups / (1 + EPSILON) if std else groups)
    advantages = groups - _mean(groups)
    if std:
        advantages = advantages / (_deviation(groups) + EPSILON)
    return _known(_zero_without_signal(advantages, groups))


def leave_one_out(rewards: Sequence[float], group_size: int) -> np.ndarray:
    """Reward minus the mean of the *others* of its group (N,); unbiased, G/(G-1) times the distance to the mean.

    >>> leave_one_out([1, 0, 0, 0], 4).round(3)
    array([ 1.   , -0.333, -0.333, -0.333])

    With nobody else in the group the baseline is 0:

    >>> leave_one_out([0.25], 1)
    array([0.25])
    """
    groups = _groups(rewards, group_size)
    if group_size == 1:
        return _known(groups)
    others = np.maximum(np.sum(~np.isnan(groups), axis=1, keepdims=True) - 1, 1)
    total = np.nansum(groups, axis=1, keepdims=True)
    return _known(_zero_without_signal(groups - (total - groups) / others, groups))


def has_signal(rewards: Sequence[float], group_size: int, tolerance: float = 1e-8) -> np.ndarray:
    """For each group whether its rewards differ (N / G,): without that every advantage is 0 and nothing is learnt.

    >>> has_signal([1, 0, 0.5, 0.5, float("nan"), 1], 2)
    array([ True, False, False])
    """
    return _spread(_groups(rewards, group_size)) > tolerance


def group_deviation(rewards: Sequence[float], group_size: int) -> float:
    """Mean over the groups of the unbiased standard deviation inside each: how much there is to learn from.

    >>> round(group_deviation([1, 0, 0.5, 0.5], 2), 3)
    0.354
    """
    return float(_deviation(_groups(rewards, group_size)).mean())


def token_advantages(
    terms: Mapping[str, float], turn_index: Sequence[int], scopes: Mapping[str, Sequence[float]] | None = None
) -> np.ndarray:
    """Advantages (n,) of one trajectory's tokens: each term's advantage times its scope's weight for the token's turn.

    terms: the trajectory's advantage by reward; {"outcome": a} is plain GRPO, one number for every token.
    turn_index: the turn of each token (n,).
    scopes: for some of the terms a weight for each turn of the trajectory; a term without one counts everywhere.

    A retrieval reward that credits the searching turn 1 alone, an answer reward for all of turns 1 and 3:

    >>> token_advantages({"retrieval": 1.0, "answer": -0.5}, [1, 1, 3], {"retrieval": [0, 1, 0, 0]})
    array([ 0.5,  0.5, -0.5])
    """
    turns = np.asarray(turn_index, dtype=int)
    total = np.zeros(len(turns))
    for name, advantage in terms.items():
        weights = None if scopes is None else scopes.get(name)
        total += advantage if weights is None else advantage * np.asarray(weights, dtype=float)[turns]
    return total


def loss_weights(lengths: Sequence[int], normalisation: str, constant_length: int | None = None) -> np.ndarray:
    """The weight (N,) of each trained token of N trajectories with `lengths` trained tokens; the loss of a batch is
    the sum over tokens of weight times loss. The weights are those of the whole batch, so it may be cut into
    micro-batches and spread over processes in any way.

    sequence: every trajectory weighs the same (the released code at its micro-batch of one; GRPO).
    token: every token weighs the same, long trajectories count for more (DAPO).
    constant: tokens are divided by N times a constant, so that length has no part at all (Dr. GRPO).

    Trajectories of 1, 3 and 0 trained tokens; the empty one is no part of a mean over trajectories:

    >>> loss_weights([1, 3, 0], "sequence").round(3)
    array([0.5  , 0.167, 0.   ])
    >>> loss_weights([1, 3, 0], "token")
    array([0.25, 0.25, 0.  ])
    >>> loss_weights([1, 3, 0], "constant", constant_length=10).round(3)
    array([0.033, 0.033, 0.   ])

    Raises ValueError for another normalisation or a constant that is not positive.
    """
    tokens = np.asarray(lengths, dtype=float)
    trained = tokens > 0
    if normalisation == "sequence":
        weights = 1 / (max(trained.sum(), 1) * np.maximum(tokens, 1))
    elif normalisation == "token":
        weights = np.full(len(tokens), 1 / max(tokens.sum(), 1))
    elif normalisation == "constant":
        if constant_length is None or constant_length < 1:
            raise ValueError(f"constant normalisation divides by a number of tokens, not by {constant_length}")
        weights = np.full(len(tokens), 1 / (max(len(tokens), 1) * constant_length))
    else:
        raise ValueError(f"the loss is normalised by sequence, token or constant, not by {normalisation!r}")
    return np.where(trained, weights, 0.0)


def clip_objective(ratio: Any, advantages: Any, low: float = 0.2, high: float = 0.2) -> Any:
    """min(ratio * A, clip(ratio, 1 - low, 1 + high) * A) for each token (n,), to be maximised (paper App. C).

    `high` above `low` leaves more room to unlikely tokens that turned out well (asymmetric clip).

    >>> clip_objective(np.array([1.5, 1.5, 0.5, 0.5]), np.array([1.0, -1.0, 1.0, -1.0]), low=0.2, high=0.28)
    array([ 1.28, -1.5 ,  0.5 , -0.8 ])
    """
    xp = _namespace(ratio)
    return xp.minimum(ratio * advantages, xp.clip(ratio, 1 - low, 1 + high) * advantages)


def is_clipped(ratio: Any, advantages: Any, low: float = 0.2, high: float = 0.2) -> Any:
    """Whether each token's gradient is cut off by the clip (n,).

    >>> is_clipped(np.array([1.5, 1.5, 0.5, 0.5]), np.array([1.0, -1.0, 1.0, -1.0]))
    array([ True, False, False,  True])
    """
    return ((ratio > 1 + high) & (advantages > 0)) | ((ratio < 1 - low) & (advantages < 0))


def k3_divergence(logprobs: Any, reference: Any, clamp: float = 10.0) -> Any:
    """Schulman's k3 estimate of KL(policy || reference) for each sampled token (n,): exp(d) - d - 1 with
    d = reference - logprobs, never negative, cut at `clamp` (the released code's "low_var_kl").

    >>> k3_divergence(np.array([-1.0, -1.0, -9.0]), np.array([-1.0, -2.0, -1.0])).round(3)
    array([ 0.   ,  0.368, 10.   ])
    """
    xp = _namespace(logprobs)
    difference = xp.clip(reference - logprobs, -20.0, 20.0)  # exp stays finite
    return xp.clip(xp.exp(difference) - difference - 1, -clamp, clamp)


def _groups(rewards: Sequence[float], group_size: int) -> np.ndarray:
    values = np.asarray(rewards, dtype=float)
    if group_size < 1 or values.ndim != 1 or len(values) % group_size:
        raise ValueError(f"{values.size} rewards are no whole number of groups of {group_size}")
    return values.reshape(-1, group_size)


def _mean(groups: np.ndarray) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a group without any verdict: NaN, taken out by _known
        return np.nanmean(groups, axis=1, keepdims=True)


def _deviation(groups: np.ndarray) -> np.ndarray:
    """Unbiased standard deviation inside each group (groups, 1); exactly 0 where all rewards are the same."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        deviation = np.nanstd(groups, axis=1, ddof=1, keepdims=True)
    return _zero_without_signal(deviation, groups)


def _zero_without_signal(values: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """`values` with exactly 0, not what rounding left, for groups whose known rewards are all the same."""
    return np.where(_spread(groups)[:, None] > 0, values, 0.0)


def _spread(groups: np.ndarray) -> np.ndarray:
    known = ~np.isnan(groups)
    high = np.max(groups, axis=1, where=known, initial=-np.inf)
    low = np.min(groups, axis=1, where=known, initial=np.inf)
    return np.where(known.any(axis=1), high - low, 0.0)


def _known(advantages: np.ndarray) -> np.ndarray:
    return np.nan_to_num(advantages, nan=0.0).reshape(-1)


def _namespace(array: Any) -> Any:
    """torch for a torch tensor, else NumPy; torch is not imported for this."""
    torch = sys.modules.get("torch")
    return torch if torch is not None and isinstance(array, torch.Tensor) else np
