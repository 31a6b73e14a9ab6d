"""The batch stream: exact resume, counted faults, ranks."""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice

import pytest
from tests.data.some_streams import (
    COLLATE,
    IMAGE,
    Make,
    Numbers,
    assert_same,
    build,
    fixed,
    levelled,
    mixture,
    packed,
    sources_of,
)

from cascadevl.data.collate import collate
from cascadevl.data.mixture import Mixture, WeightedSource
from cascadevl.data.packing import FixedRows, Packer
from cascadevl.data.prefetch import Prefetcher
from cascadevl.data.stream import BatchStream, CollateConfig, StreamConfig, merge_states
from cascadevl.errors import ConfigError, DataError, TrainingError
from cascadevl.types import Example, Record


def test_fixed_rows_hold_the_draws_in_their_order() -> None:
    wanted = mixture()
    batches = list(islice(fixed(), 4))
    assert [batch.input_ids.shape[0] for batch in batches] == [2] * 4
    assert sources_of(batches) == [
        f"{draw.source_name}:{draw.index}" for draw in islice(wanted.draws(), 24)
    ]


def test_every_setting_reaches_collate() -> None:
    config = CollateConfig(
        image_token_id=IMAGE,
        pad_token_id=7,
        tokens_per_tile=3,
        averaging="sample",
        ceil_after_image=True,
        pad_to=11,
    )
    record = Numbers("a", 4)[3]  # six tokens, the second an image with increment 1/2
    found = config([[build(record)]])
    wanted = collate(
        [[build(record)]],
        image_token_id=IMAGE,
        pad_token_id=7,
        tokens_per_tile=3,
        averaging="sample",
        ceil_after_image=True,
        pad_to=11,
    )
    assert_same(found, wanted)
    assert found.position_ids[0, :6].tolist() == [0, 0.5, 1, 1.5, 3, 4]
    assert found.input_ids[0, 8:].tolist() == [7, 7, 7]
    assert found.target_weights.tolist() == [0.25] * 4


def test_packed_rows_stay_within_the_limits() -> None:
    stream = packed()
    for batch in islice(stream, 20):
        assert batch.input_ids.shape[1] <= 24
        tiles_by_row = Counter((batch.visual_index // batch.input_ids.shape[1]).tolist())
        assert max(tiles_by_row.values(), default=0) <= 4 * 2  # two visual tokens a tile
    assert stream.fill.tokens / stream.fill.rows > 20


def test_the_epoch_reaches_the_builder() -> None:
    stream = fixed(mixture(lengths=(2, 2)))
    by_source: dict[str, set[tuple[int, ...]]] = {}
    for batch in islice(stream, 8):
        for sample, source in enumerate(batch.sources):
            ids = batch.target_ids[batch.target_samples == sample].tolist()
            by_source.setdefault(source, set()).add(tuple(ids))
    assert all(len(variants) > 3 for variants in by_source.values())


@pytest.mark.parametrize("make", [packed, fixed, levelled])
@pytest.mark.parametrize("stop", [0, 1, 7])
def test_resumed_equals_uninterrupted_bit_for_bit(make: Make, stop: int) -> None:
    config = StreamConfig(rows_per_batch=2)
    stream = make(config=config)
    before = list(islice(stream, stop))
    assert len(before) == stop
    state = json.loads(json.dumps(stream.state_dict()))
    resumed = make(config=config)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == stream.state_dict()
    for one, two in zip(islice(stream, 10), islice(resumed, 10), strict=True):
        assert_same(one, two)
    assert resumed.state_dict() == stream.state_dict()


def test_the_state_of_a_packer_holds_samples_back() -> None:
    # without them the test above would prove nothing
    stream = packed()
    next(stream)
    state = stream.state_dict()
    assert sum(map(len, state["rows"]["rows"])) > 0
    assert stream.num_draws == state["cursor"] > sum(map(len, state["rows"]["rows"]))


@pytest.mark.parametrize("make", [packed, fixed, levelled])
def test_a_bounded_stream_gives_every_draw_once_and_ends(make: Make) -> None:
    stream = make(config=StreamConfig(rows_per_batch=2, num_draws=80))
    found = sources_of(list(stream))
    wanted = [f"{draw.source_name}:{draw.index}" for draw in islice(mixture().draws(), 80)]
    assert sorted(found) == sorted(wanted)
    assert list(stream) == []


def test_skipped_records_are_counted_with_the_first_message_kept() -> None:
    source = Mixture(
        [
            WeightedSource(source=Numbers("a", 10, bad=lambda index: index in (3, 4)), weight=1.0),
            WeightedSource(source=Numbers("b", 10), weight=1.0),
        ],
        seed=0,
    )
    stream = fixed(source, StreamConfig(num_draws=20))
    found = sources_of(list(stream))
    assert len(found) == 18
    assert not {"a:3", "a:4"} & set(found)
    (key, skipped), *others = stream.skipped.items()
    assert key == ("a", "missing_image")
    assert not others
    assert skipped.count == 2
    first = next(d.index for d in source.draws() if d.source_name == "a" and d.index in (3, 4))
    assert skipped.first == f"a.jsonl:{first}: no such file"
    resumed = fixed(source, StreamConfig(num_draws=20))
    resumed.load_state_dict(json.loads(json.dumps(stream.state_dict())))
    assert resumed.skipped == stream.skipped
    assert resumed.num_draws == 20


def test_a_sample_larger_than_a_row_is_skipped_and_named() -> None:
    stream = BatchStream(
        Mixture([WeightedSource(source=Numbers("a", 10))], seed=0),
        build,
        Packer(6, 4),
        COLLATE,
        StreamConfig(num_draws=10),
    )
    list(stream)
    (key, skipped), *_ = stream.skipped.items()
    assert key == ("a", "too_long")
    assert skipped.count == 3  # 3 + number % 5 tokens, and one more for an image: 3, 4 and 9
    assert skipped.first.startswith("a[")
    assert "a row holds 6 tokens" in skipped.first


def test_too_many_bad_records_stop_the_run_with_the_counts() -> None:
    source = Mixture(
        [WeightedSource(source=Numbers("a", 400, bad=lambda index: index % 5 > 0))], seed=0
    )
    stream = fixed(source)
    with pytest.raises(DataError, match=r"of 100 records drawn cannot be used") as caught:
        list(stream)
    assert caught.value.kind == "too_many_skipped"
    count = stream.skipped[("a", "missing_image")].count
    assert f"{count} x missing_image of a, first: a.jsonl:" in str(caught.value)
    tolerant = fixed(source, StreamConfig(max_skipped_share=0.9, num_draws=300))
    assert len(sources_of(list(tolerant))) == 300 - tolerant.skipped[("a", "missing_image")].count


def test_a_short_run_of_bad_records_only_does_not_end_quietly() -> None:
    source = Mixture([WeightedSource(source=Numbers("a", 10, bad=lambda _: True))], seed=0)
    with pytest.raises(DataError, match="10 of 10 records drawn cannot be used"):
        list(fixed(source, StreamConfig(num_draws=10)))


def test_other_errors_are_not_taken_for_bad_records() -> None:
    def broken(record: Record, *, epoch: int = 0) -> Example:
        raise KeyError("a bug")

    stream = BatchStream(mixture(), broken, FixedRows(1), COLLATE)
    with pytest.raises(KeyError, match="a bug"):
        next(stream)


def test_ranks_draw_different_records_of_one_sequence() -> None:
    config = StreamConfig(rows_per_batch=1, num_draws=60)
    found = [sources_of(list(fixed(config=config, rank=rank, world_size=3))) for rank in range(3)]
    wanted = [f"{draw.source_name}:{draw.index}" for draw in islice(mixture().draws(), 60)]
    assert found == [wanted[rank::3] for rank in range(3)]


@pytest.mark.parametrize("make", [packed, fixed, levelled])
@pytest.mark.parametrize("new_world_size", [1, 2, 5])
def test_another_number_of_ranks_loses_nothing_and_repeats_nothing(
    make: Make, new_world_size: int
) -> None:
    config = StreamConfig(rows_per_batch=1, num_draws=120)
    streams = [make(config=config, rank=rank, world_size=3) for rank in range(3)]
    # ranks that pack differently stand at different places after the same number of steps
    found = [source for stream in streams for source in sources_of(list(islice(stream, 3)))]
    merged = json.loads(json.dumps(merge_states([stream.state_dict() for stream in streams])))
    new = [make(config=config, rank=n, world_size=new_world_size) for n in range(new_world_size)]
    for stream in new:
        stream.load_state_dict(merged)
    found += [source for stream in new for source in sources_of(list(stream))]
    wanted = [f"{draw.source_name}:{draw.index}" for draw in islice(mixture().draws(), 120)]
    assert sorted(found) == sorted(wanted)
    assert sum(stream.num_draws for stream in new) == 120


def test_merged_counts_go_to_one_rank() -> None:
    bad = Numbers("a", 12, bad=lambda index: index % 3 == 0)
    source = Mixture([WeightedSource(source=bad)], seed=0)
    config = StreamConfig(num_draws=12, max_skipped_share=0.9)
    streams = [fixed(source, config, rank=rank, world_size=2) for rank in range(2)]
    for stream in streams:
        list(stream)
    merged = merge_states([stream.state_dict() for stream in streams])
    new = [fixed(source, config, rank=rank, world_size=2) for rank in range(2)]
    for stream in new:
        stream.load_state_dict(merged)
    assert new[0].skipped[("a", "missing_image")].count == 4
    assert new[1].skipped == {}


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (mixture(seed=1), r"the seed was \[0\] when the state was saved and is \[1\] now"),
        (mixture(lengths=(20, 31)), r"source 'b' .* was \[30, 3\] .* and is \[31, 3\] now"),
        (
            Mixture([WeightedSource(source=Numbers("a", 20))], seed=0),
            r"source 'a' .* was \[20, 1\] .* and is \[20, 20\] now|source 'b' .* is None now",
        ),
    ],
)
def test_a_state_of_another_mixture_is_refused(other: Mixture, message: str) -> None:
    state = packed().state_dict()
    with pytest.raises(TrainingError, match=message):
        packed(other).load_state_dict(state)


def test_a_state_of_another_number_of_ranks_is_refused() -> None:
    state = packed(world_size=2).state_dict()
    with pytest.raises(TrainingError, match=r"one of 2 ranks, this run has 3.*merge_states"):
        packed(world_size=3).load_state_dict(state)


def test_a_record_that_went_away_is_named_on_resume() -> None:
    stream = packed()
    next(stream)
    state = stream.state_dict()
    gone = Mixture(
        [
            WeightedSource(source=Numbers("a", 20, bad=lambda _: True), weight=1.0),
            WeightedSource(source=Numbers("b", 30, bad=lambda _: True), weight=3.0),
        ],
        seed=0,
    )
    with pytest.raises(TrainingError, match=r"cannot be resumed: record \d+ of '[ab]' waited"):
        packed(gone).load_state_dict(state)


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="rows_per_batch is 0"):
        StreamConfig(rows_per_batch=0)
    with pytest.raises(ConfigError, match=r"max_skipped_share is 1\.5"):
        StreamConfig(max_skipped_share=1.5)
    with pytest.raises(ConfigError, match="0 batches cannot be made ahead"):
        Prefetcher(packed(), 0)
