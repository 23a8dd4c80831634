"""A trajectory as a trainer sees it: its tokens, which of them are trained, and their log-probs under a model.

SFT and GRPO build their batches here, from the same encoder that rollouts sample from (`TransformersPolicy.encode` and
`model_inputs`), so context tokens, pixels and multimodal positions of training are those of sampling (trap T1), and the
mask of trained tokens is read off the record (T2, T11, T12).

Deviation from the released code: a trajectory without images is a sequence without pixel tensors; it mixes with others
in one batch, and no black image is appended to it (T18).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vrag_lib.policy_transformers import Context, TransformersPolicy, sampling_logprobs
from vrag_lib.trajectory import Trajectory

if TYPE_CHECKING:
    import torch

_CHUNK = 512
"""Trained tokens whose distribution over the vocabulary is held in float32 at a time (0.3 GB for 152,000 entries)."""


class UntrainableError(ValueError):
    """A trajectory that no trainer can use; `reason` is a short machine-readable word."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Example:
    """One trajectory of T tokens: the context up to its last reply, and for each token whether it is trained, its turn
    and the log-prob it was sampled with (0.0 where unknown). No token of an environment turn is trained."""

    context: Context
    trained: tuple[bool, ...]
    turn_index: tuple[int, ...]
    logprobs: tuple[float, ...]

    @property
    def positions(self) -> list[int]:
        """Places of the trained tokens in the sequence."""
        return [i for i, trained in enumerate(self.trained) if trained]


def example_of(policy: TransformersPolicy, trajectory: Trajectory, *, valid_only: bool = False) -> Example:
    """The trajectory's tokens up to its last reply. Turns without token ids are encoded as the policy would encode them
    in a rollout; recorded ids are used as they are.

    valid_only: train on replies that were read as an action only; the others stay in the context.

    Raises UntrainableError: `no_reply`, or `image_token` when a reply holds image placeholders, so that pixels and
    tokens would no longer match.
    """
    replies = [i for i, turn in enumerate(trajectory.turns) if turn.role == "assistant"]
    if not replies:
        raise UntrainableError("no_reply", f"trajectory {trajectory.id} ended before its first reply")
    trained: list[bool] = []
    turn_index: list[int] = []
    logprobs: list[float] = []
    forbidden = set(policy.suppressed_token_ids)
    context = Context((), ())
    for i, turn in enumerate(trajectory.turns[: replies[-1] + 1]):
        context = policy.encode(trajectory.turns[: i + 1])
        added = context.token_ids[len(trained) :]
        is_reply = turn.role == "assistant"
        if is_reply and forbidden.intersection(added):
            raise UntrainableError("image_token", f"reply {i} of trajectory {trajectory.id} holds image placeholders")
        trained += [is_reply and not (valid_only and turn.action is None)] * len(added)
        turn_index += [i] * len(added)
        logprobs += turn.logprobs if turn.logprobs is not None else [0.0] * len(added)
    return Example(context, tuple(trained), tuple(turn_index), tuple(logprobs))


def empty_example(policy: TransformersPolicy) -> Example:
    """An example of a few tokens without trained ones: what a process feeds the model when it has nothing to train on,
    so that it takes part in the exchange of gradients all the same."""
    ids = tuple(policy.tokenizer.encode("user\n", add_special_tokens=False))
    return Example(Context(ids, ()), (False,) * len(ids), (0,) * len(ids), (0.0,) * len(ids))


def token_logprobs(
    model: Any, policy: TransformersPolicy, examples: Sequence[Example]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs (n,) and entropies (n,), without gradient, of the trained tokens of all examples, one after the other,
    in float32: under `model` at the policy's temperature, image tokens suppressed, as in sampling.

    One forward pass. The vocabulary is only projected to where a trained token follows.
    """
    import torch
    from torch.utils.checkpoint import checkpoint

    inputs = policy.model_inputs([example.context for example in examples])
    ids = inputs["input_ids"]  # (B, T), left-padded
    starts = [ids.shape[1] - len(example.trained) for example in examples]
    places = [(row, starts[row] + i) for row, example in enumerate(examples) for i in example.positions]
    rows, columns = torch.tensor(places, dtype=torch.long, device=ids.device).reshape(-1, 2).T
    kept, of_kept = (columns - 1).unique(return_inverse=True)  # a token is predicted one place before it
    with _projected(model, rows, of_kept):
        logits = model(**inputs, use_cache=False, logits_to_keep=kept).logits  # (n, V)
    targets = ids[rows, columns]
    suppressed = torch.tensor(policy.suppressed_token_ids, dtype=torch.long, device=ids.device)

    def score(chunk: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores = chunk.float().index_fill(-1, suppressed, -torch.inf)
        distribution = sampling_logprobs(scores, policy.temperature, top_p=1.0)
        entropy = torch.special.entr(distribution.detach().exp()).sum(-1)
        return distribution.gather(-1, target[:, None])[:, 0], entropy

    parts = [
        checkpoint(score, chunk, target, use_reentrant=False) if torch.is_grad_enabled() else score(chunk, target)
        for chunk, target in zip(logits.split(_CHUNK), targets.split(_CHUNK), strict=True)
    ]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


@contextmanager
def _projected(model: Any, rows: torch.Tensor, columns: torch.Tensor) -> Iterator[None]:
    """Inside, the output layer of `model` sees these places (n,) alone of the states (B, T, width) it is given. Models
    are called as a whole, by what shards them too, so a hook is the one way in between."""
    head = next(module for name, module in model.named_modules() if name.rpartition(".")[2] == "lm_head")
    hook = head.register_forward_pre_hook(lambda _, states: (states[0][rows, columns],))
    try:
        yield
    finally:
        hook.remove()


def batched(examples: Sequence[Any], size: int) -> list[list[Any]]:
    """Lists of at most `size`, in order.

    >>> batched([1, 2, 3], 2)
    [[1, 2], [3]]
    """
    return [list(examples[i : i + size]) for i in range(0, len(examples), size)]
