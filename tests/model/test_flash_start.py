"""The start of the second projector: the mean of what the first one makes, up to its activation."""

from __future__ import annotations

import pytest
import torch
from tests.model.small import small_flash_model
from torch import Tensor

from cascadevl.data.tiling import normalise, tile_image
from cascadevl.errors import ConfigError
from cascadevl.model.flash import add_flash
from cascadevl.model.flash_start import start_as_mean
from cascadevl.model.loading import load
from cascadevl.model.modeling import CascadeVLForConditionalGeneration
from cascadevl.model.projector import Projector
from cascadevl.tasks.printed import Printed

SIDE, CHANNELS = 8, 24
"""Patches along a side of a tile (two squares of four), and channels of the small models."""


@pytest.fixture
def model() -> CascadeVLForConditionalGeneration:
    started = small_flash_model(3)
    start_as_mean(started)
    return started


def patches(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, SIDE, SIDE, CHANNELS, generator=generator)


@torch.no_grad()
def both(model: CascadeVLForConditionalGeneration, grid: Tensor) -> tuple[Tensor, Tensor]:
    """Full tokens (tiles, 4, 4, hidden) and compressed ones (tiles, 2, 2, hidden)."""
    flat = grid.flatten(1, 2)
    full = model.model.multi_modal_projector(flat).unflatten(1, (4, 4))
    assert model.model.compressed_projector is not None
    return full, model.model.compressed_projector(flat).unflatten(1, (2, 2))


def test_where_the_four_squares_are_equal_it_is_the_full_token(
    model: CascadeVLForConditionalGeneration,
) -> None:
    """Kills: a weight of the wrong square, a factor of the mean, a bias counted twice."""
    larger = patches(0)[:, :2, :2].repeat_interleave(4, 1).repeat_interleave(4, 2)
    within = patches(1)[:, :2, :2].repeat(1, SIDE // 2, SIDE // 2, 1)  # patches of a square differ
    full, compressed = both(model, larger + within)
    for row in range(4):
        for column in range(4):
            torch.testing.assert_close(
                compressed[:, row // 2, column // 2], full[:, row, column], rtol=1e-4, atol=1e-5
            )


def by_hand(projector: Projector, grid: Tensor) -> Tensor:
    """The formula of the start, where the normalisation is that of the whole square."""
    tokens = torch.empty(len(grid), 2, 2, projector.linear_2.out_features)
    for row in range(2):
        for column in range(2):
            square = grid[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
            flat = square.flatten(1)
            shifted = square - flat.mean(1)[:, None, None, None]
            scale = (flat.var(1, correction=0) + projector.layer_norm.eps) ** -0.5
            normal = shifted * scale[:, None, None, None]
            halves = []
            for left in (0, 2):
                scored = []
                for top in (0, 2):
                    joined = normal[:, top : top + 2, left : left + 2].flatten(1)
                    joined = joined * projector.layer_norm.weight + projector.layer_norm.bias
                    scored.append(projector.linear_1(joined))
                halves.append(projector.linear_2(projector.act(sum(scored) / 2)))
            tokens[:, row, column] = sum(halves) / 2
    return tokens


def test_it_is_the_mean_of_two_halves_by_hand(model: CascadeVLForConditionalGeneration) -> None:
    """Kills: halves above each other, one half alone, the activation left out."""
    grid = patches(5)
    with torch.no_grad():
        wanted = by_hand(model.model.multi_modal_projector, grid)
    torch.testing.assert_close(both(model, grid)[1], wanted, rtol=1e-4, atol=1e-5)


def test_on_real_pictures_it_is_near_the_mean_and_random_weights_are_not() -> None:
    model, processor = load("micro", dtype=torch.float32)
    add_flash(model.eval(), seed=0)
    scene = Printed(px=224, difficulty="line").draw("test", 0, 3)
    assert scene.image is not None
    pixels = normalise(tile_image(scene.image, processor.tiling))
    with torch.no_grad():
        features = model.model.patch_features(pixels)
    grid = features.unflatten(1, (8, 8))
    errors = {}
    for name in ("random", "mean"):
        full, compressed = both(model, grid)
        wanted = full.unflatten(1, (2, 2)).unflatten(3, (2, 2)).mean((2, 4))
        errors[name] = ((compressed - wanted).norm() / wanted.norm()).item()
        start_as_mean(model)
    assert errors["random"] > 0.9
    assert errors["mean"] < 0.5 * errors["random"]


def test_what_cannot_be_started_so_is_refused(model: CascadeVLForConditionalGeneration) -> None:
    model.model.multi_modal_projector.act = torch.nn.Tanh()
    with pytest.raises(ConfigError, match=r"act\(x\) - act\(-x\) = x"):
        start_as_mean(model)
    assert model.model.compressed_projector is not None
    model.model.compressed_projector.ratio = 1 / 6
    with pytest.raises(ConfigError, match="6 x 6 patches and a full one of 2 x 2"):
        start_as_mean(model)
    model.model.compressed_projector = None
    with pytest.raises(ConfigError, match="add_flash"):
        start_as_mean(model)
