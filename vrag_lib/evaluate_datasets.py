"""Evaluation on benchmarks by name: SlideVQA, ViDoSeek, MMLongBench-Doc, MiniDocs, or any set in the unified format.

evaluate_datasets({"mmlongbench_doc": "data/mmlongbench_doc"}, load_config("laptop"))
evaluate_datasets({"slidevqa": None, "vidoseek": None}, load_config("gpu_7b"))      # from the hub; one merged corpus
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vrag_lib.agents import Agent, agent_environment, find_agent, questions_for
from vrag_lib.answer_metrics import OFFICIAL_METRICS, is_answerable
from vrag_lib.claims import model_fingerprint
from vrag_lib.config import Config, ConfigError, save_config
from vrag_lib.corpus import Corpus, Question
from vrag_lib.corpus_formats import answerable, load_dataset, with_prefix
from vrag_lib.dataset_hub import DONE, HUB_DATASETS, fetch_dataset
from vrag_lib.document_files import CorpusError, document_stem
from vrag_lib.evaluate import DEFAULT_METRICS, run
from vrag_lib.factory import make_policy, make_retriever, retriever_fingerprint, scale_policy
from vrag_lib.judge import Judge, rule_judge
from vrag_lib.policy import Policy
from vrag_lib.rendering import RenderSettings
from vrag_lib.retrieval import Retriever

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)

DATASETS = tuple(OFFICIAL_METRICS)
"""Question sets that are opened by name."""


def open_datasets(
    datasets: Mapping[str, str | Path | None],
    config: Config,
    split: str = "test",
    answerable_only: bool = True,
    partial: bool = False,
) -> tuple[Corpus, tuple[Question, ...]]:
    """One merged corpus of the named datasets, as the paper evaluates, and all their questions, `dataset` in `extra`.

    datasets: name (one of DATASETS) to local folder; without one `minidocs` is drawn on the spot, and a public
    benchmark is fetched (`dataset_hub`). With several datasets their names go before the uids,
    and before document ids where two datasets call different documents alike.
    split: of `minidocs`, and of a local `slidevqa`; other datasets have one set of questions.
    partial: leave out the questions on documents that the folder lacks, instead of refusing it.

    Raises ValueError for an unknown name or a missing folder, CorpusError for documents that are missing and as
    `dataset_hub.fetch_dataset` and `corpus_formats.load_dataset`, ConfigError where known regions would not fit.
    """
    corpora: list[Corpus] = []
    questions: list[Question] = []
    for name, path in datasets.items():
        corpus, found = _open_dataset(name, path, config, split, answerable_only)
        found = _with_documents(name, path, found, corpus, partial)
        if alike := _called_alike(corpus, corpora):
            logger.warning(
                "%d documents of %s are called as others of another dataset, for example %s; they get %s- in front",
                len(alike),
                name,
                alike[0],
                name,
            )
            corpus, found = with_prefix(f"{name}-", corpus, found)
        corpora.append(corpus)
        start = f"{name}:" if len(datasets) > 1 else ""
        questions += [replace(q, uid=start + q.uid, extra={**q.extra, "dataset": name}) for q in found]
    if not questions:
        raise ValueError(f"there is no question to ask in {', '.join(datasets) or 'no dataset'}")
    corpus = Corpus.merge(corpora)
    _check_regions(corpus, questions, config.corpus.dpi)
    if config.corpus.ocr != "none":
        from vrag_lib.ocr import ocr_pages

        corpus = ocr_pages(corpus, workers=config.corpus.workers, pages=config.corpus.ocr)
    return corpus, tuple(questions)


def _check_regions(corpus: Corpus, questions: Iterable[Question], dpi: int) -> None:
    """Raises ConfigError where PDFs with known regions are rendered at another resolution than these are given for."""
    if dpi == RenderSettings().dpi:
        return
    drawn = {document.id for document in corpus.documents if document.path.suffix.lower() == ".pdf"}
    for question in questions:
        if question.gold_regions and document_stem(question.file_name) in drawn:
            raise ConfigError(
                f"the regions of question {question.uid!r} are pixels at {RenderSettings().dpi} dpi, so they lie "
                f"elsewhere at corpus.dpi={dpi}: leave that setting as it is"
            )


def _called_alike(corpus: Corpus, others: Sequence[Corpus]) -> list[str]:
    """Ids of documents that stand for another content in one of the other corpora."""
    contents = {document.id: document.sha256 for other in others for document in other.documents}
    return [d.id for d in corpus.documents if contents.get(d.id, d.sha256) != d.sha256]


def _open_dataset(
    name: str, path: str | Path | None, config: Config, split: str, answerable_only: bool
) -> tuple[Corpus, tuple[Question, ...]]:
    if name not in DATASETS:
        raise ValueError(f"there is no dataset {name!r}; datasets are {', '.join(DATASETS)}")
    form = "unified" if name == "minidocs" else name
    if path is None and name in HUB_DATASETS:
        form, path = "unified", fetch_dataset(name)
    if path is not None:
        if Path(path).is_file():
            raise ValueError(f"{path} is a file; dataset {name!r} needs the folder that holds documents and questions")
        options = {"dpi": config.corpus.dpi, "workers": config.corpus.workers}
        own = name == "unified"  # asked whether pages are known or not
        corpus, questions = load_dataset(
            form, path, answerable_only=answerable_only and not own, split=split, **options
        )
        if own and answerable_only:
            asked = tuple(filter(is_answerable, questions))
            if len(asked) < len(questions):
                left = len(questions) - len(asked)
                logger.warning(
                    "left out: %d of %d questions are marked as not answerable (--unanswerable asks them)",
                    left,
                    len(questions),
                )
            questions = asked
        return corpus, questions
    if name != "minidocs":
        raise ValueError(f"dataset {name!r} needs the folder that holds its documents and questions")
    from vrag_lib.minidocs import MiniDocs

    docs = MiniDocs(config.minidocs)
    questions = docs.questions(split)
    return docs.corpus(split), answerable(questions) if answerable_only else questions


def _with_documents(
    name: str, path: str | Path | None, questions: tuple[Question, ...], corpus: Corpus, partial: bool
) -> tuple[Question, ...]:
    """The questions whose documents are there; a document that is there and cannot be used keeps its questions, as
    the benchmark counts them, and was named by the corpus. `path` as in `open_datasets`.

    Raises CorpusError, unless `partial`, when documents are missing.
    """
    there = {document.id for document in corpus.documents}
    there |= {document_stem(problem.path) for problem in corpus.problems}
    # of the same name as another document, their questions name the whole path (`with_document_names`)
    there |= {document_stem(file.replace("/", "_")) for file, document_id in corpus.files.items() if not document_id}
    there.add("")  # a question that names no document needs none of them
    missing = sorted({q.file_name for q in questions if document_stem(q.file_name) not in there})
    if not missing:
        return questions
    kept = tuple(q for q in questions if document_stem(q.file_name) in there)
    what = (
        f"{len(missing)} documents that questions of {name!r} name are missing, the first: {', '.join(missing[:3])}; "
        f"{len(questions) - len(kept)} of {len(questions)} questions are about them"
    )
    if not partial:
        remedy = f"Add the documents to their folder in {path}"
        if path is None and name in HUB_DATASETS:
            folder = fetch_dataset(name)
            remedy = f"Delete {folder / DONE}, so that the next call fetches what {folder} lacks"
        raise CorpusError(
            f"{what}. {remedy}, or leave these questions out, of their file or, in `vrag evaluate`, with --partial"
        )
    logger.warning("left out: %s", what)
    return kept


def evaluation_folder(datasets: Iterable[str], config: Config, agent: str = "vrag_rl") -> Path:
    """Where the results go: `results/<preset>/evaluate_<names>`, for another agent than `vrag_rl` with its name."""
    return config.folder("_".join(["evaluate", *datasets, *([] if agent == "vrag_rl" else [agent])]))


def evaluate_datasets(
    datasets: Mapping[str, str | Path | None],
    config: Config,
    folder: str | Path | None = None,
    *,
    agent: str | Agent = "vrag_rl",
    policy: Policy | None = None,
    retriever: Retriever | None = None,
    split: str = "test",
    limit: int | None = None,
    answerable_only: bool = True,
    partial: bool = False,
    seeds: Sequence[int] | None = None,
    judge: Judge = rule_judge,
    metrics: Sequence[str] = (),
    retry_errors: bool = True,
) -> pd.DataFrame:
    """What `vrag evaluate` does: open, index, `run`, with the datasets' official metrics beside the default ones. The
    command sets `policy.temperature` to 0 first.

    folder: default `evaluation_folder`.
    agent: what the policy may do and is shown, one of `agents.AGENTS` by name or your own.
    policy, retriever: default what the config names.
    limit: ask only so many questions, evenly spread over the set; the corpus stays whole.
    split, answerable_only, partial: see `open_datasets`.

    Raises ValueError for a limit below 1, else as `agents`, `open_datasets`, `factory` and `run` do.
    """
    agent = find_agent(agent) if isinstance(agent, str) else agent
    config = replace(config, environment=agent_environment(agent, config))
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, not {limit}")
    corpus, questions = open_datasets(datasets, config, split, answerable_only, partial)
    questions = questions_for(agent, questions)
    if limit is not None:
        chosen = np.linspace(0, len(questions) - 1, min(limit, len(questions))).round().astype(int)
        questions = tuple(questions[i] for i in chosen)
    official = [name for dataset in datasets for name in OFFICIAL_METRICS[dataset]]
    folder = Path(folder or evaluation_folder(datasets, config, agent.name))
    frame = run(
        policy or make_policy(corpus, config),
        questions,
        corpus,
        retriever or make_retriever(corpus, config),
        config.environment,
        folder,
        seeds=(config.seed,) if seeds is None else seeds,
        batch_size=config.policy.batch_size,
        retry_errors=retry_errors,
        judge=judge,
        metrics=tuple(dict.fromkeys((*DEFAULT_METRICS, *official, *metrics))),
        preset=config.preset,
        settings={"agent": agent.name, "datasets": list(datasets), "split": split, **_made_with(config)},
    )
    save_config(config, folder)
    return frame


def _made_with(config: Config) -> dict[str, Any]:
    """What the trajectories depend on of policy and retriever, models by their weights: those trained anew in the same
    folder are others."""
    named = asdict(config.policy)
    settings = {key: named[key] for key in named if key not in ("batch_size", "device", "api_key_env", "base_url")}
    if config.policy.kind == "transformers":
        settings["model"] = model_fingerprint(str(config.policy.model or scale_policy(config)))
    found = {"policy_settings": settings}
    if ranks_with := retriever_fingerprint(config):
        found["retrieval_model"] = ranks_with
    return found
