"""What a router thinks of the tiles of a picture, and the picture painted with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
import torch
from jaxtyping import UInt8

from cascadevl.data.processor import CascadeVLProcessor
from cascadevl.data.tiling import choose_grid, normalise, tile_image
from cascadevl.errors import RequestError
from cascadevl.eval.runner import Answered, Score
from cascadevl.model.modeling import CascadeVLForConditionalGeneration
from cascadevl.model.routing import VisualBudget, budget_for, compressed_tiles, tokens_of

KEPT_COLOUR = (31, 111, 235)
COMPRESSED_COLOUR = (217, 119, 6)
"""Full tiles are blue, compressed ones orange; the report's legend says so too."""

_VEIL = 110
"""Of 255: how much a compressed tile's colour covers the picture."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TileRoutes:
    """What becomes of the tiles of a picture.

    Attributes:
        probabilities: The router's, of compressing each tile.
        tokens_per_tile: Visual tokens of each tile.
        full_tokens: Visual tokens of a full one.
    """

    probabilities: tuple[float, ...]
    tokens_per_tile: tuple[int, ...]
    full_tokens: int

    @property
    def compressed(self) -> tuple[bool, ...]:
        """Which tiles are compressed."""
        return tuple(number < self.full_tokens for number in self.tokens_per_tile)

    @property
    def saved_tokens(self) -> int:
        """Visual tokens that compression saves."""
        return self.full_tokens * len(self.tokens_per_tile) - sum(self.tokens_per_tile)

    @property
    def words(self) -> str:
        """The same in a line."""
        whole = self.full_tokens * len(self.tokens_per_tile)
        return (
            f"{sum(self.compressed)} of {len(self.compressed)} tiles compressed, "
            f"{self.saved_tokens:,} of {whole:,} visual tokens saved"
        )


@torch.no_grad()
def route_tiles(
    model: CascadeVLForConditionalGeneration,
    tiles: UInt8[np.ndarray, "tiles px px 3"],
    budget: VisualBudget | None = None,
) -> TileRoutes:
    """Ask a model's router about the tiles of a request.

    Args:
        model: A Flash model.
        tiles: The tiles, the thumbnail included.
        budget: Which of them are compressed; the model's own thresholds if None.

    Raises:
        RequestError: If the model has no router.
    """
    if model.model.router is None:
        raise RequestError(
            "this model has no router; take a Flash model (InternVL3_5-...-Flash), or train one: "
            "cascadevl train router"
        )
    rule = budget_for(model.config, budget)
    pixels = normalise(tiles, model.device)
    probability = model.model.router(model.model.patch_features(pixels))
    return TileRoutes(
        probabilities=tuple(probability.float().tolist()),
        tokens_per_tile=tokens_of(model.config, compressed_tiles(probability, rule)),
        full_tokens=model.config.tokens_per_tile,
    )


def painted(
    picture: PIL.Image.Image, columns: int, rows: int, routes: TileRoutes
) -> PIL.Image.Image:
    """A copy of a picture with its grid: compressed tiles under a veil, each with its probability.

    The thumbnail, which shows the whole picture, has its own line of text below.

    Args:
        picture: The picture, at the size in which it is to be shown.
        columns: Columns of its grid.
        rows: Rows.
        routes: Of its tiles, row by row, the thumbnail last.
    """
    grid = columns * rows
    line = max(14, picture.width // 16)
    has_thumbnail = len(routes.tokens_per_tile) > grid
    whole = PIL.Image.new("RGB", (picture.width, picture.height + has_thumbnail * (line + 6)))
    whole.paste((255, 255, 255), (0, 0, *whole.size))
    veil = PIL.Image.new("RGBA", picture.size)
    canvas = PIL.ImageDraw.Draw(veil)
    font = PIL.ImageFont.load_default(size=float(line))
    for tile in range(grid):
        row, column = divmod(tile, columns)
        corners = (
            column * picture.width // columns,
            row * picture.height // rows,
            (column + 1) * picture.width // columns - 1,
            (row + 1) * picture.height // rows - 1,
        )
        colour = _colour(routes.compressed[tile])
        fill = (*colour, _VEIL) if routes.compressed[tile] else None
        canvas.rectangle(corners, fill=fill, outline=(*colour, 255), width=2)
        words = f"{100 * routes.probabilities[tile]:.0f}%"
        place = (corners[0] + 5, corners[1] + 3)
        canvas.rectangle(canvas.textbbox(place, words, font=font), fill=(255, 255, 255, 200))
        canvas.text(place, words, fill=(*colour, 255), font=font)
    whole.paste(PIL.Image.alpha_composite(picture.convert("RGBA"), veil).convert("RGB"), (0, 0))
    if has_thumbnail:
        words = f"thumbnail {100 * routes.probabilities[grid]:.0f}%"
        PIL.ImageDraw.Draw(whole).text(
            (5, picture.height + 2), words, fill=_colour(routes.compressed[grid]), font=font
        )
    return whole


def _colour(is_compressed: bool) -> tuple[int, int, int]:
    return COMPRESSED_COLOUR if is_compressed else KEPT_COLOUR


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RoutedAnswer:
    """An answered question with what became of the tiles of its picture.

    Attributes:
        row: Of the suite.
        answered: Question and answer.
        columns: Columns of the picture's grid.
        rows: Rows.
        routes: What became of its tiles.
    """

    row: str
    answered: Answered
    columns: int
    rows: int
    routes: TileRoutes


def routed_answers(
    model: CascadeVLForConditionalGeneration,
    processor: CascadeVLProcessor,
    scores: Sequence[Score],
    *,
    per_row: int = 3,
) -> list[RoutedAnswer]:
    """The first questions about pictures of every row of a suite, routed as the model does.

    Args:
        model: A Flash model, which has answered them by its own thresholds.
        processor: Cuts pictures as the model is given them.
        scores: Of the suite.
        per_row: Questions of each row.

    Raises:
        RequestError: If the model has no router.
    """
    found: list[RoutedAnswer] = []
    for score in scores:
        shown = [each for each in score.answered if each.asked.scene.image is not None]
        for answered in shown[:per_row]:
            picture = answered.asked.scene.image
            assert picture is not None, "chosen for it"
            columns, rows = choose_grid(picture.width, picture.height, processor.tiling)
            tiles = tile_image(picture, processor.tiling)
            found.append(
                RoutedAnswer(
                    row=score.row,
                    answered=answered,
                    columns=columns,
                    rows=rows,
                    routes=route_tiles(model, tiles),
                )
            )
    return found
