"""Which token of a packed row sees which: computed once a forward, used by every layer.

A row holds many samples, and a sample may be a tree of segments (`cascadevl.types.Example`). A
segment sees its ancestors' tokens and, causally, itself. Written as index tensors this becomes a
few dense products: segments of similar length stand together in a bucket, long ones are cut into
chunks of queries, and no Python loop runs over segments inside the layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Int, Int32, Int64
from torch import Tensor

from cascadevl.types import NO_PARENT, PADDING_SEGMENT


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionTable:
    """Which way of computing attention serves which length: fixed numbers, never timed at run time.

    Attributes:
        max_queries: Longest run of queries computed together; longer segments are cut.
        max_cells: Most query x key cells of one head computed together; bounds the memory.
        merge_cells: Padding cells that cost as much as one more round of kernel calls.
        short_keys: Up to this many keys, probabilities are kept for the backward pass instead
            of being computed again.
        plain_vision_tokens: Up to this many tokens a tile, the vision tower's attention on a CPU
            is two matrix products and a softmax that keeps its probabilities; beyond, it is
            `dense_attention`. ``scaled_dot_product_attention`` takes twice as long there.
    """

    max_queries: int = 256
    max_cells: int = 2**20
    merge_cells: int = 8192
    short_keys: int = 512
    plain_vision_tokens: int = 128


TABLE = AttentionTable()


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Buckets:
    """The rounds of one attention: units of queries with their keys, padded to equal lengths.

    A slot is a place in a bucket; the buckets' slots are numbered one after the other.

    Attributes:
        query_index: Flat token of every query slot; the number of tokens where it is filling.
        query_order: Place of the slot's own key among the unit's keys.
        key_index: Flat token of every key slot; 0 where it is filling (never attended).
        query_slot: The query slot of every token; one past the last where the token is padding.
        short_slot: Key slots of short buckets, sorted by token.
        short_start: For every token, where its slots begin in ``short_slot``.
        shapes: For every bucket its units, queries, keys, whether it is short, and how many of the
            first keys are seen by all of its queries; on the CPU.
        short_cells: An expanded scalar; its length is the number of cells of the short buckets,
            so that compilers see it as the size of a tensor.
    """

    query_index: Int64[Tensor, " query_slots"]
    query_order: Int64[Tensor, " query_slots"]
    key_index: Int64[Tensor, " key_slots"]
    query_slot: Int64[Tensor, " all_tokens"]
    short_slot: Int64[Tensor, " short_slots"]
    short_start: Int64[Tensor, " all_tokens"]
    shapes: Int64[Tensor, "buckets 5"]
    short_cells: Int64[Tensor, " cells"]

    def to(self, device: torch.device | str) -> Buckets:
        """The same buckets on another device; the shapes stay on the CPU."""
        moved = {
            name: getattr(self, name).to(device)
            for name in self.__dataclass_fields__
            if name not in ("shapes", "short_cells")
        }
        return replace(
            self, **moved, short_cells=self.short_cells[:1].to(device).expand_as(self.short_cells)
        )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PackedLayout:
    """Who sees whom in packed rows, for full attention and for each sliding window.

    Attributes:
        buckets: By window in tokens; None is full attention.
        own: Flat tokens sorted by segment.
        chain: Flat tokens that each segment sees, ancestors first, segment after segment.
        own_starts: Where each segment begins in ``own``; one entry more than segments.
        chain_starts: Where each segment begins in ``chain``.
        longest_own: Tokens of the longest segment.
        longest_chain: Tokens that the segment with the longest history sees.
    """

    buckets: dict[int | None, Buckets]
    own: Int64[Tensor, " tokens"]
    chain: Int64[Tensor, " chain_tokens"]
    own_starts: Int32[Tensor, " segments_and_end"]
    chain_starts: Int32[Tensor, " segments_and_end"]
    longest_own: int
    longest_chain: int

    def of(self, window: int | None) -> Buckets:
        """The buckets for a layer's window.

        Raises:
            ValueError: If the layout was not made for this window.
        """
        if window not in self.buckets:
            raise ValueError(
                f"the packed layout was made for windows {sorted(map(str, self.buckets))}, a layer "
                f"asks for {window}; name every window of the model to packed_layout"
            )
        return self.buckets[window]


def packed_layout(
    segments: Int[Tensor, "rows tokens"],
    parents: Int[Tensor, "rows tokens"],
    *,
    windows: Sequence[int | None] = (None,),
    table: AttentionTable = TABLE,
) -> PackedLayout:
    """Work out who sees whom.

    Args:
        segments: Segment of each token, unique within a row; ``PADDING_SEGMENT`` for filling.
        parents: The parent of each token's segment, in the same row, or ``NO_PARENT``.
        windows: Sliding windows of the model's layers; None for full attention. A window counts
            tokens in the chain of a segment and its ancestors, the query included.
        table: Lengths at which the computation changes.

    Raises:
        ValueError: If a parent has no token in its row, or segments are each other's ancestors.
    """
    device = segments.device
    chains = _chains(segments.cpu().numpy(), parents.cpu().numpy())
    num_tokens = segments.numel()

    def starts(counts: Int[np.ndarray, " segments"]) -> Tensor:
        return torch.from_numpy(np.append(0, np.cumsum(counts)).astype(np.int32)).to(device)

    return PackedLayout(
        buckets={w: _buckets(chains, num_tokens, w, table).to(device) for w in windows},
        own=torch.from_numpy(chains.own).to(device),
        chain=torch.from_numpy(chains.chain).to(device),
        own_starts=starts(chains.own_counts),
        chain_starts=starts(chains.chain_counts),
        longest_own=int(chains.own_counts.max(initial=0)),
        longest_chain=int(chains.chain_counts.max(initial=0)),
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Chains:
    """Every segment's own tokens, and its chain: the ancestors' tokens, then its own."""

    own: Int64[np.ndarray, " tokens"]
    own_counts: Int64[np.ndarray, " segments"]
    chain: Int64[np.ndarray, " chain_tokens"]
    chain_counts: Int64[np.ndarray, " segments"]


def _chains(
    segments: Int[np.ndarray, "rows tokens"], parents: Int[np.ndarray, "rows tokens"]
) -> _Chains:
    num_rows, width = segments.shape
    stride = int(segments.max(initial=0)) + 1
    row = np.repeat(np.arange(num_rows), width)
    tokens = np.flatnonzero(segments.ravel() != PADDING_SEGMENT)
    names = row[tokens] * stride + segments.ravel()[tokens]  # unique over the rows
    units, first, unit_of = np.unique(names, return_index=True, return_inverse=True)
    own = tokens[np.argsort(unit_of, kind="stable")]
    counts = np.bincount(unit_of, minlength=len(units)).astype(np.int64)
    starts = np.cumsum(counts) - counts

    parent_name = parents.ravel()[tokens[first]]
    orphan = parent_name == NO_PARENT
    parent_name = row[tokens[first]] * stride + parent_name
    parent = np.searchsorted(units, parent_name).clip(max=max(len(units) - 1, 0))
    if bad := np.flatnonzero(~orphan & (units[parent] != parent_name)).tolist():
        raise ValueError(
            f"{len(bad)} segments continue a parent that has no token in their row, the first is "
            f"segment {units[bad[0]] % stride} of row {units[bad[0]] // stride}"
        )
    parent = np.where(orphan, -1, parent)
    lineage = [np.arange(len(units))]
    while (lineage[-1] >= 0).any():
        if len(lineage) > len(units):
            raise ValueError("segments are each other's ancestors; parents must form a tree")
        lineage.append(np.where(lineage[-1] >= 0, parent[lineage[-1]], -1))
    table = np.stack(lineage[::-1], axis=1)  # (segments, depth), root first, -1 before the root
    pieces = table[table >= 0]
    chain = own[_ranges(starts[pieces], counts[pieces])]
    return _Chains(own, counts, chain, np.where(table >= 0, counts[table], 0).sum(axis=1))


def _ranges(
    starts: Int[np.ndarray, " ranges"], lengths: Int[np.ndarray, " ranges"]
) -> Int64[np.ndarray, " total"]:
    """The numbers ``start .. start + length - 1`` of every range, one range after the other."""
    ends = np.cumsum(lengths)
    offsets: Int64[np.ndarray, " total"] = np.repeat(starts - ends + lengths, lengths)
    offsets += np.arange(len(offsets))
    return offsets


@dataclass(frozen=True, slots=True, eq=False)
class _Units:
    """Runs of queries with their keys: offsets into ``own`` and ``chain``, and lengths."""

    query_start: Int64[np.ndarray, " units"]
    num_queries: Int64[np.ndarray, " units"]
    key_start: Int64[np.ndarray, " units"]
    num_keys: Int64[np.ndarray, " units"]
    first_order: Int64[np.ndarray, " units"]  # of the first query among the unit's keys


def _units(chains: _Chains, window: int | None, table: AttentionTable) -> _Units:
    own_counts, chain_counts = chains.own_counts, chains.chain_counts
    seen = chain_counts if window is None else np.minimum(chain_counts, window + table.max_queries)
    size = np.clip(
        table.max_cells // np.maximum(seen, 1), min(32, table.max_queries), table.max_queries
    )
    num_chunks = -(-own_counts // size)
    segment = np.repeat(np.arange(len(own_counts)), num_chunks)
    begin = _ranges(np.zeros_like(num_chunks), num_chunks) * size[segment]  # in the segment
    end = np.minimum(begin + size[segment], own_counts[segment])
    history = (chain_counts - own_counts)[segment]
    low = np.zeros_like(begin) if window is None else np.maximum(history + begin - window + 1, 0)
    return _Units(
        query_start=(np.cumsum(own_counts) - own_counts)[segment] + begin,
        num_queries=end - begin,
        key_start=(np.cumsum(chain_counts) - chain_counts)[segment] + low,
        num_keys=history + end - low,
        first_order=history + begin - low,
    )


def _groups(units: _Units, table: AttentionTable) -> list[Int64[np.ndarray, " _"]]:
    """Units that are computed together: of like lengths, and not too many cells."""
    if len(units.num_keys) == 0:
        return []
    key_class = np.ceil(np.log2(units.num_keys)).astype(np.int64)
    query_class = np.ceil(np.log2(units.num_queries)).astype(np.int64)
    order = np.lexsort((query_class, key_class))
    edges = np.flatnonzero(np.diff(key_class[order] * 64 + query_class[order])) + 1

    def cells(members: Int64[np.ndarray, " _"]) -> int:
        return len(members) * int(units.num_queries[members].max() * units.num_keys[members].max())

    merged: list[Int64[np.ndarray, " _"]] = []
    for group in np.split(order, edges):
        if merged:
            both = np.concatenate([merged[-1], group])
            if cells(both) - cells(merged[-1]) - cells(group) <= table.merge_cells:
                merged[-1] = both
                continue
        merged.append(group)
    pieces = []
    for group in merged:
        per_round = max(1, table.max_cells * len(group) // cells(group))
        pieces += [group[start : start + per_round] for start in range(0, len(group), per_round)]
    # Short ones first: the backward pass gives one buffer to all their key slots.
    return sorted(pieces, key=lambda piece: bool(units.num_keys[piece].max() > table.short_keys))


def _buckets(
    chains: _Chains, num_tokens: int, window: int | None, table: AttentionTable
) -> Buckets:
    units = _units(chains, window, table)
    query_index, query_order, key_index, shapes, filled = [], [], [], [], []
    for group in _groups(units, table):
        queries = np.arange(units.num_queries[group].max())
        keys = np.arange(units.num_keys[group].max())
        is_query = queries < units.num_queries[group, None]
        is_key = keys < units.num_keys[group, None]
        own = np.minimum(units.query_start[group, None] + queries, len(chains.own) - 1)
        seen = np.minimum(units.key_start[group, None] + keys, len(chains.chain) - 1)
        short = len(keys) <= table.short_keys
        query_index.append(np.where(is_query, chains.own[own], num_tokens).ravel())
        query_order.append(np.where(is_query, units.first_order[group, None] + queries, 0).ravel())
        key_index.append(np.where(is_key, chains.chain[seen], 0).ravel())
        filled.append((is_key & short).ravel())
        shapes.append(
            (len(group), len(queries), len(keys), int(short), _seen(units, group, window))
        )
    return _as_tensors(query_index, query_order, key_index, filled, shapes, num_tokens)


def _seen(units: _Units, group: Int64[np.ndarray, " _"], window: int | None) -> int:
    """How many of the first keys of units are seen by all of their queries, so need no mask."""
    if window is not None and int(units.num_keys[group].max()) > window:
        return 0
    return int(units.first_order[group].min()) + 1


def _as_tensors(
    query_index: list[np.ndarray],
    query_order: list[np.ndarray],
    key_index: list[np.ndarray],
    filled: list[np.ndarray],
    shapes: list[tuple[int, int, int, int, int]],
    num_tokens: int,
) -> Buckets:
    def joined(arrays: list[np.ndarray]) -> np.ndarray:
        return np.concatenate(arrays) if arrays else np.empty(0, dtype=np.int64)

    queries, keys = joined(query_index), joined(key_index)
    query_slot = np.full(num_tokens + 1, len(queries), dtype=np.int64)
    query_slot[queries] = np.arange(len(queries))  # the entry past the last collects the filling
    short_slot = np.flatnonzero(joined(filled))
    uses = np.bincount(keys[short_slot], minlength=num_tokens)
    short_cells = sum(units * q * k for units, q, k, short, _ in shapes if short)
    return Buckets(
        query_index=torch.from_numpy(queries),
        query_order=torch.from_numpy(joined(query_order)),
        key_index=torch.from_numpy(keys),
        query_slot=torch.from_numpy(query_slot[:-1]),
        short_slot=torch.from_numpy(short_slot[np.argsort(keys[short_slot], kind="stable")]),
        short_start=torch.from_numpy(np.cumsum(uses) - uses),
        shapes=torch.tensor(shapes, dtype=torch.int64).reshape(-1, 5),
        short_cells=torch.zeros(1, dtype=torch.int64).expand(short_cells),
    )
