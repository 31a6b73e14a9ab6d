"""Attention over pages against softmax by hand: long and short answers, in place and gathered."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from cascadevl.engine.attention_plan import AttentionPlan, Span, attention_plan
from cascadevl.engine.paged_attention import KeyValueStore, PagedAttention
from cascadevl.engine.sharing import shared_beginnings

PAGE, DIM, HEADS, PAGES = 16, 32, 4, 400
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


def spans_of(lengths: Sequence[tuple[int, int]], *, shared: int, scattered: bool) -> list[Span]:
    """Jobs of so many tokens before and in the step, whose first pages are the same."""
    order = np.arange(PAGES)
    if scattered:
        np.random.default_rng(0).shuffle(order)
    taken, row, spans = shared, 0, []
    for before, now in lengths:
        more = -(-(before + now) // PAGE) - shared
        pages = np.concatenate([order[:shared], order[taken : taken + more]])
        spans.append(Span(row, before, before + now, pages))
        taken, row = taken + more, row + now
    return spans


def step(
    spans: Sequence[Span],
    plan: AttentionPlan,
    dtype: torch.dtype,
    kv_heads: int,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """What the pages give, and what softmax by hand gives in float64."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    store = KeyValueStore(1, kv_heads, DIM, PAGES, PAGE, dtype=dtype, device=torch.device("cpu"))
    store.keys[0].copy_(draw(*store.keys[0].shape))
    store.values[0].copy_(draw(*store.values[0].shape))
    slots = torch.cat([torch.from_numpy(slots_of(each)[each.start :]) for each in spans])
    query = draw(1, HEADS, len(slots), DIM)
    attend = PagedAttention(store, slots, {window: plan})
    key, value = draw(1, kv_heads, len(slots), DIM), draw(1, kv_heads, len(slots), DIM)
    sinks = draw(HEADS)
    found = attend(0, query, key, value, scaling=0.3, window=window, sinks=sinks)

    wanted = torch.empty(len(slots), HEADS, DIM, dtype=torch.float64)
    keys, values = store.keys[0].double(), store.values[0].double()
    for span in spans:
        for place in range(span.start, span.stop):
            seen = slots_of(span)[: place + 1][-(window or place + 1) :]
            row = span.row + place - span.start
            for head in range(HEADS):
                kv = head * kv_heads // HEADS
                scores = 0.3 * keys[kv, seen] @ query[0, head, row].double()
                weights = torch.cat([scores, sinks[head : head + 1].double()]).softmax(0)[:-1]
                wanted[row, head] = weights @ values[kv, seen]
    return found[0].double(), wanted


def slots_of(span: Span) -> np.ndarray:
    places = np.arange(span.stop)
    slots: np.ndarray = span.pages[places // PAGE] * PAGE + places % PAGE
    return slots


@pytest.mark.parametrize("scattered", [False, True], ids=["in-order", "scattered"])
@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("lengths", "shared"),
    [
        ([(700, 1)], 0),  # alone
        ([(700, 1), (720, 1), (600, 1), (30, 1)], 0),  # long ones, side by side
        ([(700, 1), (720, 1), (500, 40), (30, 1)], 0),  # and a prompt
        ([(700, 1), (720, 1), (650, 3), (660, 1)], 36),  # with a long common beginning
    ],
    ids=["alone", "long", "prompt", "shared"],
)
def test_pages_give_what_softmax_by_hand_gives(
    lengths: list[tuple[int, int]], shared: int, dtype: torch.dtype, kv_heads: int, scattered: bool
):
    spans = spans_of(lengths, shared=shared, scattered=scattered)
    groups = shared_beginnings(
        np.stack([span.pages[:36] if shared else span.pages[:1] for span in spans]),
        [shared] * len(spans),
    )
    assert bool(groups) is bool(shared)
    for window in (None, 90):
        for apart_from in (None, 512):
            plan = attention_plan(spans, groups, PAGE, HEADS, window=window, apart_from=apart_from)
            found, wanted = step(spans, plan, dtype, kv_heads, window)
            torch.testing.assert_close(found, wanted, atol=TOLERANCE[dtype], rtol=0)


def test_long_answers_are_read_apart_or_together():
    spans = spans_of([(700, 1), (720, 1), (600, 1)], shared=0, scattered=False)
    apart = attention_plan(spans, (), PAGE, HEADS, apart_from=512).own
    assert [len(block.queries) for block in apart] == [1, 1, 1]
    assert all(block.first_slot is not None for block in apart)
    together = attention_plan(spans, (), PAGE, HEADS, apart_from=None).own
    assert [len(block.queries) for block in together] == [3]
    store = KeyValueStore(1, 1, 8, 4, PAGE, dtype=torch.bfloat16, device=torch.device("cpu"))
    assert store.apart_from is None, "a batch of a narrow type is faster"


def test_a_common_beginning_is_shared_only_if_that_saves_enough():
    table = np.array([[3, 4, 5], [3, 4, 6], [3, 4, 7]])
    assert [group.saved for group in shared_beginnings(table, [3, 3, 3], least=4)] == [4]
    assert shared_beginnings(table, [3, 3, 3], least=5) == ()
