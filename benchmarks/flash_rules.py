"""Rules that say which tiles can do with fewer visual tokens: routers, and what needs no model.

Every rule gives a tile a number from 0 to 1, the larger the fitter for compression, so that a
threshold can be calibrated for all of them alike (`cascadevl.model.routing.calibrated`).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping

import numpy as np
import torch

from cascadevl.data.tiling import normalise
from cascadevl.losses.router import LabelForm
from cascadevl.model.modeling import CascadeVLForConditionalGeneration
from cascadevl.types import Example

ROUTERS: dict[str, LabelForm] = {"router": "ratio", "router of differences": "difference"}
"""Routers, and what their labels were made of; the first one is the report's."""

RULES = (*ROUTERS, "random", "edges")

Rule = Callable[[Example], list[float]]
"""How fit for compression each tile of an example is, 0 to 1."""


def rule_of(name: str, models: Mapping[str, CascadeVLForConditionalGeneration], seed: int) -> Rule:
    """How a rule scores the tiles of an example.

    Args:
        name: One of `RULES`.
        models: The model of each of `ROUTERS`.
        seed: Of chance.
    """
    if name in models:
        return lambda example: probabilities(models[name], example)
    if name == "random":
        return lambda example: drawn(example, seed)
    return lambda example: [1 - edge_density(tile) for tile in example.tiles]


@torch.inference_mode()
def probabilities(model: CascadeVLForConditionalGeneration, example: Example) -> list[float]:
    """What the router thinks of compressing each tile."""
    found = model.encode_images(normalise(example.tiles)).compress
    assert found is not None, "the model has a router"
    values: list[float] = found.float().tolist()
    return values


def drawn(example: Example, seed: int) -> list[float]:
    """Numbers that depend on a picture, the places of its tiles and a seed alone.

    Tiles that look alike get different ones: chance knows nothing of plain paper.
    """
    generator = np.random.default_rng([zlib.crc32(example.tiles.tobytes()), seed])
    values: list[float] = generator.random(example.num_tiles).tolist()
    return values


def edge_density(tile: np.ndarray) -> float:
    """Share of pixels at which the grey level changes by more than a tenth of its range."""
    grey = tile.mean(-1)
    change = np.abs(np.diff(grey, axis=0))[:, :-1] + np.abs(np.diff(grey, axis=1))[:-1]
    return float((change > 25.5).mean())
