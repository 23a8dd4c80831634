"""bench_trl: what stock TRL reads and is shown is what the environment reads and shows."""

from __future__ import annotations

import dataclasses

import pytest
from tiny_agent import ENVIRONMENT, QUESTIONS, corpus, random_checkpoint, random_policy, retriever

pytest.importorskip("torch")

from vrag_lib import bench_trl
from vrag_lib.bench import BenchmarkError
from vrag_lib.environment import Environment
from vrag_lib.trajectory import Turn

FREE = dataclasses.replace(ENVIRONMENT, max_invalid_streak=0)


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    model, processor = bench_trl.stock_model(random_checkpoint(), random_policy())
    folder = tmp_path_factory.mktemp("stock")
    return bench_trl.stock_trainer(
        model, processor, QUESTIONS, [0.0] * 8, corpus(), retriever(), FREE, folder,
        num_generations=2, per_device_train_batch_size=8,
    )  # fmt: skip


@pytest.mark.parametrize(
    "reply",
    [
        "<think>why?</think>\n<search> page 2 </search>",
        "<bbox>[1, 2, 3, 4]</bbox>",
        "no action\n at all",
        "<search>never closed",
        "<think>half a thought<search>x</search>",
        "<|im_end|>",
    ],
)
def test_every_reply_without_an_answer_is_a_call_with_all_of_it(trainer, reply):
    parsed = trainer._tokenizer.parse_response(reply, prefix="<|im_start|>assistant\n")
    function = {"name": "act", "arguments": {"reply": reply}}
    assert parsed["tool_calls"] == [{"type": "function", "function": function}]


def test_an_answer_calls_nothing(trainer):
    reply = "<think>I can read it.</think>\n<answer>7</answer>"
    parsed = trainer._tokenizer.parse_response(reply, prefix="<|im_start|>assistant\n")
    assert "tool_calls" not in parsed and parsed["content"] == reply


def test_prompts_and_observations_become_the_tokens_that_our_policy_reads(trainer):
    tool = trainer._environment_pool[None][0]
    asked = tool.reset(question=2)
    prompt = [{"role": "user", "content": asked}]
    ids = trainer.processing_class.apply_chat_template([prompt], add_generation_prompt=True, tokenize=True)[0]
    ours = Environment(corpus(), retriever(), FREE)
    turns = [Turn("user", ours.reset(QUESTIONS[2].query).text)]
    assert list(random_policy().encode(turns).token_ids) == list(ids)
    for reply in ("<search>page 3</search>", "<bbox>[0, 0, 60, 60]</bbox>", "nothing"):
        said = random_policy()._text_ids(reply)
        seen = ours.step(reply)
        turns += [Turn("assistant", reply, token_ids=tuple(said)), Turn("user", seen.text, images=seen.images)]
        ids = [
            *ids,
            *said,
            *trainer._get_tool_suffix_ids([{"role": "tool", "name": "act", "content": tool.act(reply)}]),
        ]
        assert list(random_policy().encode(turns).token_ids) == ids


def test_a_tokenizer_that_spells_action_tags_is_refused(monkeypatch):
    monkeypatch.setattr(bench_trl, "STOP_STRINGS", ("</search>", "</look>"))
    with pytest.raises(BenchmarkError, match="spells </look> in several; add the action tags"):
        bench_trl.stock_model(random_checkpoint(), random_policy())
