"""From one item of a question file to a `Question`: a reader for each form that files have (`corpus_formats`)."""

from __future__ import annotations

import ast
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from functools import cache
from typing import Any

from vrag_lib.corpus import Question

_META_FIELDS = ("file_name", "reference_page", "source_type", "query_type")
_FIELDS = ("uid", "query", "reference_answer", "meta_info", *_META_FIELDS)
_OTHER_NAMES = {"page": "reference_page", "pages": "reference_page", "file": "file_name", "document": "file_name"}
"""What people call fields of the unified form whose right name is spelt quite differently."""


class ItemError(ValueError):
    """What is wrong with one item."""


def encodable(item: Any) -> Any:
    """The same without halves of surrogate pairs, in texts and in keys, which no file can hold."""
    return json.loads(json.dumps(item, ensure_ascii=False).encode("utf-8", "replace"))


def misspelt_fields(items: Iterable[Any]) -> Counter[tuple[str, str]]:
    """(name, right name) of the fields of unified items that are none of the form's but are called much like one that
    the item lacks, with the number of items.

    >>> misspelt_fields([{"query": "Who?", "meta_info": {"filename": "a.pdf", "doc_type": "paper"}}])
    Counter({('filename', 'file_name'): 1})
    """
    found: Counter[tuple[str, str]] = Counter()
    for item in items:
        if isinstance(item, dict):
            meta = item.get("meta_info")
            names = {*item, *(meta if isinstance(meta, dict) else ())}
            found.update((name, right) for name in names if (right := _right_name(name)) and right not in names)
    return found


@cache
def _right_name(name: str) -> str | None:
    if name in _FIELDS:
        return None
    spelt = re.sub(r"[\s-]+", "_", name.strip().lower())
    return _OTHER_NAMES.get(spelt) or next(iter(get_close_matches(spelt, _FIELDS, 1, cutoff=0.85)), None)


def _unified(item: Any, before: dict[str, Question]) -> Question:
    meta = {} if _object(item).get("meta_info") is None else item["meta_info"]
    if not isinstance(meta, dict):
        raise ItemError("field meta_info: not an object")
    fields = {name: item.get(name) if meta.get(name) is None else meta[name] for name in _META_FIELDS}
    extra = {name: value for name, value in item.items() if name not in _FIELDS}
    extra |= {name: value for name, value in meta.items() if name not in _META_FIELDS}
    pages = _pages(fields, "reference_page")
    question = Question(
        uid=_text(item, "uid"),
        query=_text(item, "query"),
        reference_answer=_answer(item, "reference_answer", extra.get("answer_format")),
        file_name=_text(fields, "file_name", None if pages else ""),
        reference_pages=pages,
        source_type=_text(fields, "source_type", ""),
        query_type=_text(fields, "query_type", ""),
        extra=extra,
    )
    try:
        _ = question.gold_regions
    except ValueError as error:
        raise ItemError(f"field regions: {error}") from error
    return question


def _slidevqa(item: Any, before: dict[str, Question]) -> Question:
    used = ("qa_id", "deck_name", "question", "answer", "evidence_pages", "reasoning_type")
    return Question(
        uid=_text(_object(item), "qa_id"),
        query=_text(item, "question"),
        reference_answer=_answer(item, "answer"),
        file_name=_text(item, "deck_name"),
        reference_pages=_pages(item, "evidence_pages"),
        query_type=_text(item, "reasoning_type", ""),
        extra={key: value for key, value in item.items() if key not in used},
    )


def _mmlongbench_doc(item: Any, before: dict[str, Question]) -> Question:
    file_name = _text(_object(item), "doc_id")
    number = 1 + sum(question.file_name == file_name for question in before.values())
    sources = _list(item, "evidence_sources")
    used = ("doc_id", "question", "answer", "evidence_pages", "evidence_sources")
    return Question(
        uid=f"{file_name}#{number}",
        query=_text(item, "question"),
        reference_answer=_answer(item, "answer", item.get("answer_format")),
        file_name=file_name,
        reference_pages=_pages(item, "evidence_pages"),
        source_type=", ".join(map(str, sources)),
        query_type="",
        extra={"evidence_sources": sources, **{key: value for key, value in item.items() if key not in used}},
    )


READERS: dict[str, Callable[[Any, dict[str, Question]], Question]] = {
    "unified": _unified,
    "slidevqa": _slidevqa,
    "mmlongbench_doc": _mmlongbench_doc,
}


def _object(item: Any) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise ItemError(f"not an object but {type(item).__name__}")
    return item


def _text(item: dict[str, Any], field: str, default: str | None = None) -> str:
    value = default if item.get(field) is None else item[field]
    if value is None or (value == "" and default is None):
        raise ItemError(f"field {field}: missing or empty")
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _answer(item: dict[str, Any], field: str, answer_format: Any = None) -> str:
    """An answer as text. A list, whose entries are all asked for, is written as `rule_judge` takes lists apart, which
    compares entries in any order and numbers by value; for MMLongBench-Doc's format List as the literal that its rule
    reads. Answers of which any will do belong in `answers`."""
    value = item.get(field)
    entries = value if isinstance(value, list) and value else [value]
    bad = [entry for entry in entries if entry is not None and not isinstance(entry, str | int | float)]
    if bad:
        raise ItemError(f"field {field}: {str(bad[0])[:60]!r} is neither text, a number nor a list of these")
    if not isinstance(value, list) or answer_format == "List":
        return _text(item, field)
    return "; ".join(_text({field: entry}, field) for entry in entries)


def _list(item: dict[str, Any], field: str) -> list[Any]:
    """A list, given as such or as a string that holds a Python list (read as a literal, never executed)."""
    value = [] if item.get(field) is None else item[field]
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value) if value.strip() else []
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            raise ItemError(f"field {field}: {value[:60]!r} is not a list") from None
    value = [value] if isinstance(value, int | float) else value
    if not isinstance(value, list | tuple):
        raise ItemError(f"field {field}: not a list but {type(value).__name__}")
    return list(value)


def _pages(item: dict[str, Any], field: str) -> tuple[int, ...]:
    pages = [_page(page) for page in _list(item, field)]
    bad = [page for page in pages if not isinstance(page, int) or isinstance(page, bool) or page < 0]
    if bad:
        raise ItemError(f"field {field}: {bad[0]!r} is no page number")
    return tuple(dict.fromkeys(pages))


def _page(value: Any) -> Any:
    """A page number as table programs write it, 4.0 or "4", as a whole number; anything else as it is."""
    if isinstance(value, str) and re.fullmatch(r"\s*\d{1,9}\s*", value):
        return int(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value
