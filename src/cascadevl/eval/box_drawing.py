"""Boxes drawn on a picture: where something is, and where a model says it is."""

from __future__ import annotations

import PIL.Image
import PIL.ImageDraw

from cascadevl.scoring.answers import Box, parse_boxes

TRUE_COLOUR = (23, 117, 58)
GIVEN_COLOUR = (214, 0, 122)
"""True boxes are green and thin, given ones pink and thick; the report's legend says so too."""

_SCALE = 1000.0
"""Boxes are given in thousandths of the picture's sides, as in the released format."""


def with_boxes(image: PIL.Image.Image, *, given: str, truth: str) -> PIL.Image.Image:
    """A copy of a picture with the boxes of an answer and those of the reference.

    Args:
        image: The picture.
        given: The answer; an answer without boxes draws none.
        truth: The reference answer.
    """
    copy = image.convert("RGB")
    canvas = PIL.ImageDraw.Draw(copy)
    for text, colour, width in ((given, GIVEN_COLOUR, 3), (truth, TRUE_COLOUR, 1)):
        for box in parse_boxes(text):
            if (place := _pixels(box, copy)) is not None:
                canvas.rectangle(place, outline=colour, width=width)
    return copy


def _pixels(box: Box, image: PIL.Image.Image) -> tuple[float, float, float, float] | None:
    """Corners in pixels, within the picture; None for a box that has no area there."""
    width, height = image.width - 1, image.height - 1
    sides = (width, height, width, height)
    left, top, right, bottom = (
        min(max(edge / _SCALE, 0.0), 1.0) * side for edge, side in zip(box, sides, strict=True)
    )
    return (left, top, right, bottom) if left < right and top < bottom else None
