"""SFT: the tokens and labels are those of rollouts, resuming is exact, merged adapters are the same model."""

from __future__ import annotations

import csv
import dataclasses
import json
import signal

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
    scratch,
    scripted,
    trained_checkpoint,
)

from vrag_lib.rollout import rollout
from vrag_lib.training import MetricsFile, last_checkpoint, merge_adapter
from vrag_lib.training_batch import example_of
from vrag_lib.trajectory import ImageRef, StopReason, Turn

torch = pytest.importorskip("torch")

from vrag_lib.policy_transformers import TransformersPolicy  # noqa: E402
from vrag_lib.sft import IGNORED, SFTConfig, collate, loss_mask_html, prepare, train_sft  # noqa: E402


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def policy():
    return random_policy()


@pytest.fixture(scope="module")
def rolled(policy):
    """The scripts again, sampled token by token: records with token ids."""
    odd = [1, 3, 5, 7]
    return rollout(
        ForcedPolicy(policy, lambda c, seed: by_question(c, 1)),
        QUESTIONS,
        corpus(),
        retriever(),
        ENVIRONMENT,
        seeds=odd,
    )


def test_the_coloured_mask_shows_replies_and_escapes_what_they_say(policy, rolled):
    import html
    import re

    for trajectory in rolled[:4]:
        page = loss_mask_html(policy, example_of(policy, trajectory))
        marked = [html.unescape(m).replace("↵<br>", "\n") for m in re.findall(r"<mark[^>]*>(.*?)</mark>", page)]
        said = [turn.text for turn in trajectory.replies]
        assert len(marked) == len(said) and all(m.startswith(text) for m, text in zip(marked, said, strict=True))
        assert "<think>" not in page and "<|image_pad|>" not in html.unescape(page)
        assert page.count("image tokens]") == len(trajectory.images)


def test_tokens_of_sft_are_the_tokens_of_the_rollout(policy, rolled):
    for text_only, sampled in zip(scripted(), rolled, strict=True):
        assert all(turn.token_ids is None for turn in text_only.turns)
        example = example_of(policy, text_only)
        tokens = sampled.tokens()
        assert example.context.token_ids == tokens.token_ids
        assert example.trained == tokens.sampled
        assert example.turn_index == tokens.turn_index
        assert example.context.images == sampled.images
    assert [len(t.images) for t in rolled] == [0, 1, 2, 3]


def test_trained_positions_decode_to_the_replies_and_nothing_else(policy):
    trajectories = scripted()
    data = prepare(policy, trajectories, SFTConfig(), corpus())
    batch = collate(policy, data.examples)
    assert batch["labels"].shape == batch["input_ids"].shape
    for row, trajectory in enumerate(trajectories):
        labels = batch["labels"][row]
        assert policy.tokenizer.decode(labels[labels != IGNORED]) == "".join(t.text for t in trajectory.replies)
        is_trained = labels != IGNORED
        assert (labels[is_trained] == batch["input_ids"][row][is_trained]).all()
        assert not is_trained[batch["attention_mask"][row] == 0].any()


def test_the_record_re_renders_to_the_same_pixels(policy):
    example = prepare(policy, scripted()[2:3], SFTConfig(), corpus()).examples[0]
    once, again = (collate(policy, [example])["pixel_values"] for _ in range(2))
    images = [ref.render(corpus()) for ref in scripted()[2].images]
    own = policy.processor.image_processor(images=images, do_resize=False, return_tensors="pt")["pixel_values"]
    assert torch.equal(once, again)
    assert torch.equal(once, own)


def test_invalid_replies_stay_in_the_context_but_are_not_trained_on(policy):
    trajectory = scripted([["no action here", "<answer>1</answer>"]] + [["<answer>1</answer>"]] * 3)[0]
    example = prepare(policy, [trajectory], SFTConfig(), corpus()).examples[0]
    trained = [t for t, is_trained in zip(example.context.token_ids, example.trained, strict=True) if is_trained]
    assert policy.tokenizer.decode(trained) == "<answer>1</answer>"
    assert "no action here" in policy.tokenizer.decode(example.context.token_ids)
    both = prepare(policy, [trajectory], SFTConfig(train_invalid=True), corpus()).examples[0]
    assert sum(both.trained) > sum(example.trained)


def test_what_cannot_be_trained_on_is_left_out_and_counted(policy, rolled):
    good = rolled[1]
    turns = good.turns
    reply = dataclasses.replace(turns[1], text="<search>another</search>")
    image = ImageRef("b_1", turns[2].images[0].view)
    pad = policy.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    forged = Turn("assistant", "<|image_pad|>", token_ids=(pad,), action=turns[1].action)
    bad = [
        dataclasses.replace(good, turns=turns[:1], stop_reason=StopReason.CONTEXT_OVERFLOW),
        dataclasses.replace(good, turns=(turns[0], reply, *turns[2:])),
        dataclasses.replace(good, turns=(*turns[:2], dataclasses.replace(turns[2], images=(image,)), *turns[3:])),
        dataclasses.replace(good, turns=(turns[0], forged, *turns[2:])),
        dataclasses.replace(good, turns=(turns[0], dataclasses.replace(turns[1], action=None))),
        rolled[3],
    ]
    data = prepare(policy, [good, *bad], SFTConfig(max_tokens=len(good.tokens().token_ids)), corpus())
    assert len(data.examples) == 1
    reasons = ("no_reply", "other_tokenizer", "unknown_page", "image_token", "nothing_trained", "too_long")
    assert data.left_out == dict.fromkeys(reasons, 1)
    with pytest.raises(ValueError, match=r"none of 1 trajectories can be trained on: .*no_reply"):
        train_sft(random_checkpoint(), bad[:1], corpus(), SFTConfig(), scratch() / "none", device="cpu")


def read(path):
    with path.open(newline="") as file:
        return [
            {k: v for k, v in row.items() if "runtime" not in k and "per_second" not in k}
            for row in csv.DictReader(file)
        ]


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole_run():
    folder = scratch() / "sft-whole"
    return folder, training_jobs.run_sft(random_checkpoint(), folder)


def test_killed_and_resumed_ends_as_if_it_had_never_stopped(whole_run):
    folder = scratch() / "sft-killed"
    second_half_of_step_3 = 6
    process = training_jobs.start(training_jobs.run_sft, random_checkpoint(), folder, second_half_of_step_3)
    assert training_jobs.finish([process]) == [-signal.SIGKILL]
    assert [row["step"] for row in read(folder / "metrics.csv")] == ["1", "2"]
    resumed = training_jobs.run_sft(random_checkpoint(), folder)
    assert weights(resumed) == weights(whole_run[1])
    assert read(folder / "metrics.csv") == read(whole_run[0] / "metrics.csv")


def test_one_row_per_step_with_loss_and_token_accuracy(whole_run):
    rows = read(whole_run[0] / "metrics.csv")
    assert [row["step"] for row in rows] == ["1", "2", "3", "4"]
    assert all(float(row["loss"]) > 0 and 0 <= float(row["mean_token_accuracy"]) <= 1 for row in rows)


def test_the_loss_is_the_mean_over_trained_tokens_however_the_batch_is_cut(policy, tmp_path):
    examples = prepare(policy, scripted(), SFTConfig(), corpus()).examples
    batch = collate(policy, examples)
    labels = batch.pop("labels")
    with torch.no_grad():
        logits = policy.model(**batch).logits
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED
    )
    norms = []
    for size in (1, 4):
        config = SFTConfig(epochs=1, batch_size=4, micro_batch_size=size, lora_rank=2, save_steps=100)
        train_sft(random_checkpoint(), scripted(), corpus(), config, tmp_path / str(size), device="cpu")
        (row,) = read(tmp_path / str(size) / "metrics.csv")
        assert float(row["loss"]) == pytest.approx(float(expected), rel=1e-5)
        norms.append(float(row["grad_norm"]))
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_vision_stays_frozen_and_the_language_model_moves(whole_run):
    from safetensors.torch import load_file

    before = load_file(random_checkpoint() / "model.safetensors")
    after = load_file(whole_run[1] / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all("visual" not in name for name in changed)
    assert any("visual" in name for name in before)


def test_a_checkpoint_in_half_precision_is_trained_in_full_and_left_in_half(tmp_path):
    from safetensors.torch import load_file
    from transformers import AutoModelForImageTextToText, AutoProcessor

    AutoModelForImageTextToText.from_pretrained(random_checkpoint()).half().save_pretrained(tmp_path / "half")
    AutoProcessor.from_pretrained(random_checkpoint()).save_pretrained(tmp_path / "half")
    config = SFTConfig(epochs=2, batch_size=2, micro_batch_size=2, learning_rate=1e-5, save_steps=1, warmup_ratio=0)
    final = train_sft(tmp_path / "half", scripted()[:2], corpus(), config, tmp_path / "run", device="cpu")
    assert {tensor.dtype for tensor in load_file(final / "model.safetensors").values()} == {torch.float16}
    (checkpoint,) = sorted((tmp_path / "run").glob("checkpoint-*"))[-1:]
    states = [load_file(path) for path in checkpoint.glob("*.safetensors")]
    kept = next(state for state in states if state.keys() == load_file(final / "model.safetensors").keys())
    rounded = {name: (tensor.half().float() - tensor).abs().max() for name, tensor in kept.items()}
    assert max(rounded.values()) > 0  # small updates are still there


def test_checkpoints_hold_no_pickle_and_a_half_written_one_is_passed_over(whole_run, tmp_path):
    files = [path for path in whole_run[0].rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".jinja", ".csv", ".md", ".txt"}
    for step, state in ((5, '{"global_step": 5}'), (10, '{"global_step": 10}'), (15, '{"global_st'), (20, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state is not None:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert last_checkpoint(tmp_path / "nowhere") is None


def test_a_merged_adapter_gives_the_logits_of_the_adapted_model(policy, tmp_path):
    from peft import PeftModel

    config = SFTConfig(epochs=2, batch_size=4, micro_batch_size=4, learning_rate=1e-2, lora_rank=4, save_steps=2)
    adapter = train_sft(
        random_checkpoint(), scripted(), corpus(), config, tmp_path / "run", validation=scripted()[:1], device="cpu"
    )
    last = read(tmp_path / "run" / "metrics.csv")[-1]
    assert float(last["eval_loss"]) > 0
    assert 0 <= float(last["eval_mean_token_accuracy"]) <= 1
    names = json.loads((adapter / "adapter_config.json").read_text())["target_modules"]
    assert "language_model" in str(names)
    merged = TransformersPolicy.from_pretrained(
        merge_adapter(random_checkpoint(), adapter, tmp_path / "merged"), corpus(), device="cpu"
    )
    own = TransformersPolicy.from_pretrained(random_checkpoint(), corpus(), device="cpu")
    batch = collate(policy, prepare(policy, scripted(), SFTConfig(), corpus()).examples)
    batch.pop("labels")
    with torch.no_grad():
        base = own.model(**batch).logits
        adapted = PeftModel.from_pretrained(own.model, adapter)(**batch).logits
        after = merged.model(**batch).logits
    assert (adapted - base).abs().max() > 0.1
    assert (after - adapted).abs().max() < 1e-4
    with pytest.raises(FileNotFoundError, match="holds no LoRA adapter"):
        merge_adapter(random_checkpoint(), tmp_path, tmp_path / "out")


def test_fine_tuned_on_scripts_the_agent_acts():
    policy = TransformersPolicy.from_pretrained(
        trained_checkpoint(), corpus(), device="cpu", temperature=0, max_reply_tokens=24
    )
    trajectories = rollout(policy, QUESTIONS, corpus(), retriever(), ENVIRONMENT)
    assert all(t.stop_reason is StopReason.ANSWER for t in trajectories)
    assert any(t.images for t in trajectories)


def test_metrics_of_steps_after_the_checkpoint_are_dropped_on_resuming(tmp_path):
    metrics = MetricsFile(tmp_path / "m.csv")
    for step in (1, 2, 3):
        metrics.add(step, {"loss": step / 3})
    metrics.add(3, {"eval_loss": 0.5})
    again = MetricsFile(tmp_path / "m.csv", step=2)
    again.add(3, {"loss": 1.0, "extra": 7})
    with (tmp_path / "m.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["loss"]) for row in rows] == [1 / 3, 2 / 3, 1.0]
    assert rows[2]["extra"] == "7"
    assert rows[0]["extra"] == ""
