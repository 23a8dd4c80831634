"""A folder of results goes on only with the settings that it was made with."""

from __future__ import annotations

import json
import threading

import pytest

from vrag_lib.claims import ClaimError, alone_in, claim, depends_on, differences, model_fingerprint
from vrag_lib.presets import load_config


def test_the_first_writes_and_others_are_named(tmp_path):
    claim(tmp_path / "run", {"seed": 0, "config": {"rate": 1.0}})
    claim(tmp_path / "run", {"seed": 0, "config": {"rate": 1.0, "new": None}})  # None is what a missing one was
    with pytest.raises(ClaimError, match=r"run holds what was made with other settings: config\.rate=1\.0 not 2\.0"):
        claim(tmp_path / "run", {"seed": 0, "config": {"rate": 2.0}})
    with pytest.raises(ClaimError, match="seed=0 not None"):
        claim(tmp_path / "run", {"config": {"rate": 1.0}})
    assert json.loads((tmp_path / "run" / "settings.json").read_text()) == {"seed": 0, "config": {"rate": 1.0}}


def test_a_fingerprint_of_an_earlier_version_is_no_difference(tmp_path):
    (tmp_path / "settings.json").write_text('{"seed": 0, "fingerprint": "abc"}')
    claim(tmp_path, {"seed": 0})


def test_what_only_says_how_fast_is_left_out():
    slow = load_config("laptop", ["grpo.micro_batch_size=2", "policy.batch_size=3", "policy.model=x"])
    stages = ("grpo", "policy")
    assert not differences(depends_on(slow, *stages), depends_on(load_config("laptop"), *stages))
    other = depends_on(load_config("laptop", ["grpo.kl_coefficient=0"]), "grpo")
    assert differences(other, depends_on(slow, "grpo")) == ["grpo.kl_coefficient=0.0 not 0.01"]


def test_a_model_is_known_by_its_weights(tmp_path):
    for name, weights in (("a", b"1"), ("b", b"1"), ("c", b"2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(weights)
    a, b, c = (model_fingerprint(str(tmp_path / name)) for name in "abc")
    assert a == b != c and model_fingerprint("Qwen/Qwen2.5-VL-3B-Instruct") == "Qwen/Qwen2.5-VL-3B-Instruct"
    (tmp_path / "c" / "model.safetensors").write_bytes(b"33")  # trained again, in the same process
    assert model_fingerprint(str(tmp_path / "c")) not in (a, c)


def test_who_comes_second_is_refused_or_waits(tmp_path, caplog):
    order, entered = [], threading.Event()

    def second():
        entered.set()
        with alone_in(tmp_path, waits=True):
            order.append("second")

    with alone_in(tmp_path):
        with pytest.raises(ClaimError, match="another process is writing"), alone_in(tmp_path):
            pass
        waiting = threading.Thread(target=second)
        waiting.start()
        entered.wait()
        waiting.join(0.3)
        assert waiting.is_alive() and "waiting for another process" in caplog.text
        order.append("first")
    waiting.join(10)
    assert order == ["first", "second"]


def test_an_adapter_is_known_by_its_settings_and_by_what_it_was_trained_on(tmp_path):
    """The same tensors at another scale, or over another model, are another model."""
    for name in ("base", "adapter"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}_model.safetensors").write_bytes(b"weights")
    settings = {"r": 4, "lora_alpha": 8, "base_model_name_or_path": str(tmp_path / "base")}

    def fingerprint(**others):
        (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings | others))
        return model_fingerprint(str(tmp_path / "adapter"))

    first = fingerprint()
    assert fingerprint() == first != fingerprint(lora_alpha=16)
    assert fingerprint(base_model_name_or_path="owner/model") not in (first, fingerprint(lora_alpha=16))
    (tmp_path / "base" / "base_model.safetensors").write_bytes(b"trained anew")
    assert fingerprint() != first
