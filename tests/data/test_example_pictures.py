"""Pictures of an example: tiles, limits, videos, and what is drawn at random."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from tests.data.conftest import picture
from tests.data.some_records import MESSAGES, SQUARE, TILING, WIDE, answer, builder_of, record, user
from transformers import PreTrainedTokenizerFast

from cascadevl.data.example import ExampleBuilder, ExampleConfig
from cascadevl.data.image import jpeg_degrade
from cascadevl.data.pictures import generator_for
from cascadevl.data.spans import describe
from cascadevl.data.tiling import TilingConfig, tile_image
from cascadevl.errors import ConfigError, DataError
from cascadevl.sequence import INCREMENTS
from cascadevl.types import ImageRef, VideoRef


def test_several_pictures_share_the_tiles(tokenizer: PreTrainedTokenizerFast) -> None:
    wide = ImageRef(picture(28 * 6, 28))
    for num_images, expected in ((1, (7,)), (2, (4, 4)), (3, (3, 3, 3)), (7, (1,) * 7)):
        example = builder_of(tokenizer)(record(user(*[wide] * num_images), answer("3")))
        assert example.tiles_per_image == expected
    apart = builder_of(tokenizer, share_tiles=False)(record(user(wide, wide), answer("3")))
    assert apart.tiles_per_image == (7, 7)


def test_the_limit_of_the_data_set_goes_first(tokenizer: PreTrainedTokenizerFast) -> None:
    wide = ImageRef(picture(28 * 6, 28))
    example = builder_of(tokenizer)(record(user(wide), answer("3"), max_tiles=2))
    assert example.tiles_per_image == (3,)
    prompt = builder_of(tokenizer).prompt([user(wide)], max_tiles=2)
    np.testing.assert_array_equal(prompt.tiles, example.tiles)


def test_pixels_are_those_of_the_tiling(tokenizer: PreTrainedTokenizerFast) -> None:
    example = builder_of(tokenizer)(record(user(SQUARE), answer("3")))
    np.testing.assert_array_equal(example.tiles, tile_image(picture(30, 30, seed=1), TILING))


def test_jpeg_only_where_asked_for(tokenizer: PreTrainedTokenizerFast) -> None:
    plain = record(user(SQUARE), answer("3"))
    augmented = record(user(SQUARE), answer("3"), augment=True)
    clean = builder_of(tokenizer)(plain).tiles
    np.testing.assert_array_equal(clean, tile_image(picture(30, 30, seed=1), TILING))
    candidates = [
        tile_image(jpeg_degrade(picture(30, 30, seed=1), quality), TILING)
        for quality in range(75, 101)
    ]
    for builder, sample in (
        (builder_of(tokenizer), augmented),
        (builder_of(tokenizer, jpeg=True), plain),
    ):
        degraded = builder(sample).tiles
        assert not np.array_equal(degraded, clean)
        assert any(np.array_equal(degraded, candidate) for candidate in candidates)


def test_video_frames_are_lines_of_one_tile_each(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    for number in range(3):
        picture(60, 28, seed=number).save(tmp_path / f"{number}.png")
    builder = builder_of(tokenizer, min_frames=2, max_frames=3, jpeg=True)
    example = builder(record(user(VideoRef(source=tmp_path), "\nWhat?"), answer("3")))
    shown = "".join(span.text for span in describe(example, tokenizer))
    count = len(example.tiles_per_image)
    lines = [f"Frame-{number}: <img><IMG_CONTEXT></img>\n" for number in range(1, count + 1)]
    assert shown.startswith(f"<|im_start|>user\n{''.join(lines)}What?<|im_end|>\n")
    assert example.tiles_per_image == (1,) * count
    assert count in (2, 3)
    clean = [picture(60, 28, seed=number).resize((28, 28), 3) for number in range(3)]
    for tile in example.tiles:
        assert any(np.array_equal(tile, np.asarray(frame)) for frame in clean)


def test_a_video_in_a_prompt_shows_the_most_frames(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    for number in range(9):
        picture(28, 28, seed=number).save(tmp_path / f"{number}.png")
    builder = builder_of(tokenizer, min_frames=2, max_frames=4)
    example = builder.prompt([user(VideoRef(source=tmp_path), "\nWhat?")])
    assert example.tiles_per_image == (1,) * 4


# What is drawn at random


@pytest.fixture
def random_builder(tokenizer: PreTrainedTokenizerFast) -> ExampleBuilder:
    return builder_of(tokenizer, jpeg=True, increment="random", seed=3)


def test_draws_depend_on_seed_record_data_set_and_epoch_alone(
    tokenizer: PreTrainedTokenizerFast, random_builder: ExampleBuilder
) -> None:
    parts = [WIDE] * 6

    def drawn(builder: ExampleBuilder, epoch: int = 0, **values: object) -> tuple[object, ...]:
        example = builder(record(user(*parts), answer("3"), **values), epoch=epoch)
        return (example.increments, example.tiles.tobytes())

    first = drawn(random_builder)
    drawn(random_builder, epoch=4)
    assert drawn(random_builder) == first
    assert drawn(builder_of(tokenizer, jpeg=True, increment="random", seed=3)) == first
    others = [
        drawn(random_builder, epoch=1),
        drawn(random_builder, record_id="8"),
        drawn(random_builder, dataset="other"),
        drawn(builder_of(tokenizer, jpeg=True, increment="random", seed=4)),
    ]
    for increments, tiles in others:
        assert increments != first[0]
        assert tiles != first[1]


def test_draws_are_the_same_in_every_process_and_version() -> None:
    drawn = generator_for(3, "set", "7", 0, "increment").integers(0, 1000, 4)
    assert drawn.tolist() == [188, 882, 787, 972]
    assert generator_for(3, "set", "70", "").random() != generator_for(3, "set", "7", "0").random()


def test_increments_are_drawn_one_an_image_from_all_of_them(
    random_builder: ExampleBuilder,
) -> None:
    drawn = [
        value
        for epoch in range(40)
        for value in random_builder(
            record(user(SQUARE, SQUARE, SQUARE), answer("3")), epoch=epoch
        ).increments
    ]
    assert set(drawn) == set(INCREMENTS)
    assert len(drawn) == 120


def test_a_compression_is_drawn_one_an_image_whatever_the_increments(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    tiling = TilingConfig(tile_px=28, max_tiles=3)
    config = ExampleConfig(tiling=tiling, compress=0.5, share_tiles=False, seed=3)
    builder = ExampleBuilder(tokenizer, config, 4, compressed_tokens=1)
    wide = ImageRef(picture(84, 28))
    shown = record(user(wide, SQUARE, wide), answer("3"))
    drawn = [builder(shown, epoch=epoch) for epoch in range(60)]
    kinds = [[each.tokens_per_tile[place] for place in (0, 4, 5)] for each in drawn]
    for each, kind in zip(drawn, kinds, strict=True):
        assert each.tiles_per_image == (4, 1, 4)
        assert each.tokens_per_tile == (kind[0],) * 4 + (kind[1],) + (kind[2],) * 4
    assert {tuple(kind) for kind in kinds} == set(product((1, 4), repeat=3))
    assert builder(shown, epoch=7).tokens_per_tile == drawn[7].tokens_per_tile  # in any order
    random = replace(config, increment="random")
    other = ExampleBuilder(tokenizer, random, 4, compressed_tokens=1)(shown, epoch=7)
    assert other.tokens_per_tile == drawn[7].tokens_per_tile
    assert builder.prompt(MESSAGES[:3]).tokens_per_tile == ()
    plain = ExampleBuilder(tokenizer, replace(config, compress=0.0), 4, compressed_tokens=1)
    assert plain(shown).tokens_per_tile == ()


def test_tiles_of_an_image_are_compressed_each_by_itself_where_they_are_mixed(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    tiling = TilingConfig(tile_px=28, max_tiles=8)
    config = ExampleConfig(tiling=tiling, compress=0.5, share_tiles=False, seed=3)
    shown = record(user(ImageRef(picture(224, 28)), ImageRef(picture(224, 28))), answer("3"))

    def drawn(mixed: float, epochs: int) -> list[tuple[int, ...]]:
        builder = ExampleBuilder(tokenizer, replace(config, mixed=mixed), 4, compressed_tokens=1)
        examples = [builder(shown, epoch=epoch) for epoch in range(epochs)]
        assert all(each.tiles_per_image == (9, 9) for each in examples)
        return [half for e in examples for half in (e.tokens_per_tile[:9], e.tokens_per_tile[9:])]

    half = drawn(0.5, 200)
    alike = [len(set(each)) == 1 for each in half]
    # half of the images by the report's rule; of the others two in ten are alike by chance:
    # each number of compressed tiles, 0 to 9, is as likely
    assert sum(alike) / len(alike) == pytest.approx(0.6, abs=0.08)
    counts = Counter(each.count(1) for each in drawn(1.0, 300))
    assert set(counts) == set(range(10))
    assert max(counts.values()) < 2 * min(counts.values())
    assert drawn(0.5, 3) == half[:6]
    reported = drawn(0.0, 200)
    assert all(len(set(each)) == 1 for each in reported)
    # the other half of the images, and one in ten of the mixed ones, are as without it
    same = [one == other for one, other in zip(half, reported, strict=True)]
    assert sum(same) / len(same) == pytest.approx(0.55, abs=0.08)
    with pytest.raises(ConfigError, match="it is a probability"):
        replace(config, mixed=-1.0)


def test_in_one_form_only_the_compression_differs_between_epochs(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    config = ExampleConfig(
        tiling=TilingConfig(tile_px=28), increment="random", jpeg=True, compress=0.5, one_form=True
    )
    builder = ExampleBuilder(tokenizer, config, 4, compressed_tokens=1)
    free = ExampleBuilder(tokenizer, replace(config, one_form=False), 4, compressed_tokens=1)
    shown = record(user(ImageRef(picture(60, 28)), "12?"), answer("3"))
    drawn = [builder(shown, epoch=epoch) for epoch in range(20)]
    first = drawn[0]
    for epoch, each in enumerate(drawn):
        assert np.array_equal(each.tiles, first.tiles)
        assert each.increments == first.increments
        # the compression is that of the epoch, as where everything is drawn anew
        assert each.tokens_per_tile == free(shown, epoch=epoch).tokens_per_tile
    assert len({each.tokens_per_tile for each in drawn}) == 2
    others = [free(shown, epoch=epoch) for epoch in range(20)]
    assert len({each.increments for each in others}) > 1
    assert any(not np.array_equal(each.tiles, first.tiles) for each in others)


def test_a_sample_that_is_compressed_must_fit_uncompressed_too(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    config = ExampleConfig(tiling=TilingConfig(tile_px=28), compress=1.0, max_tokens=60)
    builder = ExampleBuilder(tokenizer, config, 50, compressed_tokens=1)
    with pytest.raises(DataError, match="1 tiles of 50"):
        builder(record(user(SQUARE, "12?"), answer("3")))
    with pytest.raises(ConfigError, match="no compressed tiles"):
        ExampleBuilder(tokenizer, config, 50)
    with pytest.raises(ConfigError, match="a probability"):
        replace(config, compress=1.5)
