"""Conversations as the tokens of a Qwen2-VL-type checkpoint: what the policies with the weights at hand share.

Deviations from the released code: the tokens of earlier turns are never encoded again, a reply is exactly what was
sampled (traps T2, T12); the context is counted with its image tokens, and one that is full is reported (T13); images
arrive at their shown size and are never resized again (T8).

Tokens. A conversation is ChatML, in pieces that are encoded once each:

    user 1       [system turn] <|im_start|>user\\n IMAGES TEXT <|im_end|>\\n <|im_start|>assistant\\n
    assistant 1  the sampled tokens, with <|im_end|> if it was sampled
    user 2       <|im_end|> if it was not, \\n <|im_start|>user\\n IMAGES TEXT <|im_end|>\\n <|im_start|>assistant\\n

An image is <|vision_start|>, one <|image_pad|> per vision token, <|vision_end|>. Special tokens written out in a
question, or in a reply that came as text, are encoded as ordinary characters: text cannot forge turns or images.

Log-probs are those of the distribution sampled from: log-softmax, in float32, of the logits after image tokens were
given no probability, division by the temperature, and cutting to the nucleus. Greedy replies (temperature 0) carry
the log-probs at temperature 1. For training use top_p=1 and mask the same image tokens in the trainer
(`suppressed_token_ids`); the two then agree.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from vrag_lib.actions import IMAGE_TOKENS, STOP_STRINGS, cut_reply
from vrag_lib.geometry import PATCH
from vrag_lib.policy import Conversation, Reply
from vrag_lib.trajectory import ImageRef, Turn, clean_text

if TYPE_CHECKING:
    from vrag_lib.corpus import Corpus

_STOP_WINDOW = 16
"""Newest tokens decoded to look for a stop string: the longest has 9 characters, and a token has at least one byte."""


_RENDERED_IMAGES = 512
"""Images kept as pixels, about 1.2 MB each at 512 vision tokens: a conversation shows them every turn, and a rollout's
are shown again when it is trained on."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be this policy; the message says why."""


@dataclass(frozen=True)
class Context:
    """One conversation as tokens: ids with one image placeholder per vision token, and the images in order."""

    token_ids: tuple[int, ...]
    images: tuple[ImageRef, ...]


class ChatPolicy(ABC):
    """Encodes conversations, reads replies, keeps the limits. A subclass says how images are prepared and samples.

    processor: of a Qwen2-VL-type checkpoint. config, generation_config: of its model; for the longest context and the
    tokens that end a reply. corpus: where image references are rendered from.
    temperature: 0 is greedy. top_p: nucleus, 1 is the whole distribution.
    max_reply_tokens, max_context_tokens: limits in tokens, image tokens counted; the context includes the reply.
    batch_size: conversations sampled together.

    Raises CheckpointError when the processor's chat template or image patches are not Qwen2-VL's.
    """

    def __init__(
        self,
        processor: Any,
        config: Any,
        generation_config: Any,
        corpus: Corpus,
        *,
        name: str,
        temperature: float = 1.0,
        top_p: float = 1.0,
        max_reply_tokens: int = 2048,
        max_context_tokens: int = 10240,
        batch_size: int = 8,
    ):
        if temperature < 0 or not 0 < top_p <= 1 or min(max_reply_tokens, max_context_tokens, batch_size) < 1:
            raise ValueError("temperature is at least 0, top_p in (0, 1], token limits and batch size at least 1")
        self.name = name
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.temperature, self.top_p = temperature, top_p
        self.max_reply_tokens, self.batch_size = max_reply_tokens, batch_size
        longest = getattr(config.get_text_config(), "max_position_embeddings", max_context_tokens)
        self.max_context_tokens = min(max_context_tokens, longest)
        unit = processor.image_processor.patch_size * processor.image_processor.merge_size
        if unit != PATCH:
            raise CheckpointError(f"{name}: one vision token is {unit} pixels wide, {PATCH} is needed (Qwen2(.5)-VL)")
        self._render = lru_cache(_RENDERED_IMAGES)(lambda ref: ref.render(corpus))
        self._opening = self._read_opening()
        self._im_end = self._id("<|im_end|>")
        ends = getattr(generation_config, "eos_token_id", None)
        self._ends = {self._im_end, *([ends] if isinstance(ends, int) else ends or [])}
        self.suppressed_token_ids = tuple(self._id(t) for t in IMAGE_TOKENS if t in self.tokenizer.get_vocab())

    def generate(self, conversations: Sequence[Conversation], *, seeds: Sequence[int] | None = None) -> list[Reply]:
        """One reply per conversation. A conversation whose images cannot be rendered gets an error; one whose context
        is full, finish reason `overflow`. Without `seeds`, seeds come from torch's global generator."""
        import torch

        if seeds is None:
            seeds = torch.randint(2**62, (len(conversations),)).tolist()
        if len(seeds) != len(conversations):
            raise ValueError(f"{len(conversations)} conversations but {len(seeds)} seeds")
        replies: list[Reply | None] = [None] * len(conversations)
        contexts: dict[int, Context] = {}
        for i, conversation in enumerate(conversations):
            context = self.encode(conversation)
            try:
                self._prepare_images(context)
            except Exception as error:  # a page file may be broken in any way; that must cost this conversation only
                replies[i] = Reply("", finish_reason="error", error=f"an image cannot be shown: {error}")
                continue
            if len(context.token_ids) >= self.max_context_tokens:
                replies[i] = Reply("", prompt_token_ids=context.token_ids, finish_reason="overflow")
            else:
                contexts[i] = context
        sampled = self._sample_contexts(list(contexts.values()), [seeds[i] for i in contexts])
        for i, reply in zip(contexts, sampled, strict=True):
            replies[i] = reply
        return [reply for reply in replies if reply is not None]

    @abstractmethod
    def _prepare_images(self, context: Context) -> None:
        """Render what the context shows, and remember it. Raises whatever a broken page file may cause."""

    @abstractmethod
    def _sample_contexts(self, contexts: list[Context], seeds: list[int]) -> list[Reply]:
        """One reply per context, in order; every context has room for a token."""

    def reply_limit(self, context: Context) -> int:
        """Tokens that a reply to this context may have."""
        return min(self.max_reply_tokens, self.max_context_tokens - len(context.token_ids))

    def encode(self, conversation: Conversation) -> Context:
        """The context a reply to this conversation is sampled from. Recorded token ids are used as they are."""
        ids: list[int] = []
        images: list[ImageRef] = []
        for turn in conversation:
            images += turn.images
            if turn.token_ids is not None:
                ids += turn.token_ids
            elif turn.role == "assistant":
                ids += self._text_ids(turn.text)
            else:
                ids += self._user_ids(turn, ids)
        return Context(tuple(ids), tuple(images))

    def _user_ids(self, turn: Turn, before: list[int]) -> list[int]:
        start = self._id("<|im_start|>")
        if before:
            ids = ([] if before[-1] == self._im_end else [self._im_end]) + self._text_ids("\n") + [start]
        else:
            ids = list(self._opening)
        # "user\n" and a text directly after it are one piece, as in the chat template: the two may share a token.
        head, text = ("user\n", turn.text) if turn.images else ("user\n" + turn.text, "")
        ids += self._text_ids(head)
        for image in turn.images:
            pads = [self._id("<|image_pad|>")] * image.view.shown.tokens
            ids += [self._id("<|vision_start|>"), *pads, self._id("<|vision_end|>")]
        ids += [*self._text_ids(text), self._im_end, *self._text_ids("\n"), start]
        return ids + self._text_ids("assistant\n")

    def _text_ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(clean_text(text), add_special_tokens=False, split_special_tokens=True)

    def _id(self, token: str) -> int:
        return self.tokenizer.convert_tokens_to_ids(token)

    def _read_opening(self) -> list[int]:
        """Tokens of what the chat template puts before the first user turn, up to its `<|im_start|>`; the rest of the
        template must be the one described above."""
        probe = [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]},
            {"role": "assistant", "content": "b"},
            {"role": "user", "content": [{"type": "text", "text": "c"}]},
        ]
        expected = (
            "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>a<|im_end|>\n"
            "<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n"
        )
        try:
            text = self.processor.apply_chat_template(probe, add_generation_prompt=True, tokenize=False)
        except ValueError as error:
            raise CheckpointError(f"{self.name}: the processor has no chat template: {error}") from error
        if not text.endswith(expected):
            raise CheckpointError(f"{self.name}: the chat template is not Qwen2-VL's; it renders {text!r}")
        opening = text[: -len(expected)] + "<|im_start|>"
        return self.tokenizer.encode(opening, add_special_tokens=False)

    def _finish_reason(self, ids: list[int], limit: int) -> str:
        """`stop` at an end token or a stop string, `length` at the limit, empty while the reply goes on."""
        if ids[-1] in self._ends:
            return "stop"
        newest = self.tokenizer.decode(ids[-_STOP_WINDOW:], skip_special_tokens=False)
        if any(string in newest for string in STOP_STRINGS):
            return "stop"
        return "length" if len(ids) >= limit else ""

    def _text(self, ids: list[int]) -> str:
        """The reply as text, without its end token and without what its last token holds beyond a stop string."""
        kept = ids[:-1] if ids[-1] in self._ends else ids
        return cut_reply(self.tokenizer.decode(kept, skip_special_tokens=False))
