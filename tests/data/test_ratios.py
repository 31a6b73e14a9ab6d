"""Ratios of text to multimodal data: presets, tokens of a record, weights worked out by hand."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest

from cascadevl.data.mixture import Mixture, WeightedSource
from cascadevl.data.modality import Modality, modality_of
from cascadevl.data.ratios import (
    PRESETS,
    estimate_tokens,
    parse_ratio,
    with_ratio,
)
from cascadevl.data.source import Source
from cascadevl.errors import ConfigError, DataError
from cascadevl.types import ImageRef, Message, Record, VideoRef


class Lengths:
    """Records whose identity is their number of tokens; 0 for one that cannot be read."""

    def __init__(self, name: str, lengths: list[int]) -> None:
        self.name, self.lengths = name, lengths
        self.asked: list[int] = []

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int, /) -> Record:
        self.asked.append(index)
        if self.lengths[index] == 0:
            raise DataError("bad", kind="bad_field")
        return Record(
            source=f"{self.name}:{index}", record_id=f"{self.lengths[index]}", messages=()
        )


class Headed:
    """A stream of which only the beginning can be looked at."""

    def __init__(self, lengths: list[int]) -> None:
        self.name, self.num_lanes, self.lengths = "stream", 1, lengths

    def open(self, key: int) -> None:
        raise NotImplementedError

    def head(self, count: int) -> Source:
        return Lengths("stream", self.lengths[:count])

    def identity(self) -> list[int]:
        return [1]


def measure(record: Record) -> int:
    return int(record.record_id)


def estimate(lengths: list[int], most: int = 256, seed: int = 0):
    return estimate_tokens(
        WeightedSource(source=Lengths("x", lengths)), measure, seed=seed, most=most
    )


def test_the_reports_ratios_have_names() -> None:
    assert PRESETS == {
        "internvl3": (1.0, 3.0),
        "internvl3_5": (1.0, 2.5),
        "internvl3_5_sft": (1.0, 3.5),
    }
    assert parse_ratio("internvl3_5") == (1.0, 2.5)
    assert parse_ratio("2:7.5") == (2.0, 7.5)
    assert parse_ratio("as_given") is None


@pytest.mark.parametrize("text", ["", "internvl4", "1", "1:2:3", "0:1", "1:-2", "a:b", "1:inf"])
def test_what_is_no_ratio_is_refused_with_the_names(text: str) -> None:
    with pytest.raises(ConfigError, match=r"internvl3, internvl3_5, .* such as 1:3"):
        parse_ratio(text)


def test_a_small_source_is_known_exactly() -> None:
    lengths = [3, 9, 200, 7, 0, 5]
    found = estimate(lengths)
    assert found.mean == sum(lengths) / 6  # an unusable record brings nothing
    assert (found.standard_error, found.num_records, found.num_unusable) == (0.0, 6, 1)


def test_looking_ends_when_enough_is_known() -> None:
    assert estimate([50] * 5000).num_records == 64
    noisy = [(index * 7919) % 1000 + 1 for index in range(5000)]
    found = estimate(noisy)
    assert found.num_records == 256
    assert abs(found.mean - statistics.fmean(noisy)) < 3 * found.standard_error
    # s / sqrt(n), a little less because the sample is without repetition
    assert found.standard_error == pytest.approx(288.7 / 16 * (1 - 256 / 5000) ** 0.5, rel=0.1)
    assert estimate(noisy, most=2000).num_records < 2000  # 2 % reached before


def test_the_sample_is_spread_seeded_and_without_repetition() -> None:
    asked = []
    for seed in (0, 0, 1):
        source = Lengths("x", list(range(1, 100_001)))
        estimate_tokens(WeightedSource(source=source), measure, seed=seed, most=100)
        asked.append(source.asked)
    assert asked[0] == asked[1] != asked[2]
    assert len(set(asked[0])) == 100
    assert max(asked[0]) > 80_000 > 20_000 > min(asked[0])


def test_of_a_stream_the_beginning_is_looked_at() -> None:
    stream = WeightedSource(source=Headed([4, 6] * 50 + [1000] * 50), weight=1.0)
    found = estimate_tokens(stream, measure, seed=0, most=100)
    assert found.mean == pytest.approx(5.0, abs=0.5)
    assert found.standard_error > 0  # what comes later is not known


def test_a_source_without_a_usable_record_is_named() -> None:
    with pytest.raises(DataError, match="x: none of 3 records looked at") as caught:
        estimate([0, 0, 0])
    assert caught.value.kind == "no_sample"


def weighted(name: str, length: int, weight: float | None = None, repeat: float = 1.0):
    return WeightedSource(source=Lengths(name, [1] * length), weight=weight, repeat=repeat)


MODALITIES: dict[str, Modality] = {
    "web": "text",
    "books": "text",
    "captions": "multimodal",
    "charts": "multimodal",
}
TOKENS = {"web": 120.0, "books": 900.0, "captions": 300.0, "charts": 1600.0}


def four() -> list[WeightedSource]:
    return [
        weighted("web", 500),
        weighted("books", 40, repeat=2.5),
        weighted("captions", 700, repeat=0.5),
        weighted("charts", 90, repeat=4.0),
    ]


@pytest.mark.parametrize("ratio", [(1.0, 3.0), (1.0, 2.5), (5.0, 1.0)])
def test_tokens_come_in_the_ratio_and_each_side_keeps_its_own(ratio: tuple[float, float]) -> None:
    shares = Mixture(with_ratio(four(), MODALITIES, TOKENS, ratio), seed=0).shares
    tokens = {name: shares[name] * TOKENS[name] for name in shares}
    text, multimodal = tokens["web"] + tokens["books"], tokens["captions"] + tokens["charts"]
    assert text / multimodal == pytest.approx(ratio[0] / ratio[1], rel=2e-3)
    # 500 records against 40 twice and a half; 700 halved against 90 four times
    assert shares["web"] / shares["books"] == pytest.approx(500 / 100, rel=2e-3)
    assert shares["captions"] / shares["charts"] == pytest.approx(350 / 360, rel=2e-3)


def test_counting_samples_is_counting_one_token_each() -> None:
    shares = Mixture(
        with_ratio(four(), MODALITIES, dict.fromkeys(TOKENS, 1.0), (1.0, 3.0)), seed=0
    ).shares
    assert shares["web"] + shares["books"] == pytest.approx(0.25, rel=2e-3)


def test_extreme_sizes_keep_their_ratio() -> None:
    sources = [weighted("web", 1, 3e-6), weighted("charts", 1, 5e6)]
    tokens = {"web": 1e5, "charts": 3.0}
    mixed = with_ratio(sources, {"web": "text", "charts": "multimodal"}, tokens, (1.0, 3.0))
    shares = Mixture(mixed, seed=0).shares
    assert shares["web"] * 1e5 / (shares["charts"] * 3.0) == pytest.approx(1 / 3, rel=2e-3)


def test_a_ratio_needs_both_sides() -> None:
    with pytest.raises(ConfigError, match=r"mixed 1:3, but none of the data sets web is multimod"):
        with_ratio([weighted("web", 3)], {"web": "text"}, {"web": 1.0}, (1.0, 3.0))


class Shown:
    """Text records, but for those at the given numbers."""

    def __init__(self, length: int, pictures: set[int], bad: set[int] | None = None) -> None:
        self.name, self.length, self.pictures, self.bad = "x", length, pictures, bad or set()

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int, /) -> Record:
        if index in self.bad:
            raise DataError("bad", kind="bad_field")
        parts = ("hi", ImageRef(b"")) if index in self.pictures else ("hi",)
        return Record(source="x", record_id="", messages=(Message.of("user", *parts),))


def test_modality_is_found_from_records_spread_over_the_source() -> None:
    assert modality_of(Shown(5, set())) == "text"
    assert modality_of(Shown(5, {4})) == "multimodal"
    assert modality_of(Shown(3200, {3100})) == "multimodal"  # the last but one of 32 looked at
    assert modality_of(Shown(3200, {3101})) == "text"  # a rare picture: the entry must say it
    assert modality_of(Shown(3, {1}, bad={0, 2})) == "multimodal"
    with pytest.raises(DataError, match="none of the 32 records") as caught:
        modality_of(Shown(3, set(), bad={0, 1, 2}))
    assert caught.value.kind == "no_sample"


def test_a_picture_in_a_branch_and_a_video_count() -> None:
    class One(Shown):
        def __init__(self, record: Record) -> None:
            super().__init__(1, set())
            self.record = record

        def __getitem__(self, index: int, /) -> Record:
            return self.record

    picture, video = Message.of("user", ImageRef(b"")), VideoRef(source=Path("a.mp4"))
    hi = (Message.of("user", "hi"),)
    branched = Record(source="x", record_id="", messages=hi, branches=(hi, (picture,)))
    assert modality_of(One(branched)) == "multimodal"
    filmed = Record(source="x", record_id="", messages=(Message.of("user", video),))
    assert modality_of(One(filmed)) == "multimodal"
