"""Judges of answers. The rule judge is exact where truth is exact: text, numbers with their units, lists.

A judge says whether an answer is right, never how good it is (paper §2.3: r_Ans is 0 or 1). What an answer says to
the judge is data: the rule judge cannot be instructed (trap T19), and answers longer than `MAX_ANSWER_CHARS` are wrong,
so listing every candidate earns nothing.
"""

from __future__ import annotations

import logging
import re
import unicodedata
from collections.abc import Callable, Sequence
from decimal import Decimal
from itertools import product
from typing import NamedTuple

logger = logging.getLogger(__name__)

Judge = Callable[[str, str, str], bool]
"""(question, reference answer, given answer) -> right or wrong."""

MAX_ANSWER_CHARS = 400
"""Answers are asked to be short; one above this is wrong whatever it contains."""

_SCALES = {
    "dozen": 12, "hundred": 10**2, "thousand": 10**3, "lakh": 10**5, "million": 10**6, "mn": 10**6, "mln": 10**6,
    "crore": 10**7, "billion": 10**9, "bn": 10**9, "bln": 10**9, "trillion": 10**12, "tn": 10**12,
    "千": 10**3, "万": 10**4, "萬": 10**4, "亿": 10**8, "億": 10**8,
}  # fmt: skip
_SHORT_SCALES = {"k": 10**3, "m": 10**6, "b": 10**9}
"""Only where they touch the number: 5m is five million, 5 m are metres."""

_NUMBER = re.compile(
    r"([-+]?)\s*((?:us\$|usd|eur|gbp|[$€£¥])?)\s*([-+]?)(?=\.?\d)(\d{1,3}(?:,\d{3})+|\d*)(\.\d+)?(%?)"
    r"(?:(\s*)(\D[^,;]*))?"
)
_DECIMAL_COMMA = re.compile(r"(?<![\w.,'])(\d{1,3}(?:[.' ]\d{3})+|\d+),(\d+)(?![.,']?\d)")
"""A number as 12,5 or 1.234,50; three digits behind a comma are thousands, unless other signs tell those apart."""
_GROUPS = re.compile(r"(?<![\w.,'])(?<!\d )\d{1,3}(?:\.\d{3}(?:\.\d{3})+|(?:[' ]\d{3})+)(?![,']?\d| \d)")
"""Thousands told apart by two points or more, by apostrophes or by spaces: 1.234.567, 1'250, 1 250."""
_UNIT_NAMES = {"percent": "%", "pct": "%", "dollar": "$", "usd": "$", "us$": "$", "euro": "€", "eur": "€",
               "pound": "£", "gbp": "£", "yen": "¥"}  # fmt: skip
_NO_UNIT = frozenset(
    (  # noqa: SIM905
        "a an and the but or not no maybe perhaps possibly probably if unless either neither is was are were to "
        "through until rather than versus vs except wrong tenth hundredth thousandth millionth"
    ).split()
)
_MOST_UNIT_WORDS = 4
_WORDS = re.compile(r"[%$€£¥千万萬亿億]|[^\s%$€£¥千万萬亿億]+")
_UNIT_WORD = re.compile(r"[%$€£¥°]|°?[^\W\d_]+(?:[./'-][^\W\d_]+)*(?:\^?[23])?\.?")
_ARTICLES = re.compile(r"(?:\b(?:an|the)|^\s*a)\s+(?=\w)")
"""In front of a word: those of "Plan A" and "Vitamin A" are none."""

_LIST_SEPARATORS = re.compile(r";|\n|、|,(?!\d{3}\b)|\band\b")
_QUOTED = re.compile(r"""^(['"])(.*)\1$""")
_OUTER = ".,;:!?\"'()[]{}`。、「」『』【】《》〈〉"
_SAME = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "–": "-", "—": "-", "‑": "-", "−": "-"})
_LEADING_POINT = re.compile(r"(?<!\w)\.(?=\d)")
_RAISED = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹]+")


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
    >>> rule_judge("what share?", "12,5 %", "12.5%"), rule_judge("what ratio?", "3,2", "2,3")
    (True, False)
    >>> rule_judge("how many?", "12", "12 or 13"), rule_judge("how far?", "3 km", "3 miles")
    (False, False)
    """
    if not answer.strip() or len(answer) > MAX_ANSWER_CHARS:
        return False
    wanted = normalise(reference)
    if normalise(answer) == wanted and (wanted or answer.strip() == reference.strip()):
        return True
    expected, given = _quantity(reference), _quantity(answer)
    if expected is not None:
        return (given is not None and _agree(expected, given, tolerance)) or _same_pair(reference, answer)
    readings = ([_as_list(text, commas_part) for commas_part in (False, True)] for text in (reference, answer))
    return any(
        len(parts) == len(found) > 1
        and all(_same_part(part, other, tolerance) for part, other in zip(parts, found, strict=True))
        for parts, found in product(*readings)
    )


class JudgeError(RuntimeError):
    """The judge gave no verdict; the message begins with the kind of failure."""


def verdicts(judge: Judge, items: Sequence[tuple[str, str, str]]) -> list[bool | None]:
    """What a judge says of (question, reference answer, given answer), in order, equal ones asked once; None where it
    failed, which is logged. A judge with `many` gets all of them at once."""
    different = list(dict.fromkeys(items))
    if hasattr(judge, "many"):
        found = dict(zip(different, judge.many(different), strict=True))
    else:
        found = {item: _ask(judge, item) for item in different}
    without = sum(found[item] is None for item in items)
    if without:
        logger.warning("the judge gave no verdict on %d of %d answers", without, len(items))
    return [found[item] for item in items]


def _ask(judge: Judge, item: tuple[str, str, str]) -> bool | None:
    try:
        return judge(*item)
    except Exception as error:  # a model judge may fail in any way; that must cost this verdict only
        logger.warning("no verdict on %r: %s", item[2][:80], error)
        return None


def normalise(text: str) -> str:
    """Text as judges compare it: case, articles, outer punctuation and spacing do not count.

    >>> normalise(" The  Silver Heron. ")
    'silver heron'
    """
    text = _ARTICLES.sub(" ", _plain(text))
    words = (_LEADING_POINT.sub("0.", word).strip(_OUTER) for word in text.split())
    return " ".join(word for word in words if word)


def _plain(text: str) -> str:
    """Text in one spelling of signs and letters. Raised digits stay apart from those before them: 5² is not 52."""
    text = _RAISED.sub(lambda digits: f"^{digits[0]}", text)
    return unicodedata.normalize("NFKC", text).casefold().translate(_SAME)


class _Quantity(NamedTuple):
    value: Decimal
    units: frozenset[str]


def parse_number(text: str) -> float | None:
    """The one number a short answer consists of, scale words applied, currency and unit left aside; None if the
    text is anything else, holds several numbers, or is a name with a number in it.

    >>> parse_number("about 5"), parse_number("$1,200.50"), parse_number("-3 %"), parse_number("2.5 billion")
    (None, 1200.5, -3.0, 2500000000.0)
    """
    quantity = _quantity(text)
    return None if quantity is None else float(quantity.value)


def _quantity(text: str) -> _Quantity | None:
    """The number and the words of its unit, singular, signs for the units that have one. What follows a number is no
    unit when it is long or takes something back."""
    text = _in_english(_plain(text).strip().rstrip(".。")).replace("per cent", "percent")
    match = _NUMBER.fullmatch(text)
    if match is None:
        return None
    if match[8] == "s":  # the 1990s are no year
        return None
    value = Decimal(f"{match[4].replace(',', '')}{match[5] or ''}")
    words = [_singular(word) for word in _WORDS.findall(match[8] or "")]
    if words and words[0] in _SHORT_SCALES and not match[7]:
        value *= _SHORT_SCALES[words.pop(0)]
    while words and words[0] in _SCALES:
        value *= _SCALES[words.pop(0)]
    if len(words) > _MOST_UNIT_WORDS or not _NO_UNIT.isdisjoint(words) or not all(map(_UNIT_WORD.fullmatch, words)):
        return None
    units = {_UNIT_NAMES.get(word, word.replace("^", "")) for word in (*words, match[2], match[6])}
    return _Quantity(-value if "-" in (match[1], match[3]) else value, frozenset(units - {""}))


def _singular(word: str) -> str:
    return word[:-1] if len(word) > 2 and word.endswith("s") else word


def _agree(expected: _Quantity, given: _Quantity, tolerance: float) -> bool:
    """Whether two quantities are the same: units count where both name one, and one may name it more fully."""
    near = abs(given.value - expected.value) <= Decimal(tolerance) * abs(expected.value)
    return (near if tolerance else given.value == expected.value) and (
        expected.units <= given.units or given.units <= expected.units
    )


def _same_pair(reference: str, answer: str) -> bool:
    """Whether a reference like 3,2, which may be a number or two, is answered as two in its order."""
    two = re.fullmatch(r"(\d+),(\d{1,2})", reference.strip())
    pair = two and rf"\[?{two[1]}(?:[,;]\s*|\s+and\s+){two[2]}[\].]?"
    return bool(pair) and re.fullmatch(pair, _plain(answer).strip()) is not None


def _in_english(text: str) -> str:
    """Numbers in an English spelling: a point before decimals, no sign between thousands where that was none of
    commas."""

    def decimals(number: re.Match[str]) -> str:
        whole, part = number.groups()
        if whole.isdigit() and len(part) > 2 and whole != "0":
            return number[0]
        return f"{re.sub('[^0-9]', '', whole)}.{part}"

    return _GROUPS.sub(lambda number: re.sub("[^0-9]", "", number[0]), _DECIMAL_COMMA.sub(decimals, text))


def _as_list(text: str, commas_part: bool = False) -> list[_Quantity | str]:
    """The parts of a list, numbers by their value before other text by its spelling; a part may stand in quotes, as in
    a list written by a program. commas_part: 3,2 is two numbers, not one."""
    text = _plain(text).strip().strip("[]")
    parts = _LIST_SEPARATORS.split(text if commas_part else _in_english(text))
    parts = (_QUOTED.sub(r"\2", part.strip()) for part in parts if normalise(part))
    found = (_quantity(part) or normalise(part) for part in parts)
    return sorted(
        found, key=lambda part: (1, 0, part) if isinstance(part, str) else (0, part.value, sorted(part.units))
    )


def _same_part(a: _Quantity | str, b: _Quantity | str, tolerance: float) -> bool:
    return a == b or (not isinstance(a, str) and not isinstance(b, str) and _agree(a, b, tolerance))
