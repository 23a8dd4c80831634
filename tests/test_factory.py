"""From a config to objects: what only the repository ships, and what a checkpoint says of its images."""

from __future__ import annotations

import dataclasses

import pytest

from vrag_lib import factory
from vrag_lib.config import ConfigError
from vrag_lib.policy_chat import CheckpointError
from vrag_lib.presets import load_config


def test_without_the_repository_the_visual_retriever_is_refused_unless_random_will_do(tmp_path, monkeypatch):
    assert factory.laptop_colqwen2() == factory.SCALE_RETRIEVER
    monkeypatch.setenv("VRAG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(factory, "SCALE_RETRIEVER", tmp_path / "site-packages")
    with pytest.raises(ConfigError, match=r"clone .* retrieval\.model="):
        factory.laptop_colqwen2()
    with pytest.raises(ConfigError, match=r"retrieval\.model="):
        factory.make_retriever(None, load_config("laptop", ["retrieval.kind=visual"]))
    assert (factory.laptop_colqwen2(allow_random=True) / "card.json").is_file()


def test_a_checkpoint_says_how_large_it_reads_images(tmp_path):
    assert factory.image_pixels(factory.scale_agent()) == (80 * 28 * 28, 96 * 28 * 28)
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        factory.image_pixels(tmp_path)


def test_a_policy_is_not_made_with_a_temperature_that_is_none():
    config = load_config("laptop")
    config = dataclasses.replace(config, policy=dataclasses.replace(config.policy, temperature=-1.0))
    with pytest.raises(ConfigError, match=r"policy\.temperature is at least 0"):
        factory.make_policy(None, config)


@pytest.mark.parametrize(
    "built_for, reason", [(None, "this torch is built without CUDA"), ("13.0", "torch finds no GPU")]
)
def test_a_card_that_is_not_there_is_named_with_the_setting(built_for, reason, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.version.cuda", built_for)
    for make, settings in [
        (factory.make_policy, ["policy.kind=transformers", "policy.model=m", "policy.device=cuda"]),
        (factory.make_retriever, ["retrieval.kind=visual", "retrieval.device=cuda"]),
    ]:
        name = settings[-1]
        with pytest.raises(ConfigError, match=f"{name}, but {reason}; set {name.replace('cuda', 'cpu')} "):
            make(None, load_config("laptop", settings))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    factory.require_device("policy.device", "cuda")
    factory.require_policy(load_config("gpu_3b", ["rollout.engine=transformers"]))
