"""The operator ``cascadevl::packed_attention``: attention of packed rows, forward and backward.

A custom operator with a backward pass of its own, so that a compiler sees one node. A row's
segments are gathered into buckets of similar length (`cascadevl.model.layout`), each of which is
two batched matrix products and a softmax; nothing is computed across samples, and key heads are
shared by reshaping, never repeated.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

# Written out, because the schema cannot be read off functions that a run-time type checker wraps.
_LAYOUT = (
    "Tensor query_index, Tensor query_order, Tensor key_index, Tensor query_slot, "
    "Tensor short_slot, Tensor short_start, Tensor shapes"
)
_FORWARD = (
    f"(Tensor query, Tensor key, Tensor value, Tensor? sinks, {_LAYOUT}, Tensor short_cells, "
    f"float scaling, int window, bool keep) -> (Tensor, Tensor)"
)
_BACKWARD = (
    f"(Tensor grad, Tensor kept, Tensor query, Tensor key, Tensor value, Tensor? sinks, {_LAYOUT}, "
    f"float scaling, int window) -> (Tensor, Tensor, Tensor, Tensor)"
)


class _Bucket(NamedTuple):
    """One round of dense attention inside the operator."""

    units: int
    queries: int
    keys: int
    short: bool
    seen: int  # so many of the first keys are seen by all queries
    query_slots: slice
    key_slots: slice
    cells: slice


def _rounds(shapes: Tensor) -> Iterator[_Bucket]:
    query, key, cell = 0, 0, 0
    for units, queries, keys, short, seen in shapes.tolist():
        cells = units * queries * keys if short else 0
        yield _Bucket(
            units,
            queries,
            keys,
            bool(short),
            seen,
            slice(query, query + units * queries),
            slice(key, key + units * keys),
            slice(cell, cell + cells),
        )
        query, key, cell = query + units * queries, key + units * keys, cell + cells


class _Heads(NamedTuple):
    """Head counts: queries of one group share a key head."""

    kv: int
    group: int
    dim: int


def _queries(flat: Tensor, index: Tensor, bucket: _Bucket, heads: _Heads) -> Tensor:
    """Gather rows of a (tokens, heads * dim) tensor to (units * kv, group * queries, dim)."""
    rows = flat.index_select(0, index).view(bucket.units, bucket.queries, *heads)
    return rows.permute(0, 2, 3, 1, 4).reshape(bucket.units * heads.kv, -1, heads.dim)


def _keys(flat: Tensor, index: Tensor, bucket: _Bucket, heads: _Heads) -> Tensor:
    """Gather rows of a (tokens, kv * dim) tensor to (units * kv, keys, dim)."""
    rows = flat.index_select(0, index).view(bucket.units, bucket.keys, heads.kv, heads.dim)
    return rows.transpose(1, 2).reshape(bucket.units * heads.kv, bucket.keys, heads.dim)


def _flat(states: Tensor) -> Tensor:
    """(rows, heads, tokens, dim) to (rows * tokens, heads * dim): a view of a body's states."""
    return states.transpose(1, 2).reshape(states.shape[0] * states.shape[2], -1)


def _wide(states: Tensor) -> Tensor:
    """At least float32."""
    return states.to(torch.promote_types(states.dtype, torch.float32))


def _probabilities(
    queries: Tensor,
    keys: Tensor,
    order: Tensor,
    sinks: Tensor | None,
    bucket: _Bucket,
    heads: _Heads,
    window: int,
    out: Tensor | None,
) -> Tensor:
    """Softmax over the keys each query may see; (units * kv, group * queries, keys).

    torch's softmax computes in float32 also where it reads and writes bfloat16.
    """
    scores = torch.bmm(queries, keys.mT)
    place = torch.arange(bucket.seen, bucket.keys, device=order.device)
    order = order.view(bucket.units, 1, 1, bucket.queries, 1)
    hidden = place > order
    if window:
        hidden |= place <= order - window
    grid = (bucket.units, heads.kv, heads.group, bucket.queries, bucket.keys)
    scores.view(grid)[..., bucket.seen :].masked_fill_(hidden, float("-inf"))
    if sinks is None:
        return torch.softmax(scores, -1, out=None if out is None else out.view(scores.shape))
    # A sink takes part of the probability and has no value: what it leaves to the keys is a gate.
    total = torch.logsumexp(_wide(scores), -1, keepdim=True).view(*grid[:-1], 1)
    gate = torch.sigmoid(total - _wide(sinks).view(1, heads.kv, heads.group, 1, 1))
    kept = torch.softmax(scores, -1).view(grid) * gate.to(scores.dtype)
    kept = kept.view(scores.shape)
    return kept if out is None else out.view(scores.shape).copy_(kept)


@torch.library.custom_op("cascadevl::packed_attention", mutates_args=(), schema=_FORWARD)
def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    query_index: Tensor,
    query_order: Tensor,
    key_index: Tensor,
    query_slot: Tensor,
    short_slot: Tensor,
    short_start: Tensor,
    shapes: Tensor,
    short_cells: Tensor,
    scaling: float,
    window: int,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """Attention of packed rows.

    Args:
        query: (rows, heads, tokens, dim).
        key: (rows, kv heads, tokens, dim); queries of ``heads / kv heads`` heads share one.
        value: As the keys.
        sinks: One logit a head that takes part in the softmax and has no value, or None.
        query_index: See `Buckets`, as for all up to ``short_cells``.
        query_order: See `Buckets`.
        key_index: See `Buckets`.
        query_slot: See `Buckets`.
        short_slot: See `Buckets`.
        short_start: See `Buckets`.
        shapes: See `Buckets`.
        short_cells: See `Buckets`.
        scaling: Factor of the scores.
        window: Tokens a query sees, itself included; 0 for all.
        keep: Keep the probabilities of short buckets for the backward pass.

    Returns:
        The output (rows, tokens, heads, dim), zeros where a token is padding; and the kept
        probabilities.
    """
    rows, num_heads, width, dim = query.shape
    heads = _Heads(key.shape[1], num_heads // key.shape[1], dim)
    flat_query, flat_key, flat_value = _flat(query), _flat(key), _flat(value)
    gather = query_index.clamp(max=rows * width - 1)
    kept = query.new_empty(short_cells.shape[0] * num_heads if keep else 0)
    slots = query.new_empty(len(query_index) + 1, num_heads * dim)
    slots[-1] = 0
    for bucket in _rounds(shapes):
        index = key_index[bucket.key_slots]
        queries = _queries(flat_query, gather[bucket.query_slots], bucket, heads).mul_(scaling)
        keys = _keys(flat_key, index, bucket, heads)
        values = _keys(flat_value, index, bucket, heads)
        cells = slice(bucket.cells.start * num_heads, bucket.cells.stop * num_heads)
        out = kept[cells] if keep and bucket.short else None
        order = query_order[bucket.query_slots]
        probabilities = _probabilities(queries, keys, order, sinks, bucket, heads, window, out)
        context = torch.bmm(probabilities, values)
        _store(slots[bucket.query_slots], context, bucket, heads)
    return slots.index_select(0, query_slot).view(rows, width, num_heads, dim), kept


def _store(slots: Tensor, states: Tensor, bucket: _Bucket, heads: _Heads) -> None:
    """Write (units * kv, group * queries, dim) into the rows of a bucket's query slots."""
    grid = states.view(bucket.units, heads.kv, heads.group, bucket.queries, heads.dim)
    slots.view(bucket.units, bucket.queries, *heads).copy_(grid.permute(0, 3, 1, 2, 4))


@packed_attention.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    query_index: Tensor,
    query_order: Tensor,
    key_index: Tensor,
    query_slot: Tensor,
    short_slot: Tensor,
    short_start: Tensor,
    shapes: Tensor,
    short_cells: Tensor,
    scaling: float,
    window: int,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    rows, num_heads, width, dim = query.shape
    kept = query.new_empty(short_cells.shape[0] * num_heads if keep else 0)
    return query.new_empty(rows, width, num_heads, dim), kept


@torch.library.custom_op("cascadevl::packed_attention_backward", mutates_args=(), schema=_BACKWARD)
def packed_attention_backward(
    grad: Tensor,
    kept: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    query_index: Tensor,
    query_order: Tensor,
    key_index: Tensor,
    query_slot: Tensor,
    short_slot: Tensor,
    short_start: Tensor,
    shapes: Tensor,
    scaling: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `packed_attention` with respect to query, key, value and sinks (float32)."""
    rows, num_heads, width, dim = query.shape
    heads = _Heads(key.shape[1], num_heads // key.shape[1], dim)
    flat_query, flat_key, flat_value = _flat(query), _flat(key), _flat(value)
    flat_grad = F.pad(grad.reshape(rows * width, -1), (0, 0, 0, 1))  # filling gets no gradient
    gather = query_index.clamp(max=rows * width - 1)
    slots = query.new_empty(len(query_index) + 1, num_heads * dim)
    slots[-1] = 0
    key_sum = _KeySum(key, shapes, key_index)
    value_sum = _KeySum(key, shapes, key_index)
    sink_grad = _wide(query.new_zeros(num_heads))
    for bucket in _rounds(shapes):
        index, order = key_index[bucket.key_slots], query_order[bucket.query_slots]
        queries = _queries(flat_query, gather[bucket.query_slots], bucket, heads).mul_(scaling)
        keys = _keys(flat_key, index, bucket, heads)
        values = _keys(flat_value, index, bucket, heads)
        outgoing = _queries(flat_grad, query_index[bucket.query_slots], bucket, heads)
        if bucket.short and len(kept):
            cells = kept[bucket.cells.start * num_heads : bucket.cells.stop * num_heads]
            probabilities = cells.view(queries.shape[0], queries.shape[1], bucket.keys)
        else:
            probabilities = _probabilities(queries, keys, order, sinks, bucket, heads, window, None)
        incoming = torch.bmm(outgoing, values.mT)
        if sinks is not None:
            sink_grad += _sink_grad(probabilities, incoming, bucket, heads)
        # d(scores) = p (dp - sum p dp): also where a sink leaves the keys less than 1 in all.
        scores = torch._softmax_backward_data(incoming, probabilities, -1, probabilities.dtype)
        _store(slots[bucket.query_slots], torch.bmm(scores, keys).mul_(scaling), bucket, heads)
        key_sum.add(torch.bmm(scores.mT, queries), bucket, heads)
        value_sum.add(torch.bmm(probabilities.mT, outgoing), bucket, heads)
    query_grad = slots.index_select(0, query_slot).view(rows, width, num_heads, dim).transpose(1, 2)
    key_grad = key_sum.total(short_slot, short_start)
    value_grad = value_sum.total(short_slot, short_start)
    return query_grad, key_grad, value_grad, sink_grad


def _sink_grad(probabilities: Tensor, incoming: Tensor, bucket: _Bucket, heads: _Heads) -> Tensor:
    probabilities, incoming = _wide(probabilities), _wide(incoming)
    grad = -(1 - probabilities.sum(-1)) * (probabilities * incoming).sum(-1)
    return grad.view(bucket.units, heads.kv * heads.group, bucket.queries).sum((0, 2))


class _KeySum:
    """Adds up what every key receives: a token of a shared prompt is a key of many segments.

    Short buckets fill one buffer that is summed by token at the end, which is fast; long ones, of
    which that buffer would hold many copies, are added token by token in float32.
    """

    def __init__(self, states: Tensor, shapes: Tensor, key_index: Tensor) -> None:
        self.states, self.key_index = states, key_index
        num_short = int((shapes[:, 0] * shapes[:, 2] * shapes[:, 3]).sum())  # they come first
        width = states.shape[1] * states.shape[3]
        num_tokens = states.shape[0] * states.shape[2]
        self.short = states.new_empty(num_short, width)
        self.long = None
        if num_short < len(key_index):
            self.long = _wide(states.new_zeros(num_tokens, width))

    def add(self, grad: Tensor, bucket: _Bucket, heads: _Heads) -> None:
        """Take the gradient (units * kv, keys, dim) of one bucket's keys."""
        grid = grad.view(bucket.units, heads.kv, bucket.keys, heads.dim).transpose(1, 2)
        if bucket.short:
            self.short[bucket.key_slots].view(grid.shape).copy_(grid)
        else:
            assert self.long is not None, "a long bucket without room for it"
            index = self.key_index[bucket.key_slots]
            self.long.index_add_(0, index, grid.reshape(len(index), -1).to(self.long.dtype))

    def total(self, short_slot: Tensor, short_start: Tensor) -> Tensor:
        """The sum by token, in the shape of the keys."""
        rows, num_heads, width, dim = self.states.shape
        total = self.long
        if total is None or len(short_slot):
            # An empty buffer stands for padding alone; embedding_bag wants at least one row.
            buffer = self.short if len(self.short) else self.short.new_zeros(1, num_heads * dim)
            short = F.embedding_bag(short_slot, buffer, short_start, mode="sum")
            total = short if total is None else total.add_(short)
        return total.to(self.states.dtype).view(rows, width, num_heads, dim).transpose(1, 2)


@packed_attention_backward.register_fake
def _(
    grad: Tensor,
    kept: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    query_index: Tensor,
    query_order: Tensor,
    key_index: Tensor,
    query_slot: Tensor,
    short_slot: Tensor,
    short_start: Tensor,
    shapes: Tensor,
    scaling: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def like(states: Tensor) -> Tensor:
        rows, num_heads, width, dim = states.shape
        return states.new_empty(rows, width, num_heads, dim).transpose(1, 2)

    wide = torch.promote_types(query.dtype, torch.float32)
    return like(query), like(key), like(value), query.new_empty(query.shape[1], dtype=wide)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, _, ctx.scaling, ctx.window, _ = inputs
    ctx.save_for_backward(output[1], *tensors)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    nothing = (None,) * 11
    if grad is None:
        return (None, None, None, None, *nothing)
    kept, *tensors = ctx.saved_tensors
    *grads, sink_grad = packed_attention_backward(
        grad, kept, *tensors, scaling=ctx.scaling, window=ctx.window
    )
    sinks = tensors[3]
    return (*grads, None if sinks is None else sink_grad.to(sinks.dtype), *nothing)


packed_attention.register_autograd(_backward, setup_context=_setup_context)
