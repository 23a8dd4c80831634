"""Times search over page embeddings: our exact MaxSim, colpali-engine's scorer and byaldi's search, on the same
embeddings in one run, each ranking compared with that of fp64.

Embeddings and queries are random unit vectors rounded to bf16, so that every method, whatever it stores, is given the
same values; for methods that prune they are the hardest case, for exact ones all data are alike. The engine scores a
list of float32 tensors, as its documentation shows; byaldi's search runs its own code, with its bf16 embeddings, over
a model that returns the query's embeddings at once. Methods take turns query by query, so that whatever else the
machine does slows all of them. Speed-ups are given twice: the median of the ratios within a turn, and the ratio of
the least times, which a busy machine disturbs less.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from tqdm import tqdm

from vrag_lib.maxsim import EmbeddingStore, default_threads, max_row_norm, rank
from vrag_lib.plots import COLOURS, save_figure
from vrag_lib.provenance import provenance
from vrag_lib.torch_setup import ensure_torchvision

if TYPE_CHECKING:
    import torch

Method = Callable[[np.ndarray], np.ndarray]
"""(query tokens, dim) float32 -> indices of the pages it ranks, best first; all of them or the best 10."""

ENGINE = "colpali-engine score_multi_vector, fp32"
OURS = ("vrag_lib MaxSim, fp32", "vrag_lib MaxSim, bf16")
_TOP = 10


class BenchmarkError(RuntimeError):
    """A result of ours that is not the one it must be, or a comparison that cannot be made; the message says which."""


def bench_search(
    pages: Sequence[int] = (500, 2000, 10000),
    tokens: int = 768,
    dim: int = 128,
    query_tokens: int = 20,
    queries: int = 9,
    out_dir: str | Path | None = None,
    seed: int = 0,
    threads: int | None = None,
) -> pd.DataFrame:
    """Time every method at each index size and write `metrics.csv`, `config.json` and `search_speed.png` to `out_dir`.

    pages: index sizes. tokens, dim: of each page. query_tokens: of each query. queries: turns per index size; above
    5,000 pages a third as many. threads: for every method; default as many as there are cores.

    Returns one row per index size and method: median and least seconds per query, `speedup` over colpali-engine's
    scorer, the share of queries with fp64's top 10 and with its whole ranking, KB kept per page. Memory: about 600 KB
    per page of the largest index, and 2 GiB. Raises BenchmarkError, after writing, if a ranking of ours is not fp64's.
    """
    ensure_torchvision()
    import torch

    threads = threads or default_threads()
    rng = np.random.default_rng(seed)
    flat = _random_rows(rng, max(pages) * tokens, dim)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    rows: list[dict[str, Any]] = []
    try:
        with _byaldi() as search:
            for count in sorted(pages):
                turns = max(3, queries // 3) if count > 5000 else queries
                asked = [_random_rows(rng, query_tokens, dim) for _ in range(turns)]
                methods = _methods(flat[: count * tokens], tokens, threads, search)
                rows += _time(methods, asked, count, flat[: count * tokens].reshape(count, tokens, dim))
    finally:
        torch.set_num_threads(before)
    table = pd.DataFrame(rows)
    settings = {
        "pages": list(pages),
        "tokens": tokens,
        "dim": dim,
        "query_tokens": query_tokens,
        "queries": queries,
        "threads": threads,
    }
    if out_dir is not None:
        write_results(table, settings, out_dir, seed, "search_speed.png", speed_figure)
    ours = table[table["method"].isin(OURS)]
    wrong = ours[(ours["top10_as_fp64"] < 1) | (ours["ranking_as_fp64"] < 1)]
    if len(wrong):
        raise BenchmarkError(f"rankings differ from fp64's:\n{wrong.to_string(index=False)}")
    return table


def speed_figure(table: pd.DataFrame) -> Figure:
    """Median seconds per query over the number of pages, one line per method, both axes logarithmic."""
    figure = Figure(figsize=(8.5, 4.6), layout="constrained")
    ax = figure.subplots()
    for i, (method, group) in enumerate(table.groupby("method", sort=False)):
        style = "--" if method.startswith("one pass") else "-"
        group = group.sort_values("pages")
        ax.plot(group["pages"], group["seconds"], style, marker="o", color=COLOURS[i % len(COLOURS)], label=method)
        ax.fill_between(
            group["pages"], group["seconds_min"], group["seconds"], color=COLOURS[i % len(COLOURS)], alpha=0.15
        )
    ax.set_xscale("log")
    ax.set_yscale("log")
    ticks = sorted(table["pages"].unique())
    ax.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    ax.minorticks_off()
    ax.set_xlabel("pages in the index")
    ax.set_ylabel("seconds per query (median; shade to the least)")
    ax.grid(True, which="major", alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    handles, labels = ax.get_legend_handles_labels()
    slowest_first = np.argsort([-table[table["method"] == label]["seconds"].max() for label in labels])
    ax.legend(
        [handles[i] for i in slowest_first],
        [labels[i] for i in slowest_first],
        fontsize=8,
        loc="center left",
        bbox_to_anchor=(1.0, 0.5),
        frameon=False,
    )
    return figure


def _random_rows(rng: np.random.Generator, rows: int, dim: int) -> np.ndarray:
    """Unit vectors rounded to bf16, (rows, dim) float32, made in place block by block."""
    flat = np.empty((rows, dim), np.float32)
    for start in range(0, rows, 100_000):
        block = flat[start : start + 100_000]
        rng.standard_normal(block.shape, np.float32, out=block)
        block /= np.linalg.norm(block, axis=1, keepdims=True)
        bits = block.view(np.uint32)
        bits += 0x8000  # to the nearest of the two bf16 neighbours; no value is near the largest exponent
        bits &= 0xFFFF0000
    return flat


def _methods(flat: np.ndarray, tokens: int, threads: int, search: Callable) -> dict[str, tuple[Method, int]]:
    """Name -> (method, bytes kept per page), over the rows of `flat`."""
    import torch
    from colpali_engine.models import ColQwen2Processor

    count, dim = len(flat) // tokens, flat.shape[1]
    paged = torch.from_numpy(flat).view(count, tokens, dim)
    halves = paged.to(torch.bfloat16)
    offsets = np.arange(count + 1, dtype=np.int64) * tokens
    norm = max_row_norm(flat)
    fp32 = EmbeddingStore(flat, offsets, norm)
    bf16 = EmbeddingStore(halves.view(torch.int16).numpy().view(np.uint16).reshape(-1, dim), offsets, norm)
    singles, half_list = list(paged.unbind()), list(halves.unbind())

    def engine(query: np.ndarray) -> np.ndarray:
        scores = ColQwen2Processor.score_multi_vector([torch.from_numpy(query)], singles, device="cpu")
        return np.argsort(-scores[0].numpy(), kind="stable")

    def one_pass(query: np.ndarray) -> np.ndarray:
        paged.view(-1).sum()
        return np.empty(0, np.int64)

    size = tokens * dim
    return {
        OURS[0]: (lambda query: rank(query, fp32, threads=threads)[0], 4 * size),
        OURS[1]: (lambda query: rank(query, bf16, threads=threads)[0], 2 * size),
        ENGINE: (engine, 4 * size),
        "byaldi search, bf16": (lambda query: search(query, half_list), 2 * size),
        "one pass over the fp32 embeddings (sum)": (one_pass, 4 * size),
    }


@contextmanager
def _byaldi() -> Iterator[Callable[[np.ndarray, list[torch.Tensor]], np.ndarray]]:
    """byaldi's search over a list of page embeddings, by a model that answers with given query embeddings."""
    import torch

    from vrag_lib.page_encoder import ByaldiEncoder
    from vrag_lib.scale_model import build_tiny_colqwen2

    class GivenEmbeddings:
        dtype = torch.bfloat16
        answer: torch.Tensor

        def __call__(self, **inputs: Any) -> torch.Tensor:
            return self.answer

    with tempfile.TemporaryDirectory(prefix="vrag-bench-") as folder:
        rag = ByaldiEncoder(build_tiny_colqwen2(Path(folder) / "colqwen2"), "cpu").rag
        rag.model.model = GivenEmbeddings()

        def search(query: np.ndarray, embeddings: list[torch.Tensor]) -> np.ndarray:
            rag.model.model.answer = torch.from_numpy(query).to(torch.bfloat16)[None]
            if rag.model.indexed_embeddings is not embeddings:
                rag.model.indexed_embeddings = embeddings
                rag.model.embed_id_to_doc_id = {i: {"doc_id": i, "page_id": 1} for i in range(len(embeddings))}
            return np.array([result.doc_id for result in rag.search("a query", k=_TOP)])

        yield search


def _time(
    methods: dict[str, tuple[Method, int]], queries: list[np.ndarray], count: int, pages: np.ndarray
) -> list[dict[str, Any]]:
    """One row per method: every query is put to every method in turn, after one that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    ranked: dict[str, list[np.ndarray]] = {name: [] for name in methods}
    total = len(methods) * (len(queries) + 1)
    with tqdm(total=total, desc=f"{count:,} pages", unit="search", file=sys.stderr) as bar:
        for turn, query in enumerate([queries[0], *queries]):
            for name, (method, _) in methods.items():
                time.sleep(0.1)  # worker threads of the method before spin for a while before they sleep
                start = time.perf_counter()
                order = method(query)
                if turn:
                    seconds[name].append(time.perf_counter() - start)
                    ranked[name].append(order)
                bar.update()
    best = [_fp64_ranking(query, pages) for query in tqdm(queries, desc="fp64 reference", unit="query")]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
    rows = []
    for name, (_, size) in methods.items():
        orders = ranked[name]
        whole = all(len(order) == count for order in orders)
        row = {
            "pages": count,
            "method": name,
            "seconds": float(np.median(seconds[name])),
            "seconds_min": min(seconds[name]),
            "speedup": float(np.median(np.divide(seconds[ENGINE], seconds[name]))),
            "speedup_of_least": min(seconds[ENGINE]) / min(seconds[name]),
            "top10_as_fp64": np.nan,
            "ranking_as_fp64": np.nan,
            "kb_per_page": size / 1000,
            "queries": len(queries),
            "peak_memory_gib": round(peak, 2),
        }
        if all(len(order) for order in orders):
            top = [np.array_equal(order[:_TOP], want[:_TOP]) for order, want in zip(orders, best, strict=True)]
            row["top10_as_fp64"] = float(np.mean(top))
        if whole:
            same = [np.array_equal(order, want) for order, want in zip(orders, best, strict=True)]
            row["ranking_as_fp64"] = float(np.mean(same))
        rows.append(row)
    return rows


def _fp64_ranking(query: np.ndarray, pages: np.ndarray) -> np.ndarray:
    """Indices of all pages, (pages, tokens, dim), by fp64 score, computed by numpy alone."""
    wide = query.astype(np.float64).T
    blocks = [pages[i : i + 16].astype(np.float64) @ wide for i in range(0, len(pages), 16)]
    return np.argsort(-np.concatenate([block.max(axis=1).sum(axis=1) for block in blocks]), kind="stable")


def write_results(
    table: pd.DataFrame,
    settings: dict[str, Any],
    folder: str | Path,
    seed: int,
    picture: str,
    draw: Callable[[pd.DataFrame], Figure],
) -> None:
    """Write a benchmark's `metrics.csv`, `config.json` with its provenance, and `picture`, drawn from the CSV."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    about = provenance(seed)
    about["hardware"]["load_average"] = os.getloadavg()[0]  # above the number of cores, others were at work
    table.to_csv(folder / "metrics.csv", index=False, float_format="%.6g")
    (folder / "config.json").write_text(json.dumps({"config": settings, "provenance": about}, indent=1) + "\n")
    save_figure(draw(pd.read_csv(folder / "metrics.csv")), folder / picture)
