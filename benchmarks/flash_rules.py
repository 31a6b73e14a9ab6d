"""Rules that say which tiles can do with fewer visual tokens: the router, and what needs no model.

Every rule gives a tile a number from 0 to 1, the larger the fitter for compression, so that a
threshold can be calibrated for all of them alike (`cascadevl.model.routing.calibrated`).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from functools import cache

import numpy as np
import torch

from cascadevl.data.tiling import normalise
from cascadevl.model.modeling import CascadeVLForConditionalGeneration
from cascadevl.types import Example

RULES = ("router", "random", "edges", "entropy")

Rule = Callable[[Example], list[float]]
"""How fit for compression each tile of an example is, 0 to 1."""


def rule_of(name: str, model: CascadeVLForConditionalGeneration, seed: int) -> Rule:
    """How a rule scores the tiles of an example."""
    if name == "router":
        return cache_by_tiles(lambda example: probabilities(model, example))
    if name == "random":
        return lambda example: [drawn(tile, seed) for tile in example.tiles]
    measure = {"edges": edge_density, "entropy": entropy}[name]
    return cache_by_tiles(lambda example: [1 - measure(tile) for tile in example.tiles])


def cache_by_tiles(rule: Rule) -> Rule:
    """The same rule, asked once for each example object."""
    held = cache(lambda number: rule(known[number]))
    known: dict[int, Example] = {}

    def asked(example: Example) -> list[float]:
        known[id(example)] = example  # held, so that no other object gets its number
        return held(id(example))

    return asked


@torch.inference_mode()
def probabilities(model: CascadeVLForConditionalGeneration, example: Example) -> list[float]:
    """What the router thinks of compressing each tile."""
    found = model.encode_images(normalise(example.tiles)).compress
    assert found is not None, "the model has a router"
    values: list[float] = found.float().tolist()
    return values


def drawn(tile: np.ndarray, seed: int) -> float:
    """A number that depends on a tile's pixels and a seed alone."""
    return zlib.crc32(tile.tobytes(), seed) / 2**32


def edge_density(tile: np.ndarray) -> float:
    """Share of pixels at which the grey level changes by more than a tenth of its range."""
    grey = tile.mean(-1)
    change = np.abs(np.diff(grey, axis=0))[:, :-1] + np.abs(np.diff(grey, axis=1))[:-1]
    return float((change > 25.5).mean())


def entropy(tile: np.ndarray) -> float:
    """Entropy of the grey levels, as a share of its largest value."""
    counts = np.bincount(tile.mean(-1).round().astype(np.int64).ravel(), minlength=256)
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log2(shares)).sum() / 8)
