"""A conversation goes on from what was read of it: the same replies, fewer tokens read, nothing stale."""

from __future__ import annotations

import pytest
import torch

from vrag_lib.context_cache import ContextCache, Read, batch_cache, row_states
from vrag_lib.corpus import Corpus, Document, Page
from vrag_lib.geometry import Size, View
from vrag_lib.policy_transformers import TransformersPolicy
from vrag_lib.scale_model import build_tiny_qwen2_5_vl
from vrag_lib.trajectory import ImageRef, Turn

SIZE = Size(280, 224)
FOLLOW_UPS = (("look", "page_1"), ("and", None), ("a second page", "page_2"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    from PIL import Image

    folder = tmp_path_factory.mktemp("pages")
    pages = []
    for number, colour in enumerate(("white", "navy", "olive")):
        path = folder / f"page_{number}.png"
        Image.linear_gradient("L").resize((SIZE.width, SIZE.height)).convert("RGB").save(path)
        Image.blend(Image.open(path), Image.new("RGB", (SIZE.width, SIZE.height), colour), 0.4).save(path)
        pages.append(Page(f"page_{number}", "a", number + 1, path, SIZE))
    return Corpus([Document("a", folder / "a.pdf", "0" * 64, tuple(pages))])


@pytest.fixture
def policy(tmp_path_factory, corpus) -> TransformersPolicy:
    torch.set_num_threads(1)
    folder = build_tiny_qwen2_5_vl(tmp_path_factory.mktemp("model") / "tiny", seed=0)
    return TransformersPolicy.from_pretrained(folder, corpus, device="cpu", max_reply_tokens=10)


def asked(*questions: str) -> list[list[Turn]]:
    return [[Turn("user", question)] for question in questions]


def gone_on(conversation: list[Turn], reply, turn: int) -> list[Turn]:
    """The conversation with the reply and the next user turn, which may show a page."""
    first = Turn("user", "", token_ids=reply.prompt_token_ids, images=sum((t.images for t in conversation), ()))
    text, page_id = FOLLOW_UPS[turn]
    images = (ImageRef(page_id, View.of_page(SIZE, 28 * 28, 36 * 28 * 28)),) if page_id else ()
    return [first, Turn("assistant", reply.text, token_ids=reply.token_ids), Turn("user", text, images)]


def widths_read(policy, monkeypatch) -> list[tuple[int, int]]:
    """(rows, tokens) of every forward pass over more than one token."""
    found, forward = [], policy.model.forward

    def counted(*args, **kwargs):
        if kwargs["input_ids"].shape[1] > 1:
            found.append(tuple(kwargs["input_ids"].shape))
        return forward(*args, **kwargs)

    monkeypatch.setattr(policy.model, "forward", counted)
    return found


def test_replies_are_those_of_reading_everything_again(policy, monkeypatch):
    """Conversations of other lengths, with and without new images, over four turns."""
    talks = asked("How many?", "Who wrote the longest of all these reports, and when?", "Why?")
    read = widths_read(policy, monkeypatch)
    for turn in range(4):
        seeds = [10 * turn + i for i in range(3)]
        replies = policy.generate(talks, seeds=seeds)
        went_on = len(policy.context_cache)
        policy.context_cache.clear()
        again = policy.generate(talks, seeds=seeds)
        longest = max(len(reply.prompt_token_ids) for reply in replies)
        assert read[-1] == (3, longest)
        assert turn == 0 or read[-2][1] < longest - 10
        for got, wanted in zip(replies, again, strict=True):
            assert got.token_ids == wanted.token_ids and got.prompt_token_ids == wanted.prompt_token_ids
            assert got.logprobs == pytest.approx(wanted.logprobs, abs=1e-5)
        assert went_on == 3
        if turn < 3:
            # Each conversation goes its own way, so that a batch holds new tokens of other numbers and no images too.
            talks = [gone_on(talks[i], replies[i], (turn + i) % 3) for i in range(3)]


def test_a_new_conversation_beside_one_that_goes_on(policy):
    talk = asked("How many?")[0]
    talk = gone_on(talk, policy.generate([talk], seeds=[1])[0], 0)
    new = asked("Who?")[0]
    mixed = policy.generate([talk, new], seeds=[2, 3])
    policy.context_cache.clear()
    again = policy.generate([talk, new], seeds=[2, 3])
    assert [reply.token_ids for reply in mixed] == [reply.token_ids for reply in again]


def test_equal_contexts_are_read_once_and_sampled_apart(policy, monkeypatch):
    group = asked(*["How many?"] * 4, "Who?")
    read = widths_read(policy, monkeypatch)
    replies = policy.generate(group, seeds=[1, 2, 3, 4, 5])
    assert len(read) == 1 and read[0][0] == 2
    assert len({reply.token_ids for reply in replies[:4]}) == 4
    for i, reply in enumerate(replies):
        policy.context_cache.clear()
        alone = policy.generate([group[i]], seeds=[i + 1])[0]
        assert alone.token_ids == reply.token_ids
        assert alone.logprobs == pytest.approx(reply.logprobs, abs=1e-5)


def test_another_page_is_another_context(policy):
    """The tokens of two pages of one size are the same; what was read of one says nothing about the other."""
    talk = asked("How many?")[0]
    reply = policy.generate([talk], seeds=[1])[0]
    seen = gone_on(talk, reply, 0)
    other = [*seen[:2], Turn("user", "look", (ImageRef("page_0", seen[2].images[0].view),))]
    first = policy.generate([seen], seeds=[2])[0]
    image_start = policy.tokenizer.convert_tokens_to_ids("<|vision_start|>")
    longer = (*first.prompt_token_ids, *first.token_ids, 5)
    assert policy.context_cache.take(longer, other[2].images, image_start) is None
    assert policy.context_cache.take(longer, seen[2].images, image_start) is not None


def test_changed_weights_are_noticed(policy):
    talk = asked("How many?")[0]
    talk = gone_on(talk, policy.generate([talk], seeds=[1])[0], 0)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.mul_(1.3)
    reply = policy.generate([talk], seeds=[2])[0]
    policy.context_cache.clear()
    assert reply.logprobs == pytest.approx(policy.generate([talk], seeds=[2])[0].logprobs, abs=1e-5)


def test_a_switched_adapter_is_noticed(policy, corpus):
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(policy.model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    agent = TransformersPolicy(adapted, policy.processor, corpus, max_reply_tokens=10)
    talk = asked("How many?")[0]
    talk = gone_on(talk, agent.generate([talk], seeds=[1])[0], 0)
    with adapted.disable_adapter():
        reply = agent.generate([talk], seeds=[2])[0]
        agent.context_cache.clear()
        assert reply.logprobs == pytest.approx(agent.generate([talk], seeds=[2])[0].logprobs, abs=1e-5)


def states(tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 2, 3, tokens, 4, generator=torch.Generator().manual_seed(seed))


def test_longest_beginning_and_oldest_go():
    cache = ContextCache(torch.nn.Linear(1, 1), max_bytes=states(9).nbytes)
    assert cache.take([1, 2], (), 0) is None
    cache.put([1, 2], (), states(2))
    cache.put([1, 2, 3], (), states(3))
    assert cache.take([1, 2, 3], (), 0).length == 2, "a whole context leaves nothing to read"
    cache.put([1, 2], (), states(2))
    assert cache.take([1, 2, 3, 4], (), 0).length == 3
    cache.put([5, 6, 7, 8], (), states(4))
    cache.put([7, 8, 9, 10], (), states(4))  # 2 + 4 + 4 tokens are more than fit
    assert cache.take([1, 2, 3], (), 0) is None
    assert cache.take([5, 6, 7, 8, 9], (), 0).length == 4
    cache.put([7, 8, 9, 10], (), states(4, seed=1))
    assert torch.equal(cache.take([7, 8, 9, 10, 11], (), 0).states, states(4, seed=1))
    assert len(cache) == 0


def test_what_does_not_fit_is_not_kept():
    cache = ContextCache(torch.nn.Linear(1, 1), max_bytes=1)
    cache.put([1, 2], (), states(2))
    assert len(cache) == 0


def test_a_batch_is_made_and_taken_apart():
    cache, mask = batch_cache([Read(2, states(2)), None, Read(5, states(5, seed=1))])
    assert mask.tolist() == [[0, 0, 0, 1, 1], [0] * 5, [1] * 5]
    assert torch.equal(row_states(cache, 0, mask[0]), states(2))
    assert row_states(cache, 1, mask[1]).shape == (2, 2, 3, 0, 4)
    assert torch.equal(row_states(cache, 2, mask[2]), states(5, seed=1))
    assert batch_cache([None, None]) is None
