"""Exact late-interaction (MaxSim) scores over the token embeddings of pages.

score(query, page) = sum over query tokens i of max over page tokens t of <q_i, e_t>   (ColBERT, ColPali eq. 1)

Deviations from colpali-engine's `score_multi_vector` and byaldi's search, which this replaces: scores are those of
fp64 arithmetic whatever the storage type (the engine keeps bf16 to the end, so that thousands of pages share some
thirty scores); pages of different lengths are not padded with zero vectors, so a page whose best match is negative
keeps its negative score; equal scores are ordered by page id.

It is fast because nothing is copied or padded and the maximum is taken while the dot products are still in registers:
3 page tokens x 4 query tokens at a time, in fp32, compiled by numba, one thread per core. It is exact because fp32
only finds the tokens that can be best: all that come within a margin of the largest fp32 product which no rounding can
bridge. There are hardly more of them than query tokens, and their products are computed again in fp64.
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
_WIDENED_ROWS = 48  # bf16 rows turned into fp32 at a time, a multiple of 3: 24 KB at 128 dimensions, for the L1 cache
_CHUNK_PAGES = 32  # pages per unit of work handed to a thread


@dataclass(frozen=True)
class EmbeddingStore:
    """The token embeddings of all pages in one flat array, in memory or memory-mapped.

    tokens: (total tokens, dim); float32, or uint16 holding the bits of bf16.
    offsets: (pages + 1,) int64; page p owns rows offsets[p] to offsets[p + 1], at least one.
    max_norm: the largest Euclidean norm of a row; enters the rounding margin.

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
def _scan(query, rows, count, first, margin, limit, tiles, maxima, found):
    """Note every tile of 3 page tokens x 4 query tokens that may hold the largest product of a query token.

    query (n, dim), n a multiple of 4; rows (at least `count`, dim), of which the 0-th is row `first` of the store.
    limit (n,): largest product so far less `margin` (n,), updated in place. Tile number `found` and those after it
    are written: tiles (tiles, 2) its first row and query token, maxima (tiles, 4) the largest product of each of its
    query tokens. Returns the number of tiles found. A tile past the end repeats the last row.
    """
    last = count - 1
    for t in range(0, count, 3):
        t0, t1, t2 = rows[t], rows[min(t + 1, last)], rows[min(t + 2, last)]
        for i in range(0, query.shape[0], 4):
            a, b, c, d = query[i], query[i + 1], query[i + 2], query[i + 3]
            a0 = a1 = a2 = b0 = b1 = b2 = c0 = c1 = c2 = d0 = d1 = d2 = np.float32(0)
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
            a0, b0, c0, d0 = max(a0, a1, a2), max(b0, b1, b2), max(c0, c1, c2), max(d0, d1, d2)
            if a0 >= limit[i] or b0 >= limit[i + 1] or c0 >= limit[i + 2] or d0 >= limit[i + 3]:
                tiles[found, 0], tiles[found, 1] = first + t, i
                maxima[found, 0], maxima[found, 1], maxima[found, 2], maxima[found, 3] = a0, b0, c0, d0
                for g in range(4):
                    limit[i + g] = max(limit[i + g], maxima[found, g] - margin[i + g])
                found += 1
    return found


@numba.njit(nogil=True, cache=True, fastmath=_FAST_MATH)
def _exact_dot(a, b):  # (dim,), (dim,) -> their product in fp64
    total = 0.0
    for j in range(a.shape[0]):
        total += np.float64(a[j]) * np.float64(b[j])
    return total


@numba.njit(nogil=True, cache=True)
def _score_float32(query, count, tokens, offsets, pages, margin, tiles, maxima, out):
    """Put the score of each page in `pages` at its place in `out`; the first `count` rows of `query` are real."""
    limit, best = np.empty(query.shape[0], np.float32), np.empty(query.shape[0], np.float64)
    for page in pages:
        limit[:], best[:] = -np.inf, -np.inf
        lo, hi = offsets[page], offsets[page + 1]
        found = _scan(query, tokens[lo:hi], hi - lo, lo, margin, limit, tiles, maxima, 0)
        for n in range(found):
            for g in range(4):
                i = tiles[n, 1] + g
                if maxima[n, g] >= limit[i]:
                    for t in range(tiles[n, 0], min(tiles[n, 0] + 3, hi)):
                        best[i] = max(best[i], _exact_dot(query[i], tokens[t]))
        out[page] = best[:count].sum()


@numba.njit(nogil=True, cache=True)
def _score_bfloat16(query, count, tokens, offsets, pages, margin, tiles, maxima, out):
    """As `_score_float32` for tokens kept as the bits of bf16, widened to fp32 a few rows at a time."""
    limit, best = np.empty(query.shape[0], np.float32), np.empty(query.shape[0], np.float64)
    bits = np.empty((_WIDENED_ROWS, query.shape[1]), np.uint32)
    rows = bits.view(np.float32)
    for page in pages:
        limit[:], best[:] = -np.inf, -np.inf
        lo, hi = offsets[page], offsets[page + 1]
        found = 0
        for start in range(lo, hi, _WIDENED_ROWS):
            size = min(_WIDENED_ROWS, hi - start)
            _widen(tokens[start : start + size], bits)
            found = _scan(query, rows, size, start, margin, limit, tiles, maxima, found)
        for n in range(found):
            for g in range(4):
                i = tiles[n, 1] + g
                if maxima[n, g] >= limit[i]:
                    end = min(tiles[n, 0] + 3, hi)
                    _widen(tokens[tiles[n, 0] : end], bits)
                    for t in range(end - tiles[n, 0]):
                        best[i] = max(best[i], _exact_dot(query[i], rows[t]))
        out[page] = best[:count].sum()


@numba.njit(nogil=True, cache=True)
def _widen(tokens, bits):  # (rows, dim) uint16 -> the first rows of `bits`, uint32
    for t in range(tokens.shape[0]):
        for j in range(tokens.shape[1]):
            bits[t, j] = np.uint32(tokens[t, j]) << np.uint32(16)


def default_threads() -> int:
    """Threads for scoring: `OMP_NUM_THREADS` where set, else the cores this process may run on."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    if wanted.isdigit() and int(wanted) > 0:
        return int(wanted)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def score(query: np.ndarray, store: EmbeddingStore, threads: int | None = None) -> np.ndarray:
    """MaxSim scores of one query against every page: (n, dim) -> (pages,) float64, as of fp64 arithmetic.

    Raises ValueError for a query of another dimension, without tokens or with values that are not finite.
    """
    query = np.ascontiguousarray(query, np.float32)
    check_page(query, "the query", store.dim)
    if max_row_norm(query) * store.max_norm > 1e37:
        raise ValueError("query and page embeddings are so large that fp32 overflows; normalise them to length 1")
    kernel = _score_float32 if store.tokens.dtype == np.float32 else _score_bfloat16
    count = len(query)
    query = np.concatenate([query, np.repeat(query[-1:], -count % 4, axis=0)])
    margin = rounding_margin(query, store.max_norm)
    tokens, offsets = np.asarray(store.tokens), np.asarray(store.offsets)
    most_tiles = (int(np.diff(offsets).max()) // 3 + 1) * (len(query) // 4)
    out = np.empty(len(store), np.float64)

    def work(pages: np.ndarray) -> None:
        tiles, maxima = np.empty((most_tiles, 2), np.int64), np.empty((most_tiles, 4), np.float32)
        kernel(query, count, tokens, offsets, pages, margin, tiles, maxima, out)

    chunks = np.split(np.arange(len(store)), range(_CHUNK_PAGES, len(store), _CHUNK_PAGES))
    threads = min(threads or default_threads(), len(chunks))
    if threads <= 1:
        work(np.arange(len(store)))
        return out
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, chunks))
    return out


def rounding_margin(query: np.ndarray, max_norm: float) -> np.ndarray:
    """For each query token how far the fp32 products of two page tokens must lie apart for their order to be certain:
    (n, dim), norm of the longest page token -> (n,) float32.

    A dot product of D terms summed in fp32 in any order errs by at most g |q| |e|, g = D u / (1 - D u), u = 2^-24
    (Higham, Accuracy and Stability of Numerical Algorithms, §3.1, with Cauchy-Schwarz): twice that for two. The rest
    covers the rounding of the comparison itself and products below the normal range.
    """
    dim, u = query.shape[1], 2.0**-24
    lengths = np.linalg.norm(query.astype(np.float64), axis=1) * max_norm
    margin = (2 * dim * u / (1 - dim * u) + 8 * u) * lengths + 4 * dim * 2.0**-149
    return np.nextafter(margin.astype(np.float32), np.float32(np.inf))


def rank(
    query: np.ndarray,
    store: EmbeddingStore,
    k: int | None = None,
    tie_order: np.ndarray | None = None,
    threads: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The best `k` pages (all by default): their indices, int64, and their scores, float64, best first.

    Equal scores are ordered by `tie_order`, a number for each page (see `id_order`); by index without it.
    """
    scores = score(query, store, threads)
    ties = np.arange(len(store)) if tie_order is None else tie_order
    order = np.lexsort((ties, -scores))[: None if k is None else max(0, k)]
    return order, scores[order]


def id_order(page_ids: Sequence[str]) -> np.ndarray:
    """The place of each page among all when ordered by id.

    >>> id_order(["b_1", "a_2", "a_10"]).tolist()
    [2, 1, 0]
    """
    places = np.empty(len(page_ids), np.int64)
    places[sorted(range(len(page_ids)), key=page_ids.__getitem__)] = np.arange(len(page_ids))
    return places
