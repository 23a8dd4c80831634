"""Answers out of lines and boxes: what is asked for, and which words of that kind stand closest."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vrag_lib.corpus import Page, TextLine
from vrag_lib.extraction import answer_kind, content_words, find_answer
from vrag_lib.geometry import Box, Size
from vrag_lib.page_units import page_units, tokens

SIZE = Size(1000, 1000)

TABLE = [
    ("Wastage by goods", 100, 80, 40),
    ("goods", 100, 200, 30), ("tons", 500, 205, 12), ("change", 700, 205, 12),
    ("Cocoa", 100, 300, 30), ("96.3", 500, 305, 12), ("+4.4%", 700, 305, 12),
    ("Honey", 100, 400, 30), ("16.5", 500, 405, 12), ("-2.0%", 700, 405, 12),
    ("Paper", 100, 500, 30), ("20.9", 500, 505, 12), ("-1.3%", 700, 505, 12),
    ("Table 7. Wastage of 2022", 100, 600, 12),
]  # fmt: skip
BARS = [
    ("Demand", 100, 80, 40),
    ("Nickel", 100, 800, 20), ("299", 125, 400, 20),
    ("Cotton", 400, 800, 20), ("103", 425, 700, 20),
    ("Paper", 700, 800, 20), ("806", 715, 150, 20),
]  # fmt: skip
BOARD = [
    ("Studio", 100, 200, 30), ("room", 110, 250, 12), ("438", 160, 250, 12),
    ("Kiosk", 500, 200, 30), ("room", 510, 250, 12), ("310", 560, 250, 12),
    ("Pier", 100, 600, 30), ("room", 110, 650, 12), ("295", 160, 650, 12),
    ("Barn", 500, 600, 30), ("room", 510, 650, 12), ("661", 560, 650, 12),
]  # fmt: skip
PROSE = [
    ("The survey was held among 6,010 adults of whom 62% own a", 100, 100, 20),
    ("tablet (41% in 2012). Interviews began on July 18, 2013 and", 100, 125, 20),
    ("were led by Maria van der Berg. See Table 4 for 3 cities.", 100, 150, 20),
    ("Slogan: bread for everyone", 100, 400, 20),
]


def make_page(rows: list[tuple[str, int, int, int]]) -> Page:
    lines = tuple(TextLine(text, Box(x, y, x + 0.6 * tall * len(text), y + tall)) for text, x, y, tall in rows)
    return Page("p_1", "p", 1, Path("absent.png"), SIZE, lines, "layer")


def find(rows, question, **weights):
    stems = {token.stem for word in content_words(question) for token in tokens(word)}
    return find_answer(make_page(rows), question, dict.fromkeys(stems, 1.0) | weights)


@pytest.mark.parametrize(
    ("rows", "question", "answer"),
    [
        (TABLE, "What is the figure of wastage for Honey?", "16.5"),
        (TABLE, "What is the change in wastage for Honey?", "-2.0%"),
        (TABLE, "How much was thrown away for Paper, against the year before?", "-1.3%"),
        (TABLE, "Leaving aside honey and paper: how many tons of cocoa?", "96.3"),
        (BARS, "How much demand is there for Nickel?", "299"),
        (BARS, "How much demand is there for Cotton?", "103"),
        (BARS, "How much demand is there for Paper?", "806"),
        (BOARD, "What is the room entry of the second area?", "310"),
        (BOARD, "What is the room entry of the lower left area?", "295"),
        (BOARD, "Which area is directly to the right of Pier?", "Barn"),
        (BOARD, "Which area is directly below Kiosk?", "Barn"),
        (BOARD, "Who is there: which area comes after Kiosk?", "Pier"),
        (PROSE, "How many adults were in the survey?", "6,010"),
        (PROSE, "What share of adults own a tablet?", "62%"),
        (PROSE, "When did interviews begin?", "July 18, 2013"),
        (PROSE, "Who led the interviews?", "Maria van der Berg"),
        (PROSE, "How many cities?", "3"),
        (PROSE, "What is the slogan?", "bread for everyone"),
    ],
)
def test_finds_the_value_that_stands_with_the_label(rows, question, answer):
    assert find(rows, question).text == answer


@pytest.mark.parametrize("number", ["1,250.5", "1.234.567,50", "1.234,5", "1 234,50", "1'250.00", "1\u00a0250", "12,5"])
def test_a_number_is_read_as_people_write_it_and_never_in_part(number):
    rows = [(f"Turnover of the plant was {number} euros", 100, 100, 20)]
    assert find(rows, "How much was the turnover of the plant?").text == number


@pytest.mark.parametrize(
    "row, number",
    [("Kiel turnover 120 350,000", "120"), ("Turnover in district 3 100,000 euros", "3"),
     ("Turnover was rated '25' by the jury", "25"), ("Turnover lies in (3.5,4.5)", "3.5")],
)  # fmt: skip
def test_numbers_side_by_side_stay_apart(row, number):
    assert find([(row, 100, 100, 20)], "How much was the turnover?").text == number


def test_the_region_is_the_value_with_its_label():
    found = find(TABLE, "What is the figure of wastage for Honey?")
    assert [TABLE[i][0] for i in found.lines] == ["Honey", "16.5"]
    assert found.box.x1 < 100 and found.box.y1 < 400 and found.box.x2 > 500 and found.box.y2 < 500


def test_words_that_count_for_nothing_and_skipped_lines_do_not_lead_astray():
    rows = [("Honey Works 2021", 100, 20, 20), *TABLE, ("Honey Works 17", 100, 960, 20)]
    question = "What is the figure of wastage for Cocoa at Honey Works?"
    page = make_page(rows)
    weights = {"wastag": 1.0, "cocoa": 1.0, "honey": 0.05, "work": 0.05}
    found = find_answer(page, question, weights, frozenset({0, len(rows) - 1}))
    assert found is not None and found.text == "96.3"


def test_nothing_is_found_where_no_word_counts():
    assert find(TABLE, "Which volcano erupted?") is None
    assert find([], "Which volcano erupted?") is None


def test_running_text_is_joined_and_rows_are_not():
    assert len(page_units(make_page(PROSE).lines)) == 4
    assert page_units(make_page(PROSE).lines)[0].text.endswith("(41% in 2012). ")
    rows = [("Sales of white bread", 100, 100, 20), ("Sales of brown bread", 100, 125, 20),
            ("412", 600, 100, 20), ("87", 600, 125, 20)]  # fmt: skip
    assert all(unit.is_cell for unit in page_units(make_page(rows).lines))
    assert find(rows, "How many sales of brown bread?").text == "87"


def test_months_match_their_abbreviations():
    rows = [("Jun", 100, 800, 20), ("864", 100, 300, 20), ("Jul", 300, 800, 20), ("921", 300, 500, 20)]
    assert find(rows, "What is the figure for June?").text == "864"


@pytest.mark.parametrize(
    ("question", "kind"),
    [
        ("What is shown?", "text"),
        ("Who is to be called: what is the lead entry?", "text"),
        ("In which year was it founded?", "date"),
        ("What percentage agrees?", "percent"),
        ("What was the total?", "number"),
        ("What was the net revenue in Asia?", "number"),
        ("Who wrote it?", "name"),
    ],
)
def test_what_is_asked_for(question, kind):
    assert answer_kind(question) == kind


@given(
    st.text(max_size=80),
    st.lists(st.tuples(st.text(max_size=40), st.integers(0, 900), st.integers(0, 900)), max_size=6),
)
def test_any_text_is_survived(question, rows):
    stems = dict.fromkeys((token.stem for token in tokens(question)), 1.0)
    lines = tuple(TextLine(text, Box(x, y, x + 50, y + 20)) for text, x, y in rows)
    page = Page("p_1", "p", 1, Path("absent.png"), SIZE, lines, "layer")
    found = find_answer(page, question, stems)
    assert found is None or (found.text.strip() and 0 <= found.box.x1 < found.box.x2 <= SIZE.width)
