"""GRPO: what is trained is what was sampled, under the sampler's own log-probs, whatever the batch looks like."""

from __future__ import annotations

import copy
import dataclasses
import json
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import training_jobs
from tiny_agent import (
    ENVIRONMENT,
    QUESTIONS,
    ForcedPolicy,
    by_question,
    corpus,
    random_checkpoint,
    random_policy,
    retriever,
    rewarded,
    scratch,
    trained_checkpoint,
)

from vrag_lib.presets import PRESETS
from vrag_lib.rewards import score
from vrag_lib.rollout import rollout
from vrag_lib.trajectory import Trajectory, read_trajectories

torch = pytest.importorskip("torch")

from vrag_lib.grpo import GRPOConfig, train_grpo  # noqa: E402
from vrag_lib.grpo_trainer import AgentGRPOTrainer, Item, QuestionSampler, _arguments  # noqa: E402
from vrag_lib.policy_transformers import TransformersPolicy  # noqa: E402
from vrag_lib.training_batch import batched, empty_example, example_of, token_logprobs  # noqa: E402
from vrag_lib.vision_cache import weights_state  # noqa: E402

GOLDEN = Path(__file__).parent / "golden_grpo.json"
SMALL = {"lora_rank": 4, "lora_alpha": 8, "warmup_steps": 0, "max_reply_tokens": 64}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def rolled() -> list[Trajectory]:
    """Two trajectories of each question, with no, one, two and three images, sampled at temperature 0.7; in single
    letters, so that their text would be encoded as other tokens."""
    policy = ForcedPolicy(random_policy(), by_question, letters=True, temperature=0.7)
    questions = [question for question in QUESTIONS for _ in range(2)]
    return [score(t) for t in rollout(policy, questions, corpus(), retriever(), ENVIRONMENT)]


@pytest.fixture(scope="module")
def policy():
    own = random_policy()
    return TransformersPolicy(own.model, own.processor, corpus(), temperature=0.7)


def make_trainer(folder, **settings) -> AgentGRPOTrainer:
    settings = {"steps": 1, "questions_per_step": 2, "group_size": 4, "micro_batch_size": 4} | SMALL | settings
    config = GRPOConfig(**settings)
    fresh = TransformersPolicy.from_pretrained(
        random_checkpoint(), corpus(), device="cpu", temperature=config.temperature
    )
    return AgentGRPOTrainer(
        fresh, QUESTIONS, corpus(), retriever(), config, folder, environment=ENVIRONMENT, reward=score
    )


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    return make_trainer(tmp_path_factory.mktemp("trainer"), kl_coefficient=0.1, temperature=0.7)


# What is trained is what was sampled.


def test_the_trainer_s_logprobs_are_the_sampler_s(policy, rolled):
    assert sorted(Counter(len(t.images) for t in rolled).items()) == [(0, 2), (1, 2), (2, 2), (3, 2)]
    examples = [example_of(policy, t) for t in rolled]
    with torch.no_grad():
        logprobs, entropy = token_logprobs(policy.model, policy, examples)
        alone = torch.cat([token_logprobs(policy.model, policy, [example])[0] for example in examples])
    sampled = [lp for e in examples for lp, trained in zip(e.logprobs, e.trained, strict=True) if trained]
    assert logprobs.numpy() == pytest.approx(np.array(sampled), abs=1e-4)
    assert alone.numpy() == pytest.approx(np.array(sampled), abs=1e-4)
    assert (entropy > 0).all()


def test_the_vocabulary_is_projected_to_where_trained_tokens_follow_alone(policy, rolled):
    examples = [example_of(policy, t) for t in rolled]
    trained = sum(len(example.positions) for example in examples)
    head, seen = policy.model.lm_head, []
    with head.register_forward_hook(lambda _module, _states, out: seen.append(out.shape)), torch.no_grad():
        logprobs, _ = token_logprobs(policy.model, policy, examples)
    assert seen == [(trained, len(policy.tokenizer))] and logprobs.shape == (trained,)
    assert not head._forward_pre_hooks


def test_blank_pixels_change_the_logprobs_behind_them_and_none_before(policy, rolled, monkeypatch):
    trajectory = rolled[-1]
    example = example_of(policy, trajectory)
    turns = torch.tensor([example.turn_index[p] for p in example.positions])
    with torch.no_grad():
        seeing, _ = token_logprobs(policy.model, policy, [example])
        whole = policy.model_inputs
        monkeypatch.setattr(
            policy, "model_inputs", lambda c: {k: v * 0 if k == "pixel_values" else v for k, v in whole(c).items()}
        )
        blind, _ = token_logprobs(policy.model, policy, [example])
    assert (seeing - blind)[turns > 1].abs().max() > 1e-2
    assert (seeing - blind)[turns == 1].abs().max() < 1e-6


def test_the_mask_covers_exactly_the_sampled_tokens(policy, rolled):
    for trajectory in rolled:
        example = example_of(policy, trajectory)
        trained = [example.context.token_ids[p] for p in example.positions]
        assert trained == [token for reply in trajectory.replies for token in reply.token_ids]
        assert all(list(reply.token_ids) != policy.tokenizer.encode(reply.text) for reply in trajectory.replies)
        assert policy.tokenizer.decode(trained) == "".join(reply.text for reply in trajectory.replies)
        assert not set(policy.suppressed_token_ids) & set(trained)


def test_an_example_of_nothing_gives_a_differentiable_zero(policy):
    logprobs, _ = token_logprobs(policy.model, policy, [empty_example(policy)])
    assert logprobs.shape == (0,)
    assert logprobs.sum().requires_grad


# The loss.


def items_of(trainer, trajectories) -> list[Item]:
    """Items as `_collect` makes them, with an old policy that is off by up to half a nat, so that clipping happens."""
    items, reasons = trainer._items(trajectories, trajectories)
    assert not reasons
    trainer._fix_logprobs(items)
    noise = torch.Generator().manual_seed(0)
    for item in items:
        item.old = item.sampled + torch.rand(item.sampled.shape, generator=noise) - 0.5
    return items


def gradients(trainer, micro_batches) -> tuple[float, torch.Tensor]:
    trainer.model.zero_grad()
    loss = 0.0
    for batch in micro_batches:
        part = trainer.compute_loss(trainer.model, {"items": batch})
        part.backward()
        loss += float(part.detach())
    return loss, torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])


@pytest.fixture(scope="module")
def prepared(trainer, rolled):
    return items_of(trainer, rolled)


def with_weights(items, normalisation):
    from vrag_lib.advantages import loss_weights

    weights = loss_weights([len(item.advantages) for item in items], normalisation, 50)
    return [dataclasses.replace(item, weight=float(w)) for item, w in zip(items, weights, strict=True)]


@pytest.mark.parametrize("normalisation", ["sequence", "token"])
def test_one_batch_of_eight_equals_eight_of_one(trainer, prepared, normalisation):
    items = with_weights(prepared, normalisation)
    loss, gradient = gradients(trainer, [items])
    assert gradient.abs().max() > 0
    again, own = gradients(trainer, [[items[i]] for i in (3, 1, 0, 2, 7, 5, 6, 4)])
    assert again == pytest.approx(loss, abs=1e-6)
    assert (own - gradient).abs().max() < 1e-5 * gradient.abs().max()


def test_old_logprobs_of_the_sampler_serve_as_well_as_recomputed_ones(trainer, prepared, monkeypatch):
    fresh = [dataclasses.replace(item, old=None) for item in prepared]
    monkeypatch.setattr(trainer, "config", dataclasses.replace(trainer.config, old_logprobs="sampler"))
    loss, gradient = gradients(trainer, [fresh])
    trainer._fix_logprobs(fresh)
    assert all(item.old is item.sampled for item in fresh)
    again, own = gradients(trainer, [fresh])
    assert again == pytest.approx(loss, abs=1e-5)
    assert (own - gradient).abs().max() < 1e-4 * gradient.abs().max()


def test_credited_turns_have_advantages_of_their_own(trainer, rolled, monkeypatch):
    plain, _ = trainer._items(rolled, rolled)
    monkeypatch.setattr(trainer, "credit", lambda t: {"answer": [0.0] * (len(t.turns) - 1) + [1.0]})
    scoped, _ = trainer._items(rolled, rolled)
    longest = scoped[-1]
    last = torch.tensor([longest.example.turn_index[p] for p in longest.example.positions]) == 7
    assert len(plain[-1].advantages.unique()) == 1
    assert len(longest.advantages[last].unique()) == 1
    assert longest.advantages[last][0] != longest.advantages[~last][0]


def test_loss_and_gradient_are_trl_s(trainer, prepared, monkeypatch):
    """TRL's own loss on the same tokens: one sequence mean, clip and k3 divergence."""
    import trl

    monkeypatch.setattr(trainer.agent, "suppressed_token_ids", ())  # TRL scores over the whole vocabulary
    monkeypatch.setattr(trainer.args, "use_bias_correction_kl", False)
    monkeypatch.setattr(trainer, "loss_type", "grpo")
    monkeypatch.setattr(trainer, "current_gradient_accumulation_steps", 1, raising=False)
    items = with_weights(prepared, "sequence")
    own_loss, own = gradients(trainer, [items])

    contexts = [item.example.context for item in items]
    inputs = trainer.agent.model_inputs(contexts)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    image = trainer.agent.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    padded = {name: torch.zeros(ids.shape) for name in ("trained", "advantages", "old", "reference")}
    for row, item in enumerate(items):
        places = ids.shape[1] - len(item.example.trained) + torch.tensor(item.example.positions)
        for name, values in (
            ("trained", 1.0),
            ("advantages", item.advantages),
            ("old", item.old),
            ("reference", item.reference),
        ):
            padded[name][row, places] = values
    trl_inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": mask[:, :1],
        "completion_ids": ids[:, 1:],
        "completion_mask": mask[:, 1:],
        "tool_mask": padded["trained"][:, 1:],
        "advantages": padded["advantages"][:, 1:],
        "old_per_token_logps": padded["old"][:, 1:],
        "ref_per_token_logps": padded["reference"][:, 1:],
        "pixel_values": inputs["pixel_values"],
        "image_grid_thw": inputs["image_grid_thw"],
        "num_images": [len(context.images) for context in contexts],
        "mm_token_type_ids": (ids == image).int(),
    }
    trainer.model.zero_grad()
    loss = trl.GRPOTrainer._compute_loss(trainer, trainer.model, trl_inputs)
    loss.backward()
    theirs = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])
    assert own_loss == pytest.approx(float(loss.detach()), abs=1e-5)
    assert (own - theirs).abs().max() < 1e-4 * theirs.abs().max()


def test_the_reference_is_the_model_without_its_adapter(trainer, prepared):
    before = torch.cat([item.reference for item in prepared])
    adapter = [p for p in trainer.model.parameters() if p.requires_grad]
    saved = copy.deepcopy([p.data for p in adapter])
    for parameter in adapter:
        parameter.data += 0.05
    reference = torch.cat(trainer._reference_logprobs(prepared[:4]))
    moved = torch.cat(trainer._logprobs(trainer.model, prepared[:4]))
    for parameter, data in zip(adapter, saved, strict=True):
        parameter.data = data
    assert (reference - before[: len(reference)]).abs().max() < 1e-5
    assert (moved - reference).abs().max() > 1e-2


def test_without_gradient_nothing_is_computed_but_the_graph_stays(trainer, prepared):
    silent = [dataclasses.replace(item, weight=0.0) for item in prepared[:2]]
    loss, gradient = gradients(trainer, [silent, []])
    assert loss == 0
    assert not gradient.any()


# A step.


def hostile(conversation, seed) -> str:
    """No policy here behaves: image tokens, endless replies, nothing at all, one that answers."""
    kind = seed % 4
    if kind == 0:
        return "<|vision_start|><|image_pad|><|image_pad|><|vision_end|><answer>1</answer>"
    return ("<search>page 2</search>", "blah " * 400, "<answer>1</answer>")[kind - 1]


class Uncensored(ForcedPolicy):
    """A sampler that lets image tokens through, as a careless engine would."""

    def __init__(self, policy, **settings):
        super().__init__(policy, hostile, **settings)
        self.suppressed_token_ids = ()


def test_a_hostile_policy_cannot_break_a_step(tmp_path):
    config = GRPOConfig(
        steps=1,
        questions_per_step=2,
        group_size=6,
        micro_batch_size=6,
        updates_per_step=2,
        learning_rate=1e-2,
        save_steps=1,
        **SMALL,
    )
    final = train_grpo(
        random_checkpoint(),
        QUESTIONS,
        corpus(),
        retriever(),
        config,
        tmp_path,
        environment=ENVIRONMENT,
        sampler=lambda policy: Uncensored(policy, max_context_tokens=420),
        device="cpu",
    )
    rows = training_jobs.curves(tmp_path)
    assert [row["step"] for row in rows] == ["1", "2"]
    assert [row["rollout"] for row in rows] == ["1", ""]
    for row in rows:
        assert all(np.isfinite(float(value)) for value in row.values() if value)
    first = rows[0]
    assert float(first["stop_error"]) > 0
    assert float(first["stop_context_overflow"]) > 0
    assert float(first["untrained_broken"]) == pytest.approx(
        12 * (float(first["stop_error"]) + float(first["stop_context_overflow"]))
    )
    assert float(first["finish_rate"]) > 0
    assert float(first["trained_tokens"]) > 0
    assert float(rows[1]["sampler_gap_max"]) > 1e-3  # the second update of a rollout is off policy
    assert (final / "adapter_model.safetensors").is_file()


def test_the_loader_gives_whole_groups_as_often_as_the_rollout_is_used():
    config = GRPOConfig(questions_per_step=2, group_size=3)
    sampler = QuestionSampler([4, 1, 0, 2], config, repeats=2)
    rows = list(sampler)
    assert len(rows) == len(sampler) == 24
    assert [batch for batch in batched(rows, 6)] == [[4, 4, 4, 1, 1, 1]] * 2 + [[0, 0, 0, 2, 2, 2]] * 2


def test_dull_groups_are_replaced_by_other_questions(trainer, monkeypatch):
    asked = []

    def roll(questions, rows, step, attempt):
        asked.append((list(questions), list(rows)))
        values = [float(row % 2) if questions[i] == 3 or attempt == 2 else 0.5 for i, row in enumerate(rows)]
        return [rewarded(f"{row}", reward=value) for row, value in zip(rows, values, strict=True)]

    monkeypatch.setattr(trainer, "_roll", roll)
    monkeypatch.setattr(trainer, "config", dataclasses.replace(trainer.config, resample_rounds=3))
    own, everyone = trainer._sample([3] * 4 + [0] * 4, step=0)
    assert own == everyone
    assert asked[0] == ([3] * 4 + [0] * 4, list(range(8)))
    assert asked[1][1] == [4, 5, 6, 7]
    assert len(set(asked[1][0])) == 1
    assert len(asked) <= 3
    assert [t.total_reward for t in everyone] == [0, 1] * 4


# Runs.


def golden_run(folder) -> list[dict[str, float]]:
    config = GRPOConfig(
        steps=20,
        questions_per_step=1,
        group_size=2,
        micro_batch_size=2,
        learning_rate=5e-3,
        kl_coefficient=0.05,
        save_steps=100,
        **SMALL,
    )
    train_grpo(
        random_checkpoint(),
        QUESTIONS,
        corpus(),
        retriever(),
        config,
        folder,
        environment=dataclasses.replace(ENVIRONMENT, max_turns=2),
        sampler=lambda policy: ForcedPolicy(policy, by_question),
        seed=1,
        device="cpu",
    )
    return [
        {name: float(row[name]) for name in ("loss", "grad_norm", "kl", "entropy")}
        for row in training_jobs.curves(folder)
    ]


def test_twenty_steps_give_the_golden_numbers(tmp_path):
    """Forced replies, so that rounding on another machine cannot change what is sampled. To write the file anew:
    python tests/test_grpo_trainer.py"""
    golden = json.loads(GOLDEN.read_text())
    rows = golden_run(tmp_path)
    assert len(rows) == len(golden) == 20
    for row, expected in zip(rows, golden, strict=True):
        assert row == pytest.approx(expected, rel=2e-2, abs=2e-4)
    assert rows[0]["kl"] == 0
    assert rows[-1]["kl"] > rows[1]["kl"] > 0


@pytest.fixture(scope="module")
def whole_run():
    folder = scratch() / "grpo-whole"
    return folder, training_jobs.run_grpo(trained_checkpoint(), folder)


def test_a_run_learns_from_images_that_entered_in_mid_trajectory(whole_run):
    folder = whole_run[0]
    rows = training_jobs.curves(folder)
    assert [row["step"] for row in rows] == ["1", "2", "3"]
    assert all(float(row["sampler_gap_max"]) < 1e-4 for row in rows)
    assert any(float(row["images"]) > 0 for row in rows)
    assert any(float(row["grad_norm"]) > 0 for row in rows)
    for step, row in enumerate(rows, 1):
        trajectories = read_trajectories(folder / "trajectories" / f"step_{step:05d}.parquet")
        assert np.mean([t.total_reward for t in trajectories]) == pytest.approx(float(row["reward"]))
        assert len({(t.question_id, t.seed) for t in trajectories}) == 8


@pytest.mark.parametrize(
    ("rollout", "place", "steps"),
    [(3, "rollout", ["1", "2"]), (2, "update", ["1"]), (2, "checkpoint", ["1", "2"]), (3, "update", ["1", "2"])],
)
def test_killed_and_resumed_ends_as_if_it_had_never_stopped(whole_run, rollout, place, steps):
    """Checkpoints are written every second step: what came after the last one is done again, to the same end."""
    folder = scratch() / f"grpo-killed-{rollout}-{place}"
    process = training_jobs.start(
        training_jobs.run_grpo, trained_checkpoint(), folder, die_at_rollout=rollout, die_in=place
    )
    assert training_jobs.finish([process]) == [-signal.SIGKILL]
    assert [row["step"] for row in training_jobs.curves(folder)] == steps
    resumed = training_jobs.run_grpo(trained_checkpoint(), folder)
    assert training_jobs.curves(folder) == training_jobs.curves(whole_run[0])
    name = "adapter_model.safetensors"
    assert (resumed / name).read_bytes() == (whole_run[1] / name).read_bytes()


def test_a_finished_run_is_not_run_again(whole_run):
    before = training_jobs.curves(whole_run[0])
    assert training_jobs.run_grpo(trained_checkpoint(), whole_run[0], die_at_rollout=1) == whole_run[1]
    assert training_jobs.curves(whole_run[0]) == before


def test_all_weights_can_be_trained_against_a_frozen_copy(tmp_path):
    from safetensors.torch import load_file

    settings = SMALL | {"lora_rank": 0, "learning_rate": 1e-3, "steps": 2}
    final = train_grpo(
        random_checkpoint(),
        QUESTIONS[1:2],
        corpus(),
        retriever(),
        GRPOConfig(questions_per_step=1, group_size=2, micro_batch_size=2, save_steps=9, **settings),
        tmp_path,
        environment=ENVIRONMENT,
        sampler=lambda policy: ForcedPolicy(policy, by_question),
        device="cpu",
    )
    rows = training_jobs.curves(tmp_path)
    assert abs(float(rows[0]["kl"])) < 1e-6
    assert float(rows[1]["kl"]) > 1e-6
    before, after = (load_file(folder / "model.safetensors") for folder in (random_checkpoint(), final))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all("visual" not in name for name in changed)


def test_two_processes_equal_one(whole_run):
    folder = scratch() / "grpo-two"
    processes = training_jobs.start_together(2, training_jobs.run_grpo, trained_checkpoint(), folder, steps=2)
    assert training_jobs.finish(processes) == [0, 0]
    alone = training_jobs.curves(whole_run[0])[:2]
    for row, expected in zip(training_jobs.curves(folder), alone, strict=True):
        assert row.keys() == expected.keys()
        for name in set(row) - {"sampler_gap", "sampler_gap_max", "epoch"}:
            assert float(row[name]) == pytest.approx(float(expected[name]), rel=1e-3, abs=1e-5), name
    for step in (1, 2):
        own, theirs = (
            read_trajectories(path / "trajectories" / f"step_{step:05d}.parquet") for path in (whole_run[0], folder)
        )
        assert [t.tokens().token_ids for t in own] == [t.tokens().token_ids for t in theirs]


def of_many_lengths(conversation, seed) -> str:
    """No two replies are the same, and how often a trajectory searches does not depend on its question."""
    thought = f"<think>{'so ' * (seed % 9)}</think>"
    searches_on = len(conversation) < 5 and seed % 2
    return thought + ("<search>page 2</search>" if searches_on else f"<answer>{seed}</answer>")


def test_every_update_of_a_rollout_trains_on_whole_groups(trainer, monkeypatch):
    """Trap T15: neither is a group cut, nor do micro-batches of equal length gather trajectories of several."""
    monkeypatch.setattr(trainer, "sampler", lambda policy: ForcedPolicy(policy, of_many_lengths, temperature=0.7))
    monkeypatch.setattr(trainer, "config", dataclasses.replace(trainer.config, updates_per_step=2))
    monkeypatch.setattr(trainer.args, "per_device_train_batch_size", 2)
    batches = trainer._collect([3] * 4 + [0] * 4)
    rolled = read_trajectories(trainer.folder / "trajectories" / "step_00001.parquet")
    tokens = [t.tokens().token_ids for t in rolled]
    by_length = sorted(tokens, key=len)
    assert {*by_length[:4]} not in ({*tokens[:4]}, {*tokens[4:]})  # by length alone the groups would be mixed
    trained = [[item.example.context.token_ids for item in batch] for batch in batches]
    assert [len(batch) for batch in trained] == [2] * 4
    assert [{*trained[0], *trained[1]}, {*trained[2], *trained[3]}] == [{*tokens[:4]}, {*tokens[4:]}]


def test_gold_pages_and_answers_of_the_questions_reach_the_reward(trainer, monkeypatch):
    """Trap S5: the released converter drops the columns that its trainer reads."""
    monkeypatch.setattr(trainer, "sampler", lambda policy: ForcedPolicy(policy, by_question))
    asked = [trainer.train_dataset[i]["question"] for i in (1, 3)]
    found = trainer._roll(asked, [0, 1], step=0, attempt=0)
    for trajectory, question in zip(found, (QUESTIONS[1], QUESTIONS[3]), strict=True):
        assert trajectory.gold_page_ids == question.gold_page_ids
        assert trajectory.reference_answer == question.reference_answer
        assert trajectory.rewards["retrieval"][0] == 1


def test_the_warm_up_lasts_the_steps_that_its_only_setting_names(tmp_path):
    """Trap T16: the released script sets a share of the steps and their number, and the number wins unseen."""
    assert [field.name for field in dataclasses.fields(GRPOConfig) if "warmup" in field.name] == ["warmup_steps"]
    config = GRPOConfig(questions_per_step=2, group_size=4, micro_batch_size=4, updates_per_step=2, warmup_steps=7)
    arguments = _arguments(config, tmp_path, seed=0, on_gpu=False)
    assert arguments.get_warmup_steps(arguments.max_steps) == 7
    paper = PRESETS["paper"].grpo
    assert paper.warmup_steps == round(0.285 * paper.steps * paper.updates_per_step * paper.iterations)


if __name__ == "__main__":
    torch.set_num_threads(1)
    GOLDEN.write_text(json.dumps(golden_run(scratch() / "golden"), indent=1) + "\n")


def test_weights_that_deepspeed_changed_unseen_are_taken_for_new(trainer, monkeypatch):
    """Its optimizer writes through `.data`, which no version tells; samplers and caches would keep the first policy."""
    parameters = list(trainer.model.parameters())
    before, seen = weights_state(parameters), []

    def sample(*_):
        seen.append(weights_state(parameters))
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "_sample", sample)
    for is_deepspeed, changed in ((False, False), (True, True)):
        monkeypatch.setattr(trainer, "is_deepspeed_enabled", is_deepspeed)
        with pytest.raises(KeyboardInterrupt):
            trainer._collect([0])
        assert (seen[-1] != before) is changed
