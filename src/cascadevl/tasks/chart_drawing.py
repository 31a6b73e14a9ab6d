"""Bar, line and pie charts drawn straight with Pillow, in a millisecond instead of matplotlib's 50.

All lengths are shares of the picture's side, so a chart looks the same at every picture size.
Which text fits where is decided by counting letters and not by measuring, so that it does not
depend on the version of the font library.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import PIL.Image
import PIL.ImageDraw

from cascadevl.tasks.words import font

Form: TypeAlias = Literal["bar", "hbar", "line", "pie"]
Rectangle: TypeAlias = tuple[int, int, int, int]

PALETTE = (
    (31, 119, 180),
    (255, 127, 14),
    (44, 160, 44),
    (214, 39, 40),
    (148, 103, 189),
    (140, 86, 75),
    (23, 190, 207),
)
LETTER_WIDTH = 0.62
"""Width of a letter of the font as a share of its size."""

_FACE = "sans"
_INK = (20, 20, 20)
_GRID = (205, 205, 205)
_LABEL_SHARE = 0.42  # most of the width that the labels of lying bars may take


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """What is drawn.

    Attributes:
        form: The kind of chart.
        title: Text above it; empty for none.
        labels: Name of each value.
        values: The values, whole numbers as they are printed or read from the axis.
        printed: Whether every value is printed beside its bar, point or name; otherwise there
            is an axis (but for a pie).
        colour: Number in ``PALETTE`` of bars and lines, and of a pie's first slice.
        font_size: Size of text, as a share of the picture's side.
    """

    form: Form
    title: str
    labels: tuple[str, ...]
    values: tuple[int, ...]
    printed: bool
    colour: int
    font_size: float

    @property
    def step(self) -> int:
        """Distance of two ticks of the axis."""
        raw = max(self.values) / 5
        power = 10 ** max(0, math.floor(math.log10(raw))) if raw > 0 else 1
        return next(step * power for step in (1, 2, 5, 10) if step * power >= raw)

    @property
    def axis_end(self) -> int:
        """Value at the end of the axis."""
        return self.step * math.ceil(max(self.values) / self.step)


def labels_fit(labels: Sequence[str], font_size: float) -> bool:
    """Whether labels can stand beside each other below upright bars."""
    slot = (1 - _left_margin(font_size) - 0.03) / len(labels)
    longest = max(len(label) for label in labels) + 0.6  # and a gap to the next
    return longest * LETTER_WIDTH * font_size <= slot


def _left_margin(font_size: float) -> float:
    return 3 * LETTER_WIDTH * font_size + 0.03


def render(chart: Chart, px: int) -> PIL.Image.Image:
    """Draw a chart on white paper."""
    image = PIL.Image.new("RGB", (px, px), (255, 255, 255))
    canvas = _Canvas(image, chart, px)
    canvas.title()
    if chart.form == "pie":
        canvas.pie()
        return image
    area = plot_area(chart, px)
    if not chart.printed:
        canvas.axis(area)
    {"bar": canvas.bars, "hbar": canvas.lying_bars, "line": canvas.line}[chart.form](area)
    return image


def plot_area(chart: Chart, px: int) -> Rectangle:
    """Where bars and lines may be: left, top, right, bottom; the value 0 is at the bottom.

    For lying bars the value 0 is at the left.
    """
    size = chart.font_size
    top = (1.5 * size if chart.title else 0.02) + 0.01
    if chart.form == "hbar":
        longest = max(len(label) for label in chart.labels)
        left = min(_LABEL_SHARE, longest * LETTER_WIDTH * size) + 0.03
        right = 0.97 - 3 * LETTER_WIDTH * size * (1.0 if chart.printed else 0.5)
        bottom = 0.98 if chart.printed else 0.97 - 1.3 * size
    else:
        left = 0.03 if chart.printed else _left_margin(size)
        right, bottom = 0.97, 0.97 - 1.3 * size
        top += 1.2 * size if chart.printed else 0.5 * size
    return round(left * px), round(top * px), round(right * px), round(bottom * px)


class _Canvas:
    """The picture being drawn, with its chart and sizes in pixels."""

    def __init__(self, image: PIL.Image.Image, chart: Chart, px: int) -> None:
        self.image, self.chart, self.px = image, chart, px
        self.draw = PIL.ImageDraw.Draw(image)
        self.colour = PALETTE[chart.colour]
        self.size_px = max(7, round(chart.font_size * px))

    def text(
        self, place: tuple[float | int, float | int], text: str, anchor: str, room: float = 1.0
    ) -> None:
        """Write text, smaller where it would be wider than a share of the picture."""
        fitting = room * self.px / (max(1, len(text)) * LETTER_WIDTH)
        face = font(_FACE, max(6, min(self.size_px, int(fitting))))
        self.draw.text(place, text, fill=_INK, font=face, anchor=anchor)

    def title(self) -> None:
        if self.chart.title:
            self.text((self.px / 2, 0.01 * self.px), self.chart.title, "mt", 0.96)

    def axis(self, area: Rectangle) -> None:
        left, top, right, bottom = area
        end = self.chart.axis_end
        for value in range(0, end + 1, self.chart.step):
            if self.chart.form == "hbar":
                x = left + round(value / end * (right - left))
                self.draw.line((x, top, x, bottom), fill=_GRID)
                self.text((x, bottom + 0.25 * self.size_px), str(value), "mt")
            else:
                y = bottom - round(value / end * (bottom - top))
                self.draw.line((left, y, right, y), fill=_GRID)
                self.text((left - 0.01 * self.px, y), str(value), "rm")

    def bars(self, area: Rectangle) -> None:
        left, top, right, bottom = area
        slot = (right - left) / len(self.chart.values)
        for number, value in enumerate(self.chart.values):
            middle = left + slot * (number + 0.5)
            height = round(value / self.chart.axis_end * (bottom - top))
            if height:
                box = (round(middle - slot * 0.3), bottom - height, round(middle + slot * 0.3))
                self.draw.rectangle((*box, bottom - 1), fill=self.colour)
            if self.chart.printed:
                self.text((middle, bottom - height - 2), str(value), "ms")
            self._name(middle, bottom, number)

    def _name(self, middle: float, bottom: int, number: int) -> None:
        self.text((middle, bottom + 1.05 * self.size_px), self.chart.labels[number], "ms")

    def lying_bars(self, area: Rectangle) -> None:
        left, top, right, bottom = area
        slot = (bottom - top) / len(self.chart.values)
        for number, value in enumerate(self.chart.values):
            middle = top + slot * (number + 0.5)
            length = round(value / self.chart.axis_end * (right - left))
            if length:
                above, below = round(middle - slot * 0.3), round(middle + slot * 0.3)
                self.draw.rectangle((left, above, left + length - 1, below), fill=self.colour)
            if self.chart.printed:
                self.text((left + length + 2, middle), str(value), "lm")
            name = self.chart.labels[number]
            self.text((left - 0.01 * self.px, middle), name, "rm", _LABEL_SHARE)

    def line(self, area: Rectangle) -> None:
        left, top, right, bottom = area
        slot = (right - left) / len(self.chart.values)
        points = [
            (
                left + slot * (number + 0.5),
                bottom - value / self.chart.axis_end * (bottom - top),
            )
            for number, value in enumerate(self.chart.values)
        ]
        self.draw.line(points, fill=self.colour, width=max(1, self.px // 100), joint="curve")
        radius = max(2.0, self.px / 75)
        for number, (x, y) in enumerate(points):
            self.draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=self.colour)
            if self.chart.printed:
                # Where the line has a dip its own ends would cross a number above the point.
                below = self._dips(number) and y + 1.6 * self.size_px < bottom
                place = (x, y + radius + 2) if below else (x, y - radius - 1)
                anchor = "mt" if below else "ms"
                self.text(place, str(self.chart.values[number]), anchor)
            self._name(x, bottom, number)

    def _dips(self, number: int) -> bool:
        """Whether the neighbours of a point lie higher on the whole."""
        values = self.chart.values
        around = values[max(0, number - 1) : number] + values[number + 1 : number + 2]
        return sum(around) > values[number] * len(around)

    def pie(self) -> None:
        """Slices from the top on, clockwise, and a legend below."""
        row = 1.25 * self.chart.font_size
        top = 1.5 * self.chart.font_size if self.chart.title else 0.02
        side = min(0.6, 0.96 - top - row * len(self.chart.values))
        side_px = round(side * self.px)
        enlarged = PIL.Image.new("RGB", (4 * side_px, 4 * side_px), (255, 255, 255))
        slices = PIL.ImageDraw.Draw(enlarged)
        total, angle = sum(self.chart.values), -90.0
        below = (top + side + 0.02) * self.px
        for number, (name, value) in enumerate(
            zip(self.chart.labels, self.chart.values, strict=True)
        ):
            colour = PALETTE[(self.chart.colour + number) % len(PALETTE)]
            turn = 360 * value / total
            slices.pieslice((0, 0, 4 * side_px - 1, 4 * side_px - 1), angle, angle + turn, colour)
            angle += turn
            y = below + row * self.px * (number + 0.5)
            half = 0.35 * self.size_px
            x = 0.12 * self.px
            self.draw.rectangle((x - half, y - half, x + half, y + half), fill=colour)
            text = f"{name}: {value}" if self.chart.printed else name
            self.text((0.18 * self.px, y), text, "lm", 0.8)
        self.image.paste(enlarged.reduce(4), (round((self.px - side_px) / 2), round(top * self.px)))
