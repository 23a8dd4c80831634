"""Expected memory: the parameters are those of the published models, the parts add up, and settings move them."""

from __future__ import annotations

import pytest

from vrag_lib.cli import main
from vrag_lib.config import ConfigError
from vrag_lib.memory import GIB, expected_memory
from vrag_lib.presets import load_config

pytest.importorskip("torch")


@pytest.mark.parametrize(("preset", "billions"), [("gpu_3b", 3.75), ("gpu_7b", 8.29)])
def test_weights_are_those_of_the_published_model_in_bfloat16(preset, billions):
    assert expected_memory(load_config(preset)).held["weights"] / 2e9 == pytest.approx(billions, abs=0.01)


def test_the_3b_fits_a_card_of_24_gb_and_the_7b_one_of_48():
    for preset, card in (("gpu_3b", 24), ("gpu_7b", 48)):
        for stage in ("sft", "grpo"):
            memory = expected_memory(load_config(preset), stage, card=card)
            assert memory.peak < 0.9 * card * GIB
            expected_memory(load_config(preset), stage, card=card - 1)  # such a card shows a program less
        assert memory.rollout["vLLM"] > 1.1 * memory.held["weights"]  # the engine holds a copy of them


def test_all_weights_of_the_7b_need_shards():
    config = load_config("paper")
    assert expected_memory(config).peak > 80 * GIB
    assert all(expected_memory(config, stage, shards=8, card=80).peak < 0.93 * 80 * GIB for stage in ("sft", "grpo"))
    held, shared = expected_memory(config).held, expected_memory(config, shards=8).held
    assert held.keys() == shared.keys() == {"weights", "gradients and AdamW", "reference", "retriever"}
    assert all(shared[part] == held[part] // 8 for part in held if part != "retriever")
    # One model at a time is gathered, the reference only where it is asked.
    gathered = expected_memory(config, shards=8)
    whole = held["weights"] - shared["weights"]
    assert gathered.rollout["weights gathered"] == gathered.logprobs["weights gathered"] == whole


def test_settings_move_what_they_should():
    base = expected_memory(load_config("gpu_3b"))
    longer = expected_memory(load_config("gpu_3b", ["grpo.max_context_tokens=16384"]))
    assert longer.update["logits"] == 2 * base.update["logits"]
    assert longer.held == base.held
    kept = expected_memory(load_config("gpu_3b", ["grpo.gradient_checkpointing=false"]))
    assert kept.update["activations"] > 5 * base.update["activations"]
    sampled_here = expected_memory(load_config("gpu_3b", ["rollout.engine=transformers"]))
    # 36 layers of keys and values, two heads of 128, two bytes, for 16 contexts of 8,192 tokens
    assert sampled_here.rollout["keys and values"] == 36 * 2 * 2 * 128 * 2 * 16 * 8192
    assert "reference" not in expected_memory(load_config("paper", ["grpo.kl_coefficient=0"])).held


def test_an_adapter_keeps_its_inputs_once_more():
    """What autograd keeps of a real decoder layer of the 3B was counted as 92,232 bytes a token without and 187,208
    with adapters on all seven matrices."""
    lora, whole = (
        expected_memory(load_config("gpu_3b", [f"grpo.lora_rank={rank}", "grpo.gradient_checkpointing=false"]))
        for rank in (64, 0)
    )
    tokens, layers = 8192, 36
    assert lora.update["activations"] / tokens / layers == pytest.approx(187_208, rel=0.03)
    assert whole.update["activations"] / tokens / layers / 2 == pytest.approx(92_232, rel=0.08)  # in float32


def test_a_share_in_which_the_engine_would_not_start_is_named():
    with pytest.raises(ConfigError, match=r"gives vLLM 7\.2 GiB of this card, and it takes at least 8\.\d to start"):
        expected_memory(load_config("gpu_3b", ["rollout.gpu_memory_utilization=0.3"]), card=24)


def test_what_is_unknown_is_named(capsys):
    with pytest.raises(ConfigError, match=r"Qwen2\.5-VL-72B"):
        expected_memory(load_config("gpu_7b", ["policy.model=Qwen/Qwen2.5-VL-72B-Instruct"]))
    with pytest.raises(ValueError, match="'rl'"):
        expected_memory(load_config("gpu_7b"), "rl")
    with pytest.raises(ValueError, match="not on 0"):
        expected_memory(load_config("gpu_7b"), shards=0)
    assert main(["config", "--preset", "gpu_3b", "--memory", "grpo"]) == 0
    assert "expected at the peak, on each card; not measured" in capsys.readouterr().out
