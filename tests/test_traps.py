# ruff: noqa: E501
"""The traps of the released systems that this package avoids, and the test that proves each.

Numbers are those of the issue list that the package was written against: S stops the released code, T silently changes
the experiment, V concerns ViDoRAG, C is the checklist of a reproduction. Traps of stages that are not here yet are
added with them.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

TRAPS = {
    "S2 a judge that fails is asked for ever": (
        "judge_openai::test_every_failure_is_a_missing_verdict_and_counted_by_its_kind"
    ),
    "S3 a reply format that no server speaks": "judge_openai::test_one_greedy_request_in_the_papers_protocol",
    "S4 rewards only for sources on a list": "rewards::test_a_complete_trajectory_under_each_recipe",
    "S8 finished samples are never written": "synthesis::test_what_ended_before_a_policy_broke_is_kept",
    "S9 a failed call makes the sample vanish": (
        "experts_openai::test_a_sampling_run_survives_every_failure_and_reports_each_kind"
    ),
    "S10 private URLs, one device hard-coded, images by the server's working directory": (
        "search_server::test_the_answer_is_what_the_released_demo_and_trainer_read"
    ),
    "S11 reward called with missing arguments": "rewards::test_free_weights_and_another_judge",
    "S13 every page gets the embedding of the same image": (
        "visual_retrieval::test_embeddings_that_do_not_depend_on_the_page_are_refused"
    ),
    "S14 a reply without a thought or with an unknown action crashes": (
        "environment::test_a_hundred_thousand_replies_never_make_step_raise"
    ),
    "T1 text positions in training, multimodal ones in sampling": (
        "policy_transformers::test_logprobs_equal_a_full_forward"
    ),
    "T2 trained tokens are not the sampled ones": "policy_transformers::test_a_rollout_records_exactly_what_was_sampled",
    "T3 example tags in messages earn rewards": (
        "rewards::test_example_text_in_observations_and_thoughts_earns_nothing"
    ),
    "T4 a gate zeroes right answers unasked": (
        "rewards::test_the_gate_takes_a_right_answer_without_a_search_and_the_paper_does_not"
    ),
    "T5 several actions in one reply": "actions::test_nothing_after_the_first_closing_tag_is_read",
    "T6 a crop of a crop cuts the wrong region": "environment::test_a_crop_of_a_crop_is_cut_from_the_raw_page",
    "T7 another crop margin in training, validation and demo": (
        "environment::test_crop_padding_is_one_constant_from_the_config"
    ),
    "T8 boxes relative to a size the model never sees": (
        "geometry::test_qwens_own_processor_leaves_a_shown_size_as_it_is"
    ),
    "T9 a search without a new page shows another trajectory's page": (
        "environment::test_a_search_shows_the_best_page_not_yet_shown"
    ),
    "T10 a thin crop shifts the images of the whole batch": (
        "geometry::test_an_extreme_aspect_ratio_is_widened_not_raised"
    ),
    "T11 observations are trained on": "sft::test_trained_positions_decode_to_the_replies_and_nothing_else",
    "T12 masks recovered from text": "trajectory::test_the_loss_mask_covers_exactly_the_sampled_tokens",
    "T13 an image counted as one token": "policy_transformers::test_context_limits_count_image_tokens",
    "T14 pages compared by file name": "rewards::test_pages_after_the_gold_ones_cost_nothing",
    "T17 validation with a budget of its own": "environment::test_the_budget_is_announced_once_and_then_ends",
    "T19 an answer that instructs the judge, or names every candidate": (
        "judge::test_listing_every_candidate_earns_nothing"
    ),
    "T19 an answer that speaks to the model judge": "judge_openai::test_an_answer_cannot_instruct_the_judge",
    "T20 gold pages shown first in the training data": (
        "synthesis::test_the_oracle_shows_each_question_its_own_gold_page_first"
    ),
    "T21 a crop counts as following a search because its thought says search": (
        "synthesis_filters::test_a_crop_must_follow_an_image_whatever_its_thought_says"
    ),
    "T22 one failed search kills the rollout": "rollout::test_a_failing_search_engine_is_recorded_not_raised",
    "T23 the end of the budget announced in the demo only": "environment::test_the_budget_is_announced_once_and_then_ends",
    "V1 every query measured with the first one's number of pages": "hybrid::test_gmm_retriever_varies_the_number_of_pages",
    "V2 names cut at their first dot": "corpus_formats::test_mmlongbench_doc",
    "V3 a union of more than 20 pages fails": "hybrid::test_a_union_beyond_the_largest_size_is_kept_whole",
    "C2 log-probs change when pixels are blanked": "policy_transformers::test_blank_pixels_change_the_logprobs",
    "C6 intervals beside every number": "stats",
    "an adapter's weights silently do not load": "page_encoder::test_an_adapter_whose_keys_no_module_expects_is_refused",
    "scores in bf16 collapse to a few values": "maxsim::test_scores_and_ranking_are_those_of_fp64",
    "padded queries of a tiny model give NaN": (
        "page_encoder::test_queries_are_the_same_alone_and_among_others_even_where_padding_gives_nan"
    ),
    "the policy samples image placeholders": "policy_transformers::test_image_tokens_are_never_sampled",
}


@pytest.mark.parametrize("trap", TRAPS)
def test_each_trap_names_a_test_that_exists(trap):
    module, _, name = TRAPS[trap].partition("::")
    tree = ast.parse((Path(__file__).parent / f"test_{module}.py").read_text())
    tests = {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}
    assert tests
    assert not name or name in tests, f"{name} is not in test_{module}.py"
