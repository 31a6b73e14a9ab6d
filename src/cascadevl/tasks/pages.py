"""Pages covered with letters, digits and shapes, with what stands in every patch of them.

Material to teach a vision tower of its own before it meets a language model: a page names thirty
things and where they are, a question about it one. Everything is drawn from the material of the
other families and the same parts of it: held-out words, scans and the pictures asked about later
never occur.
"""

from __future__ import annotations

import string
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import PIL.Image
import PIL.ImageDraw
from jaxtyping import Bool, Int64

from cascadevl.tasks.base import Split, pick, scene_generator
from cascadevl.tasks.handwriting import load_scans
from cascadevl.tasks.shape_drawing import COLOURS, SHAPES, Thing, draw_thing
from cascadevl.tasks.words import FONTS, font, load_words

CHARACTERS = string.ascii_lowercase + string.digits + string.ascii_uppercase + ".,:-+%"
CLASSES = (
    "nothing",
    *CHARACTERS,
    *(f"handwritten {digit}" for digit in range(10)),
    *(f"{colour} {shape}" for shape in SHAPES for colour in COLOURS),
)
"""What may stand in a patch, by class number."""

_NUMBER_OF = {name: number for number, name in enumerate(CLASSES)}
_KINDS = ("text", "text", "text", "digit", "shape")
_TRIES = 40

Box: TypeAlias = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Page:
    """A picture and what stands in each of its patches.

    Attributes:
        image: The picture, RGB.
        classes: Number in ``CLASSES`` of what covers the middle of each patch.
        centres: Whether the middle of a letter, digit or shape lies in the patch, which tells
            two equal letters side by side from one wide one.
    """

    image: PIL.Image.Image
    classes: Int64[np.ndarray, "side side"]
    centres: Bool[np.ndarray, "side side"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pages:
    """The pages of one part of the material.

    Attributes:
        px: Side of a page.
        patch_px: Side of a patch.
        split: Which part of words and scans.
        seed: Seed of the pages.
        tiles: Whether every second page is a tile: a piece, cut between patches, of a page of
            twice the side. So large pictures reach a model, with letters cut in two.
    """

    px: int = 224
    patch_px: int = 14
    split: Split = "train"
    seed: int = 0
    tiles: bool = False

    def __getitem__(self, index: int) -> Page:
        """The page of that number, always the same one."""
        generator = scene_generator("pages", self.split, self.seed, index)
        paper = 255 - generator.integers(0, 61, size=3)
        ink = generator.integers(0, 81, size=3)
        if generator.integers(4) == 0:
            paper, ink = ink, paper
        is_tile = self.tiles and index % 2 == 1
        times = 2 if is_tile else 1
        sheet = _Sheet(times * self.px, self.patch_px, _rgb(paper), _rgb(ink))
        wanted = int(generator.integers(3, 11)) * times**2
        for _ in range(_TRIES * times**2):
            if len(sheet.taken) == wanted:
                break
            _WRITERS[pick(generator, _KINDS)](sheet, generator, self.split)
        page = Page(image=sheet.image, classes=sheet.classes, centres=sheet.centres)
        return _cut(page, generator, self.px, self.patch_px) if is_tile else page


def _cut(page: Page, generator: np.random.Generator, px: int, patch_px: int) -> Page:
    """A piece of that side from anywhere on a page."""
    side = px // patch_px
    row, column = generator.integers(0, len(page.classes) - side + 1, size=2).tolist()
    left, top = column * patch_px, row * patch_px
    rows, columns = slice(row, row + side), slice(column, column + side)
    return Page(
        image=page.image.crop((left, top, left + px, top + px)),
        classes=page.classes[rows, columns],
        centres=page.centres[rows, columns],
    )


class _Sheet:
    """A page that is being written, and its labels."""

    def __init__(
        self, px: int, patch_px: int, paper: tuple[int, int, int], ink: tuple[int, int, int]
    ) -> None:
        self.px, self.patch_px, self.ink = px, patch_px, ink
        self.image = PIL.Image.new("RGB", (px, px), paper)
        self.canvas = PIL.ImageDraw.Draw(self.image)
        side = px // patch_px
        self.classes = np.zeros((side, side), dtype=np.int64)
        self.centres = np.zeros((side, side), dtype=bool)
        self.middles = (np.arange(side) + 0.5) * patch_px
        self.taken: list[Box] = []

    def place(self, generator: np.random.Generator, width: float, height: float) -> Box | None:
        """A free place of that size, or None if the one that was drawn is not free."""
        if width > self.px - 2 or height > self.px - 2:
            return None
        left = 1 + float(generator.random()) * (self.px - 2 - width)
        top = 1 + float(generator.random()) * (self.px - 2 - height)
        box = (left, top, left + width, top + height)
        if any(
            box[0] < right and left_of < box[2] and box[1] < bottom and above < box[3]
            for left_of, above, right, bottom in self.taken
        ):
            return None
        self.taken.append(box)
        return box

    def label(self, name: str, box: Box) -> None:
        """Say what stands in a box."""
        columns = (self.middles >= box[0]) & (self.middles < box[2])
        rows = (self.middles >= box[1]) & (self.middles < box[3])
        self.classes[np.ix_(rows, columns)] = _NUMBER_OF[name]
        last = len(self.middles) - 1
        row = min(last, int((box[1] + box[3]) / 2 // self.patch_px))
        column = min(last, int((box[0] + box[2]) / 2 // self.patch_px))
        self.classes[row, column] = _NUMBER_OF[name]  # thin letters cover no middle of a patch
        self.centres[row, column] = True


def _write_text(sheet: _Sheet, generator: np.random.Generator, split: Split) -> None:
    size_px = 2 * round(_size(generator, 14.0, 64.0) * sheet.px / 448)  # fewer fonts to load
    drawn = font(pick(generator, tuple(FONTS)), size_px)
    text = _text(generator, split)
    box = sheet.place(generator, float(drawn.getlength(text)), 1.1 * size_px)
    if box is None:
        return
    left, base = round(box[0]), round(box[1] + 0.85 * size_px)
    sheet.canvas.text((left, base), text, fill=sheet.ink, font=drawn, anchor="ls")
    ends = [drawn.getlength(text[:number]) for number in range(len(text) + 1)]
    for letter, begin, end in zip(text, ends, ends[1:], strict=False):
        above, below = base - 0.72 * size_px, base + 0.08 * size_px
        sheet.label(letter, (left + begin, above, left + end, below))


def _text(generator: np.random.Generator, split: Split) -> str:
    kind = int(generator.integers(10))
    if kind < 6:
        word = pick(generator, load_words(split))
        return word.capitalize() if kind == 0 else word
    if kind < 8:
        return str(int(generator.integers(0, 10 ** int(generator.integers(1, 5)))))
    letters = generator.integers(0, len(CHARACTERS), size=int(generator.integers(1, 7)))
    return "".join(CHARACTERS[int(letter)] for letter in letters)


def _write_digit(sheet: _Sheet, generator: np.random.Generator, split: Split) -> None:
    side = _size(generator, 36.0, 130.0) * sheet.px / 224
    box = sheet.place(generator, side, side)
    if box is None:
        return
    scans, digit = load_scans(split), int(generator.integers(10))
    scan = PIL.Image.fromarray(scans.images[pick(generator, scans.by_class[digit])])
    mask = scan.resize((round(side), round(side)), PIL.Image.Resampling.BICUBIC)
    ink = PIL.Image.new("RGB", mask.size, sheet.ink)
    sheet.image.paste(ink, (round(box[0]), round(box[1])), mask)
    sheet.label(f"handwritten {digit}", box)


def _write_shape(sheet: _Sheet, generator: np.random.Generator, split: Split) -> None:
    del split  # shapes are geometry: there is nothing to hold out
    side = _size(generator, 24.0, 80.0) * sheet.px / 224
    box = sheet.place(generator, side, side)
    if box is None:
        return
    shape, colour = pick(generator, SHAPES), pick(generator, tuple(COLOURS))
    left, top, right, bottom = (edge / sheet.px for edge in box)
    thing = Thing(shape=shape, colour=colour, size="", cell=0, box=(left, top, right, bottom))
    draw_thing(sheet.canvas, thing, sheet.px)
    sheet.label(thing.name, box)


_Writer: TypeAlias = Callable[[_Sheet, np.random.Generator, Split], None]
_WRITERS: dict[str, _Writer] = {
    "text": _write_text,
    "digit": _write_digit,
    "shape": _write_shape,
}


def _size(generator: np.random.Generator, least: float, most: float) -> float:
    """A size in pixels of a page of 224, its logarithm uniform."""
    return float(np.exp(generator.uniform(np.log(least), np.log(most))))


def _rgb(values: Int64[np.ndarray, " channels"]) -> tuple[int, int, int]:
    red, green, blue = values.tolist()
    return red, green, blue
