"""visual_retrieval: an index is built once, resumed, shared, locked and refused; search is exact MaxSim."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vrag_lib.corpus import Corpus, Document, Page
from vrag_lib.geometry import Size
from vrag_lib.maxsim import EmbeddingStore
from vrag_lib.page_encoder import ModelError
from vrag_lib.retrieval import RetrievalIndexError, Retriever
from vrag_lib.scale_model import build_tiny_colqwen2
from vrag_lib.visual_retrieval import VisualRetriever, check_distinct


class StubEncoder:
    """Embeds a page by its number and a query by its letters; counts and, if asked, delays or breaks its work."""

    engine, name, fingerprint, dtype = "native", "stub", "f" * 64, "float32"

    def __init__(self, fingerprint: str = "f" * 64, fail_at: int | None = None, seconds: float = 0.0, log=None):
        self.fingerprint, self.fail_at, self.seconds, self.log = fingerprint, fail_at, seconds, log
        self.versions = {"colpali-engine": "0.3.18"}
        self.encoded: list[str] = []

    def vector(self, seed: str) -> np.ndarray:
        rng = np.random.default_rng(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8]))
        return rng.standard_normal((7, 128)).astype(np.float32)

    def encode_pages(self, pages: Sequence[Page]) -> Iterator[tuple[Page, np.ndarray]]:
        for page in pages:
            if len(self.encoded) == self.fail_at:
                raise RuntimeError("killed")
            time.sleep(self.seconds)
            self.encoded.append(page.id)
            if self.log:
                with open(self.log, "a") as file:
                    file.write(page.id + "\n")
            yield page, self.vector(page.image_path.read_bytes().hex())

    def encode_query(self, text: str) -> np.ndarray:
        return self.vector(text)[:4]


def make_corpus(folder: Path, pages: int = 6, documents: Sequence[str] = ("a", "b")) -> Corpus:
    """Small random page images; the pages of two corpora with a document in common are the same."""
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for name in documents:
        rng = np.random.default_rng(list(name.encode()))
        own = []
        for number in range(1, pages + 1):
            path = folder / f"{name}_{number}.png"
            Image.fromarray(rng.integers(0, 255, (4, 3, 3), dtype=np.uint8)).resize((84, 112)).save(path)
            own.append(Page(f"{name}_{number}", name, number, path, Size(84, 112)))
        sha = hashlib.sha256(f"{name}{pages}".encode()).hexdigest()
        made.append(Document(name, folder / f"{name}.pdf", sha, tuple(own)))
    return Corpus(made)


@pytest.fixture
def corpus(tmp_path) -> Corpus:
    return make_corpus(tmp_path / "pages")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return build_tiny_colqwen2(tmp_path_factory.mktemp("models") / "tiny-colqwen2")


def build(corpus, encoder, tmp_path, index="index", **options) -> VisualRetriever:
    return VisualRetriever.from_encoder(corpus, encoder, tmp_path / index, cache_dir=tmp_path / "cache", **options)


def test_search_is_exact_maxsim_over_the_pages_in_corpus_order(corpus, tmp_path):
    encoder = StubEncoder()
    retriever = build(corpus, encoder, tmp_path)
    assert isinstance(retriever, Retriever) and retriever.page_ids == corpus.page_ids
    found = retriever.search(["first", "second"], 5)
    for query, hits in zip(["first", "second"], found, strict=True):
        pages = [encoder.vector(page.image_path.read_bytes().hex()) for page in corpus.pages]
        want = [(p.astype(np.float64) @ encoder.encode_query(query).astype(np.float64).T).max(0).sum() for p in pages]
        best = sorted(range(len(want)), key=lambda i: -want[i])[:5]
        assert [hit.page_id for hit in hits] == [corpus.page_ids[i] for i in best]
        assert np.allclose([hit.score for hit in hits], [want[i] for i in best], rtol=1e-5)
    assert retriever.search([], 5) == [] and retriever.search(["x"], 0) == [[]]
    assert len(retriever.search(["x"], 99)[0]) == len(corpus)


def test_the_tiny_model_through_both_engines(corpus, tmp_path, model):
    retrievers = {
        engine: VisualRetriever.build(
            corpus, model, tmp_path / engine, engine=engine, device="cpu", cache_dir=tmp_path / "cache", threads=1
        )
        for engine in ("byaldi", "native")
    }
    queries = ["revenue by year", "a photo"]
    results = {engine: retriever.search(queries, 4) for engine, retriever in retrievers.items()}
    for hits, others in zip(results["byaldi"], results["native"], strict=True):
        assert [hit.page_id for hit in hits] == [hit.page_id for hit in others]
        assert np.allclose([hit.score for hit in hits], [hit.score for hit in others], atol=0.05)
    again = VisualRetriever.load(tmp_path / "byaldi", model, corpus, device="cpu")
    assert again.search(queries, 4) == results["byaldi"]
    assert again.store.dtype == "bfloat16" and not list((tmp_path / "byaldi").rglob("*.pt"))
    # byaldi's own scores are sums in bf16: close to ours, not equal
    for hits, ours in zip(again.search_with_byaldi(queries, 12), again.search(queries, 12), strict=True):
        scores = {hit.page_id: hit.score for hit in ours}
        assert {hit.page_id for hit in hits} == set(corpus.page_ids)
        assert all(abs(hit.score - scores[hit.page_id]) < 0.1 for hit in hits)
    with pytest.raises(RetrievalIndexError, match="built with engine='byaldi'"):
        retrievers["native"].search_with_byaldi(queries, 1)


def test_a_stopped_build_goes_on_where_it_stopped(corpus, tmp_path):
    first = StubEncoder(fail_at=4)
    with pytest.raises(RuntimeError, match="killed"):
        build(corpus, first, tmp_path)
    second = StubEncoder()
    retriever = build(corpus, second, tmp_path)
    assert first.encoded + second.encoded == list(corpus.page_ids)
    third = StubEncoder()
    assert build(corpus, third, tmp_path).search(["q"], 3) == retriever.search(["q"], 3)
    assert not third.encoded
    assert not [path for path in tmp_path.rglob(".*") if path.name != ".lock"]


def test_corpora_that_share_pages_share_their_embeddings(corpus, tmp_path):
    build(corpus, StubEncoder(), tmp_path)
    encoder = StubEncoder()
    other = make_corpus(tmp_path / "more", documents=("b", "c"))
    retriever = build(other, encoder, tmp_path, "other")
    assert encoder.encoded == [f"c_{n}" for n in range(1, 7)] and retriever.page_ids == other.page_ids
    encoder = StubEncoder(fingerprint="e" * 64)
    build(other, encoder, tmp_path, "third")
    assert encoder.encoded == list(other.page_ids)  # nothing of another model's is reused


def test_without_a_folder_each_corpus_and_model_has_its_own(corpus, tmp_path):
    other = make_corpus(tmp_path / "more", documents=("c",))
    for one, encoder in ((corpus, StubEncoder()), (other, StubEncoder()), (corpus, StubEncoder("e" * 64))):
        retriever = VisualRetriever.from_encoder(one, encoder, cache_dir=tmp_path / "cache")
        assert retriever.page_ids == one.page_ids
    assert len(list((tmp_path / "cache" / "visual").iterdir())) == 3


def test_equal_page_images_are_encoded_once_and_rank_by_page_id(tmp_path):
    corpus = make_corpus(tmp_path / "pages", pages=3, documents=("b", "a"))
    for page in corpus.pages[1:4]:
        page.image_path.write_bytes(corpus.pages[0].image_path.read_bytes())
    encoder = StubEncoder()
    retriever = build(corpus, encoder, tmp_path)
    assert len(encoder.encoded) == 3
    ranks = [hit.page_id for hit in retriever.search(["q"], 6)[0]]
    start = ranks.index("a_1")
    assert ranks[start : start + 4] == ["a_1", "a_2", "a_3", "b_1"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "0" * 64}, "another model"),
        ({"versions": {"colpali-engine": "0.3.17"}}, "other library versions"),
        ({"format": 0}, "another version of this package"),
        ({"corpus": "0" * 64}, "another corpus"),
        ({"engine": "byaldi"}, "another engine"),
    ],
)
def test_an_index_of_something_else_is_refused_with_the_remedy(corpus, tmp_path, change, message):
    build(corpus, StubEncoder(), tmp_path)
    path = tmp_path / "index" / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(RetrievalIndexError, match=f"built with {message}.*overwrite=True, or name another index_dir"):
        build(corpus, StubEncoder(), tmp_path)
    encoder = StubEncoder()
    assert build(corpus, encoder, tmp_path, overwrite=True).page_ids == corpus.page_ids
    assert not encoder.encoded  # the page embeddings themselves were good


def test_loading_checks_model_corpus_and_folder(corpus, tmp_path, model):
    cache = tmp_path / "cache"
    VisualRetriever.build(corpus, model, tmp_path / "index", engine="native", device="cpu", cache_dir=cache)
    assert VisualRetriever.load(tmp_path / "index", model, device="cpu").page_ids == corpus.page_ids
    other = build_tiny_colqwen2(tmp_path / "colqwen2-other", seed=1)
    with pytest.raises(RetrievalIndexError, match=r"another model \(tiny-colqwen2\)"):
        VisualRetriever.load(tmp_path / "index", other, device="cpu")
    with pytest.raises(RetrievalIndexError, match="another corpus"):
        VisualRetriever.load(tmp_path / "index", model, make_corpus(tmp_path / "c", documents=("c",)), device="cpu")
    with pytest.raises(RetrievalIndexError, match=r"holds no visual index.*VisualRetriever\.build"):
        VisualRetriever.load(tmp_path, model)
    with pytest.raises(ModelError):
        VisualRetriever.load(tmp_path / "index", tmp_path / "gone")


@pytest.mark.parametrize("damage", ["manifest", "embeddings", "no embeddings", "fewer pages"])
def test_a_damaged_index_is_named_or_built_again(corpus, tmp_path, damage):
    build(corpus, StubEncoder(), tmp_path)
    index = tmp_path / "index"
    if damage == "manifest":
        (index / "index.json").write_text("{")
    elif damage == "embeddings":
        (index / "embeddings.safetensors").write_bytes(b"junk")
    elif damage == "fewer pages":
        EmbeddingStore.from_pages([np.ones((1, 128))]).save(index / "embeddings.safetensors")
    else:
        (index / "embeddings.safetensors").unlink()
        assert build(corpus, StubEncoder(), tmp_path).page_ids == corpus.page_ids
        return
    with pytest.raises(RetrievalIndexError, match="build"):
        build(corpus, StubEncoder(), tmp_path)
    assert build(corpus, StubEncoder(), tmp_path, overwrite=True).page_ids == corpus.page_ids


def test_embeddings_that_do_not_depend_on_the_page_are_refused(corpus, tmp_path, monkeypatch):
    encoder = StubEncoder()
    monkeypatch.setattr(encoder, "vector", lambda seed: np.ones((7, 128), np.float32))
    with pytest.raises(RetrievalIndexError, match="12 different page images have only 1 different embeddings"):
        build(corpus, encoder, tmp_path)
    bad = StubEncoder("e" * 64)
    monkeypatch.setattr(bad, "vector", lambda seed: np.full((7, 128), np.nan, np.float32))
    with pytest.raises(RetrievalIndexError, match=r"unusable embeddings for page 'a_1': .* not finite"):
        build(corpus, bad, tmp_path, "bad")
    one = np.ones((2, 2), np.float32)
    check_distinct([("a", one), ("a", one)], "one image twice")
    check_distinct([("a", one), ("b", 2 * one), ("c", one)], "two alike of three")
    with pytest.raises(RetrievalIndexError, match="not finite"):
        check_distinct([("a", np.array([[np.inf]]))], "infinite")


def test_an_empty_corpus_has_no_index(tmp_path):
    with pytest.raises(RetrievalIndexError, match="no pages"):
        build(Corpus([]), StubEncoder(), tmp_path)


def _build_in_child(corpus: Corpus, folder: Path, seconds: float) -> None:
    build(corpus, StubEncoder(seconds=seconds, log=folder / "log"), folder)


def _child(corpus: Corpus, folder: Path, seconds: float) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=_build_in_child, args=(corpus, folder, seconds))
    process.start()
    return process


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_two_processes_that_build_one_index_take_turns(corpus, tmp_path):
    children = [_child(corpus, tmp_path, 0.05) for _ in range(2)]
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0]
    assert (tmp_path / "log").read_text().split() == list(corpus.page_ids)  # each page was encoded once
    assert build(corpus, StubEncoder(), tmp_path).page_ids == corpus.page_ids


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_build_killed_outright_leaves_nothing_in_the_way(corpus, tmp_path):
    child = _child(corpus, tmp_path, 0.1)
    deadline = time.monotonic() + 30
    while not (tmp_path / "log").exists() or len((tmp_path / "log").read_text().split()) < 4:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    encoder = StubEncoder()
    retriever = build(corpus, encoder, tmp_path)
    assert retriever.page_ids == corpus.page_ids and 0 < len(encoder.encoded) < len(corpus)
