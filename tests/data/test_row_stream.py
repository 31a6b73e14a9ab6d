"""Streamed data sets: every row once an epoch, the same order after any stop, parts, errors."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import datasets
import PIL.Image
import pytest

from cascadevl.data.hub import load_stream, open_source
from cascadevl.data.image import open_image
from cascadevl.data.meta import DatasetSpec, StreamSpec
from cascadevl.data.row_stream import RowReader, RowStream
from cascadevl.errors import ConfigError, DataError, TrainingError
from cascadevl.types import ImageRef, Record

ROWS, PARTS = 7, 5


@pytest.fixture(autouse=True)
def cache_in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def row(part: int, number: int, **more: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": "?"}, {"from": "gpt", "value": f"{part}.{number}"}]
    return {"conversations": turns, **more}


def made(parts: list[int]) -> Any:
    for part in parts:
        for number in range(ROWS):
            yield row(part, number)


def generated(num_parts: int = PARTS, **settings: Any) -> RowStream:
    rows = datasets.IterableDataset.from_generator(
        made, gen_kwargs={"parts": list(range(num_parts))}
    )
    return RowStream(rows, name="s", **settings)


def png(shade: int) -> bytes:
    file = io.BytesIO()
    PIL.Image.new("RGB", (6, 4), (shade, 0, 0)).save(file, format="PNG")
    return file.getvalue()


def write_parquet(folder: Path, *, parts: int = PARTS, rows_per_group: int = 3) -> Path:
    """Files of rows whose picture's shade is the number of the row in all files."""
    for part in range(parts):
        rows = datasets.Dataset.from_dict(
            {
                "image": [{"bytes": png(part * ROWS + n), "path": None} for n in range(ROWS)],
                "conversations": [row(part, n)["conversations"] for n in range(ROWS)],
            }
        ).cast_column("image", datasets.Image())
        rows.to_parquet(folder / f"part-{part}.parquet", batch_size=rows_per_group)
    return folder


def said(record: Record) -> str:
    return record.messages[-1].text


def read(reader: RowReader, lane: int, first: int, last: int) -> list[str]:
    return [said(reader.read(lane, ordinal)) for ordinal in range(first, last)]


def lane_rows(lane: int, num_lanes: int, num_parts: int = PARTS) -> set[str]:
    """By hand: every ``num_lanes``-th part, all its rows."""
    return {f"{p}.{n}" for p in range(lane, num_parts, num_lanes) for n in range(ROWS)}


@pytest.mark.parametrize("buffer_rows", [1, 4, 7, 1000])
@pytest.mark.parametrize("num_lanes", [1, 2, 5])
def test_every_row_of_a_lane_comes_once_an_epoch(num_lanes: int, buffer_rows: int) -> None:
    reader = generated(num_lanes=num_lanes, buffer_rows=buffer_rows).open(3)
    for lane in range(num_lanes):
        wanted = lane_rows(lane, num_lanes)
        orders = []
        for epoch in range(3):
            found = read(reader, lane, epoch * len(wanted), (epoch + 1) * len(wanted))
            assert set(found) == wanted
            assert len(found) == len(wanted)
            orders.append(tuple(found))
        if (buffer_rows > 1 and len(wanted) > 7) or num_lanes == 1:
            assert len(set(orders)) == 3


def test_rows_are_shuffled_within_a_buffer_and_parts_among_each_other() -> None:
    reader = generated(num_lanes=1, buffer_rows=4).open(0)
    first = read(reader, 0, 0, ROWS * PARTS)
    parts = [text.partition(".")[0] for text in first]
    assert parts != sorted(parts)  # parts in another order
    numbers = [int(text.partition(".")[2]) for text in first[:4]]
    assert sorted(numbers) == [0, 1, 2, 3]  # the first buffer: the first rows of one part
    other = read(generated(num_lanes=1, buffer_rows=4).open(1), 0, 0, ROWS * PARTS)
    assert other != first


def test_any_record_can_be_read_again_and_ahead() -> None:
    stream = generated(num_lanes=2, buffer_rows=4)
    whole = [read(stream.open(5), lane, 0, 60) for lane in range(2)]
    reader = stream.open(5)
    for ordinal in (3, 40, 0, 59, 20, 21, 4):
        for lane in range(2):
            assert said(reader.read(lane, ordinal)) == whole[lane][ordinal]


@pytest.mark.parametrize("stop", [0, 1, 4, 13, 20, 21, 22, 33, 47])
def test_a_mark_brings_a_new_reader_back_without_reading_from_the_start(stop: int) -> None:
    stream = generated(num_lanes=2, buffer_rows=4)
    reader = stream.open(5)
    whole = read(reader, 0, 0, 60)
    reader = stream.open(5)
    read(reader, 0, 0, stop + 1)
    mark = json.loads(json.dumps(reader.mark(0, stop)))
    again = stream.open(5)
    again.return_to(0, mark)
    assert read(again, 0, stop, 60) == whole[stop:]
    # the mark is the beginning of the buffer with the record
    assert (mark["ordinal"] if mark else 0) <= stop
    assert stop - (mark["ordinal"] if mark else 0) < 4
    # and what lies before it is still there, for the price of reading it again
    assert said(again.read(0, 0)) == whole[0]


def test_marks_of_parquet_files_are_exact(tmp_path: Path) -> None:
    spec = StreamSpec(lanes=2, buffer=5)

    def fresh() -> RowStream:
        rows = load_stream(write_parquet(tmp_path), spec)
        return RowStream(rows, name="s", num_lanes=2, buffer_rows=5)

    whole = read(fresh().open(1), 1, 0, 40)
    for stop in (0, 6, 14, 27):
        reader = fresh().open(1)
        read(reader, 1, 0, stop + 1)
        again = fresh().open(1)
        again.return_to(1, json.loads(json.dumps(reader.mark(1, stop))))
        assert read(again, 1, stop, 40) == whole[stop:]


def test_an_entry_of_a_meta_file_gives_records_with_its_settings(tmp_path: Path) -> None:
    spec = DatasetSpec(
        name="s",
        annotation=write_parquet(tmp_path),
        root=tmp_path,
        max_dynamic_patch=3,
        data_augment=True,
        length=35,
        stream=StreamSpec(lanes=5, buffer=2),
    )
    source = open_source(spec)
    assert isinstance(source, RowStream)
    assert source.identity() == [5, 2, 5]
    reader = source.open(0)
    records = [reader.read(lane, n) for lane in range(5) for n in range(2 * ROWS)]
    shades = []
    for record in records:
        part, number = map(int, said(record).split("."))
        (picture,) = (p for p in record.messages[0].parts if isinstance(p, ImageRef))
        assert isinstance(picture.source, bytes)  # not decoded before it is needed
        shades.append(open_image(picture, source="s").getpixel((1, 1))[0])  # type: ignore[index]
        assert shades[-1] == part * ROWS + number
        assert record.source == f"s:{part}:{number}"
        assert (record.max_tiles, record.augment, record.dataset) == (3, True, "s")
    assert sorted(shades) == sorted([*range(35)] * 2)
    # a row of a later epoch is another record, so that its augmentation is drawn anew
    assert len({record.record_id for record in records}) == 70


def test_the_hub_is_read_through_its_own_name(tmp_path: Path) -> None:
    """A folder in the Hub's form stands for a data set of the Hub."""
    (tmp_path / "sets" / "shades").mkdir(parents=True)
    write_parquet(tmp_path / "sets" / "shades", parts=2)
    name = Path(f"hub:{tmp_path}/sets/shades")
    rows = load_stream(name, StreamSpec())
    assert rows.num_shards == 2
    reader = RowStream(rows, name="s").open(0)
    assert {said(reader.read(lane, n)) for lane in range(2) for n in range(ROWS)} == lane_rows(
        0, 1, 2
    )
    with pytest.raises(DataError, match="check its name, subset, split"):
        load_stream(name, StreamSpec(split="absent"))


def test_a_single_parquet_file_divides_into_row_groups(tmp_path: Path) -> None:
    file = write_parquet(tmp_path, parts=1, rows_per_group=3) / "part-0.parquet"
    stream = RowStream(load_stream(file, StreamSpec()), name="s", num_lanes=3)
    assert (stream.num_lanes, stream.num_parts) == (3, 3)
    reader = stream.open(0)
    found = [read(reader, lane, 0, size) for lane, size in enumerate((3, 3, 1))]
    assert {text for lane in found for text in lane} == lane_rows(0, 1, 1)


def test_lanes_are_one_a_part_but_not_without_end() -> None:
    assert generated(3).num_lanes == 3
    assert generated(40).num_lanes == 8
    with pytest.raises(ConfigError, match=r"6 lanes, but its data set divides into 5 parts"):
        generated(num_lanes=6)


def test_those_who_only_look_see_rows_of_several_parts() -> None:
    head = generated(num_lanes=1).head(9)
    assert len(head) == 10  # two of each part
    assert [said(head[n]) for n in range(10)] == [f"{p}.{n}" for n in (0, 1) for p in range(PARTS)]
    with pytest.raises(IndexError):
        head[10]


def broken(parts: list[int]) -> Any:
    for part in parts:
        yield row(part, 0)
        if part == 1:
            raise OSError("the network is gone")


def test_a_stream_that_breaks_off_stops_the_run_and_says_where() -> None:
    rows = datasets.IterableDataset.from_generator(broken, gen_kwargs={"parts": [0, 1]})
    stream = RowStream(rows, name="s", num_lanes=2)
    reader = stream.open(0)
    assert said(reader.read(0, 5)) == "0.0"
    with pytest.raises(TrainingError, match=r"'s' cannot be read on, in part 1 .*network is gone"):
        reader.read(1, 0)
    with pytest.raises(TrainingError, match="cannot be read at its beginning"):
        stream.head(4)


def test_a_lane_without_rows_is_named() -> None:
    rows = datasets.IterableDataset.from_generator(made, gen_kwargs={"parts": [0]}).take(0)
    with pytest.raises(TrainingError, match="lane 0 of stream 's' has no row"):
        RowStream(rows, name="s").open(0).read(0, 0)


def test_files_that_cannot_be_streamed(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no Parquet file") as caught:
        load_stream(tmp_path / "empty", StreamSpec())
    assert caught.value.kind == "missing_file"
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(ConfigError, match=r"ends with '\.csv'"):
        load_stream(tmp_path / "a.csv", StreamSpec())
    (tmp_path / "a.parquet").write_text("not parquet")
    with pytest.raises((DataError, TrainingError)):
        RowStream(load_stream(tmp_path / "a.parquet", StreamSpec()), name="s").open(0).read(0, 0)
    datasets.Dataset.from_dict({"text": ["x"]}).to_parquet(tmp_path / "b.parquet")
    spec = DatasetSpec(
        name="s", annotation=tmp_path / "b.parquet", root=tmp_path, length=1, stream=StreamSpec()
    )
    with pytest.raises(DataError, match="has the columns text"):
        open_source(spec)
