"""Batches made ahead: the same ones in the same order, with the errors where they belong."""

from __future__ import annotations

import json
import threading
from itertools import islice
from typing import Any

import pytest
from tests.data.some_streams import (
    COLLATE,
    Numbers,
    assert_same,
    build,
    fixed,
    mixture,
    packed,
)

from cascadevl.data.mixture import Mixture, WeightedSource
from cascadevl.data.packing import FixedRows
from cascadevl.data.prefetch import Prefetcher
from cascadevl.data.stream import BatchStream, Skipped, StreamConfig
from cascadevl.types import Example, Record


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


def test_batches_made_ahead_are_the_same_and_so_is_the_state() -> None:
    plain = packed()
    with Prefetcher(packed(), 3) as ahead:
        for _ in range(6):
            assert_same(next(plain), next(ahead))
            assert ahead.state_dict() == plain.state_dict()
        assert threads()
    assert not threads()


def test_a_prefetcher_resumes_from_the_last_batch_handed_out() -> None:
    with Prefetcher(packed(), 3) as ahead:
        list(islice(ahead, 2))
        state = json.loads(json.dumps(ahead.state_dict()))
        wanted = list(islice(ahead, 4))
        # back in the middle of things, with batches waiting
        ahead.load_state_dict(state)
        assert ahead.state_dict() == state
        again = list(islice(ahead, 4))
    plain = packed()
    plain.load_state_dict(state)
    for one, two, three in zip(wanted, again, islice(plain, 4), strict=True):
        assert_same(one, two)
        assert_same(one, three)


def test_a_closed_prefetcher_goes_on_without_a_gap() -> None:
    ahead = Prefetcher(packed(), 3)
    before = list(islice(ahead, 2))
    ahead.close()
    after = list(islice(ahead, 2))
    ahead.close()
    for one, two in zip([*before, *after], islice(packed(), 4), strict=True):
        assert_same(one, two)


def test_errors_and_the_end_come_where_they_belong() -> None:
    with Prefetcher(fixed(config=StreamConfig(rows_per_batch=2, num_draws=14)), 2) as ahead:
        assert [len(batch.sources) for batch in ahead] == [6, 6, 2]
        assert list(ahead) == []

    calls = []

    def broken(record: Record, *, epoch: int = 0) -> Example:
        calls.append(record)
        if len(calls) > 6:
            raise KeyError("a bug")
        return build(record, epoch=epoch)

    stream = BatchStream(mixture(), broken, FixedRows(3), COLLATE)
    with Prefetcher(stream, 4) as ahead:
        assert len(list(islice(ahead, 2))) == 2
        with pytest.raises(KeyError, match="a bug"):
            next(ahead)
    assert not threads()


def test_a_prefetcher_reports_what_was_skipped_up_to_its_batch() -> None:
    source = Mixture([WeightedSource(source=Numbers("a", 12, bad=lambda n: n % 3 == 0))], seed=0)
    plain = fixed(source, StreamConfig(num_draws=12))
    reports: list[tuple[dict[Any, Skipped], dict[Any, Skipped]]] = []
    with Prefetcher(fixed(source, StreamConfig(num_draws=12)), 4) as ahead:
        for _ in ahead:
            next(plain)
            reports.append((ahead.skipped, plain.skipped))
    assert all(one == two for one, two in reports)
    assert reports[-1][0][("a", "missing_image")].count == 4
