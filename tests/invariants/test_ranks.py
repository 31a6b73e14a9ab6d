"""Whatever the ranks, stops and batches made ahead: each draw once, and the same record each time.

Files, tasks of a sort and streams are mixed. A run is stopped and gone on with, each time on
another number of ranks, and what all ranks saw is compared with the draws in their order.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import islice
from typing import Any

import datasets
import numpy as np
import pytest

from cascadevl.data import lanes
from cascadevl.data.mixture import Mixture, WeightedSource
from cascadevl.data.packing import FixedRows, Packer
from cascadevl.data.prefetch import Prefetcher
from cascadevl.data.row_stream import RowReader, RowStream
from cascadevl.data.stream import BatchStream, CollateConfig, StreamConfig, merge_states
from cascadevl.errors import DataError
from cascadevl.types import NO_PARENT, Batch, Example, Message, Record

NUM_DRAWS = 260
COLLATE = CollateConfig(image_token_id=99, pad_token_id=0, tokens_per_tile=2)


class Numbers:
    """Records read by number; every eleventh cannot be."""

    def __init__(self, name: str, length: int) -> None:
        self.name, self.length = name, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int, /) -> Record:
        if index % 11 == 7:
            raise DataError("no such file", kind="missing_image", source=f"{self.name}:{index}")
        return Record(
            source=f"{self.name}:{index}",
            record_id=f"{index}",
            messages=(Message.of("user", "hi"),),
        )


def rows(parts: list[int]) -> Iterator[dict[str, Any]]:
    for part in parts:
        for number in range(9 + part):
            turns = [{"from": "human", "value": "?"}, {"from": "gpt", "value": f"{number}"}]
            # one row in 13 is no record
            yield {"conversations": turns if (part + number) % 13 else []}


def streamed(num_lanes: int) -> RowStream:
    made = datasets.IterableDataset.from_generator(rows, gen_kwargs={"parts": list(range(6))})
    return RowStream(made, name="streamed", num_lanes=num_lanes, buffer_rows=4)


def mixture(num_lanes: int) -> Mixture:
    sources = [
        WeightedSource(source=Numbers("a", 31), weight=2.0),
        WeightedSource(source=streamed(num_lanes), weight=3.0),
        WeightedSource(source=Numbers("b", 17), weight=1.0),
    ]
    return Mixture(sources, seed=4)


def build(record: Record, *, epoch: int = 0) -> Example:
    """An example named after its record and epoch, of a length that follows from both."""
    name = f"{record.source} {record.record_id} {epoch}"
    ids = np.random.default_rng(list(name.encode())).integers(1, 90, 3 + len(name) * 7 % 11)
    return Example(
        source=name,
        record_id=record.record_id,
        input_ids=ids,
        trained=np.arange(len(ids)) > 1,
        segments=np.zeros(len(ids), dtype=np.int64),
        parents=(NO_PARENT,),
        tiles=np.empty((0, 2, 2, 3), dtype=np.uint8),
        tiles_per_image=(),
        increments=(),
    )


def wanted(num_lanes: int) -> Counter[str]:
    """What NUM_DRAWS draws give, in one go and without a stream of batches."""
    drawn = mixture(num_lanes)
    found: Counter[str] = Counter()
    for draw in islice(drawn.draws(), NUM_DRAWS):
        try:
            found[build(drawn.record(draw), epoch=draw.epoch).source] += 1
        except DataError:
            found["unusable"] += 1
    return found


def make(rank: int, world_size: int, num_lanes: int, packing: str) -> BatchStream:
    return BatchStream(
        mixture(num_lanes),
        build,
        Packer(40, 4, 3) if packing == "fill" else FixedRows(3),
        COLLATE,
        StreamConfig(rows_per_batch=1, num_draws=NUM_DRAWS, max_skipped_share=0.9),
        rank=rank,
        world_size=world_size,
    )


def run(
    worlds: Sequence[int], steps: Sequence[int], num_lanes: int, packing: str, ahead: int
) -> Counter[str]:
    """What all ranks of all attempts saw together; the last attempt goes on to the end."""
    found: Counter[str] = Counter()
    states: list[dict[str, Any]] | None = None
    for attempt, world_size in enumerate(worlds):
        streams = [make(rank, world_size, num_lanes, packing) for rank in range(world_size)]
        if states is not None:
            changed = len(states) != world_size
            for rank, stream in enumerate(streams):
                stream.load_state_dict(merge_states(states) if changed else states[rank])
        with ExitStack() as stack:
            taken = [stack.enter_context(Prefetcher(s, ahead)) if ahead else s for s in streams]
            is_last = attempt == len(worlds) - 1
            for one in taken:
                for batch in islice(one, None if is_last else steps[attempt]):
                    found.update(batch.sources)
            states = json.loads(json.dumps([one.state_dict() for one in taken]))
    # batches made ahead know of unusable draws behind the last batch only when they are asked
    states = [stream.state_dict() for stream in streams]
    found["unusable"] = sum(count for state in states for _, _, count, _ in state["skipped"])
    assert sum(state["num_draws"] for state in states) == NUM_DRAWS
    return found


@pytest.mark.parametrize("num_lanes", [1, 6])
@pytest.mark.parametrize("packing", ["fill", "count"])
@pytest.mark.parametrize(
    ("worlds", "steps", "ahead"),
    [
        ((1,), (), 3),
        ((3, 2), (4,), 0),
        ((3, 2), (4,), 2),
        ((1, 4), (9,), 2),
        ((2, 2, 3, 1), (3, 5, 2), 1),
        ((4, 3, 5), (2, 3), 0),
        ((6, 1, 6), (1, 4), 2),
    ],
)
def test_each_draw_is_seen_once_on_any_ranks_and_workers(
    worlds: Sequence[int], steps: Sequence[int], ahead: int, packing: str, num_lanes: int
) -> None:
    assert run(worlds, steps, num_lanes, packing, ahead) == wanted(num_lanes)


def same(one: Batch, two: Batch) -> bool:
    return one.sources == two.sources and one.input_ids.tolist() == two.input_ids.tolist()


@pytest.mark.parametrize("ahead", [0, 2])
@pytest.mark.parametrize("packing", ["fill", "count"])
def test_a_stop_on_the_same_ranks_changes_no_batch(packing: str, ahead: int) -> None:
    for rank in range(2):
        whole = list(make(rank, 2, 2, packing))
        for stop in (1, 6, 11):
            stopped = make(rank, 2, 2, packing)
            if ahead:
                with Prefetcher(stopped, ahead) as early:
                    for _ in range(stop):
                        next(early)
                    state = json.loads(json.dumps(early.state_dict()))
            else:
                for _ in range(stop):
                    next(stopped)
                state = json.loads(json.dumps(stopped.state_dict()))
            again = make(rank, 2, 2, packing)
            again.load_state_dict(state)
            rest = list(again)
            assert len(rest) == len(whole) - stop
            assert all(map(same, rest, whole[stop:]))


def test_draws_of_the_other_sources_do_not_depend_on_the_stream() -> None:
    """A stream has no random access; files beside it keep theirs."""
    whole, part = mixture(2), mixture(2)
    for position in (250, 3, 117):
        draw = part.draw(position)
        assert draw == whole.draw(position)
        if draw.source_name != "streamed":
            assert part.places(0) == {"streamed": []}  # nothing of the stream was read


def test_ranks_read_lanes_of_their_own_where_they_divide_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read_by: list[set[int]] = []
    read = RowReader.read

    def noting(reader: RowReader, lane: int, ordinal: int) -> Record:
        read_by[-1].add(lane)
        return read(reader, lane, ordinal)

    monkeypatch.setattr(RowReader, "read", noting)
    for rank in range(3):
        read_by.append(set())
        list(make(rank, 3, 6, "count"))
    assert read_by == [{0, 3}, {1, 4}, {2, 5}]


@pytest.mark.parametrize("new_world_size", [2, 1])
def test_a_stream_goes_on_near_the_place_it_had_reached(
    new_world_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The state is no ballast: nobody reads the lanes from their beginning again."""
    monkeypatch.setattr(lanes, "POSITIONS_APART", 1)  # this run is short
    streams = [make(rank, 2, 2, "count") for rank in range(2)]
    for stream in streams:
        list(islice(stream, 35))
    states = json.loads(json.dumps([stream.state_dict() for stream in streams]))
    merged = states[0] if new_world_size == 2 else merge_states(states)
    for lane, position, ordinal, place in merged["places"]["streamed"]:
        assert position > 60
        assert place["ordinal"] > 20
        assert ordinal - 4 < place["ordinal"] <= ordinal
        drawn = mixture(2)
        own = range(lane, position, 2)
        assert ordinal == sum(drawn.draw(p).source_name == "streamed" for p in own)

    opened: list[int] = []
    part = RowStream.part
    monkeypatch.setattr(
        RowStream, "part", lambda s, number: opened.append(number) or part(s, number)
    )
    for rank in range(new_world_size):
        again = make(rank, new_world_size, 2, "count")
        again.load_state_dict(states[rank] if new_world_size == 2 else merged)
        list(islice(again, 6 // new_world_size))
    # two or three parts for each of the two lanes; from the start it would be twelve
    assert 2 <= len(opened) <= 6
