"""Times rollouts: our loop and stock TRL's over the same environment, with the same model and questions, greedily, in
one run, and compares their tokens one by one.

Each method gets all trajectories as one batch and a model freshly loaded, so that nothing is remembered from one turn
to the next. The phases of its time are read off one clock: the language model reading contexts (all of a conversation
again at every turn) and writing replies token by token, the vision tower, making images ready, search, and the rest,
which is choosing tokens, assembling contexts and bookkeeping. What `bench_trl` says stock TRL cannot do is switched off
or counts as a difference: no trajectory ends by a streak of invalid replies.

Greedily the trajectories of a group are alike. That favours ours, which looks at each image once, more than sampling
would where a group sees other pages; and it favours stock TRL, whose batches wait for their longest reply.

Without a model the cold start that is shipped is timed; where there is none, the scale policy gets random weights and
learns one script by heart, for a minute, so that its greedy replies search, enlarge, search again and answer, with all
replies of a turn equally long.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from tqdm import tqdm

from vrag_lib.bench import write_results
from vrag_lib.bench_agent import (
    IMAGES,
    OTHER,
    OURS,
    STOCK,
    VISION,
    Stopwatch,
    image_places,
    minidocs_questions,
    phase_figure,
    random_scale_policy,
    summarise,
)
from vrag_lib.bench_trl import stock_model, stock_trainer
from vrag_lib.config import Config, EnvironmentConfig, PolicyConfig, SFTConfig
from vrag_lib.corpus import Corpus, Question
from vrag_lib.factory import scale_cold_start
from vrag_lib.policy import ScriptedPolicy
from vrag_lib.policy_transformers import TransformersPolicy
from vrag_lib.retrieval import Retriever
from vrag_lib.rollout import rollout

PREFILL, DECODE = "reading contexts", "writing replies"
PHASES = (PREFILL, DECODE, VISION, IMAGES, "search", OTHER)

SCRIPT = (
    "<think>I search for the page.</think>\n<search>the page of the measure by name</search>",
    "<think>The figure is too small to read here. I need to look closer at this region.</think>\n"
    "<bbox>[56, 56, 224, 168]</bbox>",
    "<think>This is not the right page, search again.</think>\n<search>the table of the year</search>",
    "<think>Now I can read it.</think>\n<answer>the value</answer>",
)
"""What a policy without training is taught to say to any question."""


@dataclass
class Rolled:
    """One rollout of a method: a token sequence per trajectory, how many of the tokens it sampled, and its clock."""

    sequences: list[list[int]]
    sampled: int
    watch: Stopwatch


def run_bench_rollout(
    config: Config, model: str | None, questions: int, group: int, repeats: int, out_dir: str | Path
) -> pd.DataFrame:
    """`bench_rollout` on questions of MiniDocs' test split. model: a checkpoint; without one the cold start that is
    shipped, and where there is none a policy that is taught `SCRIPT`."""
    test, chosen = minidocs_questions(config, questions, group, repeats)
    with tempfile.TemporaryDirectory(prefix="vrag-bench-") as folder:
        checkpoint = model or scale_cold_start()
        name = str(model or "the shipped cold start")
        if checkpoint is None:
            checkpoint = taught_policy(chosen, test.corpus, test.retriever, config, Path(folder))
            name = "scale policy, random weights, taught one script"
        return bench_rollout(
            checkpoint,
            chosen,
            test.corpus,
            test.retriever,
            config.environment,
            config.policy,
            group=group,
            repeats=repeats,
            out_dir=out_dir,
            seed=config.seed,
            name=name,
        )


def taught_policy(
    questions: Sequence[Question], corpus: Corpus, retriever: Retriever, config: Config, folder: Path, steps: int = 40
) -> Path:
    """A checkpoint that says `SCRIPT` to any question: the scale policy with random weights, fine-tuned for `steps`
    steps of two trajectories."""
    from vrag_lib.sft import train_sft

    start = random_scale_policy(folder / "random", config.seed)
    asked = (list(questions) * 4)[:4]
    shown = rollout(ScriptedPolicy(SCRIPT), asked, corpus, retriever, config.environment)
    recipe = SFTConfig(
        epochs=steps / 2,
        batch_size=2,
        micro_batch_size=2,
        learning_rate=3e-3,
        schedule="constant_with_warmup",
        save_steps=steps,
    )
    return train_sft(start, shown, corpus, recipe, folder / "sft", seed=config.seed, device=config.policy.device)


def bench_rollout(
    checkpoint: str | Path,
    questions: Sequence[Question],
    corpus: Corpus,
    retriever: Retriever,
    environment: EnvironmentConfig,
    policy: PolicyConfig,
    *,
    group: int = 4,
    repeats: int = 3,
    out_dir: str | Path | None = None,
    seed: int = 0,
    name: str = "",
) -> pd.DataFrame:
    """Roll out every question `group` times (at least 2, as TRL's groups) with each method in turn, `repeats` times
    after one that is not counted, and write `metrics.csv`, `config.json` and `rollout_speed.png` to `out_dir`.

    policy: limits of replies and contexts, device. name: what the table calls the checkpoint.

    Returns a row per method: seconds and `speedup` as `summarise`, forward passes and tokens sampled in one rollout,
    replies and images per trajectory; in our row the share of trajectories that are token for token stock TRL's, and
    where the first other one parts. A difference is reported, never an error: see what `bench_trl` cannot do.
    """
    import torch

    environment = dataclasses.replace(environment, max_invalid_streak=0)
    asked = [question for question in questions for _ in range(group)]
    turns: dict[str, list[Stopwatch]] = {STOCK: [], OURS: []}
    same: list[bool] = []
    difference = ""
    for turn in tqdm(range(repeats + 1), desc="rollouts", unit="turn", file=sys.stderr):
        agent = TransformersPolicy.from_pretrained(
            checkpoint,
            corpus,
            device=policy.device,
            dtype=policy.dtype,
            temperature=0,
            max_reply_tokens=policy.max_reply_tokens,
            max_context_tokens=policy.max_context_tokens,
            batch_size=len(asked),
        )
        rolled = {
            STOCK: _roll_stock(checkpoint, agent, asked, corpus, retriever, environment, group),
            OURS: _roll_ours(agent, asked, corpus, retriever, environment),
        }
        pairs = list(zip(asked, rolled[OURS].sequences, rolled[STOCK].sequences, strict=True))
        same += [ours == stock for _, ours, stock in pairs]
        others = [_difference(agent, *pair) for pair in pairs if pair[1] != pair[2]]
        difference = difference or next(iter(others), "")
        if turn:
            for method, one in rolled.items():
                turns[method].append(one.watch)
    rows = summarise(turns, PHASES)
    for row in rows:
        one = rolled[row["method"]]
        texts = agent.tokenizer.batch_decode(one.sequences)
        row |= {
            "forward_passes": one.watch.calls[PREFILL] + one.watch.calls[DECODE],
            "sampled_tokens": one.sampled,
            "tokens_per_second": one.sampled / row["seconds"],
            "replies": float(np.mean([text.count("<|im_start|>assistant") for text in texts])),
            "images": float(np.mean([text.count("<|vision_start|>") for text in texts])),
            "identical": float(np.mean(same)) if row["method"] == OURS else np.nan,
            "first_difference": difference if row["method"] == OURS else "",
            "policy": name,
        }
    table = pd.DataFrame(rows)
    if out_dir is not None:
        settings = {
            "questions": len(questions),
            "group": group,
            "repeats": repeats,
            "threads": torch.get_num_threads(),
            "environment": dataclasses.asdict(environment),
            "policy": dataclasses.asdict(policy) | {"temperature": 0, "batch_size": len(asked)},
        }
        write_results(table, settings, out_dir, seed, "rollout_speed.png", draw)
    return table


def draw(table: pd.DataFrame) -> Figure:
    """The figure of a table of `bench_rollout`."""
    return phase_figure(table, PHASES)


def _roll_ours(
    agent: TransformersPolicy,
    asked: Sequence[Question],
    corpus: Corpus,
    retriever: Retriever,
    environment: EnvironmentConfig,
) -> Rolled:
    watch = Stopwatch()
    with watch.watching(*_places(agent.model, agent.processor, retriever)), watch.phase(OTHER):
        trajectories = rollout(agent, asked, corpus, retriever, environment, batch_size=len(asked))
    sequences = [[token for turn in t.turns for token in turn.token_ids or ()] for t in trajectories]
    return Rolled(sequences, sum(len(r.token_ids or ()) for t in trajectories for r in t.replies), watch)


def _roll_stock(
    checkpoint: str | Path,
    agent: TransformersPolicy,
    asked: Sequence[Question],
    corpus: Corpus,
    retriever: Retriever,
    environment: EnvironmentConfig,
    group: int,
) -> Rolled:
    """The part of a step of stock TRL in which it generates, tool calls included; limits as in `agent`."""
    model, processor = stock_model(checkpoint, agent)
    watch, generated = Stopwatch(), []
    with tempfile.TemporaryDirectory(prefix="vrag-bench-") as folder:
        trainer = stock_trainer(
            model,
            processor,
            asked[::group],
            [0.0] * len(asked),
            corpus,
            retriever,
            environment,
            folder,
            generation={
                "max_new_tokens": agent.max_reply_tokens,
                "suppress_tokens": list(agent.suppressed_token_ids),
            },
            num_generations=group,
            per_device_train_batch_size=len(asked),
            max_completion_length=agent.max_context_tokens,
            beta=0.0,
        )
        generate = trainer._generate

        def kept(prompts: list[Any]) -> Any:
            generated.append(generate(prompts))
            return generated[0]

        trainer._generate = kept
        trainer.model.train()  # the mode in which TRL makes groups
        with (
            watch.watching((trainer, "_generate", OTHER), outermost=True),
            watch.watching(*_places(model, processor, retriever)),
        ):
            trainer._generate_and_score_completions([row for row in trainer.train_dataset for _ in range(group)])
    prompts, completions, sampled = generated[0][:3]
    return Rolled([p + c for p, c in zip(prompts, completions, strict=True)], sum(map(sum, sampled)), watch)


def _pass(input_ids: Any, **_: Any) -> str:
    """The phase of a forward pass: over a whole context (B, T), or over the one token just chosen (B, 1)."""
    return PREFILL if input_ids.shape[1] > 1 else DECODE


def _places(model: Any, processor: Any, retriever: Retriever) -> list[Any]:
    return [(model, "forward", _pass), (retriever, "search", "search"), *image_places(model, processor)]


def _difference(agent: TransformersPolicy, question: Question, ours: list[int], stock: list[int]) -> str:
    """Where two token sequences part, and what stands there in each."""
    pairs = zip(ours, stock, strict=False)
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(stock)))
    said = [agent.tokenizer.decode(ids[at : at + 12]) or "nothing" for ids in (ours, stock)]
    return f"{question.uid}, token {at} of {len(ours)} and {len(stock)}: ours {said[0]!r}, stock {said[1]!r}"
