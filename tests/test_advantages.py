"""Advantages, loss weights and the pieces of the loss: identities that hold for all rewards, NumPy and torch alike."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vrag_lib.advantages import (
    clip_objective,
    group_deviation,
    group_relative,
    has_signal,
    is_clipped,
    k3_divergence,
    leave_one_out,
    loss_weights,
    token_advantages,
)

torch = pytest.importorskip("torch")

SIZE = 4
rewards = st.lists(st.sampled_from([0.0, 0.1, 0.25, 0.7, 1.0]), min_size=SIZE, max_size=3 * SIZE).map(
    lambda values: values[: len(values) // SIZE * SIZE]
)


@given(rewards, st.booleans())
def test_a_group_advantages_sum_to_zero_and_ignore_a_shift(values, std):
    advantages = group_relative(values, SIZE, std)
    assert np.allclose(advantages.reshape(-1, SIZE).sum(axis=1), 0, atol=1e-9)
    assert np.allclose(group_relative([v + 3 for v in values], SIZE, std), advantages, atol=1e-6)


@given(rewards)
def test_advantages_are_those_of_the_released_code(values):
    for i in range(0, len(values), SIZE):
        group = torch.tensor(values[i : i + SIZE], dtype=torch.float64)
        expected = (group - group.mean()) / (group.std() + 1e-6)
        assert np.allclose(group_relative(values, SIZE)[i : i + SIZE], expected.numpy(), atol=1e-9)


@given(rewards)
def test_leave_one_out_is_the_centred_reward_stretched(values):
    centred = group_relative(values, SIZE, std=False)
    assert np.allclose(leave_one_out(values, SIZE), centred * SIZE / (SIZE - 1), atol=1e-12)


@given(rewards)
def test_groups_without_signal_are_those_with_zero_advantages(values):
    zero = (group_relative(values, SIZE).reshape(-1, SIZE) == 0).all(axis=1)
    assert (has_signal(values, SIZE) == ~zero).all()


def test_equal_rewards_give_exactly_zero_whatever_the_rounding_of_their_mean():
    assert not group_relative([0.1] * 5, 5).any()
    assert not leave_one_out([0.1] * 4, 4).any()
    assert group_deviation([0.1] * 5, 5) == 0


@pytest.mark.parametrize("estimate", [group_relative, leave_one_out])
def test_an_unknown_reward_takes_no_part_in_its_group(estimate):
    nan = float("nan")
    with_gap = estimate([1, nan, 0, 0.5], 4)
    assert with_gap[1] == 0
    assert np.allclose(with_gap[[0, 2, 3]], estimate([1, 0, 0.5], 3))
    assert not estimate([nan] * 4, 4).any()


def test_a_group_of_one_keeps_its_reward():
    assert group_relative([0.5, 0.2], 1) == pytest.approx([0.5, 0.2], abs=1e-5)
    assert leave_one_out([0.5, 0.2], 1) == pytest.approx([0.5, 0.2])


@pytest.mark.parametrize("size", [0, 3, -1])
def test_rewards_that_are_no_whole_groups_are_refused(size):
    with pytest.raises(ValueError, match="4 rewards are no whole number of groups"):
        group_relative([1, 2, 3, 4], size)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=12).filter(any))
def test_weights_make_the_loss_a_mean(lengths):
    lengths = np.array(lengths)
    trained = lengths > 0
    by_sequence = loss_weights(lengths, "sequence") * lengths
    assert np.allclose(by_sequence[trained], 1 / trained.sum())
    assert (loss_weights(lengths, "token") * lengths).sum() == pytest.approx(1)
    assert np.allclose(loss_weights(lengths, "constant", 50)[trained], 1 / (50 * len(lengths)))
    assert not loss_weights(lengths, "token")[~trained].any()


def test_a_batch_without_trained_tokens_weighs_nothing():
    for normalisation in ("sequence", "token", "constant"):
        assert not loss_weights([0, 0], normalisation, 10).any()


def test_unknown_normalisations_are_refused():
    with pytest.raises(ValueError, match="not by 'mean'"):
        loss_weights([1], "mean")
    with pytest.raises(ValueError, match="a number of tokens, not by None"):
        loss_weights([1], "constant")


def test_the_objective_is_the_same_in_numpy_and_torch():
    generator = np.random.default_rng(0)
    ratio, advantages = generator.uniform(0.3, 2, 50), generator.normal(size=50)
    expected = clip_objective(ratio, advantages, 0.2, 0.28)
    assert np.allclose(clip_objective(torch.tensor(ratio), torch.tensor(advantages), 0.2, 0.28).numpy(), expected)
    logprobs, reference = -generator.uniform(0, 30, 50), -generator.uniform(0, 30, 50)
    assert np.allclose(
        k3_divergence(torch.tensor(logprobs), torch.tensor(reference)).numpy(), k3_divergence(logprobs, reference)
    )


def test_clipped_tokens_are_those_without_gradient():
    ratio = torch.linspace(0.3, 2, 40, dtype=torch.float64, requires_grad=True)
    for advantage in (1.0, -1.0):
        advantages = torch.full((40,), advantage, dtype=torch.float64)
        (gradient,) = torch.autograd.grad(clip_objective(ratio, advantages, 0.2, 0.28).sum(), ratio)
        assert ((gradient == 0) == is_clipped(ratio.detach(), advantages, 0.2, 0.28)).all()
        assert is_clipped(ratio.detach(), advantages, 0.2, 0.28).any()


def test_divergence_is_zero_at_equality_positive_elsewhere_and_bounded():
    logprobs = torch.tensor([-1.0, -1.0, -1.0, -200.0], requires_grad=True)
    divergence = k3_divergence(logprobs, torch.tensor([-1.0, -1.5, -0.5, -0.1]))
    assert divergence[0] == 0
    assert (divergence[1:] > 0).all()
    assert divergence[3] == 10
    divergence.sum().backward()
    assert logprobs.grad[0] == 0
    assert torch.isfinite(logprobs.grad).all()


def test_a_scope_without_weight_leaves_a_turn_alone():
    advantages = token_advantages({"answer": 2.0, "retrieval": 1.0}, [1, 3, 5], {"retrieval": [0, 1, 0, 0.5, 0, 0]})
    assert advantages.tolist() == [3.0, 2.5, 2.0]
    assert token_advantages({"outcome": -1.0}, []).shape == (0,)


def test_no_trajectories_have_no_weights():
    for normalisation in ("sequence", "token", "constant"):
        assert len(loss_weights([], normalisation, constant_length=3)) == 0
