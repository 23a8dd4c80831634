"""The commands of the experiment: adapters are merged; a judge that answers nothing is no success, and it
gets no other server's key."""

from __future__ import annotations

import json
import shutil

import pandas as pd
import pytest
from chat_server import running_server, say, send
from pdf_files import words_pdf
from tiny_agent import random_checkpoint

from vrag_lib.cli import build_parser, main
from vrag_lib.cli_experiments import _judge
from vrag_lib.config import ConfigError
from vrag_lib.factory import scale_policy
from vrag_lib.presets import load_config
from vrag_lib.torch_setup import ensure_torchvision
from vrag_lib.training import base_of, lora_config

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


def test_an_adapter_finds_its_checkpoint_where_both_were_moved(adapter, tmp_path):
    """Named by a path that is none any more; a hub id is no folder either, and left to who loads it."""
    moved = shutil.copytree(adapter, tmp_path / "run" / "final")
    described = json.loads((moved / "adapter_config.json").read_text())
    for base in ("models/base/start", "/gone/start", "./start"):
        (moved / "adapter_config.json").write_text(json.dumps(described | {"base_model_name_or_path": base}))
        with pytest.raises(ConfigError, match="is not there"):
            base_of(moved)
        (tmp_path / "run" / "start").mkdir()
        (tmp_path / "run" / "start" / "config.json").touch()
        assert base_of(moved) == str(tmp_path / "run" / "start")
        shutil.rmtree(tmp_path / "run" / "start")
    (moved / "adapter_config.json").write_text(json.dumps(described | {"base_model_name_or_path": "owner/model"}))
    assert base_of(moved) == "owner/model"


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


def test_an_evaluation_that_the_judge_did_not_judge_is_no_success(tmp_path, monkeypatch, capsys):
    """What was judged is written and kept; the same command asks for the rest."""
    monkeypatch.setenv("VRAG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("vrag_lib.endpoint.random.uniform", lambda low, high: 0.0)  # no wait between the tries
    own, out = tmp_path / "own", tmp_path / "out"
    words_pdf(
        own / "documents" / "report.pdf", "The tree of the north is the birch", "The tree of the south is the olive"
    )
    items = [
        {"query": f"What is the tree of the {direction}?", "reference_answer": tree}
        for direction, tree in (("north", "birch"), ("south", "olive"))
    ]
    (own / "questions.json").write_text(json.dumps(items))
    command = ["evaluate", "--dataset", "unified", "--path", str(own), "--out", str(out), "--judge-model", "judge"]
    command += ["--policy", "extractive", "retrieval.kind=bm25", "corpus.ocr=none", "corpus.workers=1"]

    def judge(handler, body):
        right = "birch" in json.dumps(body)
        (say("<judge>True</judge>") if right else send("no model", status=404))(handler, body)

    with running_server() as server:
        for behaviour, status, verdicts, said in [
            (send("no model", status=404), 1, [], "no verdict on 2 of 2 answers"),
            (judge, 0, [1], "no verdict on 1 of 2 answers"),
            (say("<judge>False</judge>"), 0, [1, 0], ""),
        ]:
            server.behaviours, server.requests = [behaviour], []
            assert main([*command, "--judge-url", server.url]) == status
            shown = capsys.readouterr()
            assert list(pd.read_csv(out / "questions.csv")["judge"].dropna()) == verdicts
            assert said in shown.err if said else "verdict" not in shown.err
            assert "percent, 95 % intervals" in shown.out
    assert len(server.requests) == 1  # the other verdict was kept


def test_a_judge_on_another_server_does_not_get_the_policys_key(monkeypatch):
    monkeypatch.setenv("POLICY_KEY", "of-the-policy")
    monkeypatch.setenv("JUDGE_KEY", "of-the-judge")
    with running_server() as server:
        server.behaviours = [say("<judge>True</judge>")]
        other = server.url.replace("127.0.0.1", "localhost")

        def key_sent(base_url: str, *options: str) -> str | None:
            """What the judge's server gets."""
            command = ["evaluate", "--judge-model", "judge", *options]
            config = load_config("laptop", [f"policy.base_url={base_url}", "policy.api_key_env=POLICY_KEY"])
            judge = _judge(build_parser().parse_args(command), config)
            judge._endpoint._cache = None
            judge("q?", "12", "12")
            return server.headers[-1].get("Authorization")

        assert key_sent(server.url) == "Bearer of-the-policy"
        assert key_sent(server.url, "--judge-url", server.url.upper().replace("V1", "v1")) == "Bearer of-the-policy"
        assert key_sent("", "--judge-url", server.url) == "Bearer of-the-policy"
        assert key_sent("http://host/v1", "--judge-url", server.url) is None
        assert key_sent(server.url, "--judge-url", other) is None
        assert key_sent(server.url, "--judge-url", other, "--judge-key-env", "JUDGE_KEY") == "Bearer of-the-judge"
        assert key_sent(server.url, "--judge-key-env", "JUDGE_KEY") == "Bearer of-the-judge"
        assert key_sent(server.url, "--judge-key-env", "") is None
        with pytest.raises(ConfigError, match="--judge-key-env names an environment variable that is not set"):
            key_sent(server.url, "--judge-key-env", "NO_SUCH_KEY")
        with pytest.raises(ConfigError, match="--judge-key-env is the name of an environment variable") as error:
            key_sent(server.url, "--judge-key-env", "gsk_AbCdEf12")
        assert "gsk_" not in str(error.value)
