"""A data set's own limit of tiles reaches the example, whatever stores the data set."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import PIL.Image
import pytest
from accelerate import Accelerator
from tests.train.small_run import small_config, tokenizer

from cascadevl.data.processor import CascadeVLProcessor
from cascadevl.data.tiling import TilingConfig
from cascadevl.train.sources import example_builder, open_stream, sources_of_meta
from cascadevl.train.start import from_scratch

WIDE = (6 * 56, 56)
"""A picture of six tiles side by side, if that many are allowed."""


def png() -> bytes:
    file = io.BytesIO()
    PIL.Image.new("RGB", WIDE, "red").save(file, format="PNG")
    return file.getvalue()


def record(num_images: int) -> dict[str, Any]:
    question = "<image>" * num_images + "?"
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "red"}]
    return {"image": ["wide.png"] * num_images, "conversations": turns}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    (tmp_path / "wide.png").write_bytes(png())
    for num_images in (1, 2):
        lines = json.dumps(record(num_images)) + "\n"
        (tmp_path / f"{num_images}.jsonl").write_text(lines * 4)
        rows = datasets.Dataset.from_list([record(num_images)] * 4)
        rows.to_parquet(tmp_path / f"{num_images}.parquet")
    return tmp_path


def processor() -> CascadeVLProcessor:
    return CascadeVLProcessor(
        tokenizer(), tiling=TilingConfig(tile_px=56, max_tiles=6), tokens_per_tile=4
    )


FILES = (
    (1, None, 7), (1, 4, 5), (1, 2, 3), (1, 1, 1), (1, 12, 7), (2, None, 4), (2, 4, 3), (2, 2, 1),
)  # fmt: skip
"""Pictures, limit, and tiles of each picture by hand: the limit is divided by the pictures, and a
thumbnail follows where there are several tiles."""

TASKS = ((None, 5), (4, 5), (3, 1), (1, 1))
"""Limit and tiles of a square picture of two tiles' side: four and a thumbnail, or one."""


def entries(form: str) -> Iterator[tuple[dict[str, Any], int]]:
    """Entries of a meta file, and the tiles of every picture of theirs."""
    if form == "task":
        for limit, tiles in TASKS:
            yield {"annotation": "task:shapes", "length": 4, "max_dynamic_patch": limit}, tiles
        return
    more = {"stream": {"lanes": 1}, "length": 4} if form == "stream" else {}
    suffix = "jsonl" if form == "jsonl" else "parquet"
    for num_images, limit, tiles in FILES:
        yield {"annotation": f"{num_images}.{suffix}", "max_dynamic_patch": limit, **more}, tiles


def write_meta(folder: Path, form: str) -> dict[str, int]:
    """Write the meta file; returns the tiles of a picture by data set."""
    meta, wanted = {}, {}
    for number, (entry, tiles) in enumerate(entries(form)):
        meta[f"set {number}"], wanted[f"set {number}"] = entry, tiles
    (folder / "meta.json").write_text(json.dumps(meta))
    return wanted


@pytest.mark.parametrize("max_tiles", [None, 1])
@pytest.mark.parametrize("form", ["jsonl", "parquet", "stream", "task"])
def test_the_limit_of_a_data_set_reaches_its_examples(
    folder: Path, form: str, max_tiles: int | None
) -> None:
    """It goes before the run's own, as in released training, be it smaller or larger."""
    wanted = write_meta(folder, form)
    config = small_config(
        folder / "run", data__meta=(folder / "meta.json",), data__max_tiles=max_tiles
    )
    builder = example_builder(config.data, processor(), seed=0)
    for one in sources_of_meta(config.data.meta):
        source: Any = one.source
        first = source.open(0).read(0, 0) if form == "stream" else source[0]
        example = builder(first)
        tiles = wanted[one.source.name] if first.max_tiles or max_tiles is None else 1
        assert set(example.tiles_per_image) == {tiles}, one.source.name
        assert len(example.tiles) == sum(example.tiles_per_image)


@pytest.mark.parametrize("form", ["jsonl", "stream", "task"])
def test_batches_of_a_run_hold_so_many_tiles(folder: Path, form: str) -> None:
    wanted = write_meta(folder, form)
    config = small_config(
        folder / "run",
        data__meta=(folder / "meta.json",),
        batch__packing="count",
        run__seed=3,
    )
    model, _ = from_scratch(config.model, tokenizer(), seed=0)
    sources = sources_of_meta(config.data.meta)
    with open_stream(sources, processor(), config, Accelerator(cpu=True), model.config) as stream:
        found = []
        for _ in range(4 * len(wanted)):  # every source is drawn four times in a round
            batch = next(stream)
            found.append(batch.num_tiles)
    pictures = [n for n, _, _ in FILES] if form != "task" else [1] * len(TASKS)
    by_hand = [4 * [n * tiles] for n, tiles in zip(pictures, wanted.values(), strict=True)]
    assert sorted(found) == sorted(number for four in by_hand for number in four)
