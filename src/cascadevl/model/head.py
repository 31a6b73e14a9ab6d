"""The language head where a loss needs it, and nowhere else.

Logits are the largest tensor of a training step. They are computed for the targets only, in chunks
of bounded size, and the caller's function turns each chunk into one number a target at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.utils.checkpoint import checkpoint

HeadFn: TypeAlias = Callable[[Tensor, slice], Tensor]
"""From logits (chunk, vocabulary) and the chunk's place among the targets to (chunk,) numbers."""

CHUNK_BYTES = 256 * 2**20
"""Logits that are computed at once, in bytes of float32: 441 targets of a vocabulary of 151,936.

Each chunk makes a gradient of the whole head, 272 MB of bfloat16 for Qwen's 1B, and adds it to the
others'; fewer targets than these would cost more in that than in the products themselves. In
bfloat16 half the bytes are used, and as many for the gradient: losses widen a few rows at a time.
"""


def score_targets(
    hidden_states: Float[Tensor, "rows tokens hidden"],
    target_index: Int64[Tensor, " targets"],
    project: Callable[[Tensor], Tensor],
    head_fn: HeadFn,
    vocab_size: int,
    *,
    chunk_bytes: int = CHUNK_BYTES,
) -> Float[Tensor, " targets"]:
    """Apply the head and ``head_fn`` to the hidden states of the targets, chunk by chunk.

    Where more than one chunk is needed and gradients are wanted, each chunk is computed again in
    the backward pass, so that only one chunk's logits exist at any time.

    Args:
        hidden_states: Last hidden states of packed rows.
        target_index: Flat index of the hidden state that predicts each target.
        project: From hidden states to logits.
        head_fn: Loss, log-probability or any other function of one target's logits.
        vocab_size: Columns of the logits.
        chunk_bytes: Bound of one chunk's logits in bytes.
    """
    states = hidden_states.flatten(0, 1).index_select(0, target_index)
    size = max(1, chunk_bytes // (4 * vocab_size))

    def score(chunk: Tensor, place: slice) -> Tensor:
        return head_fn(project(chunk), place)

    if len(states) <= size:
        return score(states, slice(0, len(states)))
    pieces = []
    for start in range(0, len(states), size):
        place = slice(start, min(start + size, len(states)))
        if torch.is_grad_enabled():
            pieces.append(checkpoint(score, states[place], place, use_reentrant=False))
        else:
            pieces.append(score(states[place], place))
    return torch.cat(pieces)
