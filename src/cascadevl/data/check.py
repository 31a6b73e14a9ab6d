"""Look through a meta file before a run: what is in it, what is broken, how large it is.

No model is needed. Pictures are judged by their headers alone unless a deep check is asked for;
tokens are counted only where the caller brings a tokenizer, as ``measure``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
import PIL.Image

from cascadevl.data.hub import open_source
from cascadevl.data.image import image_size, open_image
from cascadevl.data.meta import DatasetSpec, read_meta
from cascadevl.data.records import repeated_length
from cascadevl.data.source import Source, StreamedSource, readable_by_number
from cascadevl.data.tiling import TilingConfig, limit_for, num_tiles_of
from cascadevl.data.video import MAX_FRAMES, check_video, read_frames
from cascadevl.errors import DataError
from cascadevl.types import ImageRef, Record, VideoRef

MAX_MESSAGES = 3
"""Examples kept of each kind of problem."""

MAX_GENERATED = 1000
"""Records looked at of a stream or a task, which have no end that one would wait for."""


@dataclass(frozen=True, slots=True)
class Histogram:
    """How often each whole number occurred.

    Attributes:
        counts: Number of occurrences by value, ascending in value.
    """

    counts: Mapping[int, int]

    @classmethod
    def of(cls, counts: Mapping[int, int]) -> Histogram:
        """Freeze a counter."""
        return cls(MappingProxyType(dict(sorted(counts.items()))))

    @property
    def total(self) -> int:
        """Number of values."""
        return sum(self.counts.values())

    @property
    def mean(self) -> float:
        """Mean of the values; 0 where there are none."""
        weighted = sum(value * count for value, count in self.counts.items())
        return weighted / self.total if self.counts else 0.0

    def quantile(self, share: float) -> int:
        """The smallest value that at least this share of all values does not exceed.

        Args:
            share: Between 0 (the least value) and 1 (the largest).

        Returns:
            The value; 0 where there are none.
        """
        seen, needed = 0, share * self.total
        for value, count in self.counts.items():
            seen += count
            if seen >= needed:
                return value
        return 0

    def bins(self, edges: tuple[int, ...]) -> list[int]:
        """Count the values in ``edges[i] <= value < edges[i + 1]``, the last bin open above.

        Args:
            edges: Lower edges, ascending; values below the first are left out.
        """
        places = np.searchsorted(edges, list(self.counts), side="right") - 1
        totals = [0] * len(edges)
        for place, count in zip(places.tolist(), self.counts.values(), strict=True):
            if place >= 0:
                totals[place] += count
        return totals


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One kind of trouble of a data set.

    Attributes:
        kind: The errors' kind.
        count: Records that have it.
        messages: The first of them, in full.
    """

    kind: str
    count: int
    messages: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetReport:
    """What one data set holds.

    Attributes:
        name: Name of the data set.
        num_records: Records looked at: each stored one once, or the first fraction that
            ``repeat_time`` leaves; of a stream or a task the first 1000.
        num_draws: Records an epoch takes, repeats included.
        num_good: Records that can be used.
        num_images: Pictures of the good records.
        num_videos: Videos of the good records.
        problems: What is wrong with the others, the most frequent first.
        tiles: Tiles of each good record, thumbnails included.
        tokens: Tokens of each good record; None where none were measured.
    """

    name: str
    num_records: int
    num_draws: int
    num_good: int
    num_images: int
    num_videos: int
    problems: tuple[Problem, ...]
    tiles: Histogram
    tokens: Histogram | None


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckReport:
    """What a meta file holds, data set by data set.

    Attributes:
        meta: The meta file.
        datasets: One report for each entry, in its order.
    """

    meta: Path
    datasets: tuple[DatasetReport, ...]

    @property
    def num_bad(self) -> int:
        """Records that cannot be used, of all data sets."""
        return sum(entry.num_records - entry.num_good for entry in self.datasets)


def check(
    meta_path: Path,
    *,
    tiling: TilingConfig,
    measure: Callable[[Record], tuple[int, int]] | None = None,
    max_tokens: int | None = None,
    max_frames: int = MAX_FRAMES,
    max_messages: int = MAX_MESSAGES,
    deep: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
    open_entry: Callable[[DatasetSpec], Source | StreamedSource] = open_source,
) -> CheckReport:
    """Read every record of a meta file once and report.

    Args:
        meta_path: The meta file.
        tiling: How pictures are cut.
        measure: Gives a record's tokens and tiles and raises `DataError` for one that cannot be
            used; without it only tiles are counted, from the headers of the pictures.
        max_tokens: Records that measure longer count as ``too_long``.
        max_frames: Tiles that a video counts for when nothing measures it: the most frames that
            training may draw, one tile each.
        max_messages: Examples kept of each kind of problem.
        deep: Decode every picture and video, which finds files that are cut off.
        progress: Called with the data set's name, the records done and their number.
        open_entry: Opens an entry; the default knows no tasks.

    Raises:
        DataError: If the meta file, or a data set as a whole, cannot be read.
    """
    checker = _Checker(
        tiling, measure, max_tokens, max_frames, max_messages, deep, progress, open_entry
    )
    specs = read_meta(meta_path)
    return CheckReport(meta=meta_path, datasets=tuple(checker.dataset(spec) for spec in specs))


@dataclass(slots=True)
class _Tally:
    tiles: Counter[int] = field(default_factory=Counter)
    tokens: Counter[int] = field(default_factory=Counter)
    problems: Counter[str] = field(default_factory=Counter)
    messages: dict[str, list[str]] = field(default_factory=dict)
    num_images: int = 0
    num_videos: int = 0


@dataclass(frozen=True, slots=True)
class _Checker:
    tiling: TilingConfig
    measure: Callable[[Record], tuple[int, int]] | None
    max_tokens: int | None
    max_frames: int
    max_messages: int
    deep: bool
    progress: Callable[[str, int, int], None] | None
    open_entry: Callable[[DatasetSpec], Source | StreamedSource]

    def dataset(self, spec: DatasetSpec) -> DatasetReport:
        # Repeats are the same lines again: each is looked at once.
        opened = self.open_entry(replace(spec, repeat_time=min(1.0, spec.repeat_time)))
        source = readable_by_number(opened, MAX_GENERATED)
        is_file = spec.task is None and spec.stream is None
        num_records = len(source) if is_file else min(len(source), MAX_GENERATED)
        tally = _Tally()
        for index in range(num_records):
            self._count(source, index, tally)
            if self.progress is not None:
                self.progress(spec.name, index + 1, num_records)
        problems = tuple(
            Problem(kind=kind, count=count, messages=tuple(tally.messages[kind]))
            for kind, count in tally.problems.most_common()
        )
        repeats = max(1.0, spec.repeat_time) if is_file else spec.repeat_time
        return DatasetReport(
            name=spec.name,
            num_records=num_records,
            num_draws=repeated_length(len(source) if is_file else spec.length or 0, repeats),
            num_good=tally.tiles.total(),
            num_images=tally.num_images,
            num_videos=tally.num_videos,
            problems=problems,
            tiles=Histogram.of(tally.tiles),
            tokens=None if self.measure is None else Histogram.of(tally.tokens),
        )

    def _count(self, source: Source, index: int, tally: _Tally) -> None:
        try:
            record = source[index]
            num_tiles = self._tiles(record)
            if self.measure is not None:
                num_tokens, num_tiles = self.measure(record)
                self._check_length(record, num_tokens)
                tally.tokens[num_tokens] += 1
        except DataError as error:
            tally.problems[error.kind] += 1
            examples = tally.messages.setdefault(error.kind, [])
            if len(examples) < self.max_messages:
                examples.append(str(error))
            return
        tally.tiles[num_tiles] += 1
        tally.num_images += sum(isinstance(part, ImageRef) for part in _parts(record))
        tally.num_videos += sum(isinstance(part, VideoRef) for part in _parts(record))

    def _check_length(self, record: Record, num_tokens: int) -> None:
        if self.max_tokens is not None and num_tokens > self.max_tokens:
            raise DataError(
                f"the record has {num_tokens} tokens, the limit is {self.max_tokens}",
                kind="too_long",
                source=record.source,
                remedy="shorten it, use fewer tiles, or raise max_tokens",
            )

    def _tiles(self, record: Record) -> int:
        images = [part for part in _parts(record) if isinstance(part, ImageRef)]
        tiling = self.tiling
        if record.max_tiles is not None:
            least = min(tiling.min_tiles, record.max_tiles)
            tiling = replace(tiling, max_tiles=record.max_tiles, min_tiles=least)
        tiling = limit_for(len(images), tiling)
        num_tiles = sum(num_tiles_of(*self._size(image, record), tiling) for image in images)
        for part in _parts(record):
            if isinstance(part, VideoRef):
                check_video(part, source=record.source)
                num_tiles += len(self._frames(part, record)) if self.deep else self.max_frames
        return num_tiles

    def _size(self, image: ImageRef, record: Record) -> tuple[int, int]:
        if self.deep:
            return open_image(image, source=record.source).size
        return image_size(image, source=record.source)

    def _frames(self, video: VideoRef, record: Record) -> list[PIL.Image.Image]:
        return read_frames(video, num_frames=self.max_frames, source=record.source)


def _parts(record: Record) -> Iterator[object]:
    for messages in (record.messages, *record.branches):
        for message in messages:
            yield from message.parts
