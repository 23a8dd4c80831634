"""Exact late-interaction (MaxSim) scores over the token embeddings of pages, and rankings equal to those of fp64.

score(query, page) = sum over query tokens i of max over page tokens t of <q_i, e_t>   (ColBERT, ColPali eq. 1)

Deviations from colpali-engine's `score_multi_vector` and byaldi's search, which this replaces: dot products are
accumulated in fp32 whatever the storage type and their maxima summed in fp64 (the engine keeps bf16 to the end, so
that thousands of pages share some thirty scores); pages of different lengths are not padded with zero vectors, so a
page whose best match is negative keeps its negative score; equal scores are ordered by page id.

One pass over the embeddings is fast because nothing is copied or padded and the maximum is taken while the dot
products are still in registers: 3 page tokens x 4 query tokens at a time, compiled by numba, one thread per core.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numba
import numpy as np

from vrag_lib.retrieval import RetrievalIndexError

FORMAT = "vrag-embeddings-1"

# Sums may be reordered into vector lanes and multiply-adds fused; infinities and NaN keep their meaning.
_FAST_MATH = {"reassoc", "contract", "nsz"}
_QUERY_TILE = 4
_WIDENED_ROWS = 48  # bf16 rows turned into fp32 at a time: 24 KB at 128 dimensions, which stays in the L1 cache
_CHUNK_PAGES = 32  # pages per unit of work handed to a thread


@dataclass(frozen=True)
class EmbeddingStore:
    """The token embeddings of all pages in one flat array, in memory or memory-mapped.

    tokens: (total tokens, dim); float32, or uint16 holding the bits of bf16.
    offsets: (pages + 1,) int64; page p owns rows offsets[p] to offsets[p + 1], at least one.
    max_norm: the largest Euclidean norm of a row; enters the rounding bound of `rank`.

    Memory and disk per page of 768 tokens x 128: 393 KB as float32, 197 KB as bf16.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    max_norm: float

    @classmethod
    def from_pages(cls, pages: Iterable[np.ndarray], dtype: str = "auto") -> EmbeddingStore:
        """Build a store from one (tokens, dim) array per page.

        dtype: "float32", "bfloat16", or "auto": bfloat16 where that changes no value (models that run in bf16
        give such embeddings), else float32.

        Raises ValueError for a page without tokens, of another dimension or with values that are not finite, and
        for dtype "bfloat16" where values would change.
        """
        arrays = [np.ascontiguousarray(page, dtype=np.float32) for page in pages]
        if not arrays:
            raise ValueError("an embedding store needs at least one page")
        for number, array in enumerate(arrays):
            check_page(array, f"page {number}", arrays[0].shape[-1])
        offsets = np.concatenate([[0], np.cumsum([len(array) for array in arrays])]).astype(np.int64)
        tokens = np.concatenate(arrays)
        norm = max_row_norm(tokens)
        if dtype not in ("auto", "float32", "bfloat16"):
            raise ValueError(f"dtype {dtype!r} is none of auto, float32, bfloat16")
        if dtype != "float32":
            bits = to_bf16_bits(tokens)
            if bits is not None:
                return cls(bits, offsets, norm)
            if dtype == "bfloat16":
                raise ValueError("these embeddings do not fit bfloat16 without loss; use float32")
        return cls(tokens, offsets, norm)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def dim(self) -> int:
        return self.tokens.shape[1]

    @property
    def dtype(self) -> str:
        return "float32" if self.tokens.dtype == np.float32 else "bfloat16"

    def page(self, index: int) -> np.ndarray:
        """The embeddings of one page as float32, (tokens of the page, dim)."""
        return as_float32(self.tokens[self.offsets[index] : self.offsets[index + 1]])

    def save(self, path: Path) -> None:
        """Write a safetensors file, whole or not at all."""
        _write(path, [self.tokens], self.tokens.dtype, self.dim, self.offsets, self.max_norm)

    @classmethod
    def load(cls, path: Path) -> EmbeddingStore:
        """Memory-map a file that `save` or `merge_stores` wrote; nothing is read until it is scored.

        Raises RetrievalIndexError, with the remedy, for a file that is cut short or of another kind.
        """
        try:
            header, start = _read_header(path)
            meta, tokens, offsets = header["__metadata__"], header["tokens"], header["offsets"]
            if meta["format"] != FORMAT:
                raise ValueError(f"format {meta['format']!r} instead of {FORMAT!r}")
            kind = {"F32": np.float32, "BF16": np.uint16}[tokens["dtype"]]
            rows = np.memmap(path, kind, "r", start + tokens["data_offsets"][0], shape=tuple(tokens["shape"]))
            bounds = np.memmap(path, np.int64, "r", start + offsets["data_offsets"][0], shape=tuple(offsets["shape"]))
            store = cls(rows, np.array(bounds), float(meta["max_norm"]))
            if store.offsets[0] != 0 or store.offsets[-1] != len(rows) or (np.diff(store.offsets) < 1).any():
                raise ValueError("page offsets do not fit the tokens")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RetrievalIndexError(
                f"{path} holds no usable embeddings ({error}); delete it and build the index again"
            ) from error
        return store


def check_page(array: np.ndarray, name: str, dim: int) -> None:
    """Raise ValueError, naming the page, unless `array` is (one or more tokens, dim) and finite."""
    if array.ndim != 2 or array.shape[0] < 1 or array.shape[1] != dim:
        raise ValueError(f"the embeddings of {name} have shape {array.shape}, not (tokens, {dim})")
    if not np.isfinite(array).all():
        raise ValueError(f"the embeddings of {name} are not finite; is the model broken?")


def max_row_norm(tokens: np.ndarray) -> float:
    """The largest Euclidean norm among the rows of a (tokens, dim) float32 array, computed in fp64."""
    blocks = (tokens[i : i + 65536].astype(np.float64) for i in range(0, len(tokens), 65536))
    return math.sqrt(max(float((block * block).sum(axis=1).max()) for block in blocks))


def to_bf16_bits(tokens: np.ndarray) -> np.ndarray | None:
    """The bits of float32 values as bf16 (uint16), or None where a value would change."""
    bits = np.ascontiguousarray(tokens, np.float32).view(np.uint32)
    return None if (bits & 0xFFFF).any() else (bits >> 16).astype(np.uint16)


def as_float32(tokens: np.ndarray) -> np.ndarray:
    """A stored (tokens, dim) array as float32; exact."""
    if tokens.dtype == np.float32:
        return tokens
    return (tokens.astype(np.uint32) << 16).view(np.float32)


def merge_stores(files: Sequence[Path], path: Path) -> None:
    """Write the pages of saved stores, one store after the other, as one store; the pages are streamed through.

    Raises RetrievalIndexError for a file that cannot be used, ValueError for stores of different kinds.
    """
    sizes: list[np.ndarray] = []
    kinds, norm = set(), 0.0
    for file in files:
        store = EmbeddingStore.load(file)
        sizes.append(np.diff(store.offsets))
        kinds.add((store.tokens.dtype, store.dim))
        norm = max(norm, store.max_norm)
    if len(kinds) != 1:
        raise ValueError(f"stores to be merged must be of one dtype and dimension, not {kinds}")
    kind, dim = kinds.pop()
    offsets = np.concatenate([[0], np.cumsum(np.concatenate(sizes))])
    _write(path, (EmbeddingStore.load(file).tokens for file in files), kind, dim, offsets, norm)


def _write(
    path: Path, parts: Iterable[np.ndarray], kind: np.dtype, dim: int, offsets: np.ndarray, max_norm: float
) -> None:
    """Write the rows of all parts as one safetensors file, whole or not at all."""
    bounds = np.ascontiguousarray(offsets, np.int64)
    rows = int(bounds[-1])
    # Offsets first: with the header padded to 8 bytes, both arrays are aligned for mapping.
    header = {
        "__metadata__": {"format": FORMAT, "max_norm": repr(float(max_norm))},
        "offsets": {"dtype": "I64", "shape": [len(bounds)], "data_offsets": [0, bounds.nbytes]},
        "tokens": {
            "dtype": "F32" if kind == np.float32 else "BF16",
            "shape": [rows, dim],
            "data_offsets": [bounds.nbytes, bounds.nbytes + rows * dim * kind.itemsize],
        },
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        with open(temporary, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.write(bounds.tobytes())
            for part in parts:
                for i in range(0, len(part), 65536):
                    file.write(np.ascontiguousarray(part[i : i + 65536]).data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _read_header(path: Path) -> tuple[dict, int]:
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= 1 << 20:
            raise ValueError("no safetensors header")
        header = json.loads(file.read(length))
    end = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    if os.path.getsize(path) != 8 + length + end:
        raise ValueError("the file is cut short")
    return header, 8 + length


@numba.njit(nogil=True, cache=True, fastmath=_FAST_MATH)
def _page_maxima(query, tokens, lo, hi, maxima):  # (n, dim), (tokens, dim), rows lo to hi, (n,) raised in place
    """Raise maxima[i] to the largest dot product of query token i with rows lo to hi of `tokens`.

    n is a multiple of 4. Rows past the end repeat the last one, so every dot product is computed by the same
    instructions and equal rows give equal products wherever they stand.
    """
    zero = query.dtype.type(0)
    last = hi - 1
    for t in range(lo, hi, 3):
        t0, t1, t2 = tokens[t], tokens[min(t + 1, last)], tokens[min(t + 2, last)]
        for i in range(0, query.shape[0], 4):
            a, b, c, d = query[i], query[i + 1], query[i + 2], query[i + 3]
            a0 = a1 = a2 = b0 = b1 = b2 = c0 = c1 = c2 = d0 = d1 = d2 = zero
            for j in range(query.shape[1]):
                a0 += a[j] * t0[j]
                a1 += a[j] * t1[j]
                a2 += a[j] * t2[j]
                b0 += b[j] * t0[j]
                b1 += b[j] * t1[j]
                b2 += b[j] * t2[j]
                c0 += c[j] * t0[j]
                c1 += c[j] * t1[j]
                c2 += c[j] * t2[j]
                d0 += d[j] * t0[j]
                d1 += d[j] * t1[j]
                d2 += d[j] * t2[j]
            maxima[i] = max(maxima[i], a0, a1, a2)
            maxima[i + 1] = max(maxima[i + 1], b0, b1, b2)
            maxima[i + 2] = max(maxima[i + 2], c0, c1, c2)
            maxima[i + 3] = max(maxima[i + 3], d0, d1, d2)


@numba.njit(nogil=True, cache=True)
def _score_float32(query, count, tokens, offsets, pages, out):  # out[pages[k]] for every k
    maxima = np.empty(query.shape[0], query.dtype)
    for page in pages:
        maxima[:] = -np.inf
        _page_maxima(query, tokens, offsets[page], offsets[page + 1], maxima)
        out[page] = maxima[:count].astype(np.float64).sum()


@numba.njit(nogil=True, cache=True)
def _score_bfloat16(query, count, tokens, offsets, pages, out):  # as _score_float32, tokens uint16
    maxima = np.empty(query.shape[0], query.dtype)
    bits = np.empty((_WIDENED_ROWS, query.shape[1]), np.uint32)
    rows = bits.view(np.float32)
    for page in pages:
        maxima[:] = -np.inf
        for lo in range(offsets[page], offsets[page + 1], _WIDENED_ROWS):
            size = min(_WIDENED_ROWS, offsets[page + 1] - lo)
            for t in range(size):
                for j in range(query.shape[1]):
                    bits[t, j] = np.uint32(tokens[lo + t, j]) << np.uint32(16)
            _page_maxima(query, rows, 0, size, maxima)
        out[page] = maxima[:count].astype(np.float64).sum()


def default_threads() -> int:
    """Threads for scoring: `OMP_NUM_THREADS` where set, else the cores this process may run on."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    if wanted.isdigit() and int(wanted) > 0:
        return int(wanted)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def score(query: np.ndarray, store: EmbeddingStore, threads: int | None = None) -> np.ndarray:
    """MaxSim scores of one query against every page: (n, dim) -> (pages,) float64.

    Dot products are accumulated in fp32; see `rank` for how far they can be from exact.
    Raises ValueError for a query of another dimension, without tokens or with values that are not finite.
    """
    query = _checked_query(query, store)
    out = np.empty(len(store), np.float64)
    _score_pages(query, store, np.arange(len(store)), out, threads)
    return out


def score_fp64(query: np.ndarray, store: EmbeddingStore, threads: int | None = None) -> np.ndarray:
    """As `score`, every product and sum in fp64; about 1.7 times its time."""
    query = _checked_query(query, store)
    out = np.empty(len(store), np.float64)
    _score_pages(query.astype(np.float64), store, np.arange(len(store)), out, threads)
    return out


def rank(
    query: np.ndarray,
    store: EmbeddingStore,
    k: int | None = None,
    page_ids: Sequence[str] | None = None,
    threads: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The best `k` pages (all by default) and their scores, in exactly the order that fp64 scores would give.

    Returns (indices of pages, int64; their scores, float64), best first, ties by page id (by index without ids).

    All pages are scored in fp32. Pages whose fp32 scores lie too close together for their order to be certain are
    scored again in fp64; the rest cannot change places. Certain means further apart than twice the rounding bound
    below, which holds for any input and any order of summation.
    """
    query = _checked_query(query, store)
    scores = np.empty(len(store), np.float64)
    _score_pages(query, store, np.arange(len(store)), scores, threads)
    k = len(store) if k is None else max(0, min(k, len(store)))
    if k == 0:
        return np.empty(0, np.int64), np.empty(0, np.float64)
    apart = 2 * rounding_bound(query, store.max_norm)
    # A page of the true top k cannot lie further below the k-th best fp32 score than this.
    kth = np.partition(scores, len(store) - k)[len(store) - k]
    pages = np.flatnonzero(scores >= kth - apart)
    pages = pages[np.argsort(-scores[pages], kind="stable")]
    close = -np.diff(scores[pages]) <= apart
    doubtful = np.concatenate([[False], close]) | np.concatenate([close, [False]])
    if doubtful.any():
        _score_pages(query.astype(np.float64), store, np.sort(pages[doubtful]), scores, threads)
    ties = np.arange(len(store)) if page_ids is None else np.argsort(np.argsort(np.asarray(page_ids)))
    pages = pages[np.lexsort((ties[pages], -scores[pages]))][:k]
    return pages, scores[pages]


def rounding_bound(query: np.ndarray, max_norm: float) -> float:
    """How far a score of `score` can be from exact, for rows of at most `max_norm`.

    A dot product of D terms summed in fp32 in any order errs by at most g * |q| |e| with g = D u / (1 - D u) and
    u = 2^-24 (Higham, Accuracy and Stability of Numerical Algorithms, §3.1, with Cauchy-Schwarz); a maximum errs by
    no more than its terms, a sum by no more than their sum. The slack covers the fp64 sums and denormal products.
    """
    dim = query.shape[1]
    g = dim * 2.0**-24 / (1 - dim * 2.0**-24)
    norms = np.linalg.norm(query.astype(np.float64), axis=1).sum()
    return float(g * norms * max_norm) * (1 + 1e-6) + len(query) * dim * 2.0**-149


def _checked_query(query: np.ndarray, store: EmbeddingStore) -> np.ndarray:
    query = np.ascontiguousarray(query, np.float32)
    check_page(query, "the query", store.dim)
    if max_row_norm(query) * store.max_norm > 1e37:
        raise ValueError("query and page embeddings are so large that fp32 overflows; normalise them to length 1")
    return query


def _score_pages(
    query: np.ndarray, store: EmbeddingStore, pages: np.ndarray, out: np.ndarray, threads: int | None
) -> None:
    """Score the pages of the given indices in the type of `query` and put each score at its page's place in `out`."""
    kernel = _score_float32 if store.tokens.dtype == np.float32 else _score_bfloat16
    count = len(query)
    padded = np.concatenate([query, np.repeat(query[-1:], -count % _QUERY_TILE, axis=0)])
    tokens, offsets = np.asarray(store.tokens), np.asarray(store.offsets)
    chunks = [pages[i : i + _CHUNK_PAGES] for i in range(0, len(pages), _CHUNK_PAGES)]
    threads = min(threads or default_threads(), len(chunks))
    if threads <= 1:
        kernel(padded, count, tokens, offsets, pages, out)
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda chunk: kernel(padded, count, tokens, offsets, chunk, out), chunks))
