"""Stock TRL as an opponent: its GRPOTrainer over this package's environment, given nothing but public arguments.

It is set up to do what this package does, as fast as it can:

- It ends a reply at tokens only, not at strings. The closing action tags are made end tokens, so the tokenizer must
  have each as one token.
- It ends a trajectory when a reply calls no tool. Every reply is a call of one tool, `act`, with the whole reply as its
  argument, except one that gives an answer. `act` hands it to `Environment.step`: replies are read by the same rules
  and show the same images.
- Images are taken at their shown size, image placeholders are never sampled, nothing is computed twice to save memory.

What it cannot do: end a trajectory from within a tool (a streak of invalid replies), let the policy try again after a
malformed answer, score a micro-batch without images where others of the step have some, and leave the image
placeholders out of the log-probs of its loss.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vrag_lib.actions import STOP_STRINGS
from vrag_lib.bench import BenchmarkError
from vrag_lib.config import EnvironmentConfig
from vrag_lib.corpus import Corpus, Question
from vrag_lib.environment import Environment, Observation
from vrag_lib.geometry import PATCH
from vrag_lib.policy_transformers import TransformersPolicy
from vrag_lib.retrieval import Retriever

if TYPE_CHECKING:
    import trl

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if loop.first and message.role != 'system' -%}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}"
    "{%- endif -%}"
    "{{ '<|im_end|>\\n<|im_start|>user\\n' if message.role == 'tool' else '<|im_start|>' + message.role + '\\n' }}"
    "{%- if message.content is string -%}{{ message.content }}{%- else -%}"
    "{%- for part in message.content -%}"
    "{{ part.text if part.type == 'text' else '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{%- endfor -%}{%- endif -%}"
    "{%- for call in message.tool_calls or [] -%}{{ call.function | tojson }}{%- endfor -%}"
    "{%- if message.role != 'assistant' -%}{{ '<|im_end|>\\n' }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)
"""Qwen2.5-VL's format, the results of a tool as user turns. What ends an assistant turn stands at the head of the next:
TRL appends the tokens of a tool's message to the sampled ones, which end with an action tag."""

RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "content": {"content": "text"},
        "tool_calls": {
            "open_pattern": r"\A(?!.*</answer>)(?P<reply>.+)",
            "content": "text",
            "repeats": True,
            "transform": {"type": "function", "function": {"name": "act", "arguments": {"reply": "{reply}"}}},
        },
    },
}
"""How TRL reads a reply: one with an answer is content, any other a call of `act`."""


def stock_model(checkpoint: str | Path, like: TransformersPolicy) -> tuple[Any, Any]:
    """The model of a checkpoint and its processor, for `stock_trainer`; device and precision as in `like`.

    Raises BenchmarkError when the tokenizer spells an action tag in several tokens.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(checkpoint)
    tokenizer = processor.tokenizer
    spelled = [tag for tag in STOP_STRINGS if tag not in tokenizer.get_vocab()]
    if spelled:
        raise BenchmarkError(
            f"stock TRL ends a reply at tokens only, and {checkpoint} spells {', '.join(spelled)} in several; "
            "add the action tags to its tokenizer, as the scale models have them"
        )
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=like.model.dtype).to(like.model.device)
    ends = ["<|im_end|>", tokenizer.pad_token, *STOP_STRINGS]
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(ends)
    # TRL cuts what stands before a tool's message at the tokenizer's end token; it must be one that ends no turn.
    tokenizer.eos_token = tokenizer.pad_token
    tokenizer.response_template = RESPONSE_TEMPLATE
    processor.chat_template = CHAT_TEMPLATE
    processor.image_processor.size = {"shortest_edge": 4 * PATCH * PATCH, "longest_edge": 16384 * PATCH * PATCH}
    return model, processor


def stock_trainer(
    model: Any,
    processor: Any,
    questions: Sequence[Question],
    rewards: Sequence[float],
    corpus: Corpus,
    retriever: Retriever,
    environment: EnvironmentConfig,
    folder: str | Path,
    *,
    peft_config: Any = None,
    generation: dict[str, Any] | None = None,
    **settings: Any,
) -> trl.GRPOTrainer:
    """TRL's trainer for one step with greedy replies, on all questions in order, a group of each.

    rewards: of the step's trajectories, in order; they are given and not judged. generation, settings: added to
    `generation_kwargs` and to the rest of trl.GRPOConfig.
    """
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    import trl
    from datasets import Dataset
    from transformers.trainer_callback import PrinterCallback

    arguments = trl.GRPOConfig(
        output_dir=str(folder),
        max_steps=1,
        max_tool_calling_iterations=environment.max_turns - 1,
        generation_kwargs={"do_sample": False, **(generation or {})},
        shuffle_dataset=False,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=model.device.type == "cpu",
        save_strategy="no",
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **settings,
    )
    prompt = [{"role": "user", "content": ""}]  # the environment puts the question there
    trainer = trl.GRPOTrainer(
        model=model,
        reward_funcs=lambda **_: list(rewards),
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": prompt, "question": i} for i in range(len(questions))]),
        processing_class=processor,
        peft_config=peft_config,
        environment_factory=functools.partial(ToolEnvironment, questions, corpus, retriever, environment),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


class ToolEnvironment:
    """The environment as TRL wants it: `reset` poses the question of a row, the other public method is the tool."""

    def __init__(self, questions: Sequence[Question], corpus: Corpus, retriever: Retriever, config: EnvironmentConfig):
        self._questions, self._corpus = questions, corpus
        self._environment = Environment(corpus, retriever, config)

    def reset(self, question: int, **_: Any) -> list[dict[str, Any]]:
        """The first user message of a row, as content blocks."""
        asked = self._questions[question]
        return self._blocks(self._environment.reset(asked.query, self._environment.given(asked)))

    def act(self, reply: str) -> list:
        """Carry out one reply.

        Args:
            reply: all of it, with its action
        """
        return self._blocks(self._environment.step(reply))

    def _blocks(self, seen: Observation) -> list[dict[str, Any]]:
        images = [{"type": "image", "image": image.render(self._corpus)} for image in seen.images]
        return [*images, {"type": "text", "text": seen.text}]
