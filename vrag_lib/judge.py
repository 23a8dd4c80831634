"""Judges of answers. The rule judge is exact where truth is exact: text, numbers with their units, lists.

A judge says whether an answer is right, never how good it is (paper §2.3: r_Ans is 0 or 1). What an answer says to
the judge is data: the rule judge cannot be instructed (trap T19), and answers longer than `MAX_ANSWER_CHARS` are wrong,
so listing every candidate earns nothing.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

Judge = Callable[[str, str, str], bool]
"""(question, reference answer, given answer) -> right or wrong."""

MAX_ANSWER_CHARS = 400
"""Answers are asked to be short; one above this is wrong whatever it contains."""

_SCALES = {"thousand": 1e3, "k": 1e3, "million": 1e6, "m": 1e6, "billion": 1e9, "bn": 1e9, "trillion": 1e12}
_NUMBER = re.compile(
    r"([-+]?)\s*([$€£¥]?)\s*([-+]?)(\d{1,3}(?:,\d{3})+|\d+)(\.\d+)?\s*(%|percent\b|[a-z]+\b)?(?:\s+([a-z ]+))?"
)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_LIST_SEPARATORS = re.compile(r"\s*(?:;|\n|,(?!\d{3})|\band\b)\s*")


def rule_judge(question: str, reference: str, answer: str, tolerance: float = 0.0) -> bool:
    """Whether `answer` equals `reference` as text, as a number or as an unordered list.

    tolerance: relative, for numbers (0.05 is the relaxed accuracy of chart benchmarks).

    >>> rule_judge("how many?", "1,250", "1250")
    True
    >>> rule_judge("how much?", "$3.2 million", "3200000 $")
    True
    >>> rule_judge("what share?", "18.29%", "18.29")
    True
    >>> rule_judge("which?", "rye, wheat", "Wheat and rye")
    True
    >>> rule_judge("how many?", "12", "12 or 13")
    False
    """
    if not answer.strip() or len(answer) > MAX_ANSWER_CHARS:
        return False
    if normalise(answer) == normalise(reference):
        return True
    expected, given = parse_number(reference), parse_number(answer)
    if expected is not None:
        return given is not None and abs(given - expected) <= tolerance * abs(expected) + 1e-9 * abs(expected)
    return _as_list(reference) == _as_list(answer) and len(_as_list(reference)) > 1


def normalise(text: str) -> str:
    """Text as judges compare it: case, articles, outer punctuation and spacing do not count.

    >>> normalise(" The  Silver Heron. ")
    'silver heron'
    """
    text = unicodedata.normalize("NFKC", text).casefold()
    text = _ARTICLES.sub(" ", text)
    words = (word.strip(".,;:!?\"'()[]{}“”‘’`") for word in text.split())
    return " ".join(word for word in words if word)


def parse_number(text: str) -> float | None:
    """The one number a short answer consists of, scale words applied, currency and unit left aside; None if the
    text is anything else, holds several numbers, or is a name with a number in it.

    >>> parse_number("about 5"), parse_number("$1,200.50"), parse_number("-3 %"), parse_number("2.5 billion")
    (None, 1200.5, -3.0, 2500000000.0)
    """
    text = unicodedata.normalize("NFKC", text).casefold().strip().rstrip(".").replace("−", "-")
    text = re.sub(r"\s*[$€£¥]$", "", text)
    match = _NUMBER.fullmatch(text)
    if match is None:
        return None
    sign = -1.0 if "-" in (match[1], match[3]) else 1.0
    value = float(match[4].replace(",", "") + (match[5] or ""))
    return sign * value * _SCALES.get(match[6] or "", 1.0)


def _as_list(text: str) -> list[str]:
    text = text.strip().strip("[]")
    return sorted(normalise(part) for part in _LIST_SEPARATORS.split(text.casefold()) if normalise(part))
