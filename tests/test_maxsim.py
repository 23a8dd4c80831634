"""maxsim: scores and rankings against plain fp64 arithmetic, for random, real and hostile embeddings."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from vrag_lib import maxsim
from vrag_lib.maxsim import EmbeddingStore, id_order, rank, rounding_margin, score
from vrag_lib.retrieval import RetrievalIndexError

REAL = Path(__file__).parents[2] / "shared/data/vidorag_example/colqwen2-v1.0_pages.safetensors"


def reference(query: np.ndarray, pages: list[np.ndarray]) -> np.ndarray:
    """Scores by numpy in fp64."""
    return np.array([(page.astype(np.float64) @ query.astype(np.float64).T).max(0).sum() for page in pages])


def unit_rows(rng: np.random.Generator, rows: int, dim: int) -> np.ndarray:
    values = rng.standard_normal((rows, dim)).astype(np.float32)
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def as_bf16(values: np.ndarray) -> np.ndarray:
    """Float32 values cut to what bf16 can hold."""
    return (values.view(np.uint32) & 0xFFFF0000).view(np.float32)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    lengths=st.lists(st.integers(1, 120), min_size=1, max_size=12),
    query_tokens=st.integers(1, 9),
    dim=st.sampled_from([1, 3, 16, 128]),
    scale=st.sampled_from([1e-20, 1.0, 1e10]),
    bf16=st.booleans(),
    threads=st.integers(1, 3),
)
def test_scores_and_ranking_are_those_of_fp64(seed, lengths, query_tokens, dim, scale, bf16, threads):
    rng = np.random.default_rng(seed)
    pages = [rng.standard_normal((n, dim)).astype(np.float32) * np.float32(scale) for n in lengths]
    if bf16:
        pages = [as_bf16(page) for page in pages]
    query = rng.standard_normal((query_tokens, dim)).astype(np.float32)
    store = EmbeddingStore.from_pages(pages, "bfloat16" if bf16 else "float32")
    want = reference(query, pages)
    assert np.allclose(score(query, store, threads), want, rtol=1e-12, atol=1e-12 * scale)
    for k in (None, 1, 3, 99):
        order, scores = rank(query, store, k, threads=threads)
        assert np.array_equal(order, np.argsort(-want, kind="stable")[:k])
        assert np.allclose(scores, want[order], rtol=1e-12, atol=1e-12 * scale)


def test_a_crowd_of_nearly_equal_pages_is_ordered_as_fp64_orders_it():
    rng = np.random.default_rng(1)
    page, query = unit_rows(rng, 40, 128), unit_rows(rng, 20, 128)
    pages = []
    for _ in range(300):  # one unit in the last place in a few numbers: below what fp32 sums can tell apart
        near = page.copy()
        rows, columns = rng.integers(40, size=8), rng.integers(128, size=8)
        near[rows, columns] = np.nextafter(near[rows, columns], np.float32(np.inf))
        pages.append(near)
    store = EmbeddingStore.from_pages(pages)
    want = np.argsort(-reference(query, pages), kind="stable")
    in_fp32 = np.array([(page @ query.T).max(0).sum() for page in pages])
    assert not np.array_equal(np.argsort(-in_fp32, kind="stable"), want)
    assert np.array_equal(rank(query, store)[0], want)


def test_a_crowd_of_nearly_equal_tokens_gives_the_best_of_fp64():
    rng = np.random.default_rng(6)
    token, query = unit_rows(rng, 1, 128), unit_rows(rng, 6, 128)
    page = np.repeat(token, 500, axis=0)
    for row in page:
        at = rng.integers(128, size=3)
        row[at] = np.nextafter(row[at], np.float32(-np.inf))
    products = page.astype(np.float64) @ query.astype(np.float64).T
    in_fp32 = (page @ query.T).argmax(0)
    assert not np.array_equal(products[in_fp32, range(6)], products.max(0))  # fp32 alone picks other tokens
    for dtype, pages in (("float32", [page]), ("bfloat16", [as_bf16(page)])):
        want = reference(query, pages)[0]
        assert abs(score(query, EmbeddingStore.from_pages(pages, dtype))[0] - want) < 1e-14


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), dim=st.integers(1, 300), spread=st.integers(0, 30))
def test_no_rounding_bridges_the_margin(seed, dim, spread):
    """fp32 products, summed in several orders, of vectors whose terms differ in size by up to 2**spread."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((50, dim)) * 2.0 ** rng.integers(-spread, 1, (50, dim))
    query = rng.standard_normal((4, dim)).astype(np.float32)
    rows = rows.astype(np.float32)
    margin = rounding_margin(query, maxsim.max_row_norm(rows))
    exact = rows.astype(np.float64) @ query.astype(np.float64).T
    terms = (rows[:, None] * query).astype(np.float32)
    for products in (rows @ query.T, np.cumsum(terms, axis=2, dtype=np.float32)[..., -1]):
        assert (np.abs(products - exact) <= margin / 2).all()


def test_equal_pages_are_ordered_by_page_id_wherever_they_stand():
    rng = np.random.default_rng(2)
    page, query = unit_rows(rng, 10, 128), unit_rows(rng, 5, 128)
    pages = [page, unit_rows(rng, 3, 128), page[::-1], np.concatenate([page[4:], page[:4], page[:1]])]
    ids = ["d_10", "d_3", "d_9", "a_1"]
    order, scores = rank(query, EmbeddingStore.from_pages(pages), 3, id_order(ids))
    assert [ids[i] for i in order] == ["a_1", "d_10", "d_9"]
    assert len(set(scores)) == 1


def test_a_negative_best_match_stays_negative_beside_longer_pages():
    query = np.array([[1.0, 0.0]], np.float32)
    store = EmbeddingStore.from_pages([np.array([[-1.0, 0]]), np.array([[-0.5, 0], [-0.25, 0], [-2, 0]])])
    assert score(query, store).tolist() == [-1.0, -0.25]


def test_real_embeddings_keep_their_values_and_their_ranking(tmp_path):
    if not REAL.exists():
        pytest.skip("the shared example data is not here")
    pages = [page.astype(np.float32) for _, page in sorted(load_file(REAL).items())]
    store = EmbeddingStore.from_pages(pages)
    store.save(tmp_path / "e.safetensors")
    store = EmbeddingStore.load(tmp_path / "e.safetensors")
    assert all(np.array_equal(store.page(i), page) for i, page in enumerate(pages))
    for first in range(0, 700, 70):  # twenty tokens of a page as the query: crowded, correlated scores
        query = pages[first % 23][first : first + 20]
        want = reference(query, pages)
        order, _ = rank(query, store)
        assert np.array_equal(order, np.argsort(-want, kind="stable"))
        assert np.allclose(score(query, store), want, rtol=1e-13)


@pytest.mark.parametrize("bf16", [False, True])
def test_a_saved_store_is_the_same_store_and_plain_safetensors(tmp_path, bf16):
    rng = np.random.default_rng(3)
    pages = [unit_rows(rng, n, 16) for n in (2, 70000, 1)]
    if bf16:
        pages = [as_bf16(page) for page in pages]
    store = EmbeddingStore.from_pages(pages)
    assert store.dtype == ("bfloat16" if bf16 else "float32")
    store.save(tmp_path / "e.safetensors")
    loaded = EmbeddingStore.load(tmp_path / "e.safetensors")
    assert isinstance(loaded.tokens, np.memmap) and loaded.max_norm == store.max_norm
    assert all(np.array_equal(loaded.page(i), page) for i, page in enumerate(pages))
    query = unit_rows(rng, 3, 16)
    assert np.array_equal(score(query, loaded), score(query, store))
    if not bf16:
        assert np.array_equal(load_file(tmp_path / "e.safetensors")["tokens"], np.concatenate(pages))
    assert [path.name for path in tmp_path.iterdir()] == ["e.safetensors"]


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "offsets", "format"])
def test_a_damaged_file_is_refused_with_the_remedy(tmp_path, damage):
    path = tmp_path / "e.safetensors"
    EmbeddingStore.from_pages([np.ones((4, 8), np.float32)]).save(path)
    data = path.read_bytes()
    if damage == "offsets":
        store = EmbeddingStore(np.ones((4, 8), np.float32), np.array([0, 5, 4]), 1.0)
        store.save(path)
    else:
        path.write_bytes(
            {
                "cut": data[:-1],
                "empty": b"",
                "text": b"x" * 100,
                "format": data.replace(b"vrag-embeddings-1", b"vrag-embeddings-0"),
            }[damage]
        )
    with pytest.raises(RetrievalIndexError, match="delete it and build the index again"):
        EmbeddingStore.load(path)


def test_merged_stores_hold_the_pages_of_all_in_order(tmp_path):
    rng = np.random.default_rng(5)
    pages = [as_bf16(unit_rows(rng, n, 16) * np.float32(n)) for n in (3, 1, 4, 2)]
    files = [tmp_path / f"{i}.safetensors" for i in range(3)]
    for file, part in zip(files, (pages[:1], pages[1:3], pages[3:]), strict=True):
        EmbeddingStore.from_pages(part).save(file)
    maxsim.merge_stores([*files, files[0]], tmp_path / "all.safetensors")
    store = EmbeddingStore.load(tmp_path / "all.safetensors")
    assert len(store) == 5 and store.max_norm == EmbeddingStore.from_pages(pages).max_norm
    assert all(np.array_equal(store.page(i), page) for i, page in enumerate([*pages, pages[0]]))
    EmbeddingStore.from_pages([np.full((2, 16), 1 / 3)]).save(files[1])
    with pytest.raises(ValueError, match="of one dtype"):
        maxsim.merge_stores(files, tmp_path / "all.safetensors")
    assert len(EmbeddingStore.load(tmp_path / "all.safetensors")) == 5


def test_bad_input_is_named():
    one = np.ones((1, 4), np.float32)
    store = EmbeddingStore.from_pages([one])
    for pages, message in [
        ([], "at least one page"),
        ([one, np.ones((0, 4))], "page 1 have shape"),
        ([one, np.ones((2, 3))], "page 1 have shape"),
        ([one, np.full((1, 4), np.nan)], "page 1 are not finite"),
    ]:
        with pytest.raises(ValueError, match=message):
            EmbeddingStore.from_pages(pages)
    with pytest.raises(ValueError, match="without loss"):
        EmbeddingStore.from_pages([np.full((1, 4), 1 / 3)], "bfloat16")
    with pytest.raises(ValueError, match="none of auto"):
        EmbeddingStore.from_pages([one], "int8")
    for query, message in [
        (np.ones((2, 3)), "the query have shape"),
        (np.ones((0, 4)), "the query have shape"),
        (np.ones(4), "the query have shape"),
        (np.full((1, 4), np.inf), "the query are not finite"),
        (np.full((1, 4), 1e38), "normalise"),
    ]:
        with pytest.raises(ValueError, match=message):
            score(query, store)
    assert rank(one, store, 0)[0].shape == (0,) and rank(one, store, -5)[0].shape == (0,)


def test_several_threads_may_search_at_once():
    rng = np.random.default_rng(4)
    store = EmbeddingStore.from_pages([unit_rows(rng, 50, 128) for _ in range(100)])
    queries = [unit_rows(rng, 8, 128) for _ in range(8)]
    want = [score(query, store, 1) for query in queries]
    got: dict[int, np.ndarray] = {}
    workers = [threading.Thread(target=lambda i=i: got.update({i: score(queries[i], store, 2)})) for i in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(np.array_equal(got[i], want[i]) for i in range(8))


def test_threads_follow_the_environment(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert maxsim.default_threads() == 7
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    assert maxsim.default_threads() >= 1
