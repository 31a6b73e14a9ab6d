"""From what the router thinks of tiles to how many visual tokens each gets.

A budget is a wish of one request: how many of its tiles keep all their visual tokens. It is decided
for the tiles of one request together and never for those of a batch, so that a request is answered
beside others as it is alone. Rules of the released code and our own: docs/decisions/0025.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cascadevl.errors import RequestError
from cascadevl.model.configuration import CascadeVLConfig

NEVER = 2.0
"""An absolute threshold that no probability reaches."""


@dataclass(frozen=True, slots=True)
class KeepShare:
    """Keep all visual tokens of a share of the tiles: those least probable to do without.

    Attributes:
        share: Of the tiles of a request; rounded up to whole tiles.
    """

    share: float

    def __post_init__(self) -> None:
        """Check the range.

        Raises:
            RequestError: If it is no share.
        """
        if not 0 <= self.share <= 1:
            raise RequestError(f"the share of tiles to keep is {self.share}; it must lie in 0 to 1")

    def num_kept(self, num_tiles: int) -> int:
        """How many of so many tiles are kept."""
        return math.ceil(round(self.share * num_tiles, 6))


@dataclass(frozen=True, slots=True, kw_only=True)
class Thresholds:
    """Compress what the router calls probable enough.

    Attributes:
        absolute: A tile is compressed only if its probability is at least this.
        relative: And, if given, above this quantile of the probabilities of all tiles of the
            request, interpolated linearly, as in released code. A lone tile never is.
    """

    absolute: float
    relative: float | None = None

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            RequestError: If one means nothing.
        """
        if not self.absolute >= 0 or not 0 <= (self.relative or 0.0) <= 1:
            raise RequestError(
                f"thresholds are {self.absolute} (absolute) and {self.relative} (relative); the "
                f"first must be at least 0, the second a quantile, 0 to 1"
            )


VisualBudget: TypeAlias = Literal["full", "compressed"] | KeepShare | Thresholds
"""All tiles full, all tiles compressed, or a rule that the router is asked for."""


def budget_for(config: CascadeVLConfig, asked: VisualBudget | None) -> VisualBudget:
    """The budget of a request.

    Args:
        config: The model's; its thresholds hold where nothing is asked for.
        asked: What a request asks for; None for the model's own.

    Raises:
        RequestError: If the model cannot compress tiles and is asked to.
    """
    if not config.flash_mode:
        if asked not in (None, "full"):
            raise RequestError(
                "a visual budget is given, but this model has no router and no compressed tiles; "
                "take a Flash model (InternVL3_5-...-Flash), or leave the budget out"
            )
        return "full"
    if asked is not None:
        return asked
    if config.flash_absolute_threshold is None:
        return "full"
    relative = config.flash_relative_threshold
    return Thresholds(
        absolute=float(config.flash_absolute_threshold),
        relative=None if relative is None else float(relative),
    )


def settled(budget: VisualBudget, num_tiles: int) -> Literal["full", "compressed"] | None:
    """What becomes of all tiles, where the router need not be asked; None where it must.

    Args:
        budget: Of a request.
        num_tiles: Its tiles.
    """
    if isinstance(budget, str):
        return budget
    if isinstance(budget, KeepShare):
        kept = budget.num_kept(num_tiles)
        return "full" if kept == num_tiles else "compressed" if kept == 0 else None
    return None if num_tiles else "full"


def most_tokens(config: CascadeVLConfig, num_tiles: int, budget: VisualBudget) -> tuple[int, ...]:
    """Visual tokens of each tile, as many as the router may leave; before it is asked.

    Their sum is exact unless thresholds decide. Which tiles get them is not known yet.

    Args:
        config: The model's.
        num_tiles: Tiles of a request.
        budget: Its budget.
    """
    kept = num_tiles
    if isinstance(budget, KeepShare):
        kept = budget.num_kept(num_tiles)
    elif budget == "compressed":
        kept = 0
    return (config.tokens_per_tile,) * kept + (config.compressed_tokens,) * (num_tiles - kept)


def compressed_tiles(
    probability: Float[Tensor, " tiles"], budget: VisualBudget
) -> Bool[Tensor, " tiles"]:
    """Which tiles of one request are compressed.

    Args:
        probability: The router's, of compressing each tile, in the type it was computed in.
        budget: The rule. Of equally probable tiles a share keeps the first ones.
    """
    if budget == "full" or not len(probability):
        return torch.zeros_like(probability, dtype=torch.bool)
    result = torch.ones_like(probability, dtype=torch.bool)
    if isinstance(budget, KeepShare):
        kept = probability.argsort(stable=True)[: budget.num_kept(len(probability))]
        result[kept] = False
    elif isinstance(budget, Thresholds):
        result = probability >= budget.absolute
        if budget.relative is not None:
            # As released: the quantile of float32 values, the comparison in the model's own type.
            quantile = torch.quantile(probability.float(), budget.relative)
            result = result & (probability > quantile)
    return result


def tokens_of(config: CascadeVLConfig, compressed: Bool[Tensor, " tiles"]) -> tuple[int, ...]:
    """Visual tokens of each tile.

    Args:
        config: The model's.
        compressed: Which tiles are compressed.
    """
    sizes = (config.tokens_per_tile, config.compressed_tokens)
    return tuple(sizes[flag] for flag in compressed.int().tolist())


def calibrated(probabilities: Sequence[float], share: float) -> Thresholds:
    """The absolute threshold that keeps a share of many tiles full: a budget for single tiles.

    Every tile is then routed by itself, whatever is shown beside it (docs/decisions/0025).

    Args:
        probabilities: The router's, of tiles like those to come.
        share: Of them to be kept full; the nearest that equal probabilities allow is taken.

    Raises:
        RequestError: If there are no tiles, or it is no share.
    """
    ordered = sorted(probabilities)
    number = len(ordered)
    if not number:
        raise RequestError(
            "no tiles to calibrate a threshold with; give the router's probabilities"
        )
    wanted = KeepShare(share).share * number
    borders = [0, *(n for n in range(1, number) if ordered[n] > ordered[n - 1]), number]
    kept = min(borders, key=lambda border: (abs(border - wanted), -border))
    if kept == 0:
        return Thresholds(absolute=0.0)
    if kept == number:
        return Thresholds(absolute=NEVER)
    return Thresholds(absolute=(ordered[kept - 1] + ordered[kept]) / 2)


def parse_budget(text: str) -> VisualBudget:
    """A budget as people write it.

    Args:
        text: ``full``, ``compressed``, a share of tiles to keep (``0.5`` or ``50%``), or
            ``threshold=0.4`` and, behind a comma, ``quantile=0.5``.

    Raises:
        RequestError: If it is none of these, or a number means nothing.
    """
    if text == "full":
        return "full"
    if text == "compressed":
        return "compressed"
    share: float | None = None
    values: dict[str, float] = {}
    with suppress(ValueError):
        if "=" in text:
            pairs = (part.partition("=") for part in text.split(","))
            values = {name: float(value) for name, _, value in pairs}
        else:
            share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    if share is not None:
        return KeepShare(share)
    if "threshold" in values and values.keys() <= {"threshold", "quantile"}:
        return Thresholds(absolute=values["threshold"], relative=values.get("quantile"))
    raise RequestError(
        f"{text!r} is no visual budget; give full, compressed, the share of tiles to keep (0.5 or "
        f"50%), threshold=0.4, or threshold=0.4,quantile=0.5"
    )
