"""Tables and effects from hand-made rows: every number against one worked out by hand or a closed form."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from paper_rows import made_up, rows_of

from vrag_lib.matrix_cells import CELLS
from vrag_lib.paper_columns import COLUMNS, TYPES, interval, seeds_spread
from vrag_lib.paper_effects import MEASURED, basis, difference, effects, illegible, verdict
from vrag_lib.paper_numbers import ABLATIONS, EFFECTS, PAPER_BY_TYPE, PAPER_OVERALL, PAPER_TABLE_2, Effect
from vrag_lib.paper_tables import figure_3, figure_5, figure_6, make_tables, summary, table_1, table_2, table_3
from vrag_lib.stats import crossed_difference, crossed_mean, holm, paired_difference


def binomial_quantile(n: int, p: float, share: float) -> int:
    total = 0.0
    for k in range(n + 1):
        total += math.comb(n, k) * p**k * (1 - p) ** (n - k)
        if total >= share:
            return k
    return n


def test_paired_bootstrap_against_its_closed_form():
    """A question resampled with replacement is one of the d that differ with probability d / n: the resampled
    difference is binomial, so its quantiles and its p-value are known."""
    n, better = 40, 6
    a, b = np.ones((1, n)), np.ones((1, n))
    b[0, :better] = 0
    found = crossed_difference(a, b, samples=20_000)
    assert found.mean == pytest.approx(better / n)
    assert found.low * n == pytest.approx(binomial_quantile(n, better / n, 0.025), abs=1e-9)
    assert found.high * n == pytest.approx(binomial_quantile(n, better / n, 0.975), abs=1e-9)
    assert found.p_value == pytest.approx(2 * (1 - better / n) ** n, abs=0.002)
    one = paired_difference(a[0], b[0])
    assert (one.mean, one.low, one.high) == pytest.approx((found.mean, found.low, found.high), abs=0.026)


def test_seeds_and_questions_are_both_resampled():
    """Variance of the crossed bootstrap of an additive table: that of the seeds, without the bias that few of them
    have, plus that of the questions."""
    rng = np.random.default_rng(0)
    seeds, questions = rng.normal(0, 1, 5), rng.normal(0, 1, 50)
    found = crossed_mean(seeds[:, None] + questions[None, :], samples=40_000)
    deviation = math.sqrt(seeds.var(ddof=1) / 5 + questions.var() / 50)
    assert found.mean == pytest.approx(seeds.mean() + questions.mean())
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * deviation, rel=0.06)
    alone = crossed_mean(questions[None, :], samples=40_000)
    assert (alone.high - alone.low) / 2 == pytest.approx(1.96 * math.sqrt(questions.var() / 50), rel=0.04)


def test_what_is_the_same_for_all_questions_cancels_in_pairs():
    hard = np.random.default_rng(1).normal(0, 5, (1, 60))
    found = crossed_difference(np.repeat(hard, 3, axis=0) + 1, hard)
    assert (found.mean, found.low, found.high) == pytest.approx((1, 1, 1))
    assert crossed_difference(hard, hard).p_value == 1.0


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match="equally many questions"):
        crossed_difference(np.ones((1, 3)), np.ones((1, 4)))
    with pytest.raises(ValueError, match="seeds cannot be paired"):
        crossed_difference(np.ones((2, 3)), np.ones((3, 3)))
    with pytest.raises(ValueError, match="not finite"):
        crossed_mean(np.array([[1.0, math.nan]]))
    with pytest.raises(ValueError, match="no values"):
        crossed_mean(np.zeros((1, 2)), np.zeros((1, 2)))


def test_holm_by_hand():
    assert holm([0.04, 0.01, 0.03, 0.005]) == pytest.approx([0.06, 0.03, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def two_seeds() -> pd.DataFrame:
    """Eight questions, two seeds: right on 4 and on 6; one failed in each."""
    first = rows_of(np.array([1, 1, 1, 1, 0, 0, 0, 0]), 0)
    second = rows_of(np.array([1, 1, 1, 1, 1, 1, 0, 0]), 1, invalid=[0, 0, 0, 0, 0, 0, 0, 6])
    for frame in (first, second):
        frame.loc[7, ["answered", "failed", "stop_reason"]] = [False, True, "error"]
    return pd.concat([first, second], ignore_index=True)


def test_numbers_of_the_tables_by_hand():
    rows = {"vrag_rl": two_seeds(), "sft": rows_of(np.array([1, 0, 0, 0, 1, 0, 0, 0]))}
    first = table_1(rows).set_index("cell")
    assert list(first.index) == ["sft", "vrag_rl"]
    ours = first.loc["vrag_rl"]
    assert (ours["overall"], ours["seeds"], ours["questions"], ours["failed"], ours["errors"]) == (62.5, 2, 8, 2, 2)
    # questions 0 and 4 are about text: right in both seeds, and in the second only
    assert (ours["text"], ours["table"], ours["layout"]) == (75.0, 75.0, 50.0)
    assert ours["multi"] == pytest.approx(100 * (1 + 1 + 0 + 1 + 1 + 0) / 6)  # questions 0, 3, 6
    assert (ours["paper_7b"], ours["paper_3b"], ours["score_slidevqa"], ours["paper_single"]) == (
        57.1,
        53.5,
        62.59,
        69.3,
    )
    assert math.isnan(first.loc["sft", "paper_7b"]) and ours["overall_low"] < 62.5 < ours["overall_high"]
    third = table_3(rows).set_index("cell").loc["vrag_rl"]
    assert third["invalid_rate"] == pytest.approx(100 * 6 / 48) and third["finish_rate"] == 87.5
    assert third["wrong_action_rate"] == pytest.approx(100 * 16 / 48)
    assert seeds_spread(rows["vrag_rl"]) == [50.0, 75.0]
    assert figure_6(rows).set_index("cell").loc["vrag_rl", "seconds"] == 1.25
    found = effects(rows, [Effect("RL", "vrag_rl", "sft", "Table 3", 12.9, column="finish_rate")]).iloc[0]
    assert (found["difference"], found["seeds"], found["paper_sign"]) == (-12.5, "2 / 1", 1)


def test_an_effect_of_one_element_looks_at_its_questions_only():
    a, b = rows_of(np.array([1, 0, 1, 0, 1, 0, 1, 0])), rows_of(np.zeros(8))
    table = effects({"vrag_rl": a, "sft": b}, [Effect("e", "vrag_rl", "sft", "", element=kind) for kind in TYPES])
    by_kind = table.set_index("element")["difference"]
    assert (by_kind["text"], by_kind["table"], by_kind["chart"], by_kind["layout"]) == (100, 0, 100, 0)


def test_missing_values_are_left_out_and_missing_cells_named():
    frame = rows_of(np.ones(4), crop_iou=[0.5, np.nan, np.nan, 0.7])
    assert interval(frame, "crop_iou").mean == pytest.approx(0.6)
    assert math.isnan(interval(frame.assign(crop_iou=np.nan), "crop_iou").mean)


def test_replies_count_only_where_what_is_counted_of_them_is_known():
    frame = rows_of(np.ones(4), wrong_actions=[1.0, 2.0, np.nan, np.nan], replies=[4, 2, 9, 9])
    assert interval(frame, "wrong_action_rate").mean == pytest.approx(50.0)
    assert math.isnan(interval(frame.assign(wrong_actions=np.nan), "wrong_action_rate").mean)
    table = effects({"vrag_rl": frame}, EFFECTS)
    assert set(table["verdict"]) == {"not measured"} and table["p_holm"].isna().all()
    assert table_2({}).empty and figure_5({}).empty
    tables = make_tables({"vanilla_rag_2": frame})
    assert tables["table_1"].empty and list(tables["figure_3"]["pages_given"]) == [2]


def test_an_effect_on_what_was_not_asked_is_not_measured():
    right, wrong = rows_of(np.ones(8)), rows_of(np.zeros(8))
    without = right["source_type"].str.lower() != "text"
    rows = {"vrag_rl": right[without], "sft": wrong[without].assign(crop_iou=np.nan)}
    wanted = [Effect("e", "vrag_rl", "sft", "", 1.0, element=kind) for kind in ("text", "table")]
    table = effects(rows, [*wanted, Effect("c", "vrag_rl", "sft", "", column="crop_iou")])
    assert list(table["verdict"])[0::2] == ["not measured"] * 2 and math.isnan(table["difference"][0])
    assert table["difference"][1] == 100 and table["p_holm"].notna().tolist() == [False, True, False]
    with pytest.raises(ValueError, match="in one cell only"):
        difference(right, wrong[without], "accuracy", "text")


def test_pairs_share_questions_and_seeds():
    frame = rows_of(np.ones(4))
    with pytest.raises(ValueError, match="in one cell only"):
        difference(frame, rows_of(np.ones(5)), "accuracy")
    with pytest.raises(ValueError, match="every question once"):
        interval(pd.concat([frame, frame]), "accuracy")
    three = pd.concat([rows_of(np.ones(4), seed) for seed in (0, 1, 2)])
    two = pd.concat([rows_of(np.zeros(4), seed) for seed in (1, 2)])
    assert difference(three, two, "accuracy").mean == 100
    with pytest.raises(ValueError, match="share no seed"):
        difference(three, two.assign(seed=two["seed"] + 5), "accuracy")
    found = effects({"vrag_rl": three, "no_kl": two}, [Effect("e", "vrag_rl", "no_kl", "")])
    assert found["seeds"].item() == "2 / 2"  # what the number stands on, not what there is


def test_correction_decides_the_verdict():
    """A difference that would be resolved alone is not, among many."""
    n = 200
    a, b = rows_of(np.ones(n)), rows_of((np.arange(n) >= 6).astype(float))  # p about 2 * 0.97^200 = 0.005
    one = Effect("e", "vrag_rl", "sft", "", 1.0)
    assert effects({"vrag_rl": a, "sft": b}, [one])["verdict"].item() == "agrees"
    many = effects({"vrag_rl": a, "sft": b}, [one] * 20)
    assert set(many["verdict"]) == {"not resolved"} and many["low"].min() > 0
    assert verdict(-3.0, 0.01, 1) == "disagrees" and verdict(2.0, 0.01, 0) == "better"
    assert verdict(2.0, 0.01, 0, "invalid_rate") == "worse"
    assert verdict(math.nan, math.nan, 1) == "not measured"


def test_what_an_effect_rests_on():
    """Gold pages at the bottom, gold regions not: whoever is shown images and cannot crop is held there."""
    bottom, top = rows_of(np.zeros(400)), rows_of(np.ones(400))  # many: the limit of nothing in 8 is high
    first = table_1({"gold_pages": bottom, "gold_regions": top})
    assert illegible(first) and illegible(first, "layout") and not illegible(first[:1]) and not illegible(first[:0])
    assert basis(first, Effect("", "vrag_rl", "search_r1", "", element="text"), "agrees") == "built in"
    assert basis(first, Effect("", "react", "react_text", ""), "disagrees") == "built in"
    assert basis(first, Effect("", "search_r1", "react", ""), "not resolved") == "both at the bottom"
    texts = Effect("", "react", "react_text", "")
    assert basis(first, texts, "not resolved", {"react", "react_text"}) == "both at the bottom"
    assert basis(first, texts, "agrees", {"react_text"}) == "built in"
    assert basis(first, Effect("", "vrag_rl", "react", "", column="first_gold"), "agrees") == "measured"
    assert basis(first, Effect("", "vrag_rl", "react", "", by_design=True), "disagrees") == "by design"
    assert basis(first, Effect("", "vrag_rl", "vrag_answer_only", ""), "agrees") == "measured"
    assert basis(first, Effect("", "vrag_rl", "search_r1", "", by_design=True), "not measured") == ""
    layout = table_1({"gold_pages": rows_of(np.array([0, 0, 0, 1] * 100)), "gold_regions": top})
    assert illegible(layout, "text") and not illegible(layout, "layout") and not illegible(layout)
    assert basis(layout, Effect("", "vrag_rl", "search_r1", "", element="layout"), "agrees") == "measured"
    assert basis(layout, Effect("", "vrag_rl", "search_r1", ""), "agrees") == "built in"  # the other kinds decide
    assert basis(layout, Effect("", "search_r1", "react", ""), "agrees") == "measured"
    assert basis(layout, texts, "agrees", {"react", "react_text"}) == "both at the bottom"  # whatever the sign


def test_the_summary_shows_the_best_agent_that_cannot_crop():
    """Chosen by its answers, never one that is given gold pages; the others follow in their order, where they are."""
    rows = {name: rows_of(np.arange(8) < right) for name, right in
            (("react", 2), ("sft_rl_search", 3), ("gold_pages", 8), ("vrag_rl", 6), ("sft", 4))}  # fmt: skip
    table = summary(rows)
    assert list(table["cell"]) == ["sft_rl_search", "sft", "vrag_rl"]
    assert list(table["best_without_crop"]) == [True, False, False]
    assert list(table["accuracy"]) == [37.5, 50.0, 75.0] and summary({}).empty


def test_what_is_answered_most_often():
    frame = rows_of(np.zeros(8), answer=["a", "Not answerable", "b ", "b", "b", "7", "x", "x"])
    frame.loc[[6, 7], ["answered", "failed"]] = [False, True]
    row = table_1({"sft": frame}).iloc[0]
    assert (row["top_answer"], row["top_share"], row["top_two_share"], row["refused_share"]) == ("b", 37.5, 50.0, 12.5)
    none = table_1({"sft": frame.assign(answered=False)}).iloc[0]
    assert (none["top_answer"], none["top_share"], none["refused_share"]) == ("", 0, 0)
    found = effects({"vrag_rl": rows_of(np.ones(8), answer=[*"abcdefgh"]), "sft": frame}, [EFFECTS[11]])
    assert found["collapsed"].item() == "sft"


def test_every_effect_names_cells_and_columns_and_its_arithmetic_holds():
    for effect in (*EFFECTS, *ABLATIONS):
        assert effect.a in CELLS and effect.b in CELLS and effect.column in COLUMNS, effect.name
        assert not effect.element or effect.element in TYPES
    assert all(effect.claimed for effect in EFFECTS) and not any(effect.claimed for effect in ABLATIONS)
    assert {effect.column for effect in ABLATIONS} <= set(MEASURED)
    assert len({e.name for e in (*EFFECTS, *ABLATIONS)}) == len(EFFECTS) + len(ABLATIONS)
    overall = {cell: big for cell, (_, big, _) in PAPER_OVERALL.items()}
    images = overall | {"vanilla_rag_5": overall["vanilla_rag_1"]}  # the paper does not say how many pages
    for effect in EFFECTS:
        if effect.source == "Table 1":
            assert effect.paper == pytest.approx(images[effect.a] - images[effect.b]), effect.name
        if effect.source == "Table 2":
            assert effect.paper == pytest.approx(PAPER_TABLE_2[effect.a] - PAPER_TABLE_2[effect.b]), effect.name
    sft = next(e for e in EFFECTS if e.source == "Table 2 - Table 1")
    assert sft.paper == pytest.approx(PAPER_TABLE_2["sft_rl_search"] - overall["search_r1"])
    assert set(PAPER_BY_TYPE) == set(PAPER_OVERALL)


def test_every_table_of_a_whole_matrix():
    tables = make_tables(made_up(24, 2))
    assert not any(table.empty for table in tables.values())
    assert set(tables["cells"]["cell"]) == set(CELLS)
    assert "not measured" not in set(tables["effects"]["verdict"]) | set(tables["ablations"]["verdict"])
    pages = figure_3(made_up(24, 1, cells=("vanilla_rag_1", "vanilla_rag_6", "gold_pages")))
    assert list(pages["paper"]) == [34.7, 55.3, 63.5]
    for name, table in tables.items():
        for column in (c.removesuffix("_low") for c in table if c.endswith("_low")):
            known = table[[column, f"{column}_low", f"{column}_high"]].dropna()
            assert (known[f"{column}_low"] <= known[column] + 1e-9).all(), (name, column)
            assert (known[column] <= known[f"{column}_high"] + 1e-9).all(), (name, column)


def test_rl_is_compared_with_the_cold_start_it_began_with():
    """Not with the mean over cold starts that it never saw, nor seed by seed with those of other trainings."""
    (compared,) = [e for e in ABLATIONS if (e.a, e.b, e.column) == ("sft", "vrag_rl", "accuracy")]
    sft = pd.concat([rows_of(np.arange(8) < 4, 0), rows_of(np.ones(8), 1), rows_of(np.ones(8), 2)])
    rl = pd.concat([rows_of(np.arange(8) < 6, seed) for seed in range(3)])
    row = effects({"sft": sft, "vrag_rl": rl}, [compared]).iloc[0]
    assert row["difference"] == pytest.approx(-25) and row["seeds"] == "1 / 3"
    row = effects({"sft": sft, "vrag_rl": rl.assign(cold_start=rl["seed"])}, [compared]).iloc[0]
    assert row["difference"] == pytest.approx(100 * (0.5 + 1 + 1) / 3 - 75) and row["seeds"] == "3 / 3"
