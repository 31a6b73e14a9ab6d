"""Attention of a step's tokens over keys and values in pages, and the store of these.

Query heads that share a key head lie side by side as rows of one matrix product, so no head is ever
copied. Attention to pages that a group shares and to a token's own pages is computed apart and
merged by the logarithms of the sums of exponentials; a learned sink (GPT-OSS) is one more such part
that adds nothing.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

from cascadevl.engine.attention_plan import READ_IN_PLACE, AttentionPlan, Block


class KeyValueStore:
    """Keys and values of all pages in all layers.

    Attributes:
        page_tokens: Tokens a page holds.
        apart_from: See `attention_plan`: of types narrower than float32 torch multiplies a batch
            that was gathered faster than one matrix after the other (decision 13).
    """

    def __init__(
        self,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        num_pages: int,
        page_tokens: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Reserve the memory; it is taken as pages are written."""
        self.page_tokens = page_tokens
        self.apart_from = None if _is_narrow(dtype) else READ_IN_PLACE
        shape = (num_kv_heads, num_pages * page_tokens, head_dim)

        # Zeros, because what was never written is masked, but 0 times a NaN would still be one.
        self.keys = [_untouched_zeros(shape, dtype, device) for _ in range(num_layers)]
        self.values = [_untouched_zeros(shape, dtype, device) for _ in range(num_layers)]

    def copy(self, pages: Sequence[tuple[int, int]]) -> None:
        """Copy pages, all (from, to) at once."""
        if not pages:
            return
        table = torch.tensor(pages, device=self.keys[0].device)
        offsets = torch.arange(self.page_tokens, device=table.device)
        sources, targets = (table[:, :, None] * self.page_tokens + offsets).unbind(1)
        for states in (*self.keys, *self.values):
            states.index_copy_(1, targets.flatten(), states[:, sources.flatten()])


@dataclass(slots=True, eq=False)
class _Ready:
    """A block with its arrays as tensors."""

    queries: Int64[Tensor, " all_queries"]
    in_order: bool  # a rectangle a token, or one of all tokens: nothing has to be sorted
    kept: Int64[Tensor, " some"] | None  # those of `queries` that are no repetition
    pages: Int64[Tensor, " all_pages"]
    hidden: Bool[Tensor, "rectangles 1 queries last_keys"] | None
    shape: tuple[int, int]  # rectangles, queries of each
    first_slot: int | None
    num_keys: int


@dataclass(slots=True, eq=False)
class PagedAttention:
    """Attention of one step, called by every layer of the text body.

    Attributes:
        store: Keys and values.
        slots: Where those of the step's tokens go.
        plans: By window, what is attended to.
    """

    store: KeyValueStore
    slots: Int64[Tensor, " tokens"]
    plans: dict[int | None, AttentionPlan]
    _ready: dict[int | None, tuple[list[_Ready], list[_Ready], Tensor]] = field(
        default_factory=dict
    )

    def __call__(
        self,
        layer: int,
        query: Float[Tensor, "1 heads tokens dim"],
        key: Float[Tensor, "1 kv_heads tokens dim"],
        value: Float[Tensor, "1 kv_heads tokens dim"],
        *,
        scaling: float,
        window: int | None,
        sinks: Float[Tensor, " heads"] | None,
    ) -> Float[Tensor, "1 tokens heads dim"]:
        """Write the tokens' keys and values into their pages, and attend.

        Args:
            layer: Number of the layer.
            query: Queries of all tokens of the step.
            key: Their keys.
            value: Their values.
            scaling: Factor of the scores.
            window: How many tokens back a token of this layer sees; None for all.
            sinks: Learned scores of nothing, one for each head.
        """
        keys, values = self.store.keys[layer], self.store.values[layer]
        number = len(self.slots)  # tokens behind these only fill the row
        keys.index_copy_(1, self.slots, key[0, :, :number].to(keys.dtype))
        values.index_copy_(1, self.slots, value[0, :, :number].to(values.dtype))
        num_kv, dim = key.shape[1], key.shape[3]
        grouped = (query[0] * scaling).view(num_kv, -1, query.shape[2], dim)
        shared, own, sharers = self._blocks(window)
        total = torch.empty_like(grouped)
        total[:, :, number:] = 0
        with_sums = bool(shared) or sinks is not None
        sums = self._attend(own, grouped, keys, values, total, with_sums=with_sums)
        if shared:
            assert sums is not None
            more = torch.empty_like(grouped)
            more_sums = self._attend(shared, grouped, keys, values, more, with_sums=True)
            assert more_sums is not None
            _merge(total, sums, more, more_sums, sharers)
        if sinks is not None:
            assert sums is not None
            share = torch.sigmoid(sums - sinks.float().view(num_kv, -1, 1))
            total = total * share[..., None].to(total.dtype)
        return total.flatten(0, 1).transpose(0, 1)[None]

    def _blocks(self, window: int | None) -> tuple[list[_Ready], list[_Ready], Tensor]:
        if window not in self._ready:
            plan, device = self.plans[window], self.slots.device
            page_tokens = self.store.page_tokens
            shared, own = (
                [_ready(block, page_tokens, device) for block in blocks]
                for blocks in (plan.shared, plan.own)
            )
            sharers = [block.queries for block in shared] or [self.slots[:0]]
            self._ready[window] = (shared, own, torch.cat(sharers))
        return self._ready[window]

    def _attend(
        self,
        blocks: list[_Ready],
        query: Float[Tensor, "kv groups tokens dim"],
        keys: Float[Tensor, "kv slots dim"],
        values: Float[Tensor, "kv slots dim"],
        out: Float[Tensor, "kv groups tokens dim"],
        *,
        with_sums: bool,
    ) -> Float32[Tensor, "kv groups tokens"] | None:
        """Fill in what the blocks give; return the logarithms of their sums."""
        sums = query.new_zeros(query.shape[:3], dtype=torch.float32) if with_sums else None
        for block in blocks:
            part, part_sums = _attend_block(
                block,
                query,
                self._of_pages(keys, block),
                self._of_pages(values, block),
                with_sums=with_sums,
            )
            queries = block.queries
            if block.in_order and len(queries) == query.shape[2]:
                out.copy_(part)
                return part_sums
            if block.kept is not None:
                queries, part = queries[block.kept], part[:, :, block.kept]
            out.index_copy_(2, queries, part)
            if sums is not None and part_sums is not None:
                if block.kept is not None:
                    part_sums = part_sums[:, :, block.kept]
                sums.index_copy_(2, queries, part_sums)
        return sums

    def _of_pages(
        self, states: Float[Tensor, "kv slots dim"], block: _Ready
    ) -> Float[Tensor, "all keys dim"]:
        """Keys or values of a block: (kv heads * rectangles, keys, dim)."""
        num_kv, _, dim = states.shape
        if block.first_slot is not None:
            return states[:, block.first_slot : block.first_slot + block.num_keys]
        paged = states.view(num_kv, -1, self.store.page_tokens * dim)
        return paged.index_select(1, block.pages).view(-1, block.num_keys, dim)


def _untouched_zeros(
    shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device
) -> Float[Tensor, "kv slots dim"]:
    """Zeros; on a CPU memory that is taken only where it is written, unlike torch's own.

    Mapped here, and not by the allocator, which may have to clear memory that it has kept
    (`cascadevl.host_memory`).
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def _is_narrow(dtype: torch.dtype) -> bool:
    return dtype.itemsize < torch.float32.itemsize


def _attend_block(
    block: _Ready,
    query: Float[Tensor, "kv groups tokens dim"],
    keys: Float[Tensor, "all keys dim"],
    values: Float[Tensor, "all keys dim"],
    *,
    with_sums: bool,
) -> tuple[Float[Tensor, "kv groups queries dim"], Float32[Tensor, "kv groups queries"] | None]:
    """Attention of a block's queries, rectangle after rectangle."""
    num_kv, num_groups, _, dim = query.shape
    rectangles, num_queries = block.shape
    chosen = query
    if not block.in_order or len(block.queries) < query.shape[2]:
        chosen = query.index_select(2, block.queries)
    chosen = chosen.view(num_kv, num_groups, rectangles, num_queries, dim).transpose(1, 2)
    scores = _products(chosen.reshape(len(keys), -1, dim), keys)
    if block.hidden is not None:
        shape = (num_kv, rectangles, num_groups, num_queries, -1)
        last = scores.view(shape)[..., -block.hidden.shape[-1] :]
        last.masked_fill_(block.hidden, torch.finfo(scores.dtype).min)
    sums = None
    if with_sums:
        weights = torch.softmax(scores, -1, dtype=torch.float32)
        # The largest weight is exp(its score - the logarithm): no second pass of exponentials.
        sums = scores.amax(-1).float() - weights.amax(-1).log_()
        sums = sums.view(num_kv, rectangles, num_groups, num_queries).transpose(1, 2).flatten(2)
        weights = weights.to(values.dtype)
    else:
        weights = torch.softmax(scores, -1)  # computed in float32, also where it is not stored so
    found = (weights @ values).view(num_kv, rectangles, num_groups, num_queries, dim)
    return found.transpose(1, 2).flatten(2, 3), sums


def _products(
    query: Float[Tensor, "all rows dim"], keys: Float[Tensor, "all keys dim"]
) -> Float[Tensor, "all rows keys"]:
    """Scores of every row and key.

    On a CPU torch's batched product of a narrow type first copies keys that are read in place, all
    of them for a few rows: there each matrix is multiplied by itself.
    """
    is_dense = keys.stride(0) == keys.shape[1] * keys.shape[2]
    if is_dense or keys.device.type != "cpu" or not _is_narrow(keys.dtype):
        return query @ keys.mT
    scores = query.new_empty(len(query), query.shape[1], keys.shape[1])
    for each, rows, matrix in zip(scores, query, keys, strict=True):
        torch.mm(rows, matrix.T, out=each)
    return scores


def _merge(
    total: Float[Tensor, "kv groups tokens dim"],
    sums: Float32[Tensor, "kv groups tokens"],
    more: Float[Tensor, "kv groups tokens dim"],
    more_sums: Float32[Tensor, "kv groups tokens"],
    rows: Int64[Tensor, " some"],
) -> None:
    """Add attention to other keys, which some tokens have, to what is there, in place."""
    all_rows = len(rows) == total.shape[2]
    if all_rows:  # the usual case of rollouts: no copies
        mine, theirs, own, other = sums, more_sums, total, more
    else:
        mine, theirs = sums[:, :, rows], more_sums[:, :, rows]
        own, other = total[:, :, rows], more[:, :, rows]
    share = torch.sigmoid(theirs - mine)[..., None]
    merged = torch.lerp(own.float(), other.float(), share).to(total.dtype)
    both = torch.logaddexp(mine, theirs)
    if all_rows:
        total.copy_(merged)
        sums.copy_(both)
    else:
        total.index_copy_(2, rows, merged)
        sums.index_copy_(2, rows, both)


def _ready(block: Block, page_tokens: int, device: torch.device) -> _Ready:
    num_keys = block.pages.shape[1] * page_tokens
    visible = block.visible(num_keys)
    kept = None if block.is_query is None else np.flatnonzero(block.is_query)
    queries = block.queries.ravel()
    return _Ready(
        queries=torch.from_numpy(queries).to(device),
        in_order=bool((queries == np.arange(len(queries))).all()),
        kept=None if kept is None else torch.from_numpy(kept).to(device),
        pages=torch.from_numpy(block.pages.ravel()).to(device),
        hidden=None if visible is None else torch.from_numpy(~visible[:, None]).to(device),
        shape=(len(block.queries), block.queries.shape[1]),
        first_slot=block.first_slot,
        num_keys=num_keys,
    )
