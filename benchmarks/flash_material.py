"""Pictures in which detail matters in part: what the experiments with the router ask about.

Notes of handwriting on larger sheets that are plain elsewhere, and on photographs, whose detail
does not matter; printed words on a page; charts; and shapes, which are counted with few tokens.
Micro knows all of them but for the sheets (docs/concepts/micro.md). Its tiles are 112 px, so each
picture is cut into five to nine of them, of 16 visual tokens or 4.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import PIL.Image
import PIL.ImageEnhance
import PIL.ImageOps

from cascadevl.data.mixture import WeightedSource
from cascadevl.eval.suite import SuiteRow, of_kind
from cascadevl.tasks.base import Scene, Split, Task, TaskSource, pick, scene_generator
from cascadevl.tasks.charts import Charts
from cascadevl.tasks.handwriting import Handwriting
from cascadevl.tasks.printed import Printed
from cascadevl.tasks.shapes import Shapes

LENGTH = 10_000_000
"""Scenes of a family; more than any run visits."""

PAGE_PX = 224

SMALL_SHEET, LARGE_SHEET = (336, 224), (448, 224)
"""Width and height: six and eight tiles, and a thumbnail."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sheet:
    """Pictures of a family, each somewhere on a larger sheet.

    Attributes:
        task: The family.
        size_px: Width and height of the sheet.
        backdrop: A plain sheet of a light colour, or a piece of a photograph.
        first: Number of the family's first scene, so that two sheets do not show the same ones.
    """

    task: Task
    size_px: tuple[int, int] = SMALL_SHEET
    backdrop: Literal["plain", "photograph"] = "plain"
    first: int = 0

    @property
    def name(self) -> str:
        """The family's, marked."""
        return f"{self.task.name} on a sheet"

    @property
    def kinds(self) -> tuple[str, ...]:
        """The family's."""
        return self.task.kinds

    def draw(self, split: Split, seed: int, index: int) -> Scene:
        """The scene of that split, seed and index, laid on a sheet."""
        scene = self.task.draw(split, seed, self.first + index)
        name = f"sheet/{self.backdrop}/{scene.scene_id}"
        generator = scene_generator(name, split, seed, index)
        if self.backdrop == "plain":
            colour = tuple((255 - generator.integers(0, 100, size=3)).tolist())
            sheet = PIL.Image.new("RGB", self.size_px, colour)
        else:
            sheet = piece(generator, split, self.size_px)
        (picture,) = scene.images
        room = [own - taken for own, taken in zip(self.size_px, picture.size, strict=True)]
        sheet.paste(picture, tuple(int(generator.integers(0, free + 1)) for free in room))
        return Scene(
            scene_id=name,
            images=(sheet,),
            questions=scene.questions,
            description=scene.description,
        )


@cache
def photographs(split: Split) -> tuple[PIL.Image.Image, ...]:
    """Halves of scikit-learn's two photographs: left ones for training, right ones for tests."""
    from sklearn.datasets import load_sample_images  # a second to import

    found = []
    for pixels in load_sample_images().images:
        whole = PIL.Image.fromarray(pixels)
        middle = whole.width // 2
        box = (0, 0, middle, whole.height) if split == "train" else (middle, 0, *whole.size)
        found.append(whole.crop(box))
    return tuple(found)


def piece(
    generator: np.random.Generator, split: Split, size_px: tuple[int, int]
) -> PIL.Image.Image:
    """A piece of a photograph, at a random place, size and brightness, mirrored or not.

    Args:
        generator: Source of all of these.
        split: Whose photographs.
        size_px: Width and height of the result.
    """
    whole = pick(generator, photographs(split))
    width = int(generator.integers(2 * whole.width // 3, whole.width + 1))
    height = round(width * size_px[1] / size_px[0])
    left = int(generator.integers(0, whole.width - width + 1))
    top = int(generator.integers(0, whole.height - height + 1))
    box = (left, top, left + width, top + height)
    found = whole.resize(size_px, PIL.Image.Resampling.BICUBIC, box=box)
    if generator.random() < 0.5:
        found = PIL.ImageOps.mirror(found)
    return PIL.ImageEnhance.Brightness(found).enhance(float(generator.uniform(0.7, 1.3)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A family of the material.

    Attributes:
        name: As it stands in tables.
        task: Where its pictures and questions come from.
        asked: The kind of question that is examined.
        weight: How often it is drawn in training, relative to the others.
    """

    name: str
    task: Task
    asked: str
    weight: float


_NUMBERS = Handwriting(difficulty="four", num_questions=4)

FAMILIES = (
    Family(
        name="numbers on sheets",
        task=Sheet(task=_NUMBERS, size_px=LARGE_SHEET),
        asked="number",
        weight=0.2,
    ),
    Family(
        name="sums on sheets",
        task=Sheet(task=Handwriting(difficulty="add", num_questions=3), size_px=LARGE_SHEET),
        asked="addition",
        weight=0.2,
    ),
    Family(
        name="numbers on photographs",
        task=Sheet(task=_NUMBERS, backdrop="photograph", first=LENGTH),
        asked="number",
        weight=0.15,
    ),
    Family(
        name="printed words",
        task=Sheet(task=Printed(px=PAGE_PX, difficulty="word", num_questions=3, invented=0.8)),
        asked="word",
        weight=0.2,
    ),
    Family(
        name="charts",
        task=Charts(px=PAGE_PX, difficulty="easy", num_questions=4, worked=True, invented=0.8),
        asked="value",
        weight=0.15,
    ),
    Family(
        name="shapes",
        task=Sheet(task=Shapes(difficulty="easy", num_questions=4)),
        asked="count",
        weight=0.1,
    ),
)


def sources(seed: int) -> list[WeightedSource]:
    """The material as a run learns from it.

    Args:
        seed: Of the scenes.
    """
    return [
        WeightedSource(
            source=TaskSource(task=family.task, length=LENGTH, seed=seed, label=family.name),
            weight=family.weight,
        )
        for family in FAMILIES
    ]


def rows(num_questions: int) -> list[SuiteRow]:
    """The held-out questions.

    Args:
        num_questions: Of each family.
    """
    return [
        SuiteRow(
            name=family.name,
            task=family.task,
            num_questions=num_questions,
            keep=of_kind(family.asked),
        )
        for family in FAMILIES
    ]
