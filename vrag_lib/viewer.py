"""Trajectories as one static HTML page: what was shown, what was said, where it was looked, what it was worth.

    Path("trajectories.html").write_text(trajectory_html(trajectories, corpus), encoding="utf-8")
    show(trajectory, corpus)  # the same inside a notebook

The page needs nothing but itself: style and images are inside, there is no script, and its content security policy
forbids everything else. All text of models and files is untrusted: it is escaped, characters that cannot be seen are
written out, and a very long text is cut, saying so.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from markupsafe import Markup

from vrag_lib.actions import ActionKind
from vrag_lib.geometry import Box, Size, View
from vrag_lib.trajectory import ImageRef, StopReason, Trajectory, Turn

if TYPE_CHECKING:
    from vrag_lib.corpus import Corpus

MAX_TEXT_CHARS = 20_000
"""A longer text is cut here and says how long it was."""

MAX_LABEL_CHARS = 160
"""The same for questions and answers in the table of contents."""

THUMBNAIL_WIDTH = 360
"""Width in pixels of the whole page beside the evidence."""

JPEG_QUALITY = 80

_STOP_TEXT = {
    StopReason.ANSWER: "it answered",
    StopReason.MAX_TURNS: "the budget of replies was used up",
    StopReason.MAX_TOKENS: "the budget of tokens was used up",
    StopReason.CONTEXT_OVERFLOW: "the context was full",
    StopReason.INVALID_STREAK: "too many invalid replies in a row",
    StopReason.ERROR: "something failed",
}
_STOP_CLASS = {StopReason.ANSWER: "good", StopReason.ERROR: "bad"}
_KIND_NAME = {ActionKind.SEARCH: "search", ActionKind.CROP: "crop", ActionKind.ANSWER: "answer"}
_Image = tuple[Markup | None, str]  # a data URL, or None and the reason
_Render = Callable[[ImageRef], _Image]
_JOINERS = "\u200c\u200d"  # zero-width, but needed to write some scripts and emoji


@dataclass(frozen=True)
class _Figure:
    """One image with the boxes drawn on it, or the reason why there is none."""

    title: str
    detail: str
    width: int
    height: int
    data: Markup | None
    problem: str = ""
    boxes: tuple[tuple[str, Box], ...] = ()
    gold: bool = False


@dataclass(frozen=True)
class _Step:
    """One reply and what came back."""

    kind: str
    kind_class: str
    argument: str | None
    is_crop: bool
    thought: str
    invalid: str
    text: str
    note: str
    observation: str
    images: tuple[_Figure, ...]


@dataclass(frozen=True)
class _Card:
    """One trajectory as the template wants it."""

    question: str
    answer: str | None
    reference: str
    stop: str
    stop_class: str
    stop_text: str
    error: str
    facts: list[tuple[str, str]]
    rewards: list[tuple[str, str, str, str]]
    total: str
    prompt: str
    first_images: tuple[_Figure, ...]
    steps: list[_Step]
    record: list[tuple[str, str]]
    source: dict[str, str] = field(default_factory=dict)
    evidence: tuple[_Figure, ...] = ()


def trajectory_html(
    trajectories: Trajectory | Sequence[Trajectory], corpus: Corpus, title: str = "Trajectories"
) -> str:
    """One self-contained HTML page of all the trajectories, with a table of contents if there are several.

    A page image that cannot be read is replaced by a placeholder with the reason; nothing about a record raises.
    """
    if isinstance(trajectories, Trajectory):
        trajectories = [trajectories]
    render = lru_cache(256)(lambda ref: _image_data(ref, corpus))
    cards = [_card(trajectory, corpus, render) for trajectory in trajectories]
    return _template().render(
        cards=cards,
        title=title,
        style=Markup(STYLE),
        style_hash=Markup(base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()),
        any_reference=any(card.reference for card in cards),
        any_reward=any(card.rewards for card in cards),
    )


def unlike_record(trajectories: Sequence[Trajectory], corpus: Corpus) -> list[str]:
    """What shows that these are not the documents that the trajectories were made from: pages that are missing or of
    another size, counted, one sentence each.

    Nothing found is no proof. A record knows a page by its id and size, so it cannot tell it from a page of another
    document of the same name and size.
    """
    sizes = {image.page_id: image.view.page for trajectory in trajectories for image in trajectory.images}
    shown = dict.fromkeys(page_id for trajectory in trajectories for page_id in trajectory.shown_pages) | sizes
    known = set(corpus.page_ids)
    missing = [page_id for page_id in shown if page_id not in known]
    other = [page_id for page_id, size in sizes.items() if page_id in known and corpus.page(page_id).size != size]
    found = ((missing, "not among these documents"), (other, "of another size here"))
    return [
        f"{len(ids)} of the {len(shown)} pages that the trajectories show are {what}, the first: {ids[0]}; give the "
        "documents that they were made from, at the same corpus.dpi"
        for ids, what in found
        if ids
    ]


def show(trajectories: Trajectory | Sequence[Trajectory], corpus: Corpus, height: int = 900) -> Any:
    """The page as the output of a notebook cell, `height` pixels high, in a frame of its own without any rights."""
    from IPython.display import HTML

    page = html.escape(trajectory_html(trajectories, corpus), quote=True)
    style = f"width:100%;height:{int(height)}px;border:1px solid #8884;border-radius:8px"
    return HTML(f'<div><iframe sandbox srcdoc="{page}" style="{style}" title="Trajectory"></iframe></div>')


def visible(text: str, limit: int = MAX_TEXT_CHARS) -> str:
    """Text for a page: cut after `limit` characters, saying so; characters that would be invisible, or would reorder
    what stands around them, written out; halves of surrogate pairs, which no file can hold, replaced.

    >>> visible("a\\u202eb\\ud800\\x00")
    'a⟨U+202E⟩b�⟨U+0000⟩'
    >>> visible("abcdef", 3)
    'abc… [3 of 6 characters shown]'
    """
    cut = f"… [{limit:,} of {len(text):,} characters shown]" if len(text) > limit else ""
    return "".join(map(_visible_character, text[:limit])) + cut


@lru_cache(4096)
def _visible_character(character: str) -> str:
    category = unicodedata.category(character)
    if category == "Cs":
        return "\ufffd"
    if (category == "Cc" and character not in "\n\t") or (category == "Cf" and character not in _JOINERS):
        return f"⟨U+{ord(character):04X}⟩"
    return character


@lru_cache(1)
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value,
    )
    environment.filters["shorten"] = lambda text: visible(" ".join(text.split()), MAX_LABEL_CHARS)
    return environment.get_template("viewer.html.j2")


def _card(trajectory: Trajectory, corpus: Corpus, render: _Render) -> _Card:
    turns = trajectory.turns
    first = turns[0] if turns and turns[0].role == "user" else Turn("user", "")
    steps = [_step(turns, i, trajectory, render) for i, turn in enumerate(turns) if turn.role == "assistant"]
    searches, crops = trajectory.count(ActionKind.SEARCH), trajectory.count(ActionKind.CROP)
    facts = [("Replies", f"{len(steps)} (searches: {searches}, crops: {crops})"), ("Policy", trajectory.policy or "–")]
    if trajectory.gold_page_ids:
        facts.append(("Gold pages", ", ".join(trajectory.gold_page_ids)))
    text_pages = [page_id for turn in turns for page_id in turn.text_pages]
    if text_pages:
        facts.append(("Pages shown as text", ", ".join(text_pages)))
    if trajectory.timings:
        facts.append(("Time", ", ".join(f"{name} {seconds:.2f} s" for name, seconds in trajectory.timings.items())))
    record = {
        "id": trajectory.id,
        "question id": trajectory.question_id,
        "run": trajectory.run_id,
        "preset": trajectory.preset,
        "seed": str(trajectory.seed),
    } | dict(trajectory.versions)
    evidence = trajectory.evidence
    return _Card(
        question=trajectory.question,
        answer=trajectory.answer,
        reference=trajectory.reference_answer,
        stop=trajectory.stop_reason.value.replace("_", " "),
        stop_class=_STOP_CLASS.get(trajectory.stop_reason, "warn"),
        stop_text=_STOP_TEXT[trajectory.stop_reason],
        error=trajectory.error,
        facts=facts,
        rewards=[
            (name, f"{score:.3f}", f"{weight:g}", f"{score * weight:.3f}")
            for name, (score, weight) in trajectory.rewards.items()
        ],
        total=f"{trajectory.total_reward:.3f}",
        prompt=first.text,
        first_images=_figures(turns, 0, trajectory, render) if first.images else (),
        steps=steps,
        record=[(name, value) for name, value in record.items() if value],
        source={} if evidence is None else _source(evidence, corpus),
        evidence=() if evidence is None else _evidence(evidence, trajectory, render),
    )


def _step(turns: Sequence[Turn], i: int, trajectory: Trajectory, render: _Render) -> _Step:
    reply = turns[i]
    seen = turns[i + 1] if i + 1 < len(turns) and turns[i + 1].role == "user" else Turn("user", "")
    action = reply.action
    thought, closing, _ = reply.text.partition("<think>")[2].partition("</think>")
    note = ["Reply as sampled"]
    if reply.token_ids is not None:
        note.append(f"{len(reply.token_ids)} tokens")
    if reply.logprobs:
        note.append(f"mean log-prob {sum(reply.logprobs) / len(reply.logprobs):.2f}")
    if reply.finish_reason not in ("", "stop"):
        note.append(f"ended by {reply.finish_reason}")
    return _Step(
        kind="invalid" if action is None else _KIND_NAME[action.kind],
        kind_class="bad" if action is None else _KIND_NAME[action.kind],
        argument=None if action is None else action.argument,
        is_crop=action is not None and action.kind is ActionKind.CROP,
        thought=thought.strip() if closing else "",
        invalid="" if reply.invalid is None else f"could not be carried out: {reply.invalid.value.replace('_', ' ')}",
        text=reply.text,
        note=" · ".join(note),
        observation=seen.text,
        images=_figures(turns, i + 1, trajectory, render) if seen.images else (),
    )


def _figures(turns: Sequence[Turn], i: int, trajectory: Trajectory, render: _Render) -> tuple[_Figure, ...]:
    """The images of turn `i`; on the last one, the box of the next crop."""
    images = turns[i].images
    figures = [_figure(ref, trajectory, render) for ref in images[:-1]]
    return (*figures, _figure(images[-1], trajectory, render, _next_crop(turns, i)))


def _next_crop(turns: Sequence[Turn], i: int) -> tuple[tuple[str, Box], ...]:
    """Boxes to draw on the last image of turn `i`, in its shown frame: the region that the next crop cut out, and the
    box as the reply named it where that is another. Invalid replies in between show no image, so they are passed."""
    view = turns[i].images[-1].view
    for j in range(i + 1, len(turns)):
        action = turns[j].action
        if turns[j].images or (action is not None and action.kind is not ActionKind.CROP):
            return ()
        if action is not None and action.box is not None:
            named = _inside(action.box, view)
            cut = turns[j + 1].images[-1].view if j + 1 < len(turns) and turns[j + 1].images else None
            if cut is None:
                return (("named", named),)
            region = _inside(view.to_shown(cut.box), view)
            differs = max(abs(a - b) for a, b in zip(region.as_tuple(), named.as_tuple(), strict=True)) > 4
            return (("crop", region), *((("named", named),) if differs else ()))
    return ()


def _inside(box: Box, view: View) -> Box:
    """The part of a box inside the shown image, corners in order, rounded to a tenth of a pixel."""
    box = Box(min(box.x1, box.x2), min(box.y1, box.y2), max(box.x1, box.x2), max(box.y1, box.y2))
    box = box.intersection(Box(0, 0, view.shown.width, view.shown.height))
    return Box(*(round(v, 1) for v in box.as_tuple()))


def _figure(
    ref: ImageRef,
    trajectory: Trajectory,
    render: _Render,
    boxes: tuple[tuple[str, Box], ...] = (),
) -> _Figure:
    shown = ref.view.shown
    data, problem = render(ref)
    title = f"Region of page {ref.page_id}" if ref.is_crop else f"Page {ref.page_id}"
    detail = f"shown at {shown.width} × {shown.height} px, {shown.tokens} tokens"
    gold = ref.page_id in trajectory.gold_page_ids and not ref.is_crop
    return _Figure(title, detail, shown.width, shown.height, data, problem, boxes, gold)


def _evidence(ref: ImageRef, trajectory: Trajectory, render: _Render) -> tuple[_Figure, ...]:
    """The whole page, small, with the region marked, and beside it the region as it was shown."""
    page = ref.view.page
    width = min(THUMBNAIL_WIDTH, page.width)
    small = Size(width, max(1, round(page.height * width / page.width)))
    whole = View(page, Box(0, 0, page.width, page.height), small)
    boxes = (("crop", _inside(whole.to_shown(ref.view.box), whole)),) if ref.is_crop else ()
    data, problem = render(ImageRef(ref.page_id, whole))
    gold = ref.page_id in trajectory.gold_page_ids
    figure = _Figure(f"Page {ref.page_id}", "", small.width, small.height, data, problem, boxes, gold)
    return (figure, _figure(ref, trajectory, render)) if ref.is_crop else (figure,)


def _source(ref: ImageRef, corpus: Corpus) -> dict[str, str]:
    """Document, page and region of an image in words; the page id's parts if the corpus does not know the page."""
    document, _, number = ref.page_id.rpartition("_")
    try:
        page = corpus.page(ref.page_id)
        document, number = page.document_id, str(page.number)
    except Exception:  # a corpus may fail in its own ways; the page id says nearly as much
        document = document or ref.page_id
    box = ", ".join(str(round(v)) for v in ref.view.box.as_tuple())
    size = f"{ref.view.page.width} × {ref.view.page.height} px"
    return {"document": document, "page": number, "region": f"[{box}] of {size}" if ref.is_crop else ""}


def _image_data(ref: ImageRef, corpus: Corpus) -> _Image:
    """The image as a data URL, or None and the reason."""
    try:
        image = ref.render(corpus)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=JPEG_QUALITY, optimize=True)
    except Exception as error:  # a page file may be missing or broken in any way; the rest is still worth seeing
        return None, str(error) or type(error).__name__
    return Markup(f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"), ""


STYLE = """
:root { --bg: #f6f7f9; --card: #fff; --ink: #1c2128; --dim: #667080; --line: #dde1e7; --soft: #f0f2f5;
  --accent: #2457d6; --crop: #e5340b; --good: #12733a; --warn: #8a5a00; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --bg: #14171c; --card: #1d2128; --ink: #e6e9ee; --dim: #98a2b3;
  --line: #343b46; --soft: #262b34; --accent: #8ab0ff; --crop: #ff5a36; --good: #5fd08d; --warn: #f0bd5b;
  --bad: #ff8a80; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--bg); color: var(--ink); line-height: 1.5; overflow-wrap: anywhere;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; font-size: 15px; }
main { max-width: 1280px; margin: 0 auto; padding: 20px clamp(10px, 3vw, 32px) 60px; }
h1 { font-size: 1.5rem; margin: 8px 0 0; } h2 { font-size: 1.3rem; line-height: 1.3; margin: 0 0 16px; }
h1, h2, p, td, dd, pre, .argument { unicode-bidi: isolate; }
p { margin: 0 0 8px; } a { color: var(--accent); } .dim { color: var(--dim); }
.mono, pre { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.mono { font-size: .88em; }
.eyebrow { color: var(--dim); font-size: .72rem; font-weight: 600; letter-spacing: .06em; text-transform: uppercase;
  margin: 0 0 2px; }
article, nav { background: var(--card); border: 1px solid var(--line); border-radius: 12px; margin: 20px 0;
  padding: clamp(12px, 2.2vw, 24px); }
nav { padding: 6px 12px; } nav td:nth-child(2) { min-width: 15em; } nav td:nth-child(3) { min-width: 9em; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: left; color: var(--dim); font-size: .78rem; font-weight: 600; white-space: nowrap; }
th, td { padding: 6px 10px 6px 0; border-bottom: 1px solid var(--line); vertical-align: top; min-width: 2.5em; }
tbody:last-child tr:last-child td, tfoot td { border-bottom: 0; }
.rewards { width: auto; min-width: min(100%, 320px); margin-top: 12px; }
.rewards td:not(:first-child), .rewards th:not(:first-child) { text-align: right; }
tfoot td { font-weight: 600; } tfoot td:last-child { text-align: right; }
.summary { display: grid; grid-template-columns: minmax(0, 5fr) minmax(0, 6fr); gap: 16px 32px;
  margin-bottom: 16px; align-items: start; }
.final { font-size: 1.25rem; font-weight: 600; margin-bottom: 12px; white-space: pre-wrap; }
.final.none { color: var(--dim); font-weight: 400; font-style: italic; }
.pair { display: grid; grid-template-columns: minmax(0, 2fr) minmax(0, 3fr); gap: 12px; align-items: start; }
.pair > figure:only-child { max-width: 360px; grid-column: 1 / -1; }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 2px 14px; margin: 8px 0 0; }
dt { color: var(--dim); } dd { margin: 0; }
.tag { display: inline-block; padding: 0 8px; border-radius: 99px; font-size: .8rem; font-weight: 600;
  line-height: 1.6; background: var(--soft); color: var(--ink); white-space: nowrap; }
.tag.good, .tag.answer { color: var(--good); background: color-mix(in srgb, var(--good) 14%, transparent); }
.tag.warn { color: var(--warn); background: color-mix(in srgb, var(--warn) 16%, transparent); }
.tag.bad { color: var(--bad); background: color-mix(in srgb, var(--bad) 14%, transparent); }
.tag.search { color: var(--accent); background: color-mix(in srgb, var(--accent) 14%, transparent); }
.tag.crop { color: var(--crop); background: color-mix(in srgb, var(--crop) 14%, transparent); }
.error { color: var(--bad); white-space: pre-wrap; }
.steps { list-style: none; margin: 16px 0; padding: 0; display: grid; gap: 16px; align-items: start;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)); }
.steps > li { border: 1px solid var(--line); border-radius: 10px; padding: 12px; min-width: 0; }
.head { margin-bottom: 8px; } .argument { font-weight: 600; margin-left: 6px; white-space: pre-wrap; }
.number { display: inline-block; width: 1.7em; height: 1.7em; line-height: 1.7em; margin-right: 8px;
  border-radius: 50%; background: var(--ink); color: var(--card); text-align: center; font-size: .78rem;
  font-weight: 700; }
.thought { color: var(--dim); font-style: italic; border-left: 3px solid var(--line); padding-left: 10px;
  white-space: pre-wrap; max-height: 16em; overflow-y: auto; }
.observation { background: var(--soft); border-radius: 6px; padding: 6px 10px; white-space: pre-wrap; }
figure { margin: 0 0 8px; min-width: 0; } figcaption { font-size: .8rem; margin-top: 4px; }
.frame { position: relative; border: 1px solid var(--line); border-radius: 4px; overflow: hidden;
  background: #fff; line-height: 0; }
.frame img { display: block; width: 100%; height: auto; }
.frame svg { position: absolute; inset: 0; width: 100%; height: 100%; }
rect { fill: none; stroke-width: 3px; vector-effect: non-scaling-stroke; }
rect.crop { stroke: var(--crop); fill: var(--crop); fill-opacity: .12; }
rect.named { stroke: var(--crop); stroke-width: 1.5px; stroke-dasharray: 5 4; }
.missing { border: 1px dashed var(--bad); border-radius: 4px; color: var(--bad); padding: 24px 16px;
  text-align: center; font-size: .9rem; }
details { margin-top: 6px; } summary { cursor: pointer; color: var(--dim); font-size: .8rem; }
pre { white-space: pre-wrap; font-size: .8rem; background: var(--soft); border-radius: 6px; padding: 8px 10px;
  margin: 6px 0 0; max-height: 24em; overflow: auto; }
@media (max-width: 820px) { .summary { grid-template-columns: minmax(0, 1fr); } }
@media print { article { break-inside: avoid-page; border: 0; } }
"""
