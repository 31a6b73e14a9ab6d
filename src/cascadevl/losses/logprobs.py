"""What the model thinks of each token: the one place where logits become log-probabilities.

Every loss of the package starts here, so that all of them take the logarithm in the same
precision: a bfloat16 log-softmax loses the tail that the ratios of MPO and GSPO live on.

Logits are the largest tensor of a training step. They are widened to float32 a few rows at a time,
forward and backward, so that no copy of them in float32 ever exists: about a third of the time of
torch's log-softmax on a CPU, where the passes over such copies cost more than the exponentials
(benchmarks/bench_parts.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = {"cpu": 2**19}
"""Entries widened at once: 2 MiB of float32, which a core's cache holds."""

DEVICE_BLOCK = 2**26
"""The same on other devices, where each block costs a launch."""


def token_logprobs(
    logits: Float[Tensor, "*tokens vocab"], ids: Int64[Tensor, "*tokens"]
) -> Float[Tensor, "*tokens"]:
    """Log-probability of each given token, in float32 whatever the logits came in.

    Args:
        logits: Scores of the whole vocabulary at the positions that predict the tokens.
        ids: The tokens that were to be predicted; the caller has already shifted them.

    Returns:
        ``log p(id)`` for each token; float32, or float64 for float64 logits.
    """
    chosen: Tensor = _TokenLogprobs.apply(logits.flatten(0, -2), ids.flatten())  # type: ignore[no-untyped-call]
    return chosen.view(ids.shape)


def sample_sums(
    values: Float[Tensor, " targets"], samples: Int64[Tensor, " targets"], num_samples: int
) -> Float[Tensor, " samples"]:
    """Sum of the values of each sample: of log-probabilities that of a whole answer.

    Args:
        values: One number a target.
        samples: The sample of each target.
        num_samples: Samples there are; one without targets gets 0.
    """
    return values.new_zeros(num_samples).index_add(0, samples, values)


@torch.no_grad()
def token_entropies(logits: Float[Tensor, "tokens vocab"]) -> Float[Tensor, " tokens"]:
    """Entropy of each distribution in nats, in at least float32; without a gradient.

    Args:
        logits: Scores of the whole vocabulary.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    entropies = logits.new_empty(len(logits), dtype=dtype)
    for rows in blocks(logits):
        logs = logits[rows].to(dtype).log_softmax(-1)
        # a token that cannot come adds 0, not 0 * -inf
        entropies[rows] = -(logs.exp() * logs.clamp(min=torch.finfo(dtype).min)).sum(-1)
    return entropies


def blocks(logits: Float[Tensor, "rows vocab"]) -> Iterator[slice]:
    """Rows that are widened together.

    Args:
        logits: Scores of the whole vocabulary.
    """
    rows = max(1, BLOCK.get(logits.device.type, DEVICE_BLOCK) // max(logits.shape[1], 1))
    for start in range(0, len(logits), rows):
        yield slice(start, start + rows)


class _TokenLogprobs(torch.autograd.Function):
    """Of logits (rows, vocabulary): keeps them as they came and one number a row."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor) -> Tensor:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        chosen = logits.new_empty(len(ids), dtype=dtype)
        totals = torch.empty_like(chosen)  # log of the sum of the exponentials
        for rows in blocks(logits):
            wide, place = logits[rows].to(dtype), ids[rows, None]
            logs = wide.log_softmax(-1)
            chosen[rows] = logs.gather(1, place).squeeze(1)
            totals[rows] = wide.amax(1) - logs.amax(1)  # at the largest, where nothing cancels
        ctx.save_for_backward(logits, ids, totals)
        return chosen

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        logits, ids, totals = ctx.saved_tensors
        result = torch.empty_like(logits)
        for rows in blocks(logits):
            wide = logits[rows].to(totals.dtype, copy=True)
            weight = grad[rows, None]
            wide.sub_(totals[rows, None]).exp_().mul_(-weight)  # minus the probabilities
            result[rows] = wide.scatter_add_(1, ids[rows, None], weight)
        return result, None
