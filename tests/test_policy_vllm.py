"""vLLM samples what the Transformers policy would, from the same tokens, and follows the weights under training.

The tests marked `vllm` need vLLM (`make test-vllm`) and are skipped without it; the others put a fake in its place.
"""

from __future__ import annotations

import csv
import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import training_jobs
from tiny_agent import (
    ENVIRONMENT,
    QUESTIONS,
    SCRIPTS,
    corpus,
    random_checkpoint,
    random_policy,
    retriever,
    trained_checkpoint,
)

from vrag_lib.actions import STOP_STRINGS
from vrag_lib.config import ConfigError, RolloutConfig, from_dict, to_dict
from vrag_lib.environment import Environment
from vrag_lib.factory import make_policy, make_sampler
from vrag_lib.policy import Policy, Reply
from vrag_lib.presets import PRESETS, load_config
from vrag_lib.trajectory import StopReason, Trajectory, Turn

torch = pytest.importorskip("torch")

from vrag_lib.grpo import GRPOConfig, train_grpo  # noqa: E402
from vrag_lib.policy_transformers import TransformersPolicy  # noqa: E402
from vrag_lib.policy_vllm import MAX_IMAGES, VLLMPolicy  # noqa: E402
from vrag_lib.training import lora_config  # noqa: E402
from vrag_lib.training_batch import example_of, token_logprobs  # noqa: E402
from vrag_lib.vllm_weights import VLLMSampler, merged_weights  # noqa: E402

SCALE_POLICY = Path(__file__).parent.parent / "data" / "scale_policy"
LIMITS = {"max_reply_tokens": 24, "max_context_tokens": 1024, "batch_size": 8}


def conversations() -> list[list[Turn]]:
    """What stands before the last reply of each script: no, one, two and three images, one to four turns."""
    found = []
    for question, script in zip(QUESTIONS, SCRIPTS, strict=True):
        environment = Environment(corpus(), retriever(), ENVIRONMENT)
        seen = environment.reset(question.query)
        turns = [Turn("user", seen.text, images=seen.images)]
        for reply in script[:-1]:
            seen = environment.step(reply, None)
            turns += [Turn("assistant", reply), Turn("user", seen.text, images=seen.images)]
        found.append(turns)
    assert [sum(len(turn.images) for turn in turns) for turns in found] == [0, 1, 2, 3]
    return found


# Settings.


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("rollout.engine=sglang", "rollout.engine is one of transformers, vllm, not 'sglang'"),
        ("rollout.gpu_memory_utilization=1.5", "rollout.gpu_memory_utilization is a share"),
        ("rollout.cpu_cache_mib=0", "rollout.cpu_cache_mib is at least 1"),
    ],
)
def test_settings_that_cannot_be_are_named(setting, message):
    config = load_config("laptop", [setting])
    for make in (lambda: make_policy(corpus(), config), lambda: make_sampler("checkpoint", corpus(), config)):
        with pytest.raises(ConfigError, match=message):
            make()


def test_without_vllm_the_error_says_what_helps(monkeypatch):
    whole = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "vllm" else whole(name, *a))
    config = load_config("laptop", ["rollout.engine=vllm", "policy.kind=transformers", "policy.model=somewhere"])
    for make in (lambda: make_policy(corpus(), config), lambda: make_sampler("checkpoint", corpus(), config)):
        with pytest.raises(ConfigError, match=r"needs the package vllm: .*make test-vllm.*engine=transformers"):
            make()


def test_gpu_presets_roll_out_in_vllm_and_the_others_in_the_model_under_training():
    """All weights of 7B, gathered in float32 on each card, leave an engine no room (`test_memory`)."""
    assert {name: config.rollout.engine for name, config in PRESETS.items()} == {
        "laptop": "transformers",
        "laptop_legible": "transformers",
        "gpu_3b": "vllm",
        "gpu_7b": "vllm",
        "paper": "transformers",
    }
    assert make_sampler("checkpoint", corpus(), PRESETS["laptop"]) is None


def test_a_snapshot_from_before_there_were_engines_is_read():
    data = to_dict(PRESETS["laptop"])
    del data["rollout"]
    assert from_dict(data) == PRESETS["laptop"]


# The policy round an engine that is not there.


class FakeEngine:
    """Expands image placeholders as vLLM does, and says `script` in turn, one token's log-prob being -1, -2, ..."""

    def __init__(self, policy, script, tokens_per_image=None):
        self.policy, self.script, self.tokens_per_image = policy, list(script), tokens_per_image
        self.calls: list[tuple[list, list, object]] = []

    def generate(self, prompts, params, *, use_tqdm, lora_request):
        self.calls.append((prompts, params, lora_request))
        return [self.output(prompt, text) for prompt, text in zip(prompts, self.script, strict=False)]

    def output(self, prompt, text):
        images = iter(prompt.get("multi_modal_data", {}).get("image", ()))
        pad, ids = self.policy._id("<|image_pad|>"), []
        for token in prompt["prompt_token_ids"]:
            count = 1
            if token == pad:
                image = next(images)
                count = self.tokens_per_image or image.width * image.height // 28**2
            ids += [token] * count
        said = self.policy.tokenizer.encode(text)
        entries = [{token: SimpleNamespace(logprob=-1.0 - i)} for i, token in enumerate(said)]
        sampled = SimpleNamespace(token_ids=said, logprobs=entries, finish_reason="stop", stop_reason=None)
        return SimpleNamespace(prompt_token_ids=ids, outputs=[sampled])


@pytest.fixture
def faked(monkeypatch):
    """A VLLMPolicy round a FakeEngine, by what that is to say."""
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=dict))
    own = random_policy()

    def make(script, tokens_per_image=None, **limits) -> VLLMPolicy:
        model = own.model
        policy = VLLMPolicy(None, own.processor, model.config, model.generation_config, corpus(), **LIMITS | limits)
        policy.engine = FakeEngine(policy, script, tokens_per_image)
        return policy

    return make


def test_one_placeholder_per_image_goes_out_and_the_whole_context_comes_back(faked):
    said = ["<answer>1</answer>", "<search>page 2</search>", "<think>one</think><|im_end|>", "<answer>4</answer>"]
    policy = faked(said, temperature=0.5)
    assert isinstance(policy, Policy)
    asked = conversations()
    replies = policy.generate(asked, seeds=[5, 6, 7, 8])
    ((prompts, params, adapter),) = policy.engine.calls
    assert adapter is None
    pad = policy._id("<|image_pad|>")
    for number, (prompt, turns, reply) in enumerate(zip(prompts, asked, replies, strict=True)):
        context = random_policy().encode(turns)  # the Transformers policy's
        assert reply.prompt_token_ids == context.token_ids
        assert prompt["prompt_token_ids"].count(pad) == number
        assert [i for i in prompt["prompt_token_ids"] if i != pad] == [i for i in context.token_ids if i != pad]
        shown = [image.view.shown for image in context.images]
        sizes = [image.size for image in prompt.get("multi_modal_data", {}).get("image", ())]
        assert sizes == [(size.width, size.height) for size in shown]
    assert [reply.text for reply in replies] == [*said[:2], "<think>one</think>", said[3]]
    assert {reply.finish_reason for reply in replies} == {"stop"}
    assert replies[0].logprobs == tuple(-1.0 - i for i in range(len(replies[0].token_ids)))
    assert [p["seed"] for p in params] == [5, 6, 7, 8]
    assert params[0]["temperature"] == 0.5
    assert set(params[0]["logit_bias"]) == set(policy.suppressed_token_ids)
    assert params[0]["stop"] == list(STOP_STRINGS)
    assert policy._im_end in params[0]["stop_token_ids"]


def test_a_full_context_is_reported_and_a_nearly_full_one_gets_what_is_left(faked):
    asked = conversations()[2]
    length = len(random_policy().encode(asked).token_ids)
    full = faked([], max_context_tokens=length)
    assert full.generate([asked], seeds=[0])[0].finish_reason == "overflow"
    assert full.engine.calls == []
    room = len(random_policy().tokenizer.encode("and then"))
    nearly = faked(["and then"], max_context_tokens=length + room)
    (reply,) = nearly.generate([asked], seeds=[0])
    assert nearly.engine.calls[0][1][0]["max_tokens"] == room
    assert reply.finish_reason == "length"


def test_images_that_do_not_fit_their_places_cost_their_conversation_only(faked):
    good, bad = conversations()[1:3]
    pad = random_policy()._id("<|image_pad|>")
    forged = [Turn("user", "x", token_ids=(pad,)), *good[:1]]
    many = [replace(bad[-1], images=bad[-1].images * (MAX_IMAGES + 1))]
    policy = faked(["<answer>1</answer>"])
    replies = policy.generate([forged, good, many], seeds=[0, 1, 2])
    assert "places for 1 images and 0 images" in replies[0].error
    assert replies[1].text == "<answer>1</answer>"
    assert f"started for {MAX_IMAGES} images" in replies[2].error
    assert len(policy.engine.calls[0][0]) == 1


def test_an_engine_that_prepares_images_otherwise_is_refused(faked):
    with pytest.raises(RuntimeError, match="prepared an image in another way"):
        faked(["<answer>1</answer>"], tokens_per_image=3).generate(conversations()[1:2], seeds=[0])


def test_a_reply_that_ends_for_no_reason_is_refused(faked):
    with pytest.raises(RuntimeError, match="ended a reply for stop"):
        faked(["and then"]).generate(conversations()[:1], seeds=[0])


# The weights' way from the trainer to the engine.


class Recorder:
    """Stands for a VLLMPolicy: remembers what it was given, and whether an adapter was there to be read."""

    def __init__(self):
        self.given: list = []
        self.engine = SimpleNamespace(sleep=None, wake_up=None)

    def use_adapter(self, folder, number):
        assert (folder / "adapter_model.safetensors").is_file()
        self.given.append((folder, number))

    def use_weights(self, weights):
        self.given.append(dict(weights))


@pytest.fixture
def sampler(monkeypatch):
    whole = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: name == "vllm" or whole(name, *a))
    recorder, started = Recorder(), []
    monkeypatch.setattr(VLLMPolicy, "from_pretrained", lambda *a, **settings: started.append(settings) or recorder)
    made = VLLMSampler(random_checkpoint(), corpus(), RolloutConfig(engine="vllm"))
    made.started, made.recorder = started, recorder
    return made


def fresh_agent() -> TransformersPolicy:
    return TransformersPolicy.from_pretrained(random_checkpoint(), corpus(), device="cpu", temperature=0.7, **LIMITS)


def test_every_update_of_an_adapter_has_a_number_and_a_folder_of_its_own(sampler):
    from peft import get_peft_model

    agent = fresh_agent()
    agent.model = get_peft_model(agent.model, lora_config(4, 8))
    weights = [p for p in agent.model.parameters() if p.requires_grad]
    for _ in range(3):
        assert sampler(agent) is sampler(agent) is sampler.recorder
        sampler.rest()
        with torch.no_grad():
            weights[0] += 1
    folders, numbers = zip(*sampler.recorder.given, strict=True)
    assert numbers == (1, 2, 3)  # weights that have not changed are not sent again
    assert len(set(folders)) == 3
    assert [folder.exists() for folder in folders] == [False, False, True]
    (started,) = sampler.started
    assert started["lora_rank"] == 4
    assert started["dtype"] == "float32"
    assert started["device"] == "cpu"
    assert {name: started[name] for name in ("temperature", *LIMITS)} == {"temperature": 0.7} | LIMITS


def test_without_an_adapter_all_weights_are_handed_over(sampler):
    agent = fresh_agent()
    sampler(agent)
    (given,) = sampler.recorder.given
    expected = agent.model.state_dict()
    assert given.keys() == expected.keys()
    assert all(torch.equal(given[name], value) for name, value in expected.items())
    assert sampler.started[0]["lora_rank"] == 0


def test_a_merged_adapter_goes_out_in_the_weights_and_stays_an_adapter_here(sampler):
    from peft import get_peft_model

    agent, plain = fresh_agent(), fresh_agent().model
    agent.model = get_peft_model(agent.model, lora_config(4, 8))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in agent.model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    sampler.settings = replace(sampler.settings, merge_adapter=True)
    sampler(agent)
    (given,) = sampler.recorder.given
    assert sampler.started[0]["lora_rank"] == 0
    plain.load_state_dict(given)
    inputs = agent.model_inputs([agent.encode(conversations()[2])])
    with torch.no_grad():
        expected, merged = agent.model(**inputs).logits, plain(**inputs).logits
        with agent.model.disable_adapter():
            assert (agent.model(**inputs).logits - expected).abs().max() > 0.1
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-4)


def test_adapters_of_the_vision_tower_and_shards_are_refused(sampler):
    from peft import get_peft_model

    agent = fresh_agent()
    whole = agent.model
    agent.model = get_peft_model(whole, lora_config(4, 8, r".*(visual|language_model).*\.up_proj"))
    with pytest.raises(ConfigError, match="cannot adapt the vision tower"):
        sampler(agent)
    agent.model = whole
    next(whole.parameters()).ds_id = 0
    with pytest.raises(ConfigError, match="not shards"):
        sampler(agent)


def test_the_engine_rests_after_each_rollout(tmp_path):
    events = []

    class Engine:
        def __call__(self, agent):
            events.append("sync")
            return agent

        def rest(self):
            events.append("rest")

    run(random_checkpoint(), tmp_path, Engine(), lora_rank=4)
    assert events == ["sync", "rest"] * 2


def train(checkpoint, folder, sampler, **settings) -> None:
    """Two steps of GRPO with a reward that differs within groups."""
    config = GRPOConfig(
        steps=2,
        questions_per_step=4,
        group_size=2,
        micro_batch_size=4,
        learning_rate=1e-3,
        warmup_steps=0,
        rollout_batch_size=8,
        **{"max_reply_tokens": 24, "max_context_tokens": 1024, "temperature": 0.7} | settings,
    )
    train_grpo(
        checkpoint,
        QUESTIONS,
        corpus(),
        retriever(),
        config,
        folder,
        environment=ENVIRONMENT,
        reward=lambda t: t.with_rewards({"parity": (float(t.seed % 2), 1.0)}),
        sampler=sampler,
        device="cpu",
    )


def run(checkpoint, folder, sampler, **settings) -> list[dict[str, float]]:
    """`train`; the rows of its curves."""
    train(checkpoint, folder, sampler, **settings)
    return read(folder)


def read(folder) -> list[dict[str, float]]:
    with (Path(folder) / "metrics.csv").open(newline="") as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


# vLLM itself.


@pytest.fixture(scope="module")
def agent():
    """The shipped scale policy in Transformers, which the trainer trains."""
    torch.set_num_threads(1)
    return TransformersPolicy.from_pretrained(SCALE_POLICY, corpus(), device="cpu", **LIMITS)


def start(**settings) -> VLLMPolicy:
    pytest.importorskip("vllm", reason="run by make test-vllm")
    torch.set_num_threads(1)
    return VLLMPolicy.from_pretrained(SCALE_POLICY, corpus(), device="cpu", **LIMITS | settings)


@pytest.fixture(scope="module")
def adapted():
    return start(lora_rank=8)


@pytest.fixture(scope="module")
def plain():
    return start()


def trained_logprobs(agent: TransformersPolicy, turns: list[Turn], reply: Reply) -> torch.Tensor:
    """The trainer's log-probs (n,) of a reply."""
    said = Turn("assistant", reply.text, token_ids=reply.token_ids, logprobs=reply.logprobs)
    example = example_of(agent, Trajectory("t", "q", "?", (*turns, said), StopReason.ANSWER))
    place = len(example.turn_index) - len(reply.token_ids)
    with torch.no_grad():
        logprobs, _ = token_logprobs(agent.model, agent, [example])
    assert example.positions[-len(reply.token_ids)] == place
    return logprobs[-len(reply.token_ids) :]


def largest_gap(agent: TransformersPolicy, replies: list[Reply]) -> float:
    """Largest difference of the replies' log-probs to the trainer's."""
    pairs = zip(conversations(), replies, strict=True)
    return max(float((trained_logprobs(agent, t, r) - torch.tensor(r.logprobs)).abs().max()) for t, r in pairs)


def with_temperature(monkeypatch, temperature: float, *policies) -> None:
    for policy in policies:
        monkeypatch.setattr(policy, "temperature", temperature)


@pytest.mark.vllm
def test_greedy_replies_are_those_of_transformers(adapted, agent, monkeypatch):
    with_temperature(monkeypatch, 0.0, adapted, agent)
    ours, theirs = agent.generate(conversations()), adapted.generate(conversations())
    for own, other in zip(ours, theirs, strict=True):
        assert (own.token_ids, own.text, own.finish_reason) == (other.token_ids, other.text, other.finish_reason)
        assert own.prompt_token_ids == other.prompt_token_ids
        assert own.logprobs == pytest.approx(other.logprobs, abs=1e-4)


@pytest.mark.vllm
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampled_logprobs_are_the_trainer_s(adapted, agent, monkeypatch, temperature):
    with_temperature(monkeypatch, temperature, adapted, agent)
    replies = adapted.generate(conversations(), seeds=[1, 2, 3, 4])
    assert largest_gap(agent, replies) < 1e-4
    again = adapted.generate(conversations()[::-1], seeds=[4, 3, 2, 1])[::-1]
    assert [r.token_ids for r in again] == [r.token_ids for r in replies]  # the batch does not matter
    other = adapted.generate(conversations(), seeds=[5, 6, 7, 8])
    assert [r.token_ids for r in other] != [r.token_ids for r in replies]


@pytest.mark.vllm
def test_a_conversation_goes_on_from_the_tokens_that_were_sampled(adapted, agent, monkeypatch):
    with_temperature(monkeypatch, 1.0, adapted, agent)
    turns = conversations()[1]
    for seed in range(3):
        (reply,) = adapted.generate([turns], seeds=[seed])
        assert reply.prompt_token_ids == agent.encode(turns).token_ids
        gap = (trained_logprobs(agent, turns, reply) - torch.tensor(reply.logprobs)).abs().max()
        assert gap < 1e-4
        said = Turn("assistant", reply.text, token_ids=reply.token_ids, logprobs=reply.logprobs)
        turns = [*turns, said, Turn("user", "look again", images=conversations()[3][-1].images)]


@pytest.mark.vllm
def test_an_adapter_swapped_at_every_step_is_followed(adapted, monkeypatch):
    from peft import get_peft_model

    trained = TransformersPolicy.from_pretrained(SCALE_POLICY, corpus(), device="cpu", **LIMITS)
    trained.model = get_peft_model(trained.model, lora_config(8, 16))
    sampler = VLLMSampler(SCALE_POLICY, corpus(), RolloutConfig(engine="vllm"))
    sampler.policy = adapted
    torch.manual_seed(0)
    before = None
    try:
        for _ in range(4):
            replies = sampler(trained).generate(conversations(), seeds=[1, 2, 3, 4])
            assert largest_gap(trained, replies) < 1e-4
            assert replies != before
            before = replies
            with torch.no_grad():
                for parameter in trained.model.parameters():
                    if parameter.requires_grad:
                        parameter += 0.05 * torch.randn_like(parameter)
    finally:
        adapted._adapter = None


@pytest.mark.vllm
def test_an_adapter_is_a_model(tmp_path):
    """What RL leaves is measured as it is: merged into bfloat16 much of it would be rounded away."""
    pytest.importorskip("vllm", reason="run by make test-vllm")
    trained = TransformersPolicy.from_pretrained(SCALE_POLICY, corpus(), device="cpu", **LIMITS)
    from peft import get_peft_model

    trained.model = get_peft_model(trained.model, lora_config(8, 16))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in trained.model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    trained.model.peft_config["default"].base_model_name_or_path = str(SCALE_POLICY)
    trained.model.save_pretrained(tmp_path / "adapter")
    policy = VLLMPolicy.from_pretrained(tmp_path / "adapter", corpus(), device="cpu", **LIMITS)
    assert largest_gap(trained, policy.generate(conversations(), seeds=[1, 2, 3, 4])) < 1e-4


def test_vllm_is_not_asked_for_another_card_than_its_first(monkeypatch):
    monkeypatch.setattr("vrag_lib.policy_vllm.require_vllm", lambda: None)
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES=1"):
        VLLMPolicy.from_pretrained(SCALE_POLICY, None, device="cuda:1")


@pytest.mark.vllm
def test_all_weights_handed_over_are_followed_the_tied_head_and_the_vision_tower_too(plain):
    trained = TransformersPolicy.from_pretrained(SCALE_POLICY, corpus(), device="cpu", **LIMITS)
    torch.manual_seed(0)
    before = plain.generate(conversations(), seeds=[1, 2, 3, 4])
    for part in ("visual", "embed_tokens", "layers"):
        with torch.no_grad():
            for name, parameter in trained.model.named_parameters():
                if part in name:
                    parameter += 0.2 * parameter.std() * torch.randn_like(parameter)
        plain.use_weights(merged_weights(trained.model))
        replies = plain.generate(conversations(), seeds=[1, 2, 3, 4])
        assert largest_gap(trained, replies) < 1e-4
        assert replies[1:] != before[1:]
        before = replies


@pytest.mark.vllm
def test_image_tokens_cannot_be_sampled(plain):
    """By a model that wants nothing else: their rows of the head are three times that of what it would have said."""
    wanting = TransformersPolicy.from_pretrained(SCALE_POLICY, corpus(), device="cpu", temperature=0.0, **LIMITS)
    turns = conversations()[:1]
    said = wanting.generate(turns)[0].token_ids[0]
    rows = wanting.model.get_input_embeddings().weight
    with torch.no_grad():
        for token in wanting.suppressed_token_ids:
            rows[token] = 3 * rows[said]
        scores = wanting.model(**wanting.model_inputs([wanting.encode(turns[0])])).logits[0, -1]
    assert int(scores.argmax()) in wanting.suppressed_token_ids
    plain.use_weights(merged_weights(wanting.model))
    for reply in plain.generate(turns * 8, seeds=range(8)):
        assert not set(plain.suppressed_token_ids) & set(reply.token_ids)


@pytest.mark.vllm
def test_the_context_ends_where_it_ends_for_transformers(adapted, agent, monkeypatch):
    with_temperature(monkeypatch, 0.0, adapted, agent)
    turns = conversations()[3:]
    length = len(agent.encode(turns[0]).token_ids)
    for room, reason in ((0, "overflow"), (3, "length")):
        for policy in (adapted, agent):
            monkeypatch.setattr(policy, "max_context_tokens", length + room)
        (own,) = agent.generate(turns)
        (other,) = adapted.generate(turns)
        assert own.finish_reason == other.finish_reason == reason
        assert own.token_ids == other.token_ids
        assert len(own.token_ids or ()) == room


@pytest.mark.vllm
@pytest.mark.parametrize(("lora_rank", "merge"), [(4, False), (4, True), (0, False)])
def test_two_steps_of_grpo_sample_under_the_trainer_s_own_weights(tmp_path, lora_rank, merge):
    pytest.importorskip("vllm", reason="run by make test-vllm")
    checkpoint = trained_checkpoint()
    config = load_config("laptop", ["rollout.engine=vllm", f"rollout.merge_adapter={merge}"])
    rows = run(checkpoint, tmp_path, make_sampler(checkpoint, corpus(), config), lora_rank=lora_rank)
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert row["images"] > 0.5
        assert row["trained_tokens"] > 0
        assert row["grad_norm"] > 1e-3
        assert row["sampler_gap_max"] < 1e-4
    assert rows[1]["kl"] > 1e-6  # the second rollout was sampled under other weights than the first


def train_with_vllm(checkpoint, folder) -> None:
    torch.set_num_threads(1)
    config = load_config("laptop", ["rollout.engine=vllm"])
    train(checkpoint, folder, make_sampler(checkpoint, corpus(), config), lora_rank=4)


@pytest.mark.vllm
def test_two_processes_have_an_engine_each(tmp_path):
    pytest.importorskip("vllm", reason="run by make test-vllm")
    processes = training_jobs.start_together(2, train_with_vllm, trained_checkpoint(), tmp_path)
    assert training_jobs.finish(processes) == [0, 0]
    rows = read(tmp_path)
    assert max(row["sampler_gap_max"] for row in rows) < 1e-4
    assert rows[1]["kl"] > 1e-6
