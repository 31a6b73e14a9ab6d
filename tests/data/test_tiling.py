"""Tiling equals the released processors: grids, pixels, normalisation."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.reference import tiling_by_hand
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import (
    GotOcr2ImageProcessorPil,
    get_optimal_tiled_canvas,
)

from cascadevl.data.tiling import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    TilingConfig,
    choose_grid,
    limit_for,
    normalise,
    num_tiles_of,
    tile_image,
)
from cascadevl.errors import ConfigError, DataError

CONFIGS = [
    (448, 1, 12),
    (448, 1, 6),
    (448, 1, 24),
    (448, 4, 12),
    (448, 2, 2),
    (112, 1, 40),
    (97, 3, 7),
]


def released_grid(width, height, tile_px, least, most):
    return get_optimal_tiled_canvas.__wrapped__((height, width), (tile_px, tile_px), least, most)


def config_of(tile_px, least, most, **more):
    return TilingConfig(tile_px=tile_px, min_tiles=least, max_tiles=most, **more)


@pytest.mark.parametrize("numbers", CONFIGS)
def test_grid_equals_transformers_for_random_sizes(numbers):
    generator = np.random.default_rng(7)
    config = config_of(*numbers)
    # Logarithmic sizes: every magnitude, and every shape from very wide to very tall.
    for width, height in np.exp(generator.uniform(0, np.log(9000), (1500, 2))).astype(int) + 1:
        size = int(width), int(height)
        assert choose_grid(*size, config) == released_grid(*size, *numbers), size


@pytest.mark.parametrize("numbers", CONFIGS)
def test_grid_equals_transformers_at_every_exact_midpoint(numbers):
    """Both sides of the area rule, for each shape and each midpoint between neighbours."""
    tile_px, least, most = numbers
    config = config_of(*numbers)
    shapes = sorted(
        {
            Fraction(columns, rows)
            for columns in range(1, most + 1)
            for rows in range(1, most // columns + 1)
            if columns * rows >= least
        }
    )
    # An eighth below, at and above half of the pixels of grids across the range.
    areas = {
        tile_px**2 * tiles * share // 8
        for tiles in {1, 2, 3, 4, 6, 12, most}
        for share in (3, 4, 5)
    }
    for ratio in [*shapes, *((low + high) / 2 for low, high in pairwise(shapes))]:
        for area in areas:
            scale = max(1, round((area / (ratio.numerator * ratio.denominator)) ** 0.5))
            for factor in (scale - 1, scale, scale + 1):
                if factor < 1:
                    continue
                size = ratio.numerator * factor, ratio.denominator * factor
                assert choose_grid(*size, config) == released_grid(*size, *numbers), size


def test_area_rule_decides_exact_ties():
    """A square of 448 px takes one tile or four, as it has more than half of four tiles' pixels."""
    config = TilingConfig(max_tiles=4)
    half = 448 * 448 * 4 // 2
    side = int(half**0.5)
    assert side * side <= half
    assert choose_grid(side, side, config) == (1, 1)
    assert choose_grid(side + 1, side + 1, config) == (2, 2)
    # 3:2 lies exactly between 1:1 and 2:1; with few pixels the smaller grid of the two stays.
    assert choose_grid(3, 2, TilingConfig(max_tiles=2)) == (1, 1)
    assert choose_grid(900, 600, TilingConfig(max_tiles=2)) == (2, 1)


@pytest.mark.parametrize(
    ("tile_px", "least", "most"), [(28, 1, 12), (32, 1, 6), (15, 2, 5), (56, 1, 1)]
)
def test_pixels_equal_transformers(tile_px, least, most):
    processor = GotOcr2ImageProcessorPil(
        size={"height": tile_px, "width": tile_px},
        image_mean=IMAGENET_MEAN,
        image_std=IMAGENET_STD,
        crop_to_patches=True,
        min_patches=least,
        max_patches=most,
    )
    generator = np.random.default_rng(tile_px)
    for _ in range(30):
        height, width = np.exp(generator.uniform(0, np.log(200), 2)).astype(int) + 1
        image = PIL.Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))
        tiles = tile_image(image, config_of(tile_px, least, most))
        raw = processor(image, do_rescale=False, do_normalize=False, return_tensors="np")
        np.testing.assert_array_equal(tiles.transpose(0, 3, 1, 2), raw["pixel_values"])
        released = processor(image, return_tensors="pt")["pixel_values"]
        np.testing.assert_allclose(normalise(tiles).numpy(), released.numpy(), rtol=0, atol=1e-6)


def test_normalise_every_value_exactly_enough():
    """All 256 values in each channel against float64 arithmetic."""
    values = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    expected = (values.astype(np.float64) / 255 - IMAGENET_MEAN) / IMAGENET_STD
    ours = normalise(values)
    assert ours.is_contiguous()
    np.testing.assert_allclose(ours.permute(0, 2, 3, 1).numpy(), expected, rtol=0, atol=5e-7)


def test_normalise_rounds_every_step_to_float32_whether_it_is_given_an_array_or_a_tensor():
    """The values are these to the last bit: one product and one difference, two rounded factors."""
    values = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    of_array, of_tensor = normalise(values), normalise(torch.from_numpy(values), "cpu")
    for channel, (mean, std) in enumerate(zip(IMAGENET_MEAN, IMAGENET_STD, strict=True)):
        scale = np.float32(1) / (np.float32(255) * np.float32(std))
        shift = np.float32(mean) / np.float32(std)
        expected = values[0, :, :, channel].astype(np.float32) * scale - shift
        np.testing.assert_array_equal(of_array[0, channel].numpy(), expected)
    assert of_array.dtype == torch.float32
    assert torch.equal(of_array, of_tensor)
    assert of_tensor.is_contiguous()


def test_tiles_that_are_normalised_stay_as_they_were():
    tiles = torch.arange(192, dtype=torch.uint8).view(4, 4, 4, 3)
    before = tiles.clone()
    some = normalise(tiles[1::2])
    assert torch.equal(some, normalise(tiles)[1::2])
    assert torch.equal(tiles, before)


def test_order_is_row_major_with_the_thumbnail_last():
    image = PIL.Image.new("RGB", (96, 64))
    for place in range(6):
        image.paste(
            (place * 40, 0, 0),
            (place % 3 * 32, place // 3 * 32, place % 3 * 32 + 32, place // 3 * 32 + 32),
        )
    config = TilingConfig(tile_px=32, min_tiles=6, max_tiles=6)
    tiles = tile_image(image, config)
    assert [int(tile[16, 16, 0]) for tile in tiles[:6]] == [0, 40, 80, 120, 160, 200]
    np.testing.assert_array_equal(
        tiles[6], np.asarray(image.resize((32, 32), PIL.Image.Resampling.BICUBIC))
    )
    assert (
        len(tile_image(image, TilingConfig(tile_px=32, min_tiles=6, max_tiles=6, thumbnail=False)))
        == 6
    )


def test_static_tiling_is_one_resized_tile():
    image = PIL.Image.effect_noise((200, 40), 60.0).convert("RGB")
    tiles = tile_image(image, TilingConfig(tile_px=24, dynamic=False))
    np.testing.assert_array_equal(
        tiles, [np.asarray(image.resize((24, 24), PIL.Image.Resampling.BICUBIC))]
    )


def test_other_modes_are_tiled_as_rgb():
    grey = PIL.Image.effect_noise((90, 30), 60.0)
    config = TilingConfig(tile_px=16)
    np.testing.assert_array_equal(tile_image(grey, config), tile_image(grey.convert("RGB"), config))


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    width=st.integers(1, 10**9),
    height=st.integers(1, 10**9),
    least=st.integers(1, 40),
    more=st.integers(0, 40),
    tile_px=st.sampled_from([14, 28, 112, 448]),
)
def test_any_size_stays_within_the_limits(width, height, least, more, tile_px):
    numbers = (tile_px, least, least + more)
    config = config_of(*numbers)
    columns, rows = choose_grid(width, height, config)
    assert columns >= 1
    assert rows >= 1
    if config.max_tiles > 1:
        assert least <= columns * rows <= least + more
    assert (columns, rows) == tiling_by_hand.grid(width, height, *numbers)
    thumbnails = int(columns * rows > 1)
    assert num_tiles_of(width, height, config) == columns * rows + thumbnails


@settings(max_examples=40, deadline=None, derandomize=True)
@given(long=st.integers(1, 10_000), short=st.integers(1, 3), tall=st.booleans())
def test_extreme_pictures_are_tiled(long, short, tall):
    size = (short, long) if tall else (long, short)
    config = TilingConfig(tile_px=14)
    tiles = tile_image(PIL.Image.new("RGB", size, (9, 8, 7)), config)
    assert len(tiles) == num_tiles_of(*size, config) <= 13
    assert (tiles == np.array([9, 8, 7])).all()


def test_several_images_share_the_tiles():
    config = TilingConfig(max_tiles=12, min_tiles=3)
    assert [limit_for(n, config).max_tiles for n in (0, 1, 2, 5, 12, 13, 40)] == [
        12,
        12,
        6,
        2,
        1,
        1,
        1,
    ]
    assert [limit_for(n, config).min_tiles for n in (1, 2, 5, 40)] == [3, 3, 2, 1]
    assert limit_for(5, config).tile_px == config.tile_px


def test_wrong_limits_and_empty_pictures_are_refused():
    with pytest.raises(ConfigError, match="min_tiles is 5 and max_tiles 4"):
        TilingConfig(min_tiles=5, max_tiles=4)
    with pytest.raises(ConfigError, match="min_tiles is 0"):
        TilingConfig(min_tiles=0)
    with pytest.raises(ConfigError, match="tile_px is 0"):
        TilingConfig(tile_px=0)
    with pytest.raises(DataError, match="0 x 5 pixels"):
        choose_grid(0, 5, TilingConfig())
