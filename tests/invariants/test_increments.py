"""Increments in training: one a picture or video, shared by all its tiles, from names alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate import Accelerator
from tests.data.conftest import TEXTS, picture
from tests.train.small_run import QUIET, small_config, sources, tokenizer

import cascadevl
from cascadevl.data.collate import collate
from cascadevl.data.example import ExampleBuilder, ExampleConfig
from cascadevl.data.tiling import TilingConfig
from cascadevl.data.tokenizer import build_tokenizer
from cascadevl.errors import DataError
from cascadevl.sequence import INCREMENTS, num_positions
from cascadevl.train.config import ModelConfig
from cascadevl.train.pretrain import pretrain
from cascadevl.train.sources import open_stream
from cascadevl.train.start import from_scratch
from cascadevl.types import NO_PARENT, Batch, Example, ImageRef, Message, Record, VideoRef

TOKENS_PER_TILE = 4
TOKENIZER = build_tokenizer(TEXTS, 400)


def builder(**values: Any) -> ExampleBuilder:
    config = ExampleConfig(
        **{"system": "", "tiling": TilingConfig(tile_px=28, max_tiles=6), "increment": "random"}
        | {"min_frames": 2, "max_frames": 5, "share_tiles": False}
        | values
    )
    return ExampleBuilder(TOKENIZER, config, TOKENS_PER_TILE)


def record(*parts: str | ImageRef | VideoRef, name: str = "7") -> Record:
    turns = (Message.of("user", *parts), Message.of("assistant", "There are 3."))
    return Record(source="set.jsonl:8", record_id=name, messages=turns)


WIDE, SQUARE = ImageRef(picture(60, 28)), ImageRef(picture(30, 30, seed=1))  # 2 + 1 tiles, 1 tile


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> list[VideoRef]:
    made = []
    for number in range(2):
        folder = tmp_path_factory.mktemp("video")
        for frame in range(6):
            picture(40, 30, seed=10 * number + frame).save(folder / f"{frame}.png")
        made.append(VideoRef(source=folder))
    return made


def collated(example: Example, *, ceil: bool = False) -> Batch:
    return collate(
        [[example]],
        image_token_id=builder().image_token_id,
        pad_token_id=0,
        tokens_per_tile=TOKENS_PER_TILE,
        averaging="square",
        ceil_after_image=ceil,
    )


def test_all_tiles_of_a_picture_the_thumbnail_too_share_its_increment() -> None:
    example = builder()(record(WIDE, SQUARE, WIDE, "\nHow many?"))
    assert example.tiles_per_image == (3, 1, 3)
    assert len(set(example.increments)) == 3
    batch = collated(example)
    positions = [Fraction(value) for value in batch.position_ids[0].tolist()]
    is_visual = (batch.input_ids[0] == builder().image_token_id).tolist()
    steps = [after - before for before, after in pairwise(positions)]
    # The step onto each visual token is its picture's, whatever tile the token is of.
    found = [step for step, visual in zip(steps, is_visual[1:], strict=True) if visual]
    expected = []
    for tiles, increment in zip(example.tiles_per_image, example.increments, strict=True):
        expected += [Fraction(increment)] * (tiles * TOKENS_PER_TILE)
    assert found == expected
    others = [step for step, visual in zip(steps, is_visual[1:], strict=True) if not visual]
    assert set(others) == {1}  # also the step from the last visual token to </img>


def test_frames_of_a_video_share_one_increment_and_pictures_beside_it_have_their_own(
    videos: list[VideoRef],
) -> None:
    made = builder()
    drawn = []
    for epoch in range(30):
        parts = (videos[0], "\n", SQUARE, "\n", videos[1], "\nWhich?")
        example = made(record(*parts), epoch=epoch)
        text = TOKENIZER.decode(example.input_ids)
        num_first, num_second = (part.count("Frame-") + 1 for part in text.split("Frame-1: ")[1:])
        values = example.increments
        assert len(values) == num_first + 1 + num_second
        groups = [values[:num_first], values[num_first : num_first + 1], values[-num_second:]]
        assert [len(set(group)) for group in groups] == [1, 1, 1]
        drawn.append(tuple(group[0] for group in groups))
    assert len(set(drawn)) > 25  # the three are drawn apart
    assert {value for each in drawn for value in each} == set(INCREMENTS)


def test_the_nine_increments_are_equally_likely() -> None:
    made = builder()
    counts: Counter[float] = Counter()
    for number in range(300):
        counts.update(made(record(*[SQUARE] * 6, "\nHow many?", name=str(number))).increments)
    assert set(counts) == set(INCREMENTS)
    # 1,800 draws, 200 each; four standard deviations are 53.
    assert all(abs(count - 200) < 53 for count in counts.values())


def test_a_prompt_leaves_its_increments_to_the_model() -> None:
    turns = [Message.of("user", WIDE, "\nHow many?")]
    for rule in ("random", 0.25):
        assert builder(increment=rule).prompt(turns).increments == ()


def test_rounding_up_reaches_training() -> None:
    example = replace(builder()(record(SQUARE, WIDE, "\nHow many?")), increments=(1 / 16, 1 / 16))
    printed, rounded = (
        collated(example, ceil=ceil).position_ids[0].tolist() for ceil in (False, True)
    )
    num_before = example.input_ids.tolist().index(builder().image_token_id)
    first = num_before + TOKENS_PER_TILE  # </img> of the first picture
    last = num_before - 1  # position of its <img>
    assert printed[first] == last + 4 / 16 + 1
    assert rounded[first] == last + 1 + 1
    assert rounded[-1] - printed[-1] == 2 - (4 + 12) / 16


# Dynamic RoPE


def test_the_positions_of_an_example_are_counted_with_its_increments() -> None:
    example = builder()(record(WIDE, "\nHow many?"))
    size = {"image_token_id": builder().image_token_id, "tokens_per_tile": TOKENS_PER_TILE}
    num_text = len(example.input_ids) - 1
    for increment, expected in ((1.0, 12), (0.25, 3), (1 / 256, 1)):
        given = replace(example, increments=(increment,))
        assert num_positions(given, **size) == num_text + expected
    # A branch begins where its parent ends: the longest one counts, not their sum.
    longest, shorter = num_text - 10, 4
    segments = np.repeat([0, 1, 2], [7, longest, shorter])
    tree = replace(given, segments=segments, parents=(NO_PARENT, 0, 0))
    assert len(segments) == len(tree.input_ids)
    assert tree.input_ids.tolist().index(builder().image_token_id) < 7
    assert num_positions(tree, **size) == 6 + 1 + longest


def test_a_sample_beyond_dynamic_rope_is_left_out_unless_its_increments_bring_it_under() -> None:
    sample = record(WIDE, "\nHow many?")
    num_text = len(builder()(sample).input_ids) - 1
    builder(increment=1.0, max_positions=num_text + 12)(sample)
    builder(increment=0.5, max_positions=num_text + 6)(sample)
    with pytest.raises(DataError) as caught:
        builder(increment=1.0, max_positions=num_text + 6)(sample)
    assert caught.value.kind == "too_long"
    assert f"{num_text + 12} positions" in str(caught.value)
    assert f"holds {num_text + 6}" in str(caught.value)


@pytest.mark.parametrize(
    ("rope_type", "limit", "is_left_out"),
    [("dynamic", 4096, False), ("dynamic", 10, True), ("default", 10, False)],
)
def test_a_run_with_dynamic_rope_leaves_out_what_it_cannot_hold(
    tmp_path: Path, rope_type: str, limit: int, is_left_out: bool
) -> None:
    model, processor = from_scratch(ModelConfig(preset="nano"), tokenizer(), seed=0)
    text = model.config.text_config
    text.rope_parameters = {"rope_type": rope_type, "rope_theta": 1e4, "factor": 2.0}
    text.max_position_embeddings = limit
    run = small_config(tmp_path, batch__packing="count")
    with open_stream(sources(), processor, run, Accelerator(cpu=True), model.config) as stream:
        if is_left_out:  # every record, so the run stops and says why
            with pytest.raises(DataError, match=r"\d+ positions.*holds 10"):
                next(stream)
        else:
            assert next(stream).num_tiles > 0


# What goes into the checkpoint


@pytest.mark.parametrize(
    ("increment", "kept"), [(0.25, 0.25), ("random", "auto"), (1.0, 1.0)], ids=str
)
def test_a_model_is_saved_with_the_increment_it_was_trained_with(
    tmp_path: Path, increment: Any, kept: Any
) -> None:
    config = small_config(tmp_path / "run", run__num_steps=1, data__increment=increment)
    result = pretrain(config, sources=sources(), tokenizer=tokenizer(), console=QUIET)
    assert result.model_path is not None
    model, _ = cascadevl.load(result.model_path)
    assert model.config.increment == kept
    assert model.config.trained_context == 4096  # the preset's; longer than the run's samples
