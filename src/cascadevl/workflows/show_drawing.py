"""The drawing of a picture as the model gets it: one page with grid, tiles and positions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke

from cascadevl.errors import ConfigError
from cascadevl.workflows.show import PictureLayout, ShownTile, number

WIDTH_IN = 13.0
"""Width of the drawing in inches."""

DPI = 130
"""Pixels an inch of the drawing."""

MAX_NAME = 80
"""Longest file name that fits into the heading."""

_TILE_COLOUR, _THUMBNAIL_COLOUR = "#1f6feb", "#bf5700"
_COMPRESSED_COLOUR = "#d97706"
_VEIL = 0.5  # how much it covers a compressed tile

# The page in inches, from the top: heading, picture and tiles, the row of positions.
_MARGIN, _GAP, _HEADING, _LABEL, _RULER = 0.3, 0.12, 0.95, 0.42, 1.0
_BODY = 9.0  # at most, for picture and tiles
_PICTURE_SHARE = 0.4


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
        tile, size = layout.tiles[index], (width / layout.columns, height / layout.rows)
        if tile.is_compressed:
            corner = (column * size[0], row * size[1])
            axes.add_patch(Rectangle(corner, *size, color=_COMPRESSED_COLOUR, alpha=_VEIL))
        is_routed = tile.probability is not None
        axes.text(
            (column + 0.5) * size[0],
            (row + 0.5) * size[1],
            f"{index + 1}: {_percent(tile)}" if is_routed else str(index + 1),
            ha="center",
            va="center",
            color="white",
            fontsize=9,
            bbox={
                "boxstyle": "round" if is_routed else "circle",
                "facecolor": _colour(tile),
                "edgecolor": "white",
            },
        )
    routed = layout.tiles[0].probability is not None
    title = "picture and router: orange tiles are compressed" if routed else "picture and grid"
    axes.set_title(title, fontsize=10, loc="left")
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
    name = tile.name
    if tile.probability is not None:
        name += f": {_percent(tile)}, {tile.num_tokens}{' tokens' if is_wide else ''}"
    axes.set_title(f"{name}\n{positions}", fontsize=8.5 if is_wide else 6.5, loc="left")


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


def _percent(tile: ShownTile) -> str:
    """The router's probability of losing nothing when the tile is compressed."""
    assert tile.probability is not None, "a router was asked"
    return f"{100 * tile.probability:.0f} %"


def _colour(tile: ShownTile) -> str:
    if tile.probability is not None:
        return _COMPRESSED_COLOUR if tile.is_compressed else _TILE_COLOUR
    return _THUMBNAIL_COLOUR if tile.is_thumbnail else _TILE_COLOUR
