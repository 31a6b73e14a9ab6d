"""Coloured shapes: what an object of a picture is, and how it is drawn with smooth edges."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import PIL.Image
import PIL.ImageDraw

COLOURS = {
    "red": (214, 39, 40),
    "green": (44, 150, 44),
    "blue": (40, 80, 220),
    "yellow": (240, 200, 20),
    "purple": (140, 60, 180),
    "black": (25, 25, 25),
    "orange": (250, 130, 20),
    "cyan": (30, 190, 210),
}
SHAPES = ("circle", "square", "triangle", "star")
PLACES = (
    "top left",
    "top",
    "top right",
    "left",
    "center",
    "right",
    "bottom left",
    "bottom",
    "bottom right",
)

SUPERSAMPLED_PX = 448
"""Pictures are drawn at about this size and reduced, which smooths the edges."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Thing:
    """One drawn object.

    Attributes:
        shape: One of ``SHAPES``.
        colour: A key of ``COLOURS``.
        size: Name of its size; empty where sizes are not spoken of.
        cell: Number of its grid cell, row by row.
        box: x1, y1, x2, y2 as shares of the picture.
    """

    shape: str
    colour: str
    size: str
    cell: int
    box: tuple[float, float, float, float]

    @property
    def name(self) -> str:
        """Colour and shape."""
        return f"{self.colour} {self.shape}"

    @property
    def full_name(self) -> str:
        """Size where spoken of, colour and shape."""
        return f"{self.size} {self.name}".lstrip()

    @property
    def place(self) -> str:
        """Name of its place."""
        return PLACES[self.cell]


def render(things: Sequence[Thing], paper: tuple[int, int, int], px: int) -> PIL.Image.Image:
    """Draw the objects with smooth edges."""
    factor = max(1, SUPERSAMPLED_PX // px)
    side = px * factor
    image = PIL.Image.new("RGB", (side, side), paper)
    canvas = PIL.ImageDraw.Draw(image)
    for thing in things:
        draw_thing(canvas, thing, side)
    return image.reduce(factor) if factor > 1 else image


def draw_thing(canvas: PIL.ImageDraw.ImageDraw, thing: Thing, side: int) -> None:
    """Draw one object on a picture of that side, in pixels."""
    box = tuple(edge * side for edge in thing.box)
    colour = COLOURS[thing.colour]
    if thing.shape == "circle":
        canvas.ellipse(box, fill=colour)
    elif thing.shape == "square":
        canvas.rectangle(box, fill=colour)
    else:
        canvas.polygon(_corners(thing.shape, box), fill=colour)


def _corners(shape: str, box: Sequence[float]) -> list[tuple[float, float]]:
    """Corners of a triangle or a five-pointed star that touches its box."""
    left, top, right, bottom = box
    if shape == "triangle":
        return [((left + right) / 2, top), (right, bottom), (left, bottom)]
    turns = [(math.sin(step * math.pi / 5), -math.cos(step * math.pi / 5)) for step in range(10)]
    points = [
        (x * (0.45 if step % 2 else 1), y * (0.45 if step % 2 else 1))
        for step, (x, y) in enumerate(turns)
    ]
    widest = max(x for x, _ in points)
    lowest = max(y for _, y in points)
    return [
        (
            (left + right) / 2 + x / widest * (right - left) / 2,
            top + (y + 1) / (lowest + 1) * (bottom - top),
        )
        for x, y in points
    ]
