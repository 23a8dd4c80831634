"""bench: the timing run at a small size: its files, its numbers, and that a wrong ranking is not passed over."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from vrag_lib import bench

SMALL = {"pages": (12, 40), "tokens": 9, "dim": 32, "query_tokens": 5, "queries": 3, "threads": 1}


def test_a_run_compares_the_methods_and_leaves_what_redraws_it(tmp_path):
    table = bench.bench_search(**SMALL, out_dir=tmp_path, seed=3)
    assert len(table) == 2 * 5 and set(table["pages"]) == {12, 40}
    timed = table.set_index(["pages", "method"])
    assert (timed["seconds"] >= timed["seconds_min"]).all() and (timed["seconds_min"] > 0).all()
    assert (timed.xs(bench.ENGINE, level="method")["speedup"] == 1).all()
    ours = table[table["method"].isin(bench.OURS)]
    assert len(ours) == 4 and (ours["top10_as_fp64"] == 1).all() and (ours["ranking_as_fp64"] == 1).all()
    byaldi = table[table["method"].str.startswith("byaldi")]
    assert byaldi["top10_as_fp64"].between(0, 1).all() and byaldi["ranking_as_fp64"].isna().all()
    read = pd.read_csv(tmp_path / "metrics.csv")
    assert list(read.columns) == list(table.columns) and np.allclose(read["seconds"], table["seconds"], rtol=1e-4)
    record = json.loads((tmp_path / "config.json").read_text())
    assert record["config"]["threads"] == 1 and record["provenance"]["seed"] == 3
    assert {"numba", "torch", "byaldi", "colpali-engine"} <= set(record["provenance"]["versions"])
    with Image.open(tmp_path / "search_speed.png") as figure:
        drawn = np.asarray(figure.convert("RGB"))
    assert len(np.unique(drawn.reshape(-1, 3), axis=0)) > 50
    bench.save_figure(bench.speed_figure(read), tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "search_speed.png").read_bytes()


def test_a_ranking_that_is_not_fp64s_is_an_error_and_on_record(tmp_path, monkeypatch):
    right = bench.rank

    def swapped(*arguments, **options):
        order, scores = right(*arguments, **options)
        return order[::-1], scores

    monkeypatch.setattr(bench, "rank", swapped)
    with pytest.raises(bench.BenchmarkError, match="rankings differ from fp64's"):
        bench.bench_search(**SMALL | {"pages": (12,)}, out_dir=tmp_path)
    assert (pd.read_csv(tmp_path / "metrics.csv")["top10_as_fp64"] == 0).any()


def test_embeddings_are_unit_vectors_that_bf16_holds():
    rows = bench._random_rows(np.random.default_rng(0), 150_000, 32)
    assert not (rows.view(np.uint32) & 0xFFFF).any()
    assert np.abs(np.linalg.norm(rows, axis=1) - 1).max() < 2**-7
    assert abs(rows.mean()) < 1e-3
