"""What every token of a step attends to, as a few large blocks; worked out once, for all layers.

A block is a batch of equal rectangles, queries against the keys of whole pages, of which each query
sees a stretch. Three kinds occur: the pages that a group of jobs shares, the other pages of jobs
that decode one token, and those of prompts. Keys that lie on consecutive pages are read in place;
others are gathered, which costs little as long as they are short.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int

from cascadevl.engine.sharing import Group

_MOST_SCORES = 2**21
"""Scores computed at once: larger outputs of torch are mapped anew at every call."""

_MOST_GATHERED = 2**15
"""Keys copied at once, for the same reason."""

READ_IN_PLACE = 512
"""From so many keys on, reading in place pays a call of its own."""

_MOST_PADDING = 1.25
"""How much longer than the shortest the longest rectangle of a block may be."""


@dataclass(frozen=True, slots=True, eq=False)
class Span:
    """The tokens of one job in a step.

    Attributes:
        row: Where its first token stands among those of the step.
        start: Place of that token in the job.
        stop: Place behind its last one.
        pages: The job's pages.
    """

    row: int
    start: int
    stop: int
    pages: Int[np.ndarray, " pages"]


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """A batch of rectangles.

    Attributes:
        queries: Tokens of the step, one row a rectangle; repeated where one has fewer.
        is_query: Where ``queries`` is no repetition; None if nowhere.
        pages: Pages of the keys, one row a rectangle; repeated where one has fewer.
        first_slot: Place of the first key if all lie side by side and are read in place.
        low: First key that each query sees.
        high: Key behind the last one that it sees.
    """

    queries: Int[np.ndarray, "rectangles queries"]
    is_query: Bool[np.ndarray, "rectangles queries"] | None
    pages: Int[np.ndarray, "rectangles pages"]
    first_slot: int | None
    low: Int[np.ndarray, "rectangles queries"]
    high: Int[np.ndarray, "rectangles queries"]

    def visible(self, num_keys: int) -> Bool[np.ndarray, "rectangles queries last_keys"] | None:
        """Which query sees which of the last keys; all see those before, of which most are.

        Args:
            num_keys: Of every rectangle.

        Returns:
            From the first key on that some query does not see; None if each sees all.
        """
        first = 0 if (self.low > 0).any() else int(self.high.min())
        if first >= num_keys:
            return None
        place = np.arange(first, num_keys)
        return (place >= self.low[..., None]) & (place < self.high[..., None])


@dataclass(frozen=True, slots=True, eq=False)
class AttentionPlan:
    """Blocks for the layers of one window.

    Attributes:
        shared: Blocks of the pages that groups share.
        own: Blocks that cover every token once.
    """

    shared: tuple[Block, ...]
    own: tuple[Block, ...]


def attention_plan(
    spans: Sequence[Span],
    groups: Sequence[Group],
    page_tokens: int,
    num_heads: int,
    *,
    window: int | None = None,
    alone: bool = False,
    apart_from: int | None = READ_IN_PLACE,
) -> AttentionPlan:
    """Cut a step into blocks.

    Args:
        spans: The jobs, in the order of their rows.
        groups: Which of them share their first pages; not used by layers with windows, which
            rarely look back so far.
        page_tokens: Tokens a page holds.
        num_heads: Query heads.
        window: How many tokens back a token sees, itself included; None for all.
        alone: Give every job blocks of its own, so that how it is computed depends on it alone.
        apart_from: Keys from which on a job has a block of its own anyway, read in place if it can
            be; None for never.
    """
    skipped = np.zeros(len(spans), dtype=np.int64)  # first pages that are no part of `own`
    shared: list[Block] = []
    if window is not None:
        firsts = np.array([span.start + 1 - window for span in spans])
        skipped = np.maximum(firsts, 0) // page_tokens
    elif not alone:
        for group in groups:
            skipped[list(group.members)] = group.num_pages
            shared += _shared_blocks(spans, group, page_tokens, num_heads)
    own: list[Block] = []
    least = 0 if len(spans) == 1 else READ_IN_PLACE
    limit = _MOST_GATHERED if apart_from is None else apart_from
    for batch in _batches(spans, skipped, page_tokens, num_heads, apart_from=0 if alone else limit):
        in_place = None if alone else least
        own += _own_blocks(batch, page_tokens, num_heads, window, in_place=in_place)
    return AttentionPlan(_merged(shared, page_tokens, num_heads), tuple(own))


@dataclass(frozen=True, slots=True)
class _Rectangle:
    """A span and the page from which on it is attended to here."""

    span: Span
    first_page: int

    def num_pages(self, page_tokens: int) -> int:
        return -(-self.span.stop // page_tokens) - self.first_page

    @property
    def num_queries(self) -> int:
        return self.span.stop - self.span.start


def _shared_blocks(
    spans: Sequence[Span], group: Group, page_tokens: int, num_heads: int
) -> Iterator[Block]:
    """One rectangle: all tokens of a group against the pages it shares."""
    pages = spans[group.members[0]].pages[: group.num_pages]
    rows = [
        np.arange(spans[member].row, spans[member].row + spans[member].stop - spans[member].start)
        for member in group.members
    ]
    num_keys = group.num_pages * page_tokens
    for queries in _cut(np.concatenate(rows), max(1, _MOST_SCORES // (num_heads * num_keys))):
        yield Block(
            queries=queries[None],
            is_query=None,
            pages=pages[None],
            first_slot=_first_slot(pages, page_tokens, READ_IN_PLACE),
            low=np.zeros((1, len(queries)), dtype=np.int64),
            high=np.full((1, len(queries)), num_keys),
        )


def _cut(values: np.ndarray, size: int) -> list[np.ndarray]:
    return [values[start : start + size] for start in range(0, len(values), size)]


def _first_slot(pages: Int[np.ndarray, " pages"], page_tokens: int, least: int) -> int | None:
    """Where the keys begin, if there are at least so many and they lie side by side."""
    if len(pages) * page_tokens < least:
        return None
    consecutive = pages[-1] - pages[0] == len(pages) - 1 and (np.diff(pages) == 1).all()
    return int(pages[0]) * page_tokens if consecutive else None


def _merged(blocks: list[Block], page_tokens: int, num_heads: int) -> tuple[Block, ...]:
    """Rectangles of equal shape together in one block, where they are gathered anyway."""
    alike: dict[tuple[object, ...], list[Block]] = {}
    for number, block in enumerate(blocks):
        own = number if block.first_slot is not None else None
        alike.setdefault((block.queries.shape, block.pages.shape, own), []).append(block)
    merged: list[Block] = []
    for (shape, pages, _), equal in alike.items():
        keys = pages[1] * page_tokens  # type: ignore[index]
        scores = shape[1] * keys * num_heads  # type: ignore[index]
        size = max(1, min(_MOST_SCORES // scores, _MOST_GATHERED // keys))
        for start in range(0, len(equal), size):
            part = equal[start : start + size]
            merged.append(
                Block(
                    queries=np.concatenate([block.queries for block in part]),
                    is_query=None,
                    pages=np.concatenate([block.pages for block in part]),
                    first_slot=part[0].first_slot,
                    low=np.concatenate([block.low for block in part]),
                    high=np.concatenate([block.high for block in part]),
                )
            )
    return tuple(merged)


def _batches(
    spans: Sequence[Span],
    skipped: Int[np.ndarray, " spans"],
    page_tokens: int,
    num_heads: int,
    *,
    apart_from: int,
) -> Iterator[list[_Rectangle]]:
    """Rectangles of similar shape together, those with so many keys apart."""
    rectangles = [
        _Rectangle(span, first) for span, first in zip(spans, skipped.tolist(), strict=True)
    ]
    sizes = [(each.num_queries, each.num_pages(page_tokens)) for each in rectangles]
    batch: list[_Rectangle] = []
    least = (0, 0)
    for number in sorted(range(len(sizes)), key=sizes.__getitem__):
        queries, pages = size = sizes[number]
        count, keys = len(batch) + 1, pages * page_tokens
        fits = (
            queries <= least[0] * _MOST_PADDING
            and pages <= max(least[1] * _MOST_PADDING, least[1] + 1)
            and count * queries * keys * num_heads <= _MOST_SCORES
            and count * keys <= _MOST_GATHERED
            and keys < apart_from
        )
        if batch and not fits:
            yield batch
            batch = []
        if not batch:
            least = size
        batch.append(rectangles[number])
    if batch:
        yield batch


def _own_blocks(
    batch: list[_Rectangle],
    page_tokens: int,
    num_heads: int,
    window: int | None,
    *,
    in_place: int | None,
) -> Iterator[Block]:
    """A batch of rectangles; a lone one that is large is cut, and each part sees no key in vain."""
    num_queries = max(each.num_queries for each in batch)
    num_keys = max(each.num_pages(page_tokens) for each in batch) * page_tokens
    size = max(1, _MOST_SCORES // (num_heads * num_keys)) if len(batch) == 1 else num_queries
    for start in range(0, num_queries, size):
        stop = min(start + size, num_queries)
        yield _own_block(batch, start, stop, page_tokens, window, in_place=in_place)


def _own_block(
    batch: list[_Rectangle],
    start: int,
    stop: int,
    page_tokens: int,
    window: int | None,
    *,
    in_place: int | None,
) -> Block:
    """Queries from ``start`` to ``stop`` of every rectangle against the keys they may see.

    A lone rectangle is read in place from ``in_place`` keys on; never if that is None.
    """
    starts = np.array([each.span.start for each in batch])
    rows = np.array([each.span.row for each in batch])
    firsts = np.array([each.first_page for each in batch])
    counts = np.array([each.num_queries for each in batch])
    number = np.minimum(np.arange(start, stop), counts[:, None] - 1)
    last_place = starts[:, None] + number
    lasts = last_place[:, -1] // page_tokens + 1
    width = int((lasts - firsts).max())
    places = np.minimum(firsts[:, None] + np.arange(width), lasts[:, None] - 1)
    pages = np.stack([each.span.pages[row] for each, row in zip(batch, places, strict=True)])
    offset = firsts[:, None] * page_tokens
    low = np.zeros_like(last_place) if window is None else last_place + 1 - window - offset
    is_query = np.arange(start, stop) < counts[:, None]
    first_slot = None
    if len(batch) == 1 and in_place is not None:
        first_slot = _first_slot(pages[0], page_tokens, in_place)
    return Block(
        queries=rows[:, None] + number,
        is_query=None if is_query.all() else is_query,
        pages=pages,
        first_slot=first_slot,
        low=low,
        high=last_place + 1 - offset,
    )
