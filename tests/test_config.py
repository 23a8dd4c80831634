"""Presets, overrides, snapshots."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from types import SimpleNamespace

import pytest

from vrag_lib.config import (
    ConfigError,
    cache_dir,
    describe,
    from_dict,
    provenance,
    read_config,
    save_config,
    to_dict,
)
from vrag_lib.presets import PRESETS, load_config
from vrag_lib.provenance import commit


def test_overrides_reach_nested_fields_with_their_types():
    config = load_config("laptop", ["environment.max_turns=3", "seed=7", "environment.allow_crop=false"])
    assert (config.environment.max_turns, config.seed, config.environment.allow_crop) == (3, 7, False)
    assert load_config("laptop", ["policy.temperature=0"]).policy.temperature == 0.0


@pytest.mark.parametrize("order", [1, -1])
def test_settings_that_constrain_each_other_are_given_together(order):
    """Each by itself would contradict the preset's value of the other."""
    sizes = ["minidocs.long_side=3000", "minidocs.short_side=2000", "minidocs.min_pages=10", "minidocs.max_pages=10"]
    minidocs = load_config("laptop", sizes[::order]).minidocs
    assert (minidocs.long_side, minidocs.short_side, minidocs.min_pages, minidocs.max_pages) == (3000, 2000, 10, 10)
    assert load_config("laptop", ["seed=3", "seed=4"]).seed == 4


def test_devices_of_torch_and_names_of_variables_that_are_set_are_allowed(monkeypatch):
    assert load_config("laptop", ["policy.device=cuda:1", "policy.dtype=float16"]).policy.device == "cuda:1"
    drawn = "Judge_Key_For_Qwen72B_a"
    with pytest.raises(ConfigError, match="not what it holds"):
        load_config("laptop", [f"policy.api_key_env={drawn}"])
    monkeypatch.setenv(drawn, "x")
    assert load_config("laptop", [f"policy.api_key_env={drawn}"]).policy.api_key_env == drawn


@pytest.mark.parametrize(
    "preset, override, message",
    [
        ("labtop", [], "there is no preset 'labtop'; presets are laptop"),
        ("laptop", ["environment.max_turn=3"], r"did you mean 'environment\.max_turns'"),
        ("laptop", ["retrieval.knd=text"], r"did you mean 'retrieval\.kind'\?"),
        ("laptop", ["polcy.kind=openai"], r"did you mean 'policy\.kind'\?"),
        ("laptop", ["kind=openai"], r"did you mean 'retrieval\.kind' or 'policy\.kind'\?"),
        ("laptop", ["grpo.colour=3"], "known here: recipe, steps"),
        ("laptop", ["seed"], "written key=value"),
        ("laptop", ["seed=x"], "seed needs a value of type int, not 'x'"),
        ("laptop", ["environment=3"], "'environment' is a stage"),
        ("laptop", ["seed.x=3"], "has no parts"),
        ("laptop", ["environment.allow_crop=maybe"], "true or false"),
        ("laptop", ["environment.max_turns=0"], r"environment\.max_turns is at least 1 and finite, not 0"),
        ("laptop", ["environment.search_depth=-1"], "search_depth is at least 1"),
        ("laptop", ["environment.crop_padding=inf"], "crop_padding is at least 0 and finite, not inf"),
        ("laptop", ["environment.max_pixels=784"], r"min_pixels=\d+ is more than environment\.max_pixels=784"),
        ("laptop", ["policy.temperature=-0.1"], r"policy\.temperature is at least 0 and finite, not -0\.1"),
        ("laptop", ["policy.temperature=nan"], "temperature is at least 0"),
        ("laptop", ["policy.top_p=7"], r"policy\.top_p is more than 0 and at most 1, not 7\.0"),
        ("laptop", ["policy.top_p=nan"], "policy.top_p is more than 0"),
        ("laptop", ["policy.max_reply_tokens=0"], "policy.max_reply_tokens is at least 1"),
        ("laptop", ["policy.batch_size=0"], "policy.batch_size is at least 1"),
        ("laptop", ["policy.kind=oracle"], r"policy\.kind is one of extractive, transformers, openai, not 'oracle'"),
        ("laptop", ["policy.dtype=float8"], "policy.dtype is one of auto, float32, bfloat16, float16, not 'float8'"),
        ("laptop", ["policy.device=gpu"], "policy.device is one of auto, cpu, cuda"),
        ("laptop", ["retrieval.kind=magic"], "retrieval.kind is one of text, bm25"),
        ("laptop", ["retrieval.depth=0"], "retrieval.depth is at least 1"),
        ("laptop", ["retrieval.kind=visual", "retrieval.dtype=float32"], "needs retrieval.engine=native"),
        ("laptop", ["corpus.dpi=0"], "corpus.dpi is at least 1"),
        ("laptop", ["corpus.workers=0"], "corpus.workers is at least 1"),
        ("laptop", ["corpus.ocr=maybe"], "corpus.ocr is one of none, no_text, all, not 'maybe'"),
        ("laptop", ["environment.given=gold"], "environment.given is one of none, retrieved"),
        ("laptop", ["preset=gpu_7b"], "--preset gpu_7b"),
        ("laptop", ["seed=99999999999999999999"], "seed lies between"),
        ("laptop", ["policy.api_key_env=sk-proj-abc"], "name of an environment variable, not what it holds"),
    ],
)
def test_wrong_presets_and_keys_are_named_with_the_remedy(preset, override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(preset, override)


@pytest.mark.parametrize(
    "key",
    [
        "gsk_AbCdEf",
        "hf_abcdefghij0123456789",
        "r8_Ab1",
        "sk_live_51AbCdEf",
        "AIzaSyA1b2C3d4E5f6G7h8I9j0",
        "a1b2c3d4e5f60718293a4b5c6d7e8f90",
        "Ab1_Cd2_Ef3_Gh4_Ij5_Kl6",
    ],
)
def test_a_key_in_place_of_its_variable_is_refused_without_repeating_it(key):
    with pytest.raises(ConfigError, match=r"policy\.api_key_env is the name of an environment variable") as error:
        load_config("laptop", [f"policy.api_key_env={key}"])
    assert key not in str(error.value)


@pytest.mark.parametrize(
    "name",
    ["OPENAI_API_KEY", "HF_TOKEN", "hf_token", "sk_key_2", "openai_key", "MY_KEY_2", "MyKey2", "Key", "",
     "openrouter_key_of_the_second_account_2", "AZURE_OPENAI_API_KEY_EASTUS2", "_KEY"],
)  # fmt: skip
def test_the_name_of_a_variable_is_none(name):
    assert load_config("laptop", [f"policy.api_key_env={name}"]).policy.api_key_env == name


@pytest.mark.parametrize("name", ["policy.base_url", "retrieval.url"])
@pytest.mark.parametrize(
    "url, message",
    [
        ("http://user:secret@host/v1", "holds a user name, password or query"),
        ("http://:secret@host/v1", "holds a user name"),
        ("http://host/v1?key=secret", "password or query"),
        ("host:8000/secret", "http:// or https:// first"),
        ("user:secret@host", "http:// or https:// first"),
        ("http://host:99999/secret", "is no address"),
    ],
)
def test_an_address_that_holds_a_secret_is_refused_without_repeating_it(name, url, message):
    with pytest.raises(ConfigError, match=message) as error:
        load_config("laptop", [f"{name}={url}"])
    assert str(error.value).startswith(name) and "secret" not in str(error.value)
    remedy = "policy.api_key_env names" in str(error.value)
    assert remedy == (name == "policy.base_url" and "holds a user name" in str(error.value))


@pytest.mark.parametrize("preset", PRESETS)
def test_a_snapshot_restores_the_config(preset, tmp_path):
    config = load_config(preset, ["seed=3"])
    save_config(config, tmp_path)
    assert read_config(tmp_path) == config and config.preset == preset
    recorded = json.loads((tmp_path / "config.json").read_text())["provenance"]
    assert recorded["seed"] == 3 and recorded["commit"] and recorded["versions"]["python"]


def test_a_missing_or_foreign_snapshot_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"holds no config\.json"):
        read_config(tmp_path)
    with pytest.raises(ConfigError, match="Config has no colour"):
        from_dict(to_dict(PRESETS["laptop"]) | {"colour": 1})


def test_every_field_is_documented():
    def walk(node):
        for field in dataclasses.fields(node):
            value = getattr(node, field.name)
            if dataclasses.is_dataclass(value):
                walk(value)
            else:
                assert field.metadata["doc"], field.name

    walk(PRESETS["laptop"])
    assert "environment.max_turns=5  # " in describe()


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("VRAG_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.delenv("VRAG_CACHE")
    assert cache_dir().name == "vrag_lib"


def test_provenance_says_what_a_rerun_needs():
    assert {"command", "seed", "commit", "versions", "hardware", "time"} <= set(provenance(1))


def test_the_commit_is_that_of_the_beginning(monkeypatch):
    """A commit made while a training runs is not the code that trained."""
    commits = iter(["first", "second"])
    answers = {"status": lambda: "", "rev-parse": lambda: next(commits) + "\n"}
    monkeypatch.setattr(subprocess, "run", lambda call, **_: SimpleNamespace(stdout=answers[call[3]]()))
    commit.cache_clear()
    try:
        assert [provenance()["commit"] for _ in range(2)] == ["first", "first"]
    finally:
        commit.cache_clear()
