"""A page of drawn scenes with their questions, for people to look at before training on them."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from cascadevl.tasks.base import Scene

_TEXT_PX = 11
_LINE_PX = 14


def contact_sheet(
    scenes: Sequence[Scene], *, num_columns: int = 4, cell_px: int = 240
) -> PIL.Image.Image:
    """Lay scenes out in a grid: each picture at its true size, its questions below it.

    Args:
        scenes: What to show.
        num_columns: Scenes beside each other.
        cell_px: Width of a cell; text is wrapped to it.
    """
    font = PIL.ImageFont.load_default(_TEXT_PX)
    texts = [_lines(scene, cell_px) for scene in scenes]
    picture_px = max((scene.image.height for scene in scenes if scene.image is not None), default=0)
    height = picture_px + _LINE_PX * max(len(lines) for lines in texts) + 12
    num_rows = -(-len(scenes) // num_columns)
    sheet = PIL.Image.new("RGB", (num_columns * cell_px, num_rows * height), (255, 255, 255))
    canvas = PIL.ImageDraw.Draw(sheet)
    for number, (scene, lines) in enumerate(zip(scenes, texts, strict=True)):
        left, top = number % num_columns * cell_px + 4, number // num_columns * height + 4
        if scene.image is not None:
            sheet.paste(scene.image, (left, top))
        for row, line in enumerate(lines):
            place = (left, top + picture_px + 2 + row * _LINE_PX)
            canvas.text(place, line, fill=(0, 0, 0), font=font)
    return sheet


def _lines(scene: Scene, cell_px: int) -> list[str]:
    texts = [f"{q.prompt} -> {q.response()}" for q in scene.questions]
    if scene.description:
        texts.append(f"# {scene.description}")
    width = max(8, cell_px // 6)
    return [line for text in texts for line in textwrap.wrap(text, width) or [""]]
