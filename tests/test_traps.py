"""The traps of the released systems that this package avoids, and the test that proves each.

S stops the released code, T silently changes the experiment, V concerns ViDoRAG, P is what the paper leaves open, E
concerns EVisRAG, C is the checklist of a reproduction. S, T and C have the numbers of the issue list that the package
was written against, V, P and E the place of their point in spec 8.5, 8.3 and 8.6. Points on what this package does not
have (collages, EVisRAG's evidence reward, VisRAG's retriever) are left out.
"""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import pytest

TRAPS = {
    "S1 a module that cannot be imported": "packaging::test_every_module_can_be_imported",
    "S2 a judge that fails is asked for ever": (
        "judge_openai::test_a_judge_that_never_gives_a_verdict_is_asked_three_times"
    ),
    "S2 a judge that fails goes unnoticed": (
        "judge_openai::test_every_failure_is_a_missing_verdict_and_counted_by_its_kind"
    ),
    "S2 a judge that fails makes a right answer worth nothing": (
        "rewards::test_a_judge_that_fails_is_an_unknown_reward_and_never_a_zero"
    ),
    "S3 a reply format that no server speaks": "judge_openai::test_one_greedy_request_in_the_papers_protocol",
    "S4 rewards only for sources on a list": "rewards::test_a_complete_trajectory_under_each_recipe",
    "S5 the trainer reads what the converter has dropped": (
        "grpo_trainer::test_gold_pages_and_answers_of_the_questions_reach_the_reward"
    ),
    "S5 questions lose fields on their way through a file": (
        "corpus_formats::test_writing_and_reading_gives_the_same_questions"
    ),
    "S6 an empty key is sent without a word": "policy_openai::test_a_missing_key_is_named",
    "S7 a stage reads files that no stage writes": "stages::test_each_stage_finds_what_the_one_before_it_left",
    "S8 finished samples are never written": "synthesis::test_what_ended_before_a_policy_broke_is_kept",
    "S9 a failed call makes the sample vanish": (
        "experts_openai::test_a_sampling_run_survives_every_failure_and_reports_each_kind"
    ),
    "S10 a private URL is the default": "ask::test_settings_are_refused_before_anything_is_rendered",
    "S10 one device hard-coded": "page_encoder::test_models_are_loaded_on_the_device_that_is_asked_for",
    "S10 all processes on one card": "sharding::test_each_process_loads_its_models_on_its_own_card",
    "S10 images by the server's working directory": (
        "search_server::test_the_answer_is_what_the_released_demo_and_trainer_read"
    ),
    "S11 reward called with missing arguments": "rewards::test_free_weights_and_another_judge",
    "S12 reinforcement learning starts from the raw model instead of SFT's": (
        "matrix::test_reinforcement_learning_starts_from_what_fine_tuning_left"
    ),
    "S13 every page gets the embedding of the same image": (
        "visual_retrieval::test_embeddings_that_do_not_depend_on_the_page_are_refused"
    ),
    "S14 a reply without a thought or with an unknown action crashes": (
        "environment::test_a_hundred_thousand_replies_never_make_step_raise"
    ),
    "T1 text positions in training, multimodal ones in sampling": (
        "grpo_trainer::test_the_trainer_s_logprobs_are_the_sampler_s"
    ),
    "T1 text positions in sampling": "policy_transformers::test_logprobs_equal_a_full_forward",
    "T2 trained tokens are not the sampled ones": (
        "policy_transformers::test_a_rollout_records_exactly_what_was_sampled"
    ),
    "T3 example tags in messages earn rewards": "rewards::test_example_text_in_observations_and_thoughts_earns_nothing",
    "T4 a gate zeroes right answers unasked": (
        "rewards::test_the_gate_takes_a_right_answer_without_a_search_and_the_paper_does_not"
    ),
    "T5 several actions in one reply": "actions::test_nothing_after_the_first_closing_tag_is_read",
    "T5 what follows the first action stays in the context": (
        "rollout::test_unprintable_replies_are_recorded_and_text_after_the_action_is_dropped"
    ),
    "T6 a crop of a crop cuts the wrong region": "environment::test_a_crop_of_a_crop_is_cut_from_the_raw_page",
    "T7 another crop margin in training, validation and demo": (
        "stages::test_synthesis_training_validation_and_demo_share_one_environment"
    ),
    "T7 a crop margin that the config does not know": "environment::test_crop_padding_is_one_constant_from_the_config",
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
    "T12 masks recovered from text": "grpo_trainer::test_the_mask_covers_exactly_the_sampled_tokens",
    "T13 an image counted as one token": "policy_transformers::test_context_limits_count_image_tokens",
    "T14 one page counts twice among those shown": "rewards::test_a_crop_of_the_whole_page_is_no_further_page",
    "T14 what nDCG does not see: pages after the gold ones": "rewards::test_pages_after_the_gold_ones_cost_nothing",
    "T15 groups split over optimizer steps": "grpo_trainer::test_every_update_of_a_rollout_trains_on_whole_groups",
    "T16 a warm-up in steps overrides one in shares": (
        "grpo_trainer::test_the_warm_up_lasts_the_steps_that_its_only_setting_names"
    ),
    "T17 validation with a budget of its own": (
        "stages::test_synthesis_training_validation_and_demo_share_one_environment"
    ),
    "T18 trajectories with and without images do not mix in a batch": (
        "grpo_trainer::test_the_trainer_s_logprobs_are_the_sampler_s"
    ),
    "T18 a batch without images or trained tokens breaks the graph": (
        "grpo_trainer::test_an_example_of_nothing_gives_a_differentiable_zero"
    ),
    "T19 an answer that names every candidate": "judge::test_listing_every_candidate_earns_nothing",
    "T19 an answer that speaks to the model judge": "judge_openai::test_an_answer_cannot_instruct_the_judge",
    "T20 gold pages shown first in the training data": (
        "stages::test_a_search_of_the_synthesis_shows_the_page_that_ranks_first_gold_or_not"
    ),
    "T21 a crop counts as following a search because its thought says search": (
        "synthesis_filters::test_a_crop_must_follow_an_image_whatever_its_thought_says"
    ),
    "T22 one failed search kills the rollout": "rollout::test_a_query_that_fails_costs_its_own_trajectory_only",
    "T22 a search engine that is away kills the rollout": (
        "rollout::test_a_failing_search_engine_is_recorded_not_raised"
    ),
    "T22 a search server that hangs is waited for": "search_server::test_a_server_that_hangs_is_not_waited_for",
    "T22 a search server is asked only once": "search_server::test_the_client_tries_again_with_growing_pauses",
    "T23 the end of the budget announced in the demo only": (
        "stages::test_synthesis_training_validation_and_demo_share_one_environment"
    ),
    "T23 the end of the budget announced never, or too late": (
        "environment::test_the_budget_is_announced_once_and_then_ends"
    ),
    "V1 every query measured with the first one's number of pages": (
        "evaluate_retrieval::test_metrics_equal_their_definitions"
    ),
    "V2 names cut at their first dot": "corpus_formats::test_datasets_load_from_their_published_layouts",
    "V3 a union of more than 20 pages fails": "hybrid::test_a_union_beyond_the_largest_size_is_kept_whole",
    "V5 every page squeezed into the commonest size": (
        "geometry::test_shown_aspect_ratio_is_within_one_patch_of_the_original"
    ),
    "V6 a score without a digit is asked for again for ever": (
        "judge_openai::test_a_judge_that_never_gives_a_verdict_is_asked_three_times"
    ),
    "V7 what failed is left out of the accuracy": "evaluate::test_what_failed_counts_in_the_accuracy",
    "V7 what failed is no row of its own": "evaluate::test_what_failed_is_wrong_and_shown",
    "V8 pages counted from 0 here and from 1 there": "corpus_formats::test_check_gold_names_what_is_missing",
    "P1 weights of the rewards that are never given": "rewards::test_a_complete_trajectory_under_each_recipe",
    "P2 fine-tuning confounded with the crop action": "matrix::test_the_papers_comparisons_differ_in_what_they_compare",
    "P3 one system with two numbers": (
        "paper_tables::test_every_effect_names_cells_and_columns_and_its_arithmetic_holds"
    ),
    "P3 no rule for the overall mean": "evaluate::test_a_question_sampled_more_often_weighs_no_more",
    "P4 a figure whose numbers are not printed": "paper_tables::test_every_table_of_a_whole_matrix",
    "P5 a baseline given nobody knows how many pages": (
        "agents::test_the_registry_holds_the_rows_of_the_table_and_the_bounds"
    ),
    "P6 paper and script update on batches of different sizes": (
        "presets::test_one_update_on_a_whole_rollout_where_paper_and_script_disagree"
    ),
    "P7 two names of the crop tag": "actions::test_a_crop_has_one_tag_which_is_the_prompts",
    "P8 no error bars over seeds and questions": "paper_tables::test_seeds_and_questions_are_both_resampled",
    "E2 a reward's scope looked for in token ids": "grpo::test_credit_goes_to_the_turns_it_names",
    "E3 one reference read letter by letter": (
        "answer_metrics::test_one_reference_given_as_text_is_not_read_letter_by_letter"
    ),
    "E4 the loss divided by what its micro-batch happens to hold": (
        "grpo_trainer::test_one_batch_of_eight_equals_eight_of_one"
    ),
    "E4 the loss divided by nothing": "advantages::test_a_batch_without_trained_tokens_weighs_nothing",
    "E6 an empty reference matches every answer": "answer_metrics::test_evisrag_scores_by_hand",
    "E6 an answer that ends with a refusing phrase is a refusal": (
        "answer_metrics::test_an_answer_below_a_refusing_phrase_is_no_refusal"
    ),
    "E8 weights that normalisation takes out again": "grpo::test_weights_decide_which_trajectory_of_a_group_did_better",
    "E9 the prompt's example read as the answer": (
        "trajectory::test_a_trajectory_that_did_not_answer_has_no_answer_whatever_its_text_says"
    ),
    "E10 long answers win where only recall is reported": "answer_metrics::test_evisrag_scores_by_hand",
    "C2 log-probs change when pixels are blanked": "policy_transformers::test_blank_pixels_change_the_logprobs",
    "C6 intervals beside every number": "evaluate::test_samples_of_a_question_are_one_cluster",
    "an adapter's weights silently do not load": (
        "page_encoder::test_an_adapter_whose_keys_no_module_expects_is_refused"
    ),
    "scores in bf16 collapse to a few values": "maxsim::test_scores_and_ranking_are_those_of_fp64",
    "padded queries of a tiny model give NaN": (
        "page_encoder::test_queries_are_the_same_alone_and_among_others_even_where_padding_gives_nan"
    ),
    "the policy samples image placeholders": "policy_transformers::test_image_tokens_are_never_sampled",
}


@functools.cache
def named_in(module: str) -> frozenset[str]:
    path = Path(__file__).parent / f"test_{module}.py"
    body = ast.parse(path.read_text()).body if path.is_file() else []
    return frozenset(n.name for n in body if isinstance(n, ast.FunctionDef) and n.name.startswith("test_"))


def is_test(proof: str) -> bool:
    """Whether the named file holds the named test; a file alone proves nothing in particular."""
    module, _, name = proof.partition("::")
    return name in named_in(module)


@pytest.mark.parametrize("trap", TRAPS)
def test_each_trap_names_a_test_that_exists(trap):
    assert is_test(TRAPS[trap]), f"{TRAPS[trap]} is no test"


@pytest.mark.parametrize(
    "proof", ["stats", "stats::", "stats::test_nothing", "stages::config_of", "nowhere::test_nothing"]
)
def test_a_file_without_a_test_is_no_proof(proof):
    assert not is_test(proof)


def test_every_trap_of_the_released_code_is_here():
    numbered = {name.split()[0] for name in TRAPS}
    assert {*(f"S{n}" for n in range(1, 15)), *(f"T{n}" for n in range(1, 24))} <= numbered
