"""A picture with its tiles, painted by what the router made of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from cascadevl.data.image import open_image
from cascadevl.data.tiling import TilingConfig, choose_grid, limit_for
from cascadevl.types import ImageRef

FULL, COMPRESSED = (31, 111, 235), (191, 87, 0)
"""Colours of tiles with all their visual tokens, and of those with fewer."""

_SIDE_PX = 760  # of a painting, at most
_THUMBNAIL_PX = 150


@dataclass(frozen=True, slots=True)
class _Frame:
    """A tile within a painting."""

    box: tuple[int, int, int, int]
    number: str


def paint(
    files: Sequence[Path], tokens_per_tile: Sequence[int], abilities: Mapping[str, Any]
) -> list[tuple[PIL.Image.Image, str]]:
    """Paint the pictures of a conversation, each with a caption.

    Args:
        files: The pictures, in the order in which they were shown.
        tokens_per_tile: Visual tokens of each tile of all of them.
        abilities: Of the model, which say how pictures are cut.

    Raises:
        DataError: If a picture cannot be opened.
    """
    tiling = TilingConfig(
        tile_px=abilities["tile_px"],
        max_tiles=abilities["max_tiles"],
        thumbnail=abilities["thumbnail"],
    )
    if abilities["share_tiles"]:
        tiling = limit_for(len(files), tiling)
    paintings, done = [], 0
    for file in files:
        picture = open_image(ImageRef(file), source=file.name)
        columns, rows = choose_grid(picture.width, picture.height, tiling)
        num_tiles = columns * rows + int(tiling.thumbnail and columns * rows > 1)
        tokens = tokens_per_tile[done : done + num_tiles]
        done += num_tiles
        painting = _painted(picture, columns, rows, tokens, abilities["tokens_per_tile"])
        paintings.append((painting, _caption(file.name, columns, rows, tokens)))
    return paintings


def _painted(
    picture: PIL.Image.Image, columns: int, rows: int, tokens: Sequence[int], full: int
) -> PIL.Image.Image:
    scale = _SIDE_PX / max(picture.size)
    width, height = (max(round(side * scale), 60) for side in picture.size)
    has_thumbnail = len(tokens) > columns * rows
    canvas = PIL.Image.new(
        "RGB", (width + (_THUMBNAIL_PX + 16 if has_thumbnail else 0), height), "white"
    )
    canvas.paste(picture.resize((width, height)))
    frames = [
        _Frame(
            (
                column * width // columns,
                row * height // rows,
                (column + 1) * width // columns - 1,
                (row + 1) * height // rows - 1,
            ),
            str(row * columns + column + 1),
        )
        for row in range(rows)
        for column in range(columns)
    ]
    if has_thumbnail:
        left = width + 16
        side = min(_THUMBNAIL_PX, height)
        canvas.paste(picture.resize((side, side)), (left, 0))
        frames.append(_Frame((left, 0, left + side - 1, side - 1), "T"))
    overlay = PIL.Image.new("RGBA", canvas.size)
    draw = PIL.ImageDraw.Draw(overlay)
    for frame, number in zip(frames, tokens, strict=True):
        _draw(draw, frame, number, is_full=number == full)
    return PIL.Image.alpha_composite(canvas.convert("RGBA"), overlay).convert("RGB")


def _draw(draw: PIL.ImageDraw.ImageDraw, frame: _Frame, tokens: int, *, is_full: bool) -> None:
    colour = FULL if is_full else COMPRESSED
    draw.rectangle(frame.box, fill=(*colour, 0 if is_full else 90), outline=(*colour, 255), width=4)
    font = PIL.ImageFont.load_default(15)
    text = f"{frame.number}: {tokens}"
    left, top = frame.box[0] + 8, frame.box[1] + 8
    ends = draw.textbbox((left, top), text, font=font)
    draw.rectangle((ends[0] - 4, ends[1] - 4, ends[2] + 4, ends[3] + 4), fill=(*colour, 255))
    draw.text((left, top), text, fill="white", font=font)


def _caption(name: str, columns: int, rows: int, tokens: Sequence[int]) -> str:
    extra = " + thumbnail" if len(tokens) > columns * rows else ""
    return f"{name}: {columns} x {rows} tiles{extra}, {sum(tokens)} visual tokens"
