"""Presets: what differs between them, and what must not."""

from __future__ import annotations

import dataclasses

import pytest

from vrag_lib.config import to_dict
from vrag_lib.factory import scale_policy
from vrag_lib.presets import EXPERIMENTS, PRESETS


@pytest.mark.parametrize("presets", [PRESETS, EXPERIMENTS])
def test_the_laptop_presets_differ_in_the_large_print_and_in_the_rate_of_rl_alone(presets):
    small, large = (to_dict(presets[name]) for name in ("laptop", "laptop_legible"))
    assert small.pop("preset") == "laptop" and large.pop("preset") == "laptop_legible"
    assert small["minidocs"].pop("text_px") is None and large["minidocs"].pop("text_px") == 60
    rates = [config["grpo"].pop("learning_rate") for config in (small, large)]
    assert rates == ([1.5e-3, 7.5e-4] if presets is EXPERIMENTS else [1e-6, 1e-6])
    assert small == large


def test_the_experiment_starts_from_the_policy_that_reads_its_print():
    assert scale_policy(EXPERIMENTS["laptop"]).name == scale_policy().name == "scale_policy"
    assert scale_policy(EXPERIMENTS["laptop_legible"]).name == "scale_policy_legible"


def test_experiments_are_the_presets_of_their_names():
    assert list(EXPERIMENTS) == list(PRESETS)
    assert all(presets[name].preset == name for presets in (PRESETS, EXPERIMENTS) for name in presets)


def test_one_update_on_a_whole_rollout_where_paper_and_script_disagree():
    """The paper's mini-batch of 64 and the script's of 32 both split a group of five."""
    grpo = PRESETS["paper"].grpo
    assert (grpo.rows, grpo.group_size, grpo.updates_per_step) == (160, 5, 1)
    assert all(size % grpo.group_size for size in (64, 32))
    with pytest.raises(ValueError, match="a group is not split over optimizer steps"):
        dataclasses.replace(grpo, updates_per_step=grpo.rows // 32).validate()
