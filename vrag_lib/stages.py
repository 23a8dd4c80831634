"""The stages of the paper's experiment, each from a config to a folder of results: what notebooks and `vrag` call.

    synthesize(config)                  experts write trajectories, filters choose (paper §2.2)
    fine_tune(config)                   the cold start on them (paper §2.2, Table 5)
    reinforce(config, checkpoint)       GRPO on other questions (paper §2.3, Table 6)

What comes out is measured by `evaluate_datasets`.

On the `laptop` preset the documents are MiniDocs, the models the shipped scale models and the experts scripted ones.
`synthesis.dataset` names other documents to train on, `unified` one's own; all stages have to be given the same.
A stage reads what the one before it left in `results/<preset>/`, and goes on where it was interrupted.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vrag_lib.claims import claim, depends_on, model_fingerprint, text_fingerprint
from vrag_lib.config import Config, ConfigError, save_config
from vrag_lib.corpus import Corpus, Question, document_stem
from vrag_lib.factory import make_retriever, make_sampler, retriever_fingerprint, scale_policy
from vrag_lib.judge import Judge, rule_judge
from vrag_lib.policy import Policy
from vrag_lib.retrieval import Retriever
from vrag_lib.synthesis import questions_fingerprint
from vrag_lib.trajectory import Trajectory, read_trajectories, write_trajectories

logger = logging.getLogger(__name__)

EXPERTS = ("scripted", "openai")
TRAINING_DATASETS = ("slidevqa", "vidoseek", "mmlongbench_doc", "unified")
"""What `synthesis.dataset` may name; without it the documents are MiniDocs'."""
VARIANTS = ("relocate", "next_reply", "planner", "grounder")
_ABOUT = {
    "relocate": "The planner drives; where it wants to look closer, the grounding expert re-locates its box (paper).",
    "next_reply": "After each search the grounding expert writes the whole next reply, as in the released code.",
    "planner": "The planner alone, with the boxes it names itself.",
    "grounder": "The grounding expert alone.",
}
_SCRIPTED = (
    "Both are scripted experts: programs that know the answers of MiniDocs and make stated, seeded mistakes "
    "(`vrag_lib.experts_scripted`). No model wrote any of this."
)
INPUTS = "inputs.json"
"""What a training depends on: model, data and settings. One with others does not go on in the same folder."""

_NOT_SAMPLED = ("concurrency", "trajectories", "rl_questions", "dataset_path")
"""Settings of the synthesis that no sample depends on: how they are asked for, and what is done with them later. The
questions and documents are known by what is in them."""

SMOKE_DOCUMENTS = 4
"""Documents of each split in a smoke run."""


@dataclass(frozen=True)
class Collection:
    """The documents of one split: pages, an index of them, made when first asked for, and questions."""

    questions: tuple[Question, ...]
    corpus: Corpus
    index: Callable[[], Retriever]

    @functools.cached_property
    def retriever(self) -> Retriever:
        """The index, built or read from the cache the first time."""
        return self.index()


def collection(config: Config, split: str) -> Collection:
    """The documents of a split with the configured retriever: those of MiniDocs, `synthesis.documents` of them in
    training; or for training those of the dataset that `synthesis.dataset` names.

    Raises ConfigError for a dataset that does not exist, needs a folder, or has no such split, else as
    `evaluate_datasets.open_datasets`.
    """
    from vrag_lib.minidocs import MiniDocs

    if config.synthesis.dataset is not None or config.synthesis.dataset_path is not None:
        return _dataset_collection(config, split)
    counts = {"train_documents": config.synthesis.documents}
    if config.smoke:
        counts = {f"{name}_documents": SMOKE_DOCUMENTS for name in ("train", "validation", "test")}
    docs = MiniDocs(dataclasses.replace(config.minidocs, **counts))
    corpus = docs.corpus(split)
    return Collection(docs.questions(split), corpus, functools.partial(make_retriever, corpus, config))


def _dataset_collection(config: Config, split: str) -> Collection:
    """`synthesis.dataset` with the questions that can be learnt from: those with an answer whose gold pages are there.
    A smoke run has those of its first documents."""
    from vrag_lib.dataset_hub import HUB_DATASETS
    from vrag_lib.evaluate_datasets import open_datasets

    name, path = config.synthesis.dataset, config.synthesis.dataset_path
    if name not in TRAINING_DATASETS:
        known = ", ".join(TRAINING_DATASETS)
        raise ConfigError(
            f"synthesis.dataset is one of {known}, or none: MiniDocs, without a dataset_path; it is not {name!r}"
        )
    if path is None and name not in HUB_DATASETS:
        raise ConfigError(
            f"synthesis.dataset={name} needs synthesis.dataset_path=, a folder of documents and questions"
        )
    if split != "train":
        raise ConfigError(
            f"synthesis.dataset={name} is for training and has no split {split!r}: measure with `vrag evaluate "
            "--dataset`, or on MiniDocs with synthesis.dataset=none"
        )
    if name in HUB_DATASETS and (path is None or name != "slidevqa"):
        logger.warning("the questions of %s are a test set: what is trained on them cannot be measured on them", name)
    corpus, questions = open_datasets({name: path}, config, split)
    there = [q for q in questions if q.gold_page_ids and all(page in corpus for page in q.gold_page_ids)]
    if len(there) < len(questions):
        logger.warning("left out: %d of %d questions lack gold pages", len(questions) - len(there), len(questions))
    if config.smoke:
        some = list(dict.fromkeys(document_stem(question.file_name) for question in there))[:SMOKE_DOCUMENTS]
        there = [question for question in there if document_stem(question.file_name) in some]
        corpus = corpus.with_documents(some)
    return Collection(tuple(there), corpus, functools.partial(make_retriever, corpus, config))


def training_questions(config: Config, questions: Sequence[Question]) -> tuple[list[Question], list[Question]]:
    """Questions for the cold start and for reinforcement learning, of different documents."""
    from vrag_lib.synthesis_export import split_questions

    wanted = len(questions) // 2 if config.smoke else config.synthesis.rl_questions
    return split_questions(questions, wanted, config.seed)


def set_apart(config: Config, train: Collection) -> Collection:
    """What reinforcement learning works in: the questions set apart for it, among the pages of their documents alone.
    That is several times as many pages as the test split has, and spares an index of those that SFT learnt from."""
    questions = training_questions(config, train.questions)[1]
    names = {document_stem(question.file_name) for question in questions}
    corpus = train.corpus.with_documents(names)
    return Collection(tuple(questions), corpus, functools.partial(make_retriever, corpus, config))


def check_experts(config: Config) -> None:
    """Raises ConfigError for an unknown `synthesis.experts` or `synthesis.variant`, for scripted experts on other
    documents than MiniDocs, and where an endpoint, a model or any request at once is missing."""
    settings = config.synthesis
    if settings.experts not in EXPERTS:
        raise ConfigError(f"synthesis.experts is one of {', '.join(EXPERTS)}, not {settings.experts!r}")
    if settings.experts == "scripted" and settings.dataset is not None:
        raise ConfigError(
            f"scripted experts know MiniDocs alone, not {settings.dataset}: set synthesis.experts=openai, "
            "policy.base_url=, synthesis.planner= and synthesis.grounder="
        )
    if settings.experts == "openai" and not (config.policy.base_url and settings.planner and settings.grounder):
        raise ConfigError("synthesis.experts=openai needs policy.base_url=, synthesis.planner= and synthesis.grounder=")
    if settings.variant not in VARIANTS:
        raise ConfigError(f"synthesis.variant is one of {', '.join(VARIANTS)}, not {settings.variant!r}")
    if settings.concurrency < 1:
        raise ConfigError(f"synthesis.concurrency is at least 1, not {settings.concurrency}")


def make_experts(config: Config, questions: Sequence[Question], corpus: Corpus) -> tuple[Policy, Any]:
    """Planner and grounding expert as `synthesis.experts` names them; the latter points, or writes whole replies where
    `synthesis.variant` wants it to. Raises ConfigError as `check_experts`."""
    check_experts(config)
    settings = config.synthesis
    if settings.experts == "scripted":
        from vrag_lib.experts_scripted import ScriptedGrounder, ScriptedPlanner

        return ScriptedPlanner(questions), ScriptedGrounder(questions)
    from vrag_lib.experts_openai import OpenAIGrounder, openai_planner

    # one limit for both, and for all threads of the synthesis
    shared = {"api_key_env": config.policy.api_key_env, "concurrency": asyncio.Semaphore(settings.concurrency)}
    writer = functools.partial(
        openai_planner, corpus, config.policy.base_url, temperature=settings.temperature, **shared
    )
    if settings.variant in ("next_reply", "grounder"):
        return writer(settings.planner), writer(settings.grounder)
    return writer(settings.planner), OpenAIGrounder(corpus, config.policy.base_url, settings.grounder, **shared)


def make_expert_policy(config: Config, questions: Sequence[Question], corpus: Corpus) -> Policy:
    """The experts joined as `synthesis.variant` says. Raises ConfigError as `check_experts`."""
    from vrag_lib.experts import MultiExpertPolicy, NextReplyPolicy

    planner, grounder = make_experts(config, questions, corpus)
    variant = config.synthesis.variant
    if variant == "relocate":
        return MultiExpertPolicy(planner, grounder, f"{planner.name} + {grounder.name}")
    if variant == "next_reply":
        return NextReplyPolicy(planner, grounder, f"{planner.name}, after searches {grounder.name}")
    return planner if variant == "planner" else grounder


def make_judge(config: Config) -> Judge:
    """Who accepts an expert's answer: scripted like the experts, or the rule judge."""
    if config.synthesis.experts != "scripted":
        return rule_judge
    from vrag_lib.experts_scripted import ScriptedJudge

    return ScriptedJudge(seed=config.seed)


def synthesize(config: Config, train: Collection | None = None, judge: Judge | None = None) -> Path:
    """Sample trajectories from the experts, filter and balance them, export them; returns the folder. `judge` accepts
    their answers (default: `make_judge`).

    `synthesis/samples/` all samples, `trajectories.parquet` those chosen for SFT, `funnel.csv`, `rl_questions.json`,
    `dataset/` (Hugging Face), `llamafactory/`, `experts.json` (what the experts did and cost, where they count it), and
    the data card `README.md`.

    `trajectories.parquet` is written last: a folder without it is not finished.

    Raises ConfigError as `make_expert_policy`, SynthesisError and SamplingError as `sample`, SynthesisError where the
    grounding expert failed on every box and where the filters leave no trajectory.
    """
    from vrag_lib.corpus_formats import write_unified
    from vrag_lib.expert_record import check_record, keep_record, write_record
    from vrag_lib.synthesis import SynthesisError, sample
    from vrag_lib.synthesis_export import write_card, write_dataset, write_llama_factory
    from vrag_lib.synthesis_filters import balance, filter_trajectories

    check_experts(config)  # before hours of drawing pages
    train = train or collection(config, "train")
    settings, folder = config.synthesis, config.folder("synthesis")
    cold_start, for_rl = training_questions(config, train.questions)
    policy = make_expert_policy(config, cold_start, train.corpus)
    sampled = folder / "samples" / (settings.variant + ("_oracle" if settings.oracle_pages else ""))
    try:
        samples = sample(
            policy,
            cold_start,
            train.corpus,
            train.retriever,
            config.environment,
            sampled,
            samples_per_question=settings.samples_per_question,
            seed=config.seed,
            workers=settings.concurrency if settings.experts == "openai" else 1,
            batch_size=64,
            oracle=settings.oracle_pages,
            settings={
                "synthesis": {k: v for k, v in dataclasses.asdict(settings).items() if k not in _NOT_SAMPLED},
                "retrieval_model": retriever_fingerprint(config),
            },
            preset=config.preset,
        )
    finally:
        experts = keep_record(policy, sampled)
    write_record(experts, folder)
    check_record(experts, policy, sampled)
    result = filter_trajectories(samples, judge or make_judge(config))
    chosen = balance(result.kept, settings.trajectories, config.seed)
    funnel = result.funnel.with_stage("balance", len(chosen))
    funnel.write_csv(folder / "funnel.csv")
    if not chosen:
        left = ", ".join(f"{stage} {kept}" for stage, kept in funnel.stages)
        raise SynthesisError(
            f"no trajectory is left to learn from ({left}; {folder / 'funnel.csv'}). Look at {sampled}, then sample "
            "more (synthesis.samples_per_question=, synthesis.documents=) or choose other experts"
        )
    done = folder / "trajectories.parquet"
    done.unlink(missing_ok=True)
    write_unified(for_rl, folder / "rl_questions.json")
    exported = [
        write_dataset(chosen, train.corpus, folder / "dataset"),
        write_llama_factory(chosen, train.corpus, folder / "llamafactory"),
    ]
    about = _ABOUT[settings.variant] + (" " + _SCRIPTED if settings.experts == "scripted" else "")
    write_card(
        folder, chosen, funnel, questions=cold_start, seed=config.seed, exported=exported, about=about, experts=experts
    )
    save_config(config, folder)
    write_trajectories(chosen, done)
    return folder


def fine_tune(
    config: Config,
    train: Collection | None = None,
    trajectories: int | None = None,
    *,
    checkpoint: str | Path | None = None,
    data: Sequence[Trajectory] | None = None,
    folder: Path | None = None,
) -> Path:
    """Fine-tune the configured policy on the synthesis' trajectories, or on the first `trajectories` of them (the
    balanced draw is balanced at any length). Returns the folder of the trained checkpoint or adapter.

    checkpoint, data, folder: start from another model, learn from other trajectories, write elsewhere.

    Raises ConfigError without a model or trajectories, CheckpointError for a model that is not there, ClaimError for a
    folder in which something else was trained.
    """
    from vrag_lib.sft import train_sft
    from vrag_lib.training import check_checkpoint, use_own_card, whole_checkpoint

    use_own_card(config.policy.device)
    model = checkpoint or config.policy.model or scale_policy(config)
    if not model:
        raise ConfigError("fine-tuning needs policy.model=, a path or hub id of a Qwen2-VL-type model")
    check_checkpoint(model)
    if data is None:
        path = config.folder("synthesis") / "trajectories.parquet"
        if not path.is_file():
            raise ConfigError(f"there is no {path}: `vrag synthesize --preset {config.preset}` makes it")
        data = read_trajectories(path)
    data = data if trajectories is None else data[:trajectories]
    held_out = max(1, len(data) // 50)
    folder = folder or sft_folder(config, len(data))
    train = train or collection(config, "train")
    inputs = {
        "model": model_fingerprint(str(model)),
        "trajectories": text_fingerprint([(t.id, [reply.text for reply in t.replies]) for t in data]),
        "corpus": train.corpus.fingerprint,
        "config": depends_on(config, "environment", "sft"),
    }
    claim(folder, inputs, INPUTS)
    save_config(config, folder)
    return train_sft(
        whole_checkpoint(model, folder / "start"),
        data[held_out:],
        train.corpus,
        config.sft,
        folder,
        validation=data[:held_out],
        seed=config.seed,
        device=config.policy.device,
    )


def sft_folder(config: Config, trajectories: int) -> Path:
    """Where a cold start on so many trajectories lies."""
    return config.folder("sft") / f"{trajectories}_trajectories_seed_{config.seed}"


def find_cold_start(config: Config) -> Path | None:
    """The finished cold start of this config and seed on the most trajectories, for `reinforce`; None if there is none.

    A cold start with LoRA is an adapter, which `reinforce` merges into its checkpoint first.
    """
    made = {
        int(folder.name.partition("_")[0]): folder / "final"
        for folder in config.folder("sft").glob(f"[0-9]*_trajectories_seed_{config.seed}")
        if any((folder / "final" / name).is_file() for name in ("config.json", "adapter_config.json"))
    }
    return made[max(made)] if made else None


def reinforce(
    config: Config,
    checkpoint: str | Path,
    train: Collection | None = None,
    *,
    folder: Path | None = None,
    seed: int | None = None,
    judge: Judge = rule_judge,
) -> Path:
    """Train a checkpoint, the cold start's as a rule, by GRPO on the questions set apart for it, with the reward that
    `grpo.recipe` names. Returns the folder of the trained adapter or checkpoint.

    seed: train with another one than `config.seed`, from which follows which questions are set apart; so the seeds of
    one experiment share their questions. folder: write elsewhere than to `grpo/<recipe>_seed_<seed>`. judge: of answers
    (the paper: a model, `judge_openai`); where it gives no verdict, a trajectory takes no part in its group.

    Raises ConfigError for an unknown recipe, or an engine that is not installed, CheckpointError for a checkpoint that
    is not there, ClaimError for a folder in which something else was trained.
    """
    from vrag_lib.grpo import train_grpo
    from vrag_lib.rewards import Scorer, find_recipe
    from vrag_lib.training import check_checkpoint, use_own_card, whole_checkpoint

    use_own_card(config.policy.device)
    try:
        recipe = find_recipe(config.grpo.recipe)
    except ValueError as error:
        raise ConfigError(f"grpo.recipe: {error}") from error
    check_checkpoint(checkpoint)
    seed = config.seed if seed is None else seed
    folder = folder or config.folder("grpo") / f"{config.grpo.recipe}_seed_{seed}"
    apart = set_apart(config, train or collection(config, "train"))
    inputs = {
        "model": model_fingerprint(str(checkpoint)),
        "questions": questions_fingerprint(apart.questions),
        "corpus": apart.corpus.fingerprint,
        "page_texts": apart.corpus.text_fingerprint,
        "retrieval_model": retriever_fingerprint(config),
        "judge": getattr(judge, "name", getattr(judge, "__name__", "")),
        "seed": seed,
        "config": depends_on(config, "environment", "retrieval", "grpo"),
    }
    claim(folder, inputs, INPUTS)
    save_config(config, folder)
    checkpoint = whole_checkpoint(checkpoint, folder / "start")
    return train_grpo(
        checkpoint,
        apart.questions,
        apart.corpus,
        apart.retriever,
        config.grpo,
        folder,
        environment=config.environment,
        reward=Scorer(recipe, judge),
        sampler=make_sampler(checkpoint, apart.corpus, config),
        seed=seed,
        device=config.policy.device,
        preset=config.preset,
    )
