"""The operator ``cascadevl::dense_attention``: the vision tower's attention on a CPU.

Two matrix products and a softmax for a few heads at a time, so that their probabilities stay in
the cache; they are computed again in the backward pass, so that none are kept. For the 1,025 tokens
of a released tile, forward and backward pass take little more than half the time of torch's
``scaled_dot_product_attention`` in bfloat16 on a CPU (benchmarks/bench_parts.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

CELLS = 2**21
"""Most query x key cells computed together: 4 MiB of probabilities in bfloat16."""

# Written out, because the schema cannot be read off functions that a run-time type checker wraps.
_FORWARD = "(Tensor query, Tensor key, Tensor value, float scaling) -> Tensor"
_BACKWARD = (
    "(Tensor grad, Tensor query, Tensor key, Tensor value, float scaling) "
    "-> (Tensor, Tensor, Tensor)"
)


def _parts(states: Tensor) -> Iterator[tuple[int, slice]]:
    """A tile and some of its heads at a time, of (tiles, heads, tokens, dim)."""
    tiles, heads, tokens, _ = states.shape
    together = max(1, CELLS // tokens**2)
    for tile in range(tiles):
        for start in range(0, heads, together):
            yield tile, slice(start, start + together)


@torch.library.custom_op("cascadevl::dense_attention", mutates_args=(), schema=_FORWARD)
def dense_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Attention in which every token of a tile sees all of it.

    Args:
        query: (tiles, heads, tokens, dim).
        key: As the queries.
        value: As the queries.
        scaling: Factor of the scores.

    Returns:
        (tiles, tokens, heads, dim).
    """
    tiles, heads, tokens, dim = query.shape
    out = query.new_empty(tiles, tokens, heads, dim)
    # Heads side by side in memory are multiplied slower than heads one behind the other.
    query, key = (query * scaling).contiguous(), key.contiguous()
    for part in _parts(query):
        probabilities = torch.softmax(torch.bmm(query[part], key[part].mT), -1)
        out.transpose(1, 2)[part] = torch.bmm(probabilities, value[part])
    return out


@dense_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    tiles, heads, tokens, dim = query.shape
    return query.new_empty(tiles, tokens, heads, dim)


@torch.library.custom_op("cascadevl::dense_attention_backward", mutates_args=(), schema=_BACKWARD)
def dense_attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `dense_attention` with respect to query, key and value."""
    tiles, heads, tokens, dim = query.shape
    grads = [query.new_empty(tiles, tokens, heads, dim).transpose(1, 2) for _ in range(3)]
    query_grad, key_grad, value_grad = grads
    outgoing = grad.transpose(1, 2)
    for part in _parts(query):
        queries = query[part] * scaling
        probabilities = torch.softmax(torch.bmm(queries, key[part].mT), -1)
        value_grad[part] = torch.bmm(probabilities.mT, outgoing[part])
        incoming = torch.bmm(outgoing[part], value[part].mT)
        scores = torch._softmax_backward_data(incoming, probabilities, -1, probabilities.dtype)
        query_grad[part] = torch.bmm(scores, key[part]).mul_(scaling)
        key_grad[part] = torch.bmm(scores.mT, queries)
    return query_grad, key_grad, value_grad


@dense_attention_backward.register_fake
def _(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    tiles, heads, tokens, dim = query.shape
    one, two, three = (query.new_empty(tiles, tokens, heads, dim).transpose(1, 2) for _ in range(3))
    return one, two, three


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.scaling = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*dense_attention_backward(grad, *ctx.saved_tensors, scaling=ctx.scaling), None)


dense_attention.register_autograd(_backward, setup_context=_setup_context)
