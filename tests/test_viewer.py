"""The viewer: one page that needs nothing else, shows what the record says, and runs nothing of what it is given."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import html
import io
import re
import time
from html.parser import HTMLParser

import pytest
from helpers import FakeCorpus, FakeRetriever
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vrag_lib.config import EnvironmentConfig
from vrag_lib.corpus import Question
from vrag_lib.geometry import Box, Size
from vrag_lib.policy import ScriptedPolicy
from vrag_lib.rollout import rollout
from vrag_lib.trajectory import StopReason, Trajectory, Turn
from vrag_lib.viewer import MAX_TEXT_CHARS, show, trajectory_html, unlike_record, visible

CORPUS = FakeCorpus([Size(640, 480), Size(300, 500)])
SMALL = EnvironmentConfig(max_turns=8, min_pixels=16 * 28 * 28, max_pixels=64 * 28 * 28, crop_padding=10)
SCRIPT = [
    "<think>find it</think><search>page 1</search>",
    "<think>zoom</think><bbox>[28, 28, 140, 112]</bbox>",
    "<bbox>[-40, 20, 84, 9999]</bbox>",
    "no action here",
    "<answer>forty two</answer>",
]
ALLOWED_TAGS = {
    *(
        "html",
        "head",
        "meta",
        "title",
        "style",
        "body",
        "main",
        "h1",
        "h2",
        "p",
        "nav",
        "div",
        "table",
        "thead",
        "tbody",
    ),
    *("tfoot", "tr", "th", "td", "a", "span", "article", "header", "b", "bdi", "dl", "dt", "dd", "details", "summary"),
    *("pre", "figure", "figcaption", "img", "svg", "rect", "ol", "li"),
}


def make(script=SCRIPT, query="How many?", **changes) -> Trajectory:
    question = Question("q1", query, "42")
    trajectory = rollout(ScriptedPolicy(script), [question], CORPUS, FakeRetriever(CORPUS.page_ids), SMALL)[0]
    return dataclasses.replace(trajectory, **changes)


class Parsed(HTMLParser):
    """Tags with their attributes, and the text, as a browser would see them."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def check_is_inert(page: str) -> Parsed:
    """No tag, attribute or address but the viewer's own: nothing can run or be fetched."""
    parsed = Parsed(page)
    assert {name for name, _ in parsed.tags} <= ALLOWED_TAGS
    for name, attributes in parsed.tags:
        assert not any(key.startswith("on") or key in ("style", "srcset", "action") for key in attributes), name
        assert re.fullmatch(r"#t\d+", attributes.get("href") or "#t1")
        assert (attributes.get("src") or "data:image/jpeg;base64,").startswith("data:image/jpeg;base64,")
    page.encode("utf-8")
    return parsed


def images(parsed: Parsed) -> list[Image.Image]:
    return [Image.open(io.BytesIO(base64.b64decode(a["src"].split(",")[1]))) for a in parsed.all("img")]


def rectangles(parsed: Parsed) -> list[tuple[str, Box]]:
    found = []
    for a in parsed.all("rect"):
        x, y = float(a["x"]), float(a["y"])
        found.append((a["class"], Box(x, y, x + float(a["width"]), y + float(a["height"]))))
    return found


def close(a: Box, b: Box, slack: float = 1.5) -> bool:
    return max(abs(x - y) for x, y in zip(a.as_tuple(), b.as_tuple(), strict=True)) <= slack


def test_the_policy_of_the_page_allows_its_style_and_nothing_else():
    page = trajectory_html([make()], CORPUS)
    parsed = check_is_inert(page)
    policy = next(a["content"] for a in parsed.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    style = page.split("<style>")[1].split("</style>")[0]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert "default-src 'none'" in policy and f"style-src 'sha256-{digest}'" in policy and "img-src data:" in policy
    assert "unsafe" not in policy and "script" not in policy
    assert "url(" not in style and "@import" not in style


def test_shows_what_happened():
    trajectory = make(
        rewards={"answer": (1.0, 0.7), "retrieval": (0.5, 0.3)},
        timings={"generate": 1.234},
        gold_page_ids=("doc_1",),
        versions={"torch": "2.13.0"},
        policy="a policy",
    )
    parsed = check_is_inert(trajectory_html(trajectory, CORPUS))
    for text in (
        "How many?", "forty two", "42", "find it", "zoom", "[28, 28, 140, 112]", "no action here", "no action",
        "Your last message could not be carried out", "doc_1", "gold page", "0.850", "0.700", "0.150", "1.23 s",
        "it answered", "a policy", "2.13.0", "page 1",
    ):  # fmt: skip
        assert text in parsed.text, text


def test_boxes_are_drawn_where_the_next_crop_was_cut():
    trajectory = make()
    page, first, second = trajectory.images
    parsed = check_is_inert(trajectory_html(trajectory, CORPUS))
    drawn = rectangles(parsed)
    # The evidence: the whole page, small, with the last crop.
    scale = int(parsed.all("img")[0]["width"]) / page.view.page.width
    assert drawn[0][0] == "crop"
    assert close(drawn[0][1], Box(*(v * scale for v in second.view.box.as_tuple())))
    # The page: what the first crop cut out (padding included) and, dashed, the box as it was named.
    assert drawn[1][0] == "crop" and close(page.view.to_raw(drawn[1][1]), first.view.box)
    assert drawn[2] == ("named", Box(28, 28, 140, 112))
    # The first crop: the second one, named far beyond the image, drawn inside it.
    assert drawn[3][0] == "crop" and drawn[4][0] == "named" and len(drawn) == 5
    assert drawn[4][1] == Box(0, 20, 84, first.view.shown.height)
    assert close(first.view.to_raw(drawn[3][1]), second.view.box.intersection(first.view.box), 2.5)


def test_images_are_what_the_model_saw():
    trajectory = make()
    shown = images(check_is_inert(trajectory_html(trajectory, CORPUS)))[2:]  # after the two of the evidence
    assert len(shown) == 3
    for image, ref in zip(shown, trajectory.images, strict=True):
        assert image.size == (ref.view.shown.width, ref.view.shown.height)
        truth = ref.render(CORPUS)
        middle = (image.width // 2, image.height // 2)
        difference = [abs(a - b) for a, b in zip(image.getpixel(middle), truth.getpixel(middle), strict=True)]
        assert max(difference) <= 12  # JPEG


def test_contents_for_several():
    one = trajectory_html([make()], CORPUS)
    assert "<nav" not in one
    parsed = check_is_inert(trajectory_html([make(), make(query="Who?")], CORPUS, title="A run"))
    assert [a["href"] for a in parsed.all("a")] == ["#t1", "#t2"]
    assert [a["id"] for a in parsed.all("article")] == ["t1", "t2"]
    assert "2 trajectories" in parsed.text and "A run" in parsed.text


def test_is_deterministic():
    trajectory = make(timings={})
    assert trajectory_html([trajectory], CORPUS) == trajectory_html([trajectory], CORPUS)


HOSTILE = (
    "<script>alert(1)</script>",
    "\"><img src=x onerror=alert(1)>",
    "' onmouseover='alert(1)",
    "javascript:alert(1)",
    "</style></pre></details><iframe src=//evil.example>",
    "{{ 7 * 7 }} {% raw %}",
    "<!-- --><![CDATA[",
    "&lt;b&gt; &#x3c;script&#x3e;",
    "\u202eevil\u202c \u2066x\u2069 a\u200bb \ufeff",
    "\ud800 lone \udfff",
    "\x00\x08\x1b[31m\r",
    "مرحبا <b>RTL</b>",
)  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_text_from_anywhere_is_only_text(text):
    trajectory = make([f"<think>{text}</think><search>{text}</search>", text, f"<answer>{text}</answer>"], text)
    turns = tuple(dataclasses.replace(turn, text=turn.text + text) for turn in trajectory.turns)
    trajectory = dataclasses.replace(
        trajectory,
        turns=turns,
        question=text,
        reference_answer=text,
        error=text,
        policy=text,
        id=text,
        run_id=text,
        rewards={text: (1.0, 1.0)},
        timings={text: 1.0},
        versions={text: text},
        gold_page_ids=(text,),
    )
    parsed = check_is_inert(trajectory_html([trajectory, trajectory], CORPUS, title=text))
    assert "49" not in parsed.text.replace(trajectory.id, "")
    shown = visible(text)
    if "\r" not in text:
        assert shown in parsed.text
    assert not any(c in parsed.text for c in "\u202e\u2066\u200b\ufeff\x00\x1b")


@settings(max_examples=50, deadline=None)
@given(st.text(alphabet=st.characters(), max_size=80), st.text(alphabet=st.characters(), max_size=80))
def test_any_text_gives_a_page(said, asked):
    turns = (Turn("user", asked), Turn("assistant", said), Turn("user", asked))
    trajectory = Trajectory("t", "q", asked, turns, StopReason.ERROR, error=said, policy=asked, reference_answer=said)
    check_is_inert(trajectory_html([trajectory], CORPUS, title=said))


def test_a_megabyte_is_cut_and_says_so():
    page = trajectory_html([make(["a" * 1_000_000, "<answer>x</answer>"], query="b" * 1_000_000)], CORPUS)
    assert len(page) < 40 * MAX_TEXT_CHARS
    assert "… [20,000 of 1,000,000 characters shown]" in page


def test_thoughts_that_are_never_closed_take_no_time():
    """Answers of an endpoint may be megabytes."""
    start = time.process_time()
    assert "a thought" in trajectory_html([make(["<think>a thought</think>", "<think>" * 20_000])], CORPUS)
    assert time.process_time() - start < 5


def test_a_corpus_that_is_not_the_records_is_told_from_it():
    trajectories = [make(), make()]
    assert unlike_record(trajectories, CORPUS) == []
    fewer = unlike_record(trajectories, FakeCorpus([]))
    assert len(fewer) == 1 and fewer[0].startswith("1 of the 1 pages that the trajectories show are not among these")
    other = unlike_record(trajectories, FakeCorpus([Size(641, 480), Size(300, 500)]))
    assert len(other) == 1 and "are of another size here, the first: doc_1; give the documents" in other[0]
    read = Trajectory("t", "q", "why?", (Turn("user", "text", text_pages=("doc_9",)),), StopReason.ERROR)
    assert "1 of the 2 pages" in unlike_record([*trajectories, read], CORPUS)[0]


@pytest.mark.parametrize("failure", [FileNotFoundError("no <b>file</b> p.png"), OSError(), MemoryError("big")])
def test_a_missing_image_leaves_a_note(failure):
    class Broken(FakeCorpus):
        def page(self, page_id):
            raise failure

    trajectory = make()
    parsed = check_is_inert(trajectory_html([trajectory], Broken([])))
    assert not parsed.all("img") and parsed.text.count("This image cannot be shown") == 5
    assert str(failure) in parsed.text and "doc" in parsed.text and "forty two" in parsed.text


def test_a_page_image_of_another_size_leaves_a_note():
    assert "cannot be shown" in trajectory_html([make()], FakeCorpus([Size(641, 480), Size(300, 500)]))


@pytest.mark.parametrize("reason", list(StopReason))
def test_every_end_has_words(reason):
    trajectory = make(stop_reason=reason, error="why it failed" if reason is StopReason.ERROR else "")
    parsed = check_is_inert(trajectory_html([trajectory], CORPUS))
    assert ("no answer was given" in parsed.text) == (reason is not StopReason.ANSWER)
    assert ("why it failed" in parsed.text) == (reason is StopReason.ERROR)


def test_nothing_to_show():
    assert "0 trajectories" in trajectory_html([], CORPUS)
    empty = Trajectory("t", "q", "why?", (), StopReason.ERROR, error="the policy was away")
    assert "the policy was away" in trajectory_html([empty], CORPUS)


def test_a_first_turn_with_images_and_tokens():
    full = make()
    first = dataclasses.replace(full.turns[0], images=full.turns[2].images)
    said = dataclasses.replace(full.turns[1], token_ids=(1, 2), logprobs=(-1.0, -2.0), finish_reason="length")
    trajectory = dataclasses.replace(full, turns=(first, said, *full.turns[2:]))
    parsed = check_is_inert(trajectory_html([trajectory], CORPUS))
    assert "2 tokens · mean log-prob -1.50 · ended by length" in parsed.text
    assert len(parsed.all("img")) == 6


def test_in_a_notebook_the_page_sits_in_a_frame_without_rights():
    trajectory = make([HOSTILE[1], "<answer>x</answer>"])
    cell = show(trajectory, CORPUS, height=500).data
    frame = Parsed(cell).all("iframe")
    assert len(frame) == 1 and frame[0]["sandbox"] is None and "height:500px" in frame[0]["style"]
    assert frame[0]["srcdoc"] == trajectory_html(trajectory, CORPUS)
    assert {name for name, _ in Parsed(cell).tags} == {"div", "iframe"}
    assert html.unescape(cell).count("<iframe") == 1
