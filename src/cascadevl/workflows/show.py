"""A picture as the model gets it, drawn for people: grid, tiles, thumbnail, tokens, positions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from jaxtyping import UInt8
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.patheffects import withStroke

from cascadevl.data.image import open_image
from cascadevl.data.tiling import TilingConfig, choose_grid, tile_image
from cascadevl.errors import ConfigError
from cascadevl.sequence import expand
from cascadevl.types import NO_PARENT, ImageRef

TOKEN_PX = 28
"""Side of the square that one visual token stands for: 2 x 2 patches of 14 px."""

WIDTH_IN = 13.0
"""Width of the drawing in inches."""

DPI = 130
"""Pixels an inch of the drawing."""

MAX_NAME = 80
"""Longest file name that fits into the heading."""

_START, _SLOT, _END = 0, 1, 2
_TILE_COLOUR, _THUMBNAIL_COLOUR = "#1f6feb", "#bf5700"

# The page in inches, from the top: heading, picture and tiles, the row of positions.
_MARGIN, _GAP, _HEADING, _LABEL, _RULER = 0.3, 0.12, 0.95, 0.42, 1.0
_BODY = 9.0  # at most, for picture and tiles
_PICTURE_SHARE = 0.4


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
    def facts(self) -> str:
        """Its sizes in one line."""
        num_tokens = sum(tile.num_tokens for tile in self.tiles)
        grid = self.columns * self.rows
        tiles = "1 tile" if grid == 1 else f"{self.columns} x {self.rows} = {grid} tiles"
        extra = " + thumbnail" if self.tiles[-1].is_thumbnail else ""
        return (
            f"{self.picture.width} x {self.picture.height} px, {tiles}{extra}, "
            f"{num_tokens:,} visual tokens ({self.tiles[0].num_tokens} a tile), "
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
    """Draw a layout: the picture with its grid, the tiles, and the row of their positions.

    Args:
        layout: What to draw.
        out: PNG file to write; its folder is made where it is missing.

    Raises:
        ConfigError: If that would overwrite the picture.
    """
    if out.exists() and out.samefile(layout.file):
        raise ConfigError(f"the drawing would overwrite the picture {out}; give another --out")
    page = _Page.of(layout)
    figure = Figure(figsize=(WIDTH_IN, page.height), dpi=DPI)
    FigureCanvasAgg(figure)
    heading: dict[str, Any] = {"x": _MARGIN / WIDTH_IN, "va": "top", "parse_math": False}
    top = 1 - 0.2 / page.height
    figure.text(y=top, s=_printable(layout.file.name), fontsize=13, weight="bold", **heading)
    figure.text(y=top - 0.3 / page.height, s=layout.facts, fontsize=10.5, **heading)
    _draw_picture(figure.add_axes(page.picture), layout)
    for index, tile in enumerate(layout.tiles):
        _draw_tile(figure.add_axes(page.tile(index, layout)), tile)
    _draw_positions(figure.add_axes(page.ruler), layout)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, format="png")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Page:
    """Where everything stands, in inches from the lower left corner.

    Attributes:
        height: Of the page.
        left: Where the tiles begin.
        side: Of a tile.
        picture_size: Width and height of the picture.
    """

    height: float
    left: float
    side: float
    picture_size: tuple[float, float]

    @classmethod
    def of(cls, layout: PictureLayout) -> _Page:
        room = WIDTH_IN - 2 * _MARGIN
        width = _PICTURE_SHARE * room
        left = 2 * _MARGIN + width
        columns = layout.columns + int(layout.tiles[-1].is_thumbnail)
        widest = (WIDTH_IN - _MARGIN - left + _GAP) / columns - _GAP
        side = min(widest, max(_BODY / layout.rows - _LABEL, 0.5), 3.0)
        tiles = layout.rows * (side + _LABEL)
        # A tall picture is made as high as its tiles, a wide one as wide as its column.
        scale = min(width / layout.picture.width, max(tiles - _LABEL, 3.0) / layout.picture.height)
        size = (layout.picture.width * scale, layout.picture.height * scale)
        body = max(tiles, size[1] + _LABEL)
        left = 2 * _MARGIN + max(size[0], 2.0)
        return cls(height=_HEADING + body + _RULER, left=left, side=side, picture_size=size)

    @property
    def picture(self) -> tuple[float, float, float, float]:
        width, height = self.picture_size
        return self._box(_MARGIN, self.height - _HEADING - _LABEL - height, width, height)

    @property
    def ruler(self) -> tuple[float, float, float, float]:
        return self._box(_MARGIN, 0.42, WIDTH_IN - 2 * _MARGIN, 0.22)

    def tile(self, index: int, layout: PictureLayout) -> tuple[float, float, float, float]:
        """A tile stands in its place of the grid; the thumbnail has a column of its own."""
        row, column = divmod(index, layout.columns)
        if layout.tiles[index].is_thumbnail:
            row, column = 0, layout.columns
        top = self.height - _HEADING - row * (self.side + _LABEL) - _LABEL
        start = self.left + column * (self.side + _GAP)
        return self._box(start, top - self.side, self.side, self.side)

    def _box(
        self, left: float, bottom: float, width: float, height: float
    ) -> tuple[float, float, float, float]:
        """The same in shares of the page, as matplotlib wants it."""
        return left / WIDTH_IN, bottom / self.height, width / WIDTH_IN, height / self.height


def _tokens_of(tile_px: int) -> int:
    if tile_px % TOKEN_PX:
        raise ConfigError(
            f"a tile of {tile_px} px is no whole number of {TOKEN_PX} px squares, one a visual "
            f"token; use a multiple of {TOKEN_PX}, or give tokens_per_tile"
        )
    return (tile_px // TOKEN_PX) ** 2


def _printable(name: str) -> str:
    """A file name as the font can write it, not longer than the page is wide."""
    font = get_font(findfont(FontProperties()))
    shown = "".join(sign if font.get_char_index(ord(sign)) else "?" for sign in name)
    half = MAX_NAME // 2
    return shown if len(shown) <= MAX_NAME else f"{shown[:half]} ... {shown[-half:]}"


def _draw_picture(axes: Axes, layout: PictureLayout) -> None:
    width, height = layout.picture.size
    axes.imshow(layout.picture, aspect="auto", extent=(0, width, height, 0))
    # A light edge keeps the lines visible on dark and on blue pictures.
    edge = [withStroke(linewidth=3.0, foreground="white")]
    line: dict[str, Any] = {"color": _TILE_COLOUR, "linewidth": 1.3, "path_effects": edge}
    for column in range(1, layout.columns):
        axes.axvline(column * width / layout.columns, **line)
    for row in range(1, layout.rows):
        axes.axhline(row * height / layout.rows, **line)
    for index in range(layout.columns * layout.rows):
        row, column = divmod(index, layout.columns)
        axes.text(
            (column + 0.5) * width / layout.columns,
            (row + 0.5) * height / layout.rows,
            str(index + 1),
            ha="center",
            va="center",
            color="white",
            fontsize=9,
            bbox={"boxstyle": "circle", "facecolor": _TILE_COLOUR, "edgecolor": "white"},
        )
    axes.set_title("picture and grid", fontsize=10, loc="left")
    axes.set_xticks([])
    axes.set_yticks([])


def _draw_tile(axes: Axes, tile: ShownTile) -> None:
    axes.imshow(tile.pixels)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color(_colour(tile))
        spine.set_linewidth(2.0)
    is_wide = axes.get_position().width * WIDTH_IN > 1.5
    positions = f"positions {tile.positions}" if is_wide else tile.positions
    axes.set_title(f"{tile.name}\n{positions}", fontsize=8.5 if is_wide else 6.5, loc="left")


def _draw_positions(axes: Axes, layout: PictureLayout) -> None:
    """One bar from ``<img>`` to ``</img>``, a stretch for every tile."""
    step = layout.increment
    for index, tile in enumerate(layout.tiles, start=1):
        start, end = tile.first_position - step, tile.last_position
        bar: dict[str, Any] = {"color": _colour(tile), "edgecolor": "white", "alpha": 0.85}
        axes.barh(0, end - start, left=start, height=1, **bar)
        name = "thumbnail" if tile.is_thumbnail and len(layout.tiles) < 10 else str(index)
        label = "T" if tile.is_thumbnail and name != "thumbnail" else name
        axes.text((start + end) / 2, 0, label, ha="center", va="center", color="white", fontsize=8)
    axes.set_xlim(0, layout.length)
    axes.set_ylim(-0.5, 0.5)
    axes.set_yticks([])
    ends = [0.0, *(tile.last_position for tile in layout.tiles)]
    axes.set_xticks(ends, [number(end) for end in ends], fontsize=8)
    axes.set_title(
        f"positions: <img> at 0, </img> at {number(layout.length)}", fontsize=10, loc="left"
    )
    for side in ("top", "left", "right", "bottom"):
        axes.spines[side].set_visible(False)


def _colour(tile: ShownTile) -> str:
    return _THUMBNAIL_COLOUR if tile.is_thumbnail else _TILE_COLOUR
