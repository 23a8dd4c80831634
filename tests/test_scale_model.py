"""scale_model: tiny models of the real classes load through the real loaders, are deterministic and exact."""

from __future__ import annotations

import json
import shutil
import threading

import pytest
from PIL import Image

from vrag_lib.scale_model import (
    ACTION_TAGS,
    SPECIAL_TOKENS,
    build_tiny_colqwen2,
    build_tiny_qwen2_5_vl,
    build_tokenizer,
)
from vrag_lib.torch_setup import ensure_torchvision

ensure_torchvision()

import torch  # noqa: E402
from transformers import AutoModelForImageTextToText, AutoProcessor  # noqa: E402


@pytest.fixture(scope="module")
def agent(tmp_path_factory):
    return build_tiny_qwen2_5_vl(tmp_path_factory.mktemp("models") / "agent", seed=0)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return build_tiny_colqwen2(tmp_path_factory.mktemp("models") / "tiny-colqwen2", seed=0)


def image(shade: int, size: tuple[int, int]) -> Image.Image:
    picture = Image.new("RGB", size, (shade, 255 - shade, 128))
    picture.paste((255, 255, 255), (10, 10, size[0] // 2, size[1] // 2))
    return picture


def weights(path) -> bytes:
    return (path / "model.safetensors").read_bytes()


def test_tags_and_special_tokens_are_single_tokens_and_text_survives():
    tokenizer = build_tokenizer()
    for token in (*SPECIAL_TOKENS, *ACTION_TAGS):
        assert tokenizer.tokenize(token) == [token]
    reply = "<think>Which year? 2019 – é 漢 🙂</think>\n<search> total  revenue </search>"
    ids = tokenizer.encode(reply, add_special_tokens=False)
    assert tokenizer.decode(ids, skip_special_tokens=True) == reply
    again = build_tokenizer()
    assert again.get_vocab() == tokenizer.get_vocab() and again.encode(reply) == tokenizer.encode(reply)


def test_the_agent_loads_generates_and_pads_exactly(agent):
    model = AutoModelForImageTextToText.from_pretrained(agent, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(agent)
    assert type(model).__name__ == "Qwen2_5_VLForConditionalGeneration"
    contents = [
        [{"type": "image", "image": image(9, (84, 56))}, {"type": "text", "text": "Hi?"}],
        [{"type": "text", "text": "Two images:"}, *({"type": "image", "image": image(s, (112, 84))} for s in (1, 2))],
    ]
    conversations = [[{"role": "user", "content": content}] for content in contents]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}

    def inputs(chosen):
        return processor.apply_chat_template(
            chosen, **options, processor_kwargs={"return_tensors": "pt", "padding": True}
        )

    batch = inputs(conversations)
    assert batch["image_grid_thw"].prod(dim=1).tolist() == [4 * 6, 6 * 8, 6 * 8]  # nothing was resized
    with torch.no_grad():
        logits = model(**batch).logits
        for row, conversation in enumerate(conversations):
            alone = model(**inputs([conversation])).logits
            assert torch.allclose(alone[0, -1], logits[row, -1], atol=1e-5)
        generated = model.generate(**batch, max_new_tokens=4, do_sample=False)
    assert generated.shape[1] <= batch["input_ids"].shape[1] + 4
    assert torch.isfinite(logits[batch["attention_mask"].bool()]).all()


def test_the_template_marks_assistant_turns(agent):
    processor = AutoProcessor.from_pretrained(agent)
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "b"}]},
        {"role": "user", "content": "c"},
    ]
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>a<|im_end|>\n"
        "<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n"
    )
    out = processor.tokenizer.apply_chat_template(
        [{"role": "user", "content": "c"}, {"role": "assistant", "content": "b b"}],
        chat_template=processor.chat_template,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    trained = [i for i, m in zip(out["input_ids"], out["assistant_masks"], strict=True) if m]
    assert processor.tokenizer.decode(trained) == "b b<|im_end|>"


def test_the_encoder_loads_in_colpali_engine_with_every_weight(encoder):
    from colpali_engine.models import ColQwen2, ColQwen2Processor

    model, info = ColQwen2.from_pretrained(encoder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    processor = ColQwen2Processor.from_pretrained(encoder)
    with torch.no_grad():
        pages = model.eval()(**processor.process_images([image(5, (280, 196)), image(99, (280, 196))]))
        query = model(**processor.process_queries(["profit by year"]))
    assert pages.shape[2] == query.shape[2] == 128
    assert torch.isfinite(pages).all() and torch.isfinite(query).all()
    assert not torch.allclose(pages[0], pages[1], atol=1e-3)


def test_a_large_page_is_shown_at_no_more_than_the_tokens_asked_for(tmp_path):
    from colpali_engine.models import ColQwen2Processor

    processor = ColQwen2Processor.from_pretrained(build_tiny_colqwen2(tmp_path / "colqwen2", max_vision_tokens=16))
    grid = processor.process_images([image(5, (1700, 2200))])["image_grid_thw"][0]
    assert 12 <= grid.prod() // 4 <= 16


@pytest.mark.parametrize("build", [build_tiny_qwen2_5_vl, build_tiny_colqwen2])
def test_a_seed_is_a_model_and_the_global_generator_is_untouched(tmp_path, build):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, two, other = (build(tmp_path / n / "colqwen2", seed=s) for n, s in (("a", 1), ("b", 1), ("c", 2)))
    assert torch.equal(torch.get_rng_state(), before)
    assert weights(one) == weights(two) != weights(other)
    assert "random weights" in (one / "README.md").read_text()
    assert json.loads((one / "card.json").read_text())["weights"] == "random"


def test_a_folder_is_reused_if_it_is_this_model_and_refused_otherwise(tmp_path):
    path = build_tiny_colqwen2(tmp_path / "colqwen2")
    stamp = (path / "model.safetensors").stat().st_mtime_ns
    assert build_tiny_colqwen2(path) == path
    assert (path / "model.safetensors").stat().st_mtime_ns == stamp
    with pytest.raises(FileExistsError, match="seed 1; delete it or name another"):
        build_tiny_colqwen2(path, seed=1)
    (path / "card.json").unlink()
    with pytest.raises(FileExistsError):
        build_tiny_colqwen2(path)
    with pytest.raises(ValueError, match="needs colqwen2"):
        build_tiny_colqwen2(tmp_path / "encoder")
    assert [entry.name for entry in tmp_path.iterdir()] == ["colqwen2"]


def test_two_builders_of_one_folder_leave_one_whole_model(tmp_path):
    errors = []

    def build():
        try:
            build_tiny_colqwen2(tmp_path / "colqwen2")
        except Exception as error:
            errors.append(error)

    workers = [threading.Thread(target=build) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not errors
    assert weights(tmp_path / "colqwen2") == weights(build_tiny_colqwen2(tmp_path / "alone" / "colqwen2"))
    shutil.rmtree(tmp_path / "alone")
    assert [entry.name for entry in tmp_path.iterdir()] == ["colqwen2"]
