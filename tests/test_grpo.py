"""GRPO without a model: settings, data order, credit, the metrics of a rollout."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tiny_agent import rewarded

from vrag_lib.actions import Action, ActionKind, InvalidReason
from vrag_lib.grpo import GRPOConfig, question_order, rollout_metrics, row_seed, step_advantages
from vrag_lib.training import MetricsFile, read_runs
from vrag_lib.trajectory import StopReason, Turn


def test_credit_goes_to_the_turns_it_names():
    rewards = [{"retrieval": (1.0, 0.2), "answer": (0.0, 0.8)}, {"retrieval": (0.0, 0.2), "answer": (1.0, 0.8)}]
    pair = [rewarded(str(i), 0).with_rewards(r) for i, r in enumerate(rewards)]
    config = GRPOConfig(group_size=2, advantage_std=False)
    (plain, _), (scoped, _) = (
        step_advantages(pair, config, credit) for credit in (None, lambda t: {"retrieval": [0, 1, 0, 0]})
    )
    assert plain([1, 3]).tolist() == pytest.approx([-0.3, -0.3])
    assert scoped([1, 3]).tolist() == pytest.approx([0.1 - 0.4, -0.4])


def test_weights_decide_which_trajectory_of_a_group_did_better():
    """EVisRAG normalises each reward by itself, which takes its weights out again."""
    for weight in (0.2, 0.8):
        rewards = [{"retrieval": (1.0, weight), "answer": (0.0, 1 - weight)}]
        rewards += [{"retrieval": (0.0, weight), "answer": (1.0, 1 - weight)}]
        pair = [rewarded(str(i), 0).with_rewards(r) for i, r in enumerate(rewards)]
        first, second = (f([1])[0] for f in step_advantages(pair, GRPOConfig(group_size=2)))
        assert (first > 0 > second) == (weight > 0.5) and first == pytest.approx(-second) and abs(first) > 0.5
        apart = [f([1])[0] for f in step_advantages(pair, GRPOConfig(group_size=2), credit=lambda t: {})]
        assert (apart[0] > 0 > apart[1]) == (weight > 0.5)


def test_an_invalid_reply_may_be_penalised_even_where_its_trajectory_did_well():
    search = Turn("assistant", "s", action=Action(ActionKind.SEARCH, "x"), token_ids=(1, 2))
    bad = Turn("assistant", "b", invalid=InvalidReason.NO_ACTION, token_ids=(1,))
    pair = [rewarded("a", 1.0, (bad, search)), rewarded("b", 0.0, (search, bad))]
    places = [i for i, turn in enumerate(pair[0].turns) if turn.role == "assistant"]
    own = GRPOConfig(group_size=2, advantage_std=False)
    for config, expected in (
        (own, [[0.5, 0.5], [-0.5, -0.5]]),
        (replace(own, invalid_advantage=-1.0), [[-1.0, 0.5], [-0.5, -1.0]]),
    ):
        assert [f(places).tolist() for f in step_advantages(pair, config)] == expected


def test_an_error_of_the_world_gives_its_neighbours_no_advantage():
    group = [rewarded(str(i), 1.0) for i in range(4)] + [rewarded("4", 0.0, stop=StopReason.ERROR)]
    config = GRPOConfig(group_size=5)
    assert [f([1]).tolist() for f in step_advantages(group, config)] == [[0.0]] * 5
    assert rollout_metrics(group, 5)["groups_without_signal"] == 1
    own_fault = [*group[:4], rewarded("4", 0.0, stop=StopReason.CONTEXT_OVERFLOW)]
    assert step_advantages(own_fault, config)[0]([1])[0] > 0.4


def test_a_reward_without_weight_may_be_unknown():
    pair = [rewarded(name, 1.0).with_rewards({"answer": (float("nan"), 0.0), "retrieval": (r, 1.0)}) for name, r in
            (("a", 1.0), ("b", 0.0))]  # fmt: skip
    credit = lambda trajectory: {}  # noqa: E731
    for given in (None, credit):
        first, second = step_advantages(pair, GRPOConfig(group_size=2, advantage_std=False), given)
        assert first([1]).tolist() == [0.5] and second([1]).tolist() == [-0.5]


def test_leave_one_out_is_chosen_by_its_name():
    group = [rewarded(str(i), r) for i, r in enumerate([1.0, 0.0, 0.0])]
    first, *_ = step_advantages(group, GRPOConfig(group_size=3, advantage="leave_one_out"))
    assert first([1]).tolist() == pytest.approx([1.0])


def test_metrics_of_a_rollout():
    search = Turn("assistant", "s", action=Action(ActionKind.SEARCH, "x"), token_ids=(1, 2))
    bad = Turn("assistant", "b", invalid=InvalidReason.NO_ACTION, token_ids=(1,))
    pair = [rewarded("a", 1.0, (search, search)), rewarded("b", 0.0, (search, bad), StopReason.MAX_TURNS)]
    metrics = rollout_metrics([*pair, rewarded("c", float("nan")), rewarded("d", 0.5)], 2)
    assert metrics["reward"] == pytest.approx(0.5)
    assert metrics["reward_answer"] == pytest.approx(0.5)
    assert metrics["rewards_unknown"] == 1
    assert metrics["groups_without_signal"] == 1
    assert metrics["searches"] == 0.75
    assert metrics["turns"] == 1
    assert metrics["invalid_rate"] == metrics["invalid_no_action"] == 0.25
    assert metrics["finish_rate"] == 0.75
    assert metrics["stop_max_turns"] == 0.25
    assert metrics["sampled_tokens"] == 7 / 4


def test_order_and_seeds_depend_on_nothing_but_the_run():
    order = question_order(5, 12, seed=1)
    assert order == question_order(5, 12, seed=1) != question_order(5, 12, seed=2)
    assert order[:7] == question_order(5, 7, seed=1)
    assert sorted(order[5:10]) == list(range(5))
    seeds = {row_seed(0, step, row, attempt) for step in range(4) for row in range(8) for attempt in range(2)}
    assert len(seeds) == 64


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"group_size": 1}, "group_size=1"),
        ({"temperature": 0.0}, "temperature=0 is greedy"),
        ({"advantage": "mean"}, "advantage is one of group, leave_one_out, not 'mean'"),
        ({"micro_batch_size": 7}, "160 trajectories per rollout are not a multiple"),
        ({"updates_per_step": 5}, "questions_per_step=32 is not a multiple of updates_per_step"),
    ],
)
def test_settings_that_do_not_fit_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        GRPOConfig(**settings).validate()


def test_curves_of_all_runs_are_read_with_their_name_and_seed(tmp_path):
    assert read_runs(tmp_path / "nowhere").empty
    for name, values in {"paper_seed_0": [0.1, 0.2], "paper_seed_10": [0.3], "answer_only_seed_1": [0.4]}.items():
        curve = MetricsFile(tmp_path / name / "metrics.csv")
        for step, value in enumerate(values, 1):
            curve.add(step, {"reward": value} | ({"kl": 0.0} if step == 2 else {}))
    MetricsFile(tmp_path / "paper_seed_first" / "metrics.csv").add(1, {"reward": 9.0})
    table = read_runs(tmp_path)
    assert table[["run", "seed", "step", "reward"]].values.tolist() == [
        ["answer_only", 1, 1, 0.4],
        ["paper", 0, 1, 0.1],
        ["paper", 0, 2, 0.2],
        ["paper", 10, 1, 0.3],
    ]
    assert table["kl"].notna().sum() == 1
