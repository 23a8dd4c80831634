"""Answer metrics beside the judge: exact match, token F1, ANLS, and the official rules of four benchmarks.

All are pure functions in [0, 1], defined as their sources' scorers compute them, slips included, because numbers are
only comparable to published ones if the slips are the same; a docstring names each. Deviations: what a scorer does by
running text as code (`eval` of lists) is read as a literal; what raises there scores 0 here, as its caller makes it.

MMLongBench-Doc has GPT-4o turn a free-form reply into a short answer before its rule is applied. The agent gives short
answers in a tag, so `extract_short_answer` does what is left by rules: refusals, numbers with units, plain lists.
`mmlongbench_verbatim` leaves that step out.

`METRICS` gives all of them one signature, (question, answer) -> score; no answer (None) scores 0 everywhere.
"""

from __future__ import annotations

import ast
import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from vrag_lib.corpus import Question
from vrag_lib.judge import parse_number
from vrag_lib.minidocs_content import NOT_ANSWERABLE

EVISRAG_REFUSALS = ("no relevant information", "insufficient to answer", "insufficient to answer the question")
"""EVisRAG's gold answers of a question whose pages do not suffice."""

ANSWER_FORMATS = ("Int", "Float", "Str", "List", "None")
"""MMLongBench-Doc's `answer_format`."""

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def exact_match(reference: str, answer: str) -> float:
    """1 if both are equal after SQuAD's normalisation (Rajpurkar et al. 2016: case, punctuation, articles, spacing).

    >>> exact_match("The Silver Heron", "silver heron."), exact_match("3.5", "35"), exact_match("12", "12 barns")
    (1.0, 1.0, 0.0)
    """
    return float(_squad_tokens(reference) == _squad_tokens(answer))


def token_f1(reference: str, answer: str) -> float:
    """F1 of the two bags of SQuAD-normalised tokens; where one is empty, 1 if the other is too (SQuAD 2.0).

    "quiet mill pond" against "the mill": precision 1/3, recall 1, F1 1/2.

    >>> token_f1("the mill", "quiet mill pond")
    0.5
    """
    expected, given = _squad_tokens(reference), _squad_tokens(answer)
    if not expected or not given:
        return float(expected == given)
    return _bag_f1(expected, given)


def _squad_tokens(text: str) -> list[str]:
    """Lower case, punctuation deleted (so "3.5" becomes "35"), then articles, split at white space."""
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def _bag_f1(expected: Sequence[str], given: Sequence[str], slack: float = 0.0) -> float:
    same = (Counter(expected) & Counter(given)).total()
    if not same:
        return 0.0
    precision, recall = same / len(given), same / len(expected)
    return 2 * precision * recall / (precision + recall + slack)


def anls(references: str | Sequence[str], answer: str, threshold: float = 0.5) -> float:
    """Normalised Levenshtein similarity, best of the references, 0 unless above `threshold` (Biten et al. 2019, the
    metric of DocVQA; ANLS is its mean over questions). Case and spacing do not count.

    One letter of six wrong: 1 - 1/6. Half the letters wrong is no longer an answer:

    >>> round(anls("Harbor", "harbur"), 4), anls("ab", "ax"), anls(["Ann", "Anna"], "anna")
    (0.8333, 0.0, 1.0)
    """
    given = " ".join(answer.lower().split())
    golds = [references] if isinstance(references, str) else references
    return max((_similarity(" ".join(gold.lower().split()), given, threshold) for gold in golds), default=0.0)


def _similarity(a: str, b: str, threshold: float = 0.5) -> float:
    """1 - distance / longer length, 0 unless above the threshold; two empty texts are alike."""
    longer = max(len(a), len(b))
    if not longer:
        return 1.0
    # The distance is at least the difference in length: an answer of a hundred pages is not worth measuring.
    if 1 - abs(len(a) - len(b)) / longer <= threshold:
        return 0.0
    similarity = 1 - levenshtein(a, b) / longer
    return similarity if similarity > threshold else 0.0


def levenshtein(a: str, b: str) -> int:
    """Least number of characters inserted, deleted or replaced to turn `a` into `b`.

    >>> levenshtein("kitten", "sitting")
    3
    """
    above = list(range(len(b) + 1))
    for i, char in enumerate(a, start=1):
        row = [i]
        for j, other in enumerate(b, start=1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (char != other)))
        above = row
    return above[-1]


_SLIDEVQA_REPLACED = (
    ("this is ", ""), ("it is ", ""), ("&", ","), ("and", ","), ("percent", ""), ("organisation", "organization"),
    ("because of", ""), ("because", ""), ("due to", ""), ("hours", "hrs"), ("minites", "min"),
)  # fmt: skip
_NUMBER_WORDS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip


def slidevqa_exact_match(question: str, reference: str, answer: str) -> float:
    """SlideVQA's EM (Tanaka et al. 2023, `evaluate.py` of its repository): equal normalised tokens, at least one.

    >>> slidevqa_exact_match("About how many barns stand there?", "3 barns", "three")
    1.0
    """
    expected, given = slidevqa_tokens(question, reference), slidevqa_tokens(question, answer)
    return float(expected == given and bool(expected))


def slidevqa_f1(question: str, reference: str, answer: str) -> float:
    """SlideVQA's F1: of the bags of its normalised tokens; 0 where none is shared.

    >>> round(slidevqa_f1("Which grains are sold?", "rye & wheat", "rye, wheat and oats"), 4)
    0.8
    """
    return _bag_f1(slidevqa_tokens(question, reference), slidevqa_tokens(question, answer))


def slidevqa_tokens(question: str, text: str) -> list[str]:
    """An answer as SlideVQA compares it: lower case; fillers, "percent" and the unit asked for removed; "and" and "&"
    to commas; punctuation and articles deleted; yes/no answers cut to their first word; number words to digits.

    Its slips are kept: replacements also hit inside words (both sides alike); the unit is the word after a *lower-case*
    "how many" or "which" of the question, its punctuation included; any text that starts with "no" is a yes/no answer.

    >>> slidevqa_tokens("In total, how many hours was it?", "It is twelve hours")
    ['12', 'hrs']
    >>> slidevqa_tokens("Where?", "North Shore"), slidevqa_tokens("Is it so?", "Yes, it does")
    (['north'], ['yes'])
    """
    text = text.lower()
    for old, new in _SLIDEVQA_REPLACED:
        text = text.replace(old, new)
    for asked in ("how many", "which"):
        unit = question.partition(asked)[2].split()
        if unit:
            text = text.replace(unit[0], "")
    text = _ARTICLES.sub(" ", text.translate(_PUNCTUATION))
    words = text.split()
    if text.startswith(("yes", "no")):
        words = words[:1]
    return [str(_NUMBER_WORDS.index(word)) if word in _NUMBER_WORDS else word for word in words]


class EvisragScores(NamedTuple):
    """EVisRAG's three metrics of one answer."""

    em: float
    acc: float
    f1: float


def evisrag_scores(references: Sequence[str], answer: str) -> EvisragScores:
    """EM, Acc and F1 as EVisRAG's `src/evisrag/eval.py` computes them (spec 4.3), each the best over the references
    that share a token with the answer. Acc asks only that every gold token occurs, so a long answer that holds
    everything has it: read it beside F1.

    >>> scores = evisrag_scores(["12 barns"], "There are 12 old barns and 3 mills")
    >>> scores.em, scores.acc, round(scores.f1, 4)
    (0.0, 1.0, 0.4)
    """
    references = (references,) if isinstance(references, str) else references
    best = EvisragScores(0.0, 0.0, 0.0)
    given = _squad_tokens(answer)
    for reference in references:
        expected = _squad_tokens(reference)
        if not set(expected) & set(given):
            continue
        scores = (float(expected == given), float(set(expected) <= set(given)), _bag_f1(expected, given, slack=1e-7))
        best = EvisragScores(*map(max, best, scores))
    return best


def mmlongbench_score(reference: str, answer: str, answer_format: str) -> float:
    """MMLongBench-Doc's rule for one extracted answer (Ma et al. 2024, `eval/eval_score.py` of its repository).

    Int: equal after truncation. Float: see `_floats_agree`. Str and None: ANLS of the cleaned texts, equality where the
    reference is a page, time, date, telephone number, address or file. List: as many entries, both sorted; equality if
    the first entry is a number or one of those, else the *least* ANLS of the pairs.

    >>> [mmlongbench_score("18.29%", answer, "Float") for answer in ("0.1829", "18.3", "19")]
    [1.0, 1.0, 0.0]
    >>> mmlongbench_score("['black', 'blue']", "['Blue', 'Black']", "List"), mmlongbench_score("3", "3.9", "Int")
    (1.0, 1.0)

    Raises ValueError for an unknown format.
    """
    if answer_format not in ANSWER_FORMATS:
        raise ValueError(f"answer_format is one of {', '.join(ANSWER_FORMATS)}, not {answer_format!r}")
    if answer_format == "List":
        return _list_score(_literal_list(reference), _literal_list(answer))
    try:
        if answer_format == "Int":
            return float(int(reference) == int(float(answer)))
        if answer_format == "Float":
            return float(_floats_agree(float(_clean(reference)), float(_clean(answer))))
    except (ValueError, OverflowError):
        return 0.0
    expected, given = _clean(reference), _clean(answer)
    return float(expected == given) if _wants_equality(expected) else _similarity(expected, given)


def _clean(value: Any) -> str:
    """Lower case without parentheses, one outer quote at each end, leading $, trailing %. (The official code means to
    remove "miles" and "million" too, but drops the result.)"""
    closed, end, rest = str(value).lower().strip().rpartition(")")  # without an end a search goes on from every "("
    text = (re.sub(r"(?<!\s)\s*\([^)]*\)", "", closed + end) + rest).strip()
    text = re.sub(r"^['\"]|['\"]$", "", text).strip()
    return text.lstrip("$").strip().rstrip("%").strip()


def _floats_agree(reference: float, answer: float) -> bool:
    """Within 1 % of the reference, a hundredth or a hundred times it (per cent or share), or equal when rounded to the
    decimals that both show, at least two."""
    for target in (reference / 100, reference, reference * 100):
        if math.isclose(target, answer, rel_tol=0.01):
            return True
        decimals = max(min(_decimals(answer), _decimals(target)), 2)
        if round(answer, decimals) == round(target, decimals):
            return True
    return False


def _decimals(value: float) -> int:
    """Digits after the point as Python prints the number; 3 if it prints none."""
    _, point, digits = str(value).partition(".")
    return len(digits) if point else 3


_EQUALITY_PATTERNS = (
    r".*https://.*|.*\.py|.*ipynb|page.*|.*[ap]\.m\..*",
    r"\d+(?:[-\s]\d+)?",
    r"\d{4}[-\s]\d{2}(?:[-\s]\d{2})?",
    r"[a-z0-9._%+-]+@[a-z0-9.-]+\.[a-z]{2,}",
)


def _wants_equality(text: str) -> bool:
    return any(re.fullmatch(pattern, text, re.DOTALL) for pattern in _EQUALITY_PATTERNS)


def _literal_list(text: str) -> list[Any] | None:
    """A text that starts with "[" read as a Python literal, anything else as its own only entry; None if unreadable."""
    if not text.startswith("["):
        return [text]
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
    return value if isinstance(value, list) else [value]


def _list_score(reference: list[Any] | None, answer: list[Any] | None) -> float:
    if not reference or not answer or len(reference) != len(answer):
        return 0.0
    expected, given = sorted(map(_clean, reference)), sorted(map(_clean, answer))
    if _is_float(expected[0]) or _wants_equality(expected[0]):
        return float("-".join(expected) == "-".join(given))
    return min(_similarity(a, b) for a, b in zip(expected, given, strict=True))


def _is_float(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


# What may follow a refusal: nothing that begins anew, where an answer would stand, and no number at once.
_REST = r"(?:(?!\b(?:but|yet|though|however)\b|\.\s|\s[-–—]\s|,[^,]*\d)[^;:])*"
_AFTER = rf"\b(?!\W*\d){_REST}"
_REFUSAL = re.compile(
    rf"(?:the answer is |(?:the|this) question )?(?:(?:it|this) )?(?:is )?"
    rf"(?:not answerable|unanswerable|(?:can ?not|can['’]t) be (?:answered|determined)){_AFTER}"
    rf"|(?:there is )?no relevant information{_AFTER}"
    rf"|(?:there is )?(?:insufficient|not enough) (?:to answer|information|evidence){_AFTER}"
    rf"|(?:it (?:is|was) )?not (?:found|given|stated|mentioned|specified)(?: (?:in|on) {_REST})?"
)
_LIST_BREAK = re.compile(r";|\n|,(?!\d{3}\b)|\band\b", re.IGNORECASE)


def is_refusal(answer: str) -> bool:
    """Whether an answer says that the documents do not answer the question.

    >>> is_refusal("Not answerable."), is_refusal("Not found on the pages shown"), is_refusal("Nottingham")
    (True, True, False)
    """
    return _REFUSAL.fullmatch(" ".join(answer.lower().replace("*", "").split()).rstrip(".")) is not None


def extract_short_answer(answer: str, answer_format: str) -> str:
    """A short answer in the form that MMLongBench-Doc's rule reads, in place of its extraction by GPT-4o: refusals
    become "Not answerable", numbers lose units and thousands separators, plain lists become literals.

    >>> extract_short_answer("1,250 barns", "Int"), extract_short_answer("rye, wheat and oats", "List")
    ('1250.0', "['rye', 'wheat', 'oats']")
    """
    answer = answer.strip()
    if is_refusal(answer):
        return NOT_ANSWERABLE
    if answer_format in ("Int", "Float") and not _is_float(_clean(answer)):
        number = parse_number(answer)
        return answer if number is None else str(number)
    if answer_format == "Int":
        return _clean(answer)
    if answer_format == "List" and not (answer.startswith("[") and _literal_list(answer) is not None):
        parts = (part.strip().strip("'\" ") for part in _LIST_BREAK.split(answer.strip("[]")))
        return repr([part for part in parts if part])
    return answer


class MMLongBenchResult(NamedTuple):
    """MMLongBench-Doc's generalised accuracy and F1 over a question set, and the accuracy of its two parts (NaN for a
    part without questions)."""

    accuracy: float
    f1: float
    answerable: float
    unanswerable: float


def mmlongbench_result(scores: Sequence[float], references: Sequence[str], answers: Sequence[str]) -> MMLongBenchResult:
    """MMLongBench-Doc's overall numbers. With S the summed scores of answerable questions, recall is S / answerable
    questions, precision S / questions answered with anything but "Not answerable", F1 their harmonic mean. No answer
    at all is written "Fail to answer" there, and counts as answered.

    Two answerable questions, one right and one refused, and an unanswerable one that was answered: recall 1/2,
    precision 1/2, F1 1/2, accuracy 1/3.

    >>> result = mmlongbench_result([1, 0, 0], ["3", "4", NOT_ANSWERABLE], ["3", NOT_ANSWERABLE, "7"])
    >>> round(result.accuracy, 3), result.f1, result.answerable, result.unanswerable
    (0.333, 0.5, 0.5, 0.0)

    Raises ValueError for no questions or lists of different length.
    """
    if not scores or not len(scores) == len(references) == len(answers):
        raise ValueError(f"{len(scores)} scores, {len(references)} references and {len(answers)} answers do not fit")
    good = [score for score, reference in zip(scores, references, strict=True) if reference != NOT_ANSWERABLE]
    bad = [score for score, reference in zip(scores, references, strict=True) if reference == NOT_ANSWERABLE]
    answered = sum(answer != NOT_ANSWERABLE for answer in answers)
    # 2PR / (P + R) with P = S / answered and R = S / answerable
    f1 = 2 * sum(good) / (answered + len(good)) if good and answered else 0.0
    return MMLongBenchResult(sum(scores) / len(scores), f1, _mean(good), _mean(bad))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def vidorag_score(reply: str) -> int | None:
    """The score, 1 to 5, in a reply of ViDoRAG's evaluator: its first digit (`llms/evaluator.py`, spec 2.5).

    None when there is no digit, for which the released code asks again for ever, or it is not 1 to 5.

    >>> vidorag_score("4\\nfully correct, 1 detail more"), vidorag_score("Score: 5"), vidorag_score("irrelevant")
    (4, 5, None)
    """
    digit = re.search(r"[0-9]", reply)
    return int(digit[0]) if digit and digit[0] in "12345" else None


def vidorag_passes(reply: str, least: int = 4) -> bool:
    """Whether ViDoRAG's evaluator counts the answer as right: a score of 4 or 5. (VRAG-RL's SFT filter wants 5.) A
    reply without a score is not a pass.

    >>> [vidorag_passes(reply) for reply in ("3", "4", "5", "")], vidorag_passes("4", least=5)
    ([False, True, True, False], False)
    """
    score = vidorag_score(reply)
    return score is not None and score >= least


def is_answerable(question: Question) -> bool:
    """Whether the question has an answer: by its own mark (`answerable`, EVisRAG's `is_sufficient`), else by its
    reference answer."""
    for mark in ("answerable", "is_sufficient"):
        if mark in question.extra:
            return str(question.extra[mark]).strip().lower() not in ("", "false", "no", "none", "0")
    return question.reference_answer.strip() != NOT_ANSWERABLE


def gold_answers(question: Question) -> tuple[str, ...]:
    """The accepted answers: `answers` of `question.extra` where it has some, else the reference answer."""
    several = question.extra.get("answers")
    return tuple(map(str, several)) if isinstance(several, list | tuple) and several else (question.reference_answer,)


def answer_format(question: Question) -> str:
    """MMLongBench-Doc's answer format of a question; Str (or None, where it has no answer) if it names none of them."""
    named = question.extra.get("answer_format")
    return named if named in ANSWER_FORMATS else "Str" if is_answerable(question) else "None"


Metric = Callable[[Question, str | None], float]
"""(question, given answer or None) -> score in [0, 1]."""


def _best(score: Callable[[str, str], float]) -> Metric:
    return lambda question, answer: (
        0.0 if answer is None else max(score(gold, answer) for gold in gold_answers(question))
    )


def _slidevqa(score: Callable[[str, str, str], float]) -> Metric:
    return lambda question, answer: 0.0 if answer is None else score(question.query, question.reference_answer, answer)


def _evisrag(name: str) -> Metric:
    def score(question: Question, answer: str | None) -> float:
        golds = gold_answers(question) if is_answerable(question) else EVISRAG_REFUSALS
        return 0.0 if answer is None else getattr(evisrag_scores(golds, answer), name)

    return score


def _mmlongbench(question: Question, answer: str | None) -> float:
    if answer is None:
        return 0.0
    form = answer_format(question)
    return mmlongbench_score(question.reference_answer, extract_short_answer(answer, form), form)


def _mmlongbench_verbatim(question: Question, answer: str | None) -> float:
    return 0.0 if answer is None else mmlongbench_score(question.reference_answer, answer, answer_format(question))


METRICS: dict[str, Metric] = {
    "exact": _best(exact_match),
    "f1": _best(token_f1),
    "anls": lambda question, answer: 0.0 if answer is None else anls(gold_answers(question), answer),
    "slidevqa_em": _slidevqa(slidevqa_exact_match),
    "slidevqa_f1": _slidevqa(slidevqa_f1),
    "mmlongbench": _mmlongbench,
    "mmlongbench_verbatim": _mmlongbench_verbatim,
    "evisrag_em": _evisrag("em"),
    "evisrag_acc": _evisrag("acc"),
    "evisrag_f1": _evisrag("f1"),
}
"""Every answer metric by name."""

OFFICIAL_METRICS: dict[str, tuple[str, ...]] = {
    "slidevqa": ("slidevqa_em", "slidevqa_f1"),
    "mmlongbench_doc": ("mmlongbench", "mmlongbench_verbatim"),
    "vidoseek": (),
    "unified": (),
    "minidocs": (),
}
"""The string metrics that a dataset's own scorer reports; ViDoSeek's is a model's score of 1 to 5, which
`judge_openai.ViDoRAGJudge` asks for."""
