"""A picture as the model gets it, drawn for people: grid, tiles, thumbnail, tokens, positions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image
from jaxtyping import UInt8
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure

from cascadevl.data.image import open_image
from cascadevl.data.tiling import TilingConfig, choose_grid, tile_image
from cascadevl.errors import ConfigError
from cascadevl.sequence import expand
from cascadevl.types import NO_PARENT, ImageRef

TOKEN_PX = 28
"""Side of the square that one visual token stands for: 2 x 2 patches of 14 px."""

WIDTH_IN = 13.0
"""Width of the drawing in inches, at 100 px an inch."""

_START, _SLOT, _END = 0, 1, 2
_TILE_COLOUR, _THUMBNAIL_COLOUR = "#1f6feb", "#bf5700"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ShownTile:
    """One tile and its place in the prompt.

    Attributes:
        name: ``tile 3`` or ``thumbnail``.
        pixels: The tile.
        num_tokens: Visual tokens it becomes.
        first_position: Position of its first visual token, where ``<img>`` stands at 0.
        last_position: Position of its last visual token.
    """

    name: str
    pixels: UInt8[np.ndarray, "px px 3"]
    num_tokens: int
    first_position: float
    last_position: float

    @property
    def positions(self) -> str:
        """Its range of positions in words."""
        return f"{self.first_position:g} to {self.last_position:g}"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PictureLayout:
    """Everything that is shown of one picture.

    Attributes:
        file: Where it came from.
        picture: The whole picture.
        columns: Columns of the grid.
        rows: Rows of the grid.
        tiles: Tiles in the model's order, the thumbnail last.
        increment: Position step of a visual token.
        length: By how much ``<img>`` to ``</img>`` moves the position forward.
    """

    file: Path
    picture: PIL.Image.Image
    columns: int
    rows: int
    tiles: tuple[ShownTile, ...]
    increment: float
    length: float

    @property
    def summary(self) -> str:
        """The layout in one line."""
        num_tokens = sum(tile.num_tokens for tile in self.tiles)
        extra = " + thumbnail" if self.tiles[-1].name == "thumbnail" else ""
        return (
            f"{self.file.name}: {self.picture.width} x {self.picture.height} px, "
            f"{self.columns} x {self.rows} tiles{extra}, {num_tokens} visual tokens, "
            f"{self.length:g} positions at increment {self.increment:g}"
        )


def lay_out(
    file: Path, tiling: TilingConfig, *, tokens_per_tile: int | None = None, increment: float = 1.0
) -> PictureLayout:
    """Tile a picture and place its tokens.

    Args:
        file: The picture.
        tiling: Tile size and limits.
        tokens_per_tile: Visual tokens of a tile; None for one a square of 28 px, as released.
        increment: Position step of a visual token.

    Raises:
        DataError: If the picture cannot be read.
        ConfigError: If the tile size does not say how many tokens a tile has.
    """
    num_tokens = _tokens_of(tiling.tile_px) if tokens_per_tile is None else tokens_per_tile
    picture = open_image(ImageRef(file), source=str(file))
    columns, rows = choose_grid(picture.width, picture.height, tiling)
    pixels = tile_image(picture, tiling)
    placed = expand(
        np.array([_START, _SLOT, _END]),
        np.zeros(3, dtype=np.bool_),
        np.zeros(3, dtype=np.int64),
        (NO_PARENT,),
        image_token_id=_SLOT,
        tokens_per_image=[num_tokens * len(pixels)],
        increments=[increment],
        source=str(file),
    )
    positions = placed.position_ids[placed.is_visual].reshape(len(pixels), num_tokens)
    tiles = tuple(
        ShownTile(
            name="thumbnail" if index == columns * rows else f"tile {index + 1}",
            pixels=pixels[index],
            num_tokens=num_tokens,
            first_position=float(positions[index, 0]),
            last_position=float(positions[index, -1]),
        )
        for index in range(len(pixels))
    )
    return PictureLayout(
        file=file,
        picture=picture,
        columns=columns,
        rows=rows,
        tiles=tiles,
        increment=increment,
        length=float(placed.position_ids[-1]),
    )


def draw(layout: PictureLayout, out: Path) -> None:
    """Draw a layout: the picture with its grid on the left, what the model sees on the right.

    Args:
        layout: What to draw.
        out: PNG file to write; its folder is made where it is missing.
    """
    figure = Figure(figsize=(WIDTH_IN, _height_in(layout)), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(layout.summary, fontsize=12)
    panels = figure.subfigures(1, 2, width_ratios=[1.0, 1.4])
    assert isinstance(panels, np.ndarray)
    left, right = panels
    _draw_picture(left.subplots(), layout)
    _draw_tiles(right, layout)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, format="png")


def _tokens_of(tile_px: int) -> int:
    if tile_px % TOKEN_PX:
        raise ConfigError(
            f"a tile of {tile_px} px is no whole number of {TOKEN_PX} px squares, one a visual "
            f"token; use a multiple of {TOKEN_PX}, or give tokens_per_tile"
        )
    return (tile_px // TOKEN_PX) ** 2


def _height_in(layout: PictureLayout) -> float:
    """A height at which neither the picture nor the tiles leave much empty."""
    width, height = layout.picture.size
    picture = WIDTH_IN / 2.4 * height / width
    tile = WIDTH_IN * 1.4 / 2.4 / (layout.columns + 1)
    return min(max(picture, layout.rows * (tile + 0.6), 3.0) + 0.8, 12.0)


def _draw_picture(axes: Axes, layout: PictureLayout) -> None:
    width, height = layout.picture.size
    axes.imshow(layout.picture)
    for column in range(1, layout.columns):
        axes.axvline(column * width / layout.columns - 0.5, color=_TILE_COLOUR, linewidth=1.5)
    for row in range(1, layout.rows):
        axes.axhline(row * height / layout.rows - 0.5, color=_TILE_COLOUR, linewidth=1.5)
    for index in range(layout.columns * layout.rows):
        row, column = divmod(index, layout.columns)
        axes.text(
            (column + 0.5) * width / layout.columns,
            (row + 0.5) * height / layout.rows,
            str(index + 1),
            ha="center",
            va="center",
            color="white",
            bbox={"boxstyle": "circle", "facecolor": _TILE_COLOUR, "edgecolor": "none"},
        )
    axes.set_title("the picture and its grid", fontsize=10)
    axes.set_xticks([])
    axes.set_yticks([])


def _draw_tiles(figure: SubFigure, layout: PictureLayout) -> None:
    """Tiles in their grid; the thumbnail in a column of its own."""
    has_thumbnail = layout.tiles[-1].name == "thumbnail"
    columns = layout.columns + int(has_thumbnail)
    cells = figure.subplots(layout.rows, columns, squeeze=False)
    for axes in cells.flat:
        axes.set_axis_off()
    for index, tile in enumerate(layout.tiles):
        is_thumbnail = tile.name == "thumbnail"
        row, column = (0, layout.columns) if is_thumbnail else divmod(index, layout.columns)
        axes = cells[row, column]
        axes.set_axis_on()
        axes.set_xticks([])
        axes.set_yticks([])
        axes.imshow(tile.pixels)
        for spine in axes.spines.values():
            spine.set_color(_THUMBNAIL_COLOUR if is_thumbnail else _TILE_COLOUR)
            spine.set_linewidth(2.0)
        axes.set_title(
            f"{tile.name}\n{tile.num_tokens} tokens\n{tile.positions}",
            fontsize=8 if layout.columns <= 4 else 6,
        )
