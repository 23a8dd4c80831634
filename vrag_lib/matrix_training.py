"""What the cells of the matrix are made from: documents, trajectories and checkpoints, each made once and shared.

    bench = Workbench(load_config("laptop", experiment=True), format_trajectories=400)
    bench.checkpoint(CELLS["vrag_rl"], seed=0)     # trains what is missing: SFT, then RL

Everything lies below `results/<preset>/matrix/`: `data/` trajectories, `checkpoints/` models. A folder says in
`settings.json` what it depends on, and nothing made with other settings is used in its place. Trainings go on from
their last checkpoint after a kill. Data are drawn with `config.seed`, trainings with the seed of the cell. Seeds of RL
after SFT share their cold start, as the paper has one, unless `cold_starts` asks for several; they then take turns. The
cold start that the repository ships is not trained again where it was made with the same settings from the same data.

Deviations from the paper: see `matrix_cells`. The stage `format`, where there is no SFT, stands in for what an
instruct model brings along; `gold` does for agents given the gold pages or regions, from about as many as SFT.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import math
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vrag_lib.agents import agent_environment, find_agent, questions_for
from vrag_lib.claims import alone_in, claim, compare, depends_on, differences, model_fingerprint
from vrag_lib.config import Config, ConfigError, read_config
from vrag_lib.corpus import Question
from vrag_lib.factory import scale_cold_start, scale_policy
from vrag_lib.judge import rule_judge
from vrag_lib.matrix_cells import Cell, cell_config
from vrag_lib.policy import Policy
from vrag_lib.rendering import read_json, write_atomically
from vrag_lib.stages import (
    Collection,
    collection,
    fine_tune,
    make_expert_policy,
    make_judge,
    reinforce,
    synthesize,
    training_questions,
)
from vrag_lib.synthesis import sample
from vrag_lib.trajectory import Trajectory, read_trajectories, write_trajectories

logger = logging.getLogger(__name__)

FORMS = {
    "format": ("vanilla_rag_1", "vanilla_rag_3", "react", "vrag_rl"),
    "gold": ("gold_pages", "gold_pages_crop", "gold_regions"),
}
"""Agents whose trajectories the stages `format` and `gold` learn from, equally many of each."""

FORMAT_TRAJECTORIES = {"laptop": 400, "laptop_legible": 400}
"""Trajectories of the stage `format` by preset, of all forms together. Other presets start from an instruct model, and
need neither it nor `gold`."""

QUESTIONS_AT_A_TIME = 96
"""Questions that each form is sampled on at a time, until enough trajectories are right."""

SEARCH_SAMPLES = 4
"""Samples per question of experts that cannot crop: what is too small to read they guess, so fewer are right."""


class MatrixError(RuntimeError):
    """A part of the matrix that cannot be made or used; the message says which and what helps."""


class Workbench:
    """Collections, trajectories and checkpoints of one config, made when first asked for."""

    def __init__(self, config: Config, format_trajectories: int | None = None, cold_starts: int = 1):
        if cold_starts < 1:
            raise ValueError(f"reinforcement learning needs at least one cold start, not {cold_starts}")
        if config.synthesis.dataset is not None or config.synthesis.dataset_path is not None:
            raise ConfigError("the matrix trains and measures on MiniDocs: leave synthesis.dataset and its path out")
        self.config = config
        self.cold_starts = cold_starts
        self.folder = config.folder("matrix")
        if format_trajectories is None:
            format_trajectories = FORMAT_TRAJECTORIES.get(config.preset, 0)
        self.format_trajectories = format_trajectories
        self._failed: dict[str, str] = {}

    @functools.cached_property
    def train(self) -> Collection:
        """Training documents, of which SFT and RL get different ones."""
        return collection(self.config, "train")

    @functools.cached_property
    def test(self) -> Collection:
        """Test documents and their answerable questions."""
        from vrag_lib.corpus_formats import answerable

        whole = collection(self.config, "test")
        return dataclasses.replace(whole, questions=tuple(answerable(whole.questions)))

    def trajectories(self, kind: str) -> list[Trajectory]:
        """What SFT learns from: `crop` as `vrag synthesize` leaves it, `search` of the same questions without crop,
        `format` and `gold` of each of their FORMS."""
        folder = self.folder / "data" / kind
        with alone_in(folder, MatrixError, waits=True):
            return self._expert_trajectories() if kind == "crop" else self._sampled_trajectories(kind, folder)

    def _expert_trajectories(self) -> list[Trajectory]:
        path = self.config.folder("synthesis") / "trajectories.parquet"
        if not path.is_file() or not (path.parent / "config.json").is_file():
            synthesize(self.config, self.train)
        made, wanted = depends_on(read_config(path.parent), "synthesis"), depends_on(self.config, "synthesis")
        compare(path.parent, made, wanted, MatrixError)
        return read_trajectories(path)

    def _sampled_trajectories(self, kind: str, folder: Path) -> list[Trajectory]:
        count = self.format_trajectories if kind == "format" else len(self.trajectories("crop"))
        claim(folder, {"count": count, "config": depends_on(self.config, "synthesis")}, error=MatrixError)
        path = folder / "trajectories.parquet"
        if not path.is_file():
            made = self._search() if kind == "search" else self._taking_turns(kind, count)
            if not made:
                raise MatrixError(
                    f"experts wrote no right trajectory of the kind {kind!r}; look at the samples in {folder}"
                )
            write_trajectories(made, path)
        return read_trajectories(path)

    def checkpoint(self, cell: Cell, seed: int) -> str:
        """The model of a cell, trained with that seed, ready to be loaded: a folder, or a hub id for `raw`."""
        model = self._start(cell) if cell.starts_formatted else self.raw()
        if cell.chain in ("sft", "sft+grpo"):
            model = self._fine_tuned(model, cell, seed if cell.chain == "sft" else seed % self.cold_starts)
        if cell.chain in ("grpo", "sft+grpo"):
            model = self._reinforced(model, cell, seed)
        return model

    def training_folder(self, cell: Cell, seed: int) -> Path:
        """Where a cell is trained by RL, for those that are."""
        return self.folder / "checkpoints" / f"{cell.name}_seed_{seed}"

    def raw(self) -> str:
        """The policy before any stage. Raises ConfigError where there is none."""
        model = self.config.policy.model or scale_policy(self.config)
        if not model:
            raise ConfigError(
                "the matrix needs a policy that can be trained: `vrag scale-model policy` makes the laptop's, "
                "policy.model= names another"
            )
        return str(model)

    def _start(self, cell: Cell) -> str:
        raw, kind = self.raw(), "gold" if cell.data == "gold" else "format"
        if not self.format_trajectories:
            return raw
        depends = {"start": model_fingerprint(raw), "trajectories": self.format_trajectories}
        return self._made(
            kind,
            depends | {"config": depends_on(self.config, "sft", "synthesis")},
            lambda folder: fine_tune(
                self.config, self.train, checkpoint=raw, data=self.trajectories(kind), folder=folder
            ),
        )

    def sft_settings(self, start: str, cell: Cell, seed: int) -> dict[str, Any]:
        """What a cold start depends on: where it starts, what it learns from, its settings."""
        learnt = self.trajectories(cell.data)[: cell.trajectories]
        return {
            "start": model_fingerprint(start),
            "data": cell.data,
            "trajectories": "all" if cell.trajectories is None else str(cell.trajectories),
            "replies": hashlib.sha256("\n".join(r.text for t in learnt for r in t.replies).encode()).hexdigest()[:16],
            "seed": seed,
            "config": depends_on(self.config, "sft", "synthesis"),
        }

    def _fine_tuned(self, start: str, cell: Cell, seed: int) -> str:
        settings = self.sft_settings(start, cell, seed)
        shipped = scale_cold_start(self.config)
        recorded = read_json(shipped / "settings.json") if shipped else None
        if recorded is not None and not differences(recorded, json.loads(json.dumps(settings))):
            return str(shipped)
        config = dataclasses.replace(self.config, seed=seed)
        return self._made(
            f"sft_{cell.data}_{settings['trajectories']}_seed_{seed}",
            settings,
            lambda folder: fine_tune(
                config,
                self.train,
                cell.trajectories,
                checkpoint=start,
                data=self.trajectories(cell.data),
                folder=folder,
            ),
        )

    def _reinforced(self, start: str, cell: Cell, seed: int) -> str:
        config = cell_config(cell, self.config)
        depends = {"start": model_fingerprint(start), "seed": seed}
        return self._made(
            self.training_folder(cell, seed).name,
            depends | {"config": depends_on(config, "grpo", "environment", "retrieval", "synthesis")},
            lambda folder: reinforce(config, start, self.train, folder=folder, seed=seed),
        )

    def _made(self, name: str, settings: Mapping[str, Any], train: Callable[[Path], Path]) -> str:
        """The finished model of a training, trained now unless it was, or is by another process just now; what failed
        in this run is not tried again."""
        if name in self._failed:
            raise MatrixError(f"needs the checkpoint {name}, which failed: {self._failed[name]}")
        folder = self.folder / "checkpoints" / name
        claim(folder, settings, error=MatrixError)
        with alone_in(folder, MatrixError, waits=True):
            return self._trained(name, folder, train)

    def _trained(self, name: str, folder: Path, train: Callable[[Path], Path]) -> str:
        done = folder / "done.json"
        if (made := read_json(done)) is None:
            try:
                final = train(folder)
                if self.config.rollout.merge_adapter and (final / "adapter_config.json").is_file():
                    from vrag_lib.training import base_of, merge_adapter

                    final = merge_adapter(base_of(final), final, folder / "merged")
            except Exception as error:
                self._failed[name] = f"{type(error).__name__}: {error}"
                raise
            for checkpoint in folder.glob("checkpoint-*"):  # only for going on; the model has all that is left to use
                shutil.rmtree(checkpoint)
            made = {"model": final.name}
            write_atomically(done, json.dumps(made).encode())
        return str(folder / made["model"])

    def _search(self) -> list[Trajectory]:
        """Trajectories of the SFT questions by experts without crop: as many as there are with crop, or all."""
        from vrag_lib.synthesis_filters import balance, filter_trajectories

        questions = training_questions(self.config, self.train.questions)[0]
        samples = self._sampled("react", SEARCH_SAMPLES, "search", questions)
        kept = filter_trajectories(samples, make_judge(self.config)).kept
        wanted = len(self.trajectories("crop"))
        if len(kept) < wanted:
            logger.warning("experts without crop wrote %d right trajectories, those with crop %d", len(kept), wanted)
        return balance(kept, wanted, self.config.seed)

    def _taking_turns(self, kind: str, count: int) -> list[Trajectory]:
        """Right trajectories without an invalid reply, at most one per question and form, the forms taking turns: of
        each as many as of the rarest, and no more together than wanted."""
        forms = [self._right(kind, form, math.ceil(count / len(FORMS[kind]))) for form in FORMS[kind]]
        return [trajectory for row in zip(*forms, strict=False) for trajectory in row][:count]

    def _right(self, kind: str, form: str, wanted: int) -> list[Trajectory]:
        """Right trajectories of one form, sampled on questions in random order until there are enough."""
        questions = questions_for(find_agent(form), training_questions(self.config, self.train.questions)[0])
        questions = random.Random(self.config.seed).sample(questions, len(questions))
        right: list[Trajectory] = []
        for start in range(0, len(questions), QUESTIONS_AT_A_TIME):
            some = questions[start : start + QUESTIONS_AT_A_TIME]
            samples = self._sampled(form, 1, f"{kind}/{form}/{start}", some)
            right += [t for t in samples if _is_right(t) and not any(reply.invalid for reply in t.replies)]
            if len(right) >= wanted:
                break
        return right

    def _sampled(self, agent: str, per_question: int, name: str, questions: Sequence[Question]) -> list[Trajectory]:
        return sample(
            self._expert(agent),
            questions,
            self.train.corpus,
            self.train.retriever,
            agent_environment(agent, self.config),
            self.folder / "data" / name / "samples",
            samples_per_question=per_question,
            seed=self.config.seed,
            batch_size=64,
            preset=self.config.preset,
        )

    def _expert(self, agent: str) -> Policy:
        """The planner alone, which takes what an agent may do into account: a model reads it in the prompt, the
        scripted one is told."""
        questions = training_questions(self.config, self.train.questions)[0]
        if self.config.synthesis.experts != "scripted":
            settings = dataclasses.replace(self.config.synthesis, variant="planner")
            config = dataclasses.replace(self.config, synthesis=settings)
            return make_expert_policy(config, questions, self.train.corpus)
        from vrag_lib.experts_scripted import Flaws, ScriptedPlanner

        can_crop = agent_environment(agent, self.config).allow_crop
        return ScriptedPlanner(questions, Flaws() if can_crop else Flaws(no_crop=1.0, needless_crop=0.0))


def _is_right(trajectory: Trajectory) -> bool:
    answer = trajectory.answer
    return answer is not None and rule_judge(trajectory.question, trajectory.reference_answer, answer)
