"""A picture as the model gets it: grid, tiles, thumbnail, tokens, positions, and routes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import PIL.Image
from jaxtyping import UInt8

from cascadevl.data.image import open_image
from cascadevl.data.tiling import TilingConfig, choose_grid, tile_image
from cascadevl.errors import ConfigError
from cascadevl.sequence import expand
from cascadevl.types import NO_PARENT, ImageRef

TOKEN_PX = 28
"""Side of the square that one visual token stands for: 2 x 2 patches of 14 px."""

_START, _SLOT, _END = 0, 1, 2


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ShownTile:
    """One tile and its place in the prompt.

    Attributes:
        name: ``tile 3`` or ``thumbnail``.
        pixels: The tile.
        num_tokens: Visual tokens it becomes.
        first_position: Position of its first visual token, where ``<img>`` stands at 0.
        last_position: Position of its last visual token.
        probability: The router's, of losing nothing when it is compressed; None without a router.
        is_compressed: Whether it is.
    """

    name: str
    pixels: UInt8[np.ndarray, "px px 3"]
    num_tokens: int
    first_position: float
    last_position: float
    probability: float | None = None
    is_compressed: bool = False

    @property
    def positions(self) -> str:
        """Its range of positions in words."""
        return f"{number(self.first_position)} to {number(self.last_position)}"

    @property
    def is_thumbnail(self) -> bool:
        """Whether it is the whole picture, made small."""
        return self.name == "thumbnail"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PictureLayout:
    """Everything that is shown of one picture.

    Attributes:
        file: Where it came from.
        picture: The whole picture.
        columns: Columns of the grid.
        rows: Rows of the grid.
        tiles: Tiles in the model's order, the thumbnail last.
        full_tokens: Visual tokens of a tile that is not compressed.
        increment: Position step of a visual token.
        length: By how much ``<img>`` to ``</img>`` moves the position forward.
    """

    file: Path
    picture: PIL.Image.Image
    columns: int
    rows: int
    tiles: tuple[ShownTile, ...]
    full_tokens: int
    increment: float
    length: float

    @property
    def facts(self) -> str:
        """Its sizes in one line."""
        num_tokens = sum(tile.num_tokens for tile in self.tiles)
        grid = self.columns * self.rows
        saved = self.full_tokens * len(self.tiles) - num_tokens
        each = f"{self.full_tokens} a tile" + (f", {saved:,} saved" if saved else "")
        tiles = "1 tile" if grid == 1 else f"{self.columns} x {self.rows} = {grid} tiles"
        extra = " + thumbnail" if self.tiles[-1].is_thumbnail else ""
        return (
            f"{self.picture.width} x {self.picture.height} px, {tiles}{extra}, "
            f"{num_tokens:,} visual tokens ({each}), "
            f"{number(self.length)} positions at increment {number(self.increment)}"
        )

    @property
    def summary(self) -> str:
        """The layout in one line."""
        return f"{self.file.name}: {self.facts}"


def number(value: float) -> str:
    """A position or increment, exact: increments are powers of two, so their sums are short.

    Args:
        value: The number.
    """
    return f"{value:.12g}"


Route: TypeAlias = Callable[
    [UInt8[np.ndarray, "tiles px px 3"]], tuple[Sequence[float], Sequence[int]]
]
"""From the tiles of a picture to the router's probabilities, and each tile's visual tokens."""


def lay_out(
    file: Path,
    tiling: TilingConfig,
    *,
    tokens_per_tile: int | None = None,
    increment: float = 1.0,
    route: Route | None = None,
) -> PictureLayout:
    """Tile a picture and place its tokens.

    Args:
        file: The picture.
        tiling: Tile size and limits.
        tokens_per_tile: Visual tokens of a full tile; None for one a square of 28 px, as released.
        increment: Position step of a visual token.
        route: Asks a router; None for full tiles.

    Raises:
        DataError: If the picture cannot be read.
        ConfigError: If the tile size does not say how many tokens a tile has.
    """
    full_tokens = _tokens_of(tiling.tile_px) if tokens_per_tile is None else tokens_per_tile
    picture = open_image(ImageRef(file), source=str(file))
    columns, rows = choose_grid(picture.width, picture.height, tiling)
    pixels = tile_image(picture, tiling)
    probabilities: Sequence[float | None] = [None] * len(pixels)
    counts: Sequence[int] = [full_tokens] * len(pixels)
    if route is not None:
        probabilities, counts = route(pixels)
    placed = expand(
        np.array([_START, _SLOT, _END]),
        np.zeros(3, dtype=np.bool_),
        np.zeros(3, dtype=np.int64),
        (NO_PARENT,),
        image_token_id=_SLOT,
        tokens_per_image=[sum(counts)],
        increments=[increment],
        source=str(file),
    )
    positions = placed.position_ids[placed.is_visual]
    ends = np.cumsum(counts)
    tiles = tuple(
        ShownTile(
            name="thumbnail" if index == columns * rows else f"tile {index + 1}",
            pixels=pixels[index],
            num_tokens=counts[index],
            first_position=float(positions[ends[index] - counts[index]]),
            last_position=float(positions[ends[index] - 1]),
            probability=probabilities[index],
            is_compressed=counts[index] < full_tokens,
        )
        for index in range(len(pixels))
    )
    return PictureLayout(
        file=file,
        picture=picture,
        columns=columns,
        rows=rows,
        tiles=tiles,
        full_tokens=full_tokens,
        increment=increment,
        length=float(placed.position_ids[-1]),
    )


def _tokens_of(tile_px: int) -> int:
    if tile_px % TOKEN_PX:
        raise ConfigError(
            f"a tile of {tile_px} px is no whole number of {TOKEN_PX} px squares, one a visual "
            f"token; use a multiple of {TOKEN_PX}, or give tokens_per_tile"
        )
    return (tile_px // TOKEN_PX) ** 2
