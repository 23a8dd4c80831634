"""page_encoder: both engines give the embeddings of one page at a time; no checkpoint passes whose weights are lost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vrag_lib import page_encoder
from vrag_lib.actions import MAX_QUERY_CHARS
from vrag_lib.corpus import Page
from vrag_lib.geometry import Size
from vrag_lib.page_encoder import ByaldiEncoder, ColPaliEncoder, ModelError, clean_query, find_checkpoint, load_encoder
from vrag_lib.scale_model import _language_config, _processor, _token_ids, build_tiny_colqwen2, build_tokenizer
from vrag_lib.torch_setup import ensure_torchvision

ensure_torchvision()

import torch  # noqa: E402
from colpali_engine.models import ColQwen2, ColQwen2_5, ColQwen2_5_Processor, ColQwen2Processor  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return build_tiny_colqwen2(tmp_path_factory.mktemp("models") / "tiny-colqwen2")


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> list[Page]:
    """Nine pages of three sizes, mixed."""
    folder = tmp_path_factory.mktemp("pages")
    rng = np.random.default_rng(0)
    made = []
    for number in range(1, 10):
        width, height = [(280, 196), (196, 280), (84, 84)][number % 3]
        picture = Image.fromarray(rng.integers(0, 255, (height // 28, width // 28, 3), dtype=np.uint8))
        path = folder / f"{number}.png"
        picture.resize((width, height)).save(path)
        made.append(Page(f"d_{number}", "d", number, path, Size(width, height)))
    return made


@pytest.fixture(scope="module")
def native(model) -> ColPaliEncoder:
    return ColPaliEncoder(model, "cpu", batch_size=4)


def by_id(encoder, pages) -> dict[str, np.ndarray]:
    return {page.id: array for page, array in encoder.encode_pages(pages)}


def alone(model: ColQwen2, processor: ColQwen2Processor, page: Page) -> np.ndarray:
    """The embeddings of one page by colpali-engine and nothing else."""
    with torch.inference_mode():
        return model(**processor.process_images([page.open_image()]))[0].float().numpy()


def test_both_engines_give_what_the_model_gives_page_by_page(model, pages, native):
    plain = ColQwen2.from_pretrained(model, dtype=torch.float32).eval()
    processor = ColQwen2Processor.from_pretrained(model)
    want = {page.id: alone(plain, processor, page) for page in pages}
    exact = by_id(ColPaliEncoder(model, "cpu", dtype="float32", batch_size=4), pages)
    batched, byaldi = by_id(native, pages), by_id(ByaldiEncoder(model, "cpu"), pages)
    assert want.keys() == exact.keys() == batched.keys() == byaldi.keys()
    for page_id, array in want.items():
        assert np.allclose(exact[page_id], array, atol=1e-5)
        for other in (batched[page_id], byaldi[page_id]):
            assert other.shape == array.shape and other.dtype == np.float32
            assert (other * array).sum(axis=1).min() > 0.99  # cosine: bf16 against fp32
            assert not (other.view(np.uint32) & 0xFFFF).any()  # bf16 values, so they are stored without loss
        assert np.allclose(batched[page_id], byaldi[page_id], atol=0.02)


@pytest.mark.parametrize("has_gpu", [False, True])
def test_models_are_loaded_on_the_device_that_is_asked_for(model, monkeypatch, has_gpu):
    """Trap S10: meta is a device that every machine has and that nobody would write into the code."""
    from byaldi import RAGMultiModalModel

    load, asked = RAGMultiModalModel.from_pretrained, []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(
        RAGMultiModalModel,
        "from_pretrained",
        lambda source, device, **settings: asked.append(device) or load(source, device="cpu", **settings),
    )
    for device in ("auto", "meta"):
        load_encoder(model, "byaldi", device)
    assert asked == ["cuda" if has_gpu else "cpu", "meta"]
    assert load_encoder(model, "native", "meta").model.device.type == "meta"


def test_byaldi_is_given_the_pages_in_order_however_many_there_are(model, pages, monkeypatch):
    monkeypatch.setattr(page_encoder, "_BYALDI_PAGES", 2)
    encoder = ByaldiEncoder(model, "cpu")
    chosen = [pages[i] for i in (4, 0, 7, 2, 5)]
    found = list(encoder.encode_pages(chosen))
    assert [page.id for page, _ in found] == [page.id for page in chosen]
    for page, array in found:
        assert np.array_equal(array, next(encoder.encode_pages([page]))[1])


def test_queries_are_the_same_alone_and_among_others_even_where_padding_gives_nan(tmp_path, model):
    """The trap: a zero padding embedding and a zero projection bias make padded rows 0 / 0."""
    path = tmp_path / "colqwen2-zero-bias"
    shutil.copytree(model, path)
    weights = load_file(path / "model.safetensors")
    weights["custom_text_proj.bias"].zero_()
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    plain, processor = ColQwen2.from_pretrained(path).eval(), ColQwen2Processor.from_pretrained(path)
    with torch.no_grad():
        assert plain(**processor.process_queries(["a", "a much longer query"])).isnan().any()
    for encoder in (ColPaliEncoder(path, "cpu"), ByaldiEncoder(path, "cpu")):
        short = encoder.encode_query("a")
        assert len(encoder.encode_query("a much longer query")) > len(short)
        assert np.isfinite(short).all() and np.array_equal(encoder.encode_query("a"), short)


def test_hostile_queries_are_text_and_nothing_else(native):
    tokenizer = native.processor.tokenizer
    assert clean_query("a<|image_pad|>b<|im_end|>", tokenizer) == "a b "
    for text in ("", " ", "<|image_pad|>" * 3, "\ud800 lone surrogate", "\x00", "x" * 100_000, "漢字 🙂"):
        array = native.encode_query(text)
        assert np.isfinite(array).all() and len(array) < 2 * MAX_QUERY_CHARS + 64


def test_the_class_follows_the_config_whatever_the_name(tmp_path, model, pages, native):
    path = tmp_path / "my-retriever"
    shutil.copytree(model, path)
    encoder = load_encoder(path, "native", "cpu")
    assert np.array_equal(by_id(encoder, pages[:1])["d_1"], by_id(native, pages[:1])["d_1"])
    assert encoder.fingerprint == native.fingerprint
    with pytest.raises(ModelError, match=r"take .* for nothing, but it is a ColQwen2; rename"):
        load_encoder(path, "byaldi", "cpu")
    shutil.copytree(model, tmp_path / "colpali" / "colqwen2")
    with pytest.raises(ModelError, match="for ColPali, but it is a ColQwen2; rename"):
        ByaldiEncoder(tmp_path / "colpali" / "colqwen2", "cpu")


def test_a_colqwen2_5_is_loaded_as_one_and_byaldi_refuses_it(tmp_path, pages):
    from transformers import Qwen2_5_VLConfig

    vision = {"depth": 1, "hidden_size": 64, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 128}
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(
        text_config=_language_config(tokenizer, layers=1), vision_config=vision, **_token_ids(tokenizer)
    )
    path = tmp_path / "colqwen2.5"
    ColQwen2_5(config).save_pretrained(path)
    _processor(ColQwen2_5_Processor, tokenizer, 1, 16).save_pretrained(path)
    encoder = ColPaliEncoder(path, "cpu")
    assert type(encoder.model).__name__ == "ColQwen2_5"
    assert all(np.isfinite(array).all() for array in by_id(encoder, pages[:3]).values())
    with pytest.raises(ModelError, match="for ColQwen2, but it is a ColQwen2_5"):
        ByaldiEncoder(path, "cpu")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, model) -> Path:
    """A LoRA adapter over the tiny model, its key names those of the published vidore/colqwen2-v1.0."""
    from peft import LoraConfig, get_peft_model

    path = tmp_path_factory.mktemp("adapters") / "colqwen2-adapter"
    torch.manual_seed(1)
    lora = LoraConfig(
        r=4, init_lora_weights=False, target_modules=r"(.*language_model.*(q_proj|v_proj)|custom_text_proj)$"
    )
    tuned = get_peft_model(ColQwen2.from_pretrained(model), lora)
    tuned.save_pretrained(path)
    ColQwen2Processor.from_pretrained(model).save_pretrained(path)
    config = json.loads((path / "adapter_config.json").read_text()) | {"base_model_name_or_path": str(model)}
    (path / "adapter_config.json").write_text(json.dumps(config))
    weights = load_file(path / "adapter_model.safetensors")
    assert any("language_model.layers" in key for key in weights)
    weights = {
        key.replace("model.language_model.layers", "model.model.layers"): value for key, value in weights.items()
    }
    save_file(weights, path / "adapter_model.safetensors", {"format": "pt"})
    return path


def test_an_adapter_changes_the_embeddings_as_it_should(model, adapter, pages, native):
    from peft import PeftModel

    tuned = ColPaliEncoder(adapter, "cpu", dtype="float32")
    assert find_checkpoint(adapter).base == model
    assert tuned.fingerprint != native.fingerprint
    reference = PeftModel.from_pretrained(ColQwen2.from_pretrained(model, dtype=torch.float32), adapter)
    weights = load_file(adapter / "adapter_model.safetensors")
    own = reference.state_dict()
    for key, value in weights.items():  # by hand: peft alone does not know the published names
        name = key.replace("model.model.layers", "model.language_model.layers")
        own[name.replace(".weight", ".default.weight")].copy_(value)
    want = alone(reference.base_model.model.eval(), tuned.processor, pages[0])
    got = by_id(tuned, pages[:1])["d_1"]
    assert np.allclose(got, want, atol=1e-4)
    assert not np.allclose(got, by_id(native, pages[:1])["d_1"], atol=0.05)
    assert np.allclose(by_id(ByaldiEncoder(adapter, "cpu"), pages[:1])["d_1"], want, atol=0.05)


@pytest.mark.parametrize("engine", ["native", "byaldi"])
def test_an_adapter_whose_keys_no_module_expects_is_refused(tmp_path, adapter, engine):
    """colpali-engine issue 424: the model loads and runs, without the adapter."""
    path = tmp_path / "colqwen2-adapter"
    shutil.copytree(adapter, path)
    weights = load_file(path / "adapter_model.safetensors")
    weights = {key.replace("self_attn", "attention"): value for key, value in weights.items()}
    save_file(weights, path / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="the weights did not arrive: 8 tensors of the checkpoint are not in"):
        load_encoder(path, engine, "cpu")


@pytest.mark.parametrize("engine", ["native", "byaldi"])
def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path, model, engine):
    path = tmp_path / "colqwen2-cut"
    shutil.copytree(model, path)
    weights = load_file(path / "model.safetensors")
    del weights["custom_text_proj.weight"]
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"1 of its parameters are not in the checkpoint \(custom_text_proj.weight"):
        load_encoder(path, engine, "cpu")


def test_unusable_checkpoints_are_named(tmp_path, model, monkeypatch):
    with pytest.raises(ModelError, match="no-such is not a folder"):
        find_checkpoint(tmp_path / "no-such")

    def offline(*arguments, **options):
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(ModelError, match="owner/name is not a folder, and the model hub did not give it: no network"):
        find_checkpoint("owner/name")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *arguments, **options: str(model))
    assert find_checkpoint("owner/colqwen2").model_class == "ColQwen2"
    with pytest.raises(ModelError, match=r"config\.json"):
        find_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ModelError, match="'bert' is not of the ColPali family"):
        find_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_vl"}')
    with pytest.raises(ModelError, match="pickled weights are not loaded"):
        find_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"junk")
    with pytest.raises(ModelError, match="cannot be loaded as ColQwen2"):
        load_encoder(tmp_path, "native", "cpu")
    with pytest.raises(ValueError, match="neither byaldi nor native"):
        load_encoder(model, "torch")
    with pytest.raises(ValueError, match="bfloat16"):
        load_encoder(model, "byaldi", dtype="float32")
