"""The commands of the experiment: adapters are merged."""

from __future__ import annotations

import json

import pytest
from tiny_agent import random_checkpoint

from vrag_lib.cli import main
from vrag_lib.factory import scale_policy
from vrag_lib.torch_setup import ensure_torchvision
from vrag_lib.training import lora_config

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A LoRA adapter that changes the model, as training leaves one."""
    ensure_torchvision()
    from peft import get_peft_model
    from transformers import AutoModelForImageTextToText

    folder = tmp_path_factory.mktemp("run") / "final"
    model = get_peft_model(AutoModelForImageTextToText.from_pretrained(random_checkpoint()), lora_config(2, 4))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.fill_(0.1)
    model.save_pretrained(folder)
    return folder


def weights(checkpoint):
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(checkpoint).state_dict()


def test_an_adapter_is_merged_with_the_checkpoint_that_it_names(adapter, tmp_path, capsys):
    assert main(["merge", str(adapter), str(tmp_path / "model")]) == 0
    assert capsys.readouterr().out == f"model  {tmp_path / 'model'}\n"
    base, merged = weights(random_checkpoint()), weights(tmp_path / "model")
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert base.keys() == merged.keys() and changed and all("language_model" in name for name in changed)
    assert (tmp_path / "model" / "processor_config.json").is_file()
    assert main(["merge", str(adapter), str(tmp_path / "model")]) == 2
    assert "is there already; name a new folder" in capsys.readouterr().err


def test_what_cannot_be_merged_is_named(adapter, tmp_path, capsys):
    out = str(tmp_path / "model")
    record = json.loads((adapter / "adapter_config.json").read_text())
    for name, base in (("nameless", None), ("moved", str(tmp_path / "gone"))):
        (tmp_path / name).mkdir()
        for file in adapter.iterdir():
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
        record["base_model_name_or_path"] = base
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(record))
    for arguments, message in [
        ([str(tmp_path), out], "holds no LoRA adapter; name the `final` folder"),
        ([str(random_checkpoint()), out], "is a whole checkpoint"),
        ([str(tmp_path / "nameless"), out], "`vrag merge --checkpoint` does"),
        ([str(tmp_path / "moved"), out], "is not there; `vrag merge --checkpoint` says where it is"),
        ([str(adapter), out, "--checkpoint", str(adapter)], "is a LoRA adapter, too; merge that one first"),
        ([str(adapter), out, "--checkpoint", str(scale_policy())], "cannot be merged; is that the checkpoint"),
    ]:
        assert main(["merge", *arguments]) == 2
        assert message in capsys.readouterr().err
    assert main(["merge", str(tmp_path / "moved"), out, "--checkpoint", str(random_checkpoint())]) == 0
