"""Pictures in which detail matters in part: what the experiments with the router ask about.

Notes of handwriting on a larger sheet that is plain elsewhere, printed words somewhere on a page,
charts, and shapes, which are told apart with few tokens. All are cut into several tiles.
"""

from __future__ import annotations

from dataclasses import dataclass

import PIL.Image

from cascadevl.data.mixture import WeightedSource
from cascadevl.eval.suite import SuiteRow, of_kind
from cascadevl.tasks.base import Scene, Split, Task, TaskSource, scene_generator
from cascadevl.tasks.charts import Charts
from cascadevl.tasks.handwriting import Handwriting
from cascadevl.tasks.printed import Printed
from cascadevl.tasks.shapes import Shapes

LENGTH = 10_000_000
"""Scenes of a family; more than any run visits."""

PAGE_PX = 224


@dataclass(frozen=True, slots=True, kw_only=True)
class Sheet:
    """Pictures of a family, each somewhere on a larger plain sheet.

    Attributes:
        task: The family.
        size_px: Width and height of the sheet.
    """

    task: Task
    size_px: tuple[int, int] = (336, 224)

    @property
    def name(self) -> str:
        """The family's, marked."""
        return f"{self.task.name} on a sheet"

    @property
    def kinds(self) -> tuple[str, ...]:
        """The family's."""
        return self.task.kinds

    def draw(self, split: Split, seed: int, index: int) -> Scene:
        """The scene of that split, seed and index, laid on a sheet of a light colour."""
        scene = self.task.draw(split, seed, index)
        generator = scene_generator(f"sheet/{scene.scene_id}", split, seed, index)
        colour = tuple((255 - generator.integers(0, 100, size=3)).tolist())
        (picture,) = scene.images
        sheet = PIL.Image.new("RGB", self.size_px, colour)
        room = [own - taken for own, taken in zip(self.size_px, picture.size, strict=True)]
        sheet.paste(picture, tuple(int(generator.integers(0, free + 1)) for free in room))
        return Scene(
            scene_id=f"sheet/{scene.scene_id}",
            images=(sheet,),
            questions=scene.questions,
            description=scene.description,
        )


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


FAMILIES = (
    Family(
        name="numbers on notes",
        task=Sheet(task=Handwriting(difficulty="four", num_questions=4)),
        asked="number",
        weight=0.25,
    ),
    Family(
        name="sums on notes",
        task=Sheet(task=Handwriting(difficulty="add", num_questions=3)),
        asked="addition",
        weight=0.2,
    ),
    Family(
        name="printed words",
        task=Printed(px=PAGE_PX, difficulty="word", num_questions=3, invented=0.8),
        asked="word",
        weight=0.25,
    ),
    Family(
        name="charts",
        task=Charts(px=PAGE_PX, difficulty="easy", num_questions=4, worked=True, invented=0.8),
        asked="value",
        weight=0.2,
    ),
    Family(
        name="shapes",
        task=Sheet(task=Shapes(difficulty="full", num_questions=5, worked=True)),
        asked="list",
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
