"""Is there ...? Object existence in the manner of POPE, of pictures whose objects are known.

Li et al., arXiv 2305.10355: of every picture as many questions name objects that are there as
objects that are not. Those that are not are drawn in one of three ways: any (``random``), those
that are most frequent in the material (``popular``), or those that most often stand beside what is
there (``adversarial``). A model that answers by what is usual, and not by what it sees, says yes to
the latter two. Pictures and questions about what is there are the same in all three.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Protocol, runtime_checkable

import numpy as np
import PIL.Image

from cascadevl.errors import ConfigError
from cascadevl.tasks import easy_vqa, shapes
from cascadevl.tasks.base import Question, Scene, Split, check_difficulty, scene_generator
from cascadevl.tasks.shape_drawing import COLOURS, SHAPES, Thing, render

NEGATIVES = ("random", "popular", "adversarial")
"""How objects are drawn that are not there."""

COUNTED_SCENES = 2000
"""Scenes of the training part in which objects are counted."""

_LEVEL = shapes.LEVELS["full"]
_EASY_VQA_COLOURS = tuple(f"{colour} shape" for colour in easy_vqa.COLOURS)


@runtime_checkable
class Sighting(Protocol):
    """A picture whose objects are known."""

    @property
    def objects(self) -> tuple[str, ...]:
        """What is in it, each once."""
        ...

    @property
    def unknown(self) -> tuple[str, ...]:
        """What may be in it or not: nobody has said."""
        ...

    @property
    def description(self) -> str:
        """All of it in words."""
        ...

    def show(self, px: int) -> PIL.Image.Image:
        """The picture, with sides of so many pixels."""
        ...


@runtime_checkable
class Material(Protocol):
    """Where pictures come from.

    Attributes:
        vocabulary: Everything that may be asked for.
    """

    @property
    def vocabulary(self) -> tuple[str, ...]: ...  # noqa: D102
    def sight(self, split: Split, seed: int, index: int) -> Sighting:
        """The picture of that split, seed and index, not drawn yet."""
        ...


@dataclass(frozen=True, slots=True)
class _Drawn:
    """Coloured shapes.

    Attributes:
        things: The shapes.
        paper: Colour of the ground.
        unknown: Nothing.
    """

    things: tuple[Thing, ...]
    paper: tuple[int, int, int]
    unknown: tuple[str, ...] = ()

    @property
    def objects(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(thing.name for thing in self.things))

    @property
    def description(self) -> str:
        return shapes.describe(self.things)

    def show(self, px: int) -> PIL.Image.Image:
        return render(self.things, self.paper, px)


@dataclass(frozen=True, slots=True)
class _Shapes:
    """Pictures of coloured shapes in which some colours and shapes are more frequent than others.

    The n-th colour and the n-th shape are drawn with a weight of 1 / n, as words of a language
    are. Few of them are in a picture, so that what shares a colour or a shape stands together.
    """

    @property
    def vocabulary(self) -> tuple[str, ...]:
        colours = tuple(COLOURS)[: _LEVEL.num_colours]
        every = itertools.product(colours, SHAPES[: _LEVEL.num_shapes])
        return tuple(f"{colour} {shape}" for colour, shape in every)

    def sight(self, split: Split, seed: int, index: int) -> Sighting:
        generator = scene_generator("existence/shapes", split, seed, index)
        fewest, most = _LEVEL.num_objects
        number = int(generator.integers(fewest, most + 1))
        cells = sorted(generator.permutation(9)[:number].tolist())
        colours = _frequent(generator, tuple(COLOURS)[: _LEVEL.num_colours])
        names = _frequent(generator, SHAPES[: _LEVEL.num_shapes])
        things = shapes.place_things(generator, _LEVEL, cells, colours, names)
        paper = shapes.PAPERS[int(generator.integers(len(shapes.PAPERS)))]
        return _Drawn(tuple(things), paper)


def _frequent(generator: np.random.Generator, names: Sequence[str]) -> list[str]:
    weights = 1 / np.arange(1, len(names) + 1)
    count = int(generator.integers(2, len(names) + 1))
    chances = weights / weights.sum()
    return [str(name) for name in generator.choice(names, count, replace=False, p=chances)]


@dataclass(frozen=True, slots=True)
class _Photographed:
    """A picture of easy-VQA."""

    picture: easy_vqa.Picture

    @property
    def objects(self) -> tuple[str, ...]:
        colour, shape = easy_vqa.attributes(self.picture)
        named = (f"{colour} shape" if colour else "", shape)
        return tuple(each for each in named if each)

    @property
    def unknown(self) -> tuple[str, ...]:
        """A picture's own questions need not tell both its colour and its form."""
        colour, shape = easy_vqa.attributes(self.picture)
        colours = () if colour else _EASY_VQA_COLOURS
        return (*colours, *(() if shape else easy_vqa.SHAPES))

    @property
    def description(self) -> str:
        return easy_vqa.describe(self.picture)

    def show(self, px: int) -> PIL.Image.Image:
        return easy_vqa.enlarged(self.picture, px)


@dataclass(frozen=True, slots=True)
class _EasyVQA:
    """The pictures of easy-VQA: one shape each, asked for by its colour or by its form."""

    @property
    def vocabulary(self) -> tuple[str, ...]:
        return (*_EASY_VQA_COLOURS, *easy_vqa.SHAPES)

    def sight(self, split: Split, seed: int, index: int) -> Sighting:
        return _Photographed(easy_vqa.picture_at(split, seed, index))


MATERIALS: dict[str, Material] = {"shapes": _Shapes(), "easy_vqa": _EasyVQA()}
"""Pictures by their name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Existence:
    """Questions of existence, as many about what is there as about what is not.

    Attributes:
        px: Side of the picture.
        num_questions: At most so many questions a picture (POPE: 6).
        difficulty: How objects are drawn that are not there, one of ``NEGATIVES``.
        material: A key of ``MATERIALS``.
        wording: Of the question, with a place for the object (POPE: "Is there {} in the image?").
    """

    px: int = 112
    num_questions: int = 6
    difficulty: str = "random"
    material: str = "shapes"
    wording: str = "Is there {}?"
    name: ClassVar[str] = "existence"
    kinds: ClassVar[tuple[str, ...]] = ("existence",)

    def __post_init__(self) -> None:
        """Refuse unknown words.

        Raises:
            ConfigError: Naming the known ones.
        """
        check_difficulty(self.name, self.difficulty, NEGATIVES)
        if self.material not in MATERIALS:
            raise ConfigError(
                f"existence has no material {self.material!r}; choose from {sorted(MATERIALS)}"
            )
        if "{}" not in self.wording:
            raise ConfigError(f"the wording {self.wording!r} has no place {{}} for the object")

    def draw(self, split: Split, seed: int, index: int) -> Scene:
        """Draw one picture with its questions."""
        sighting = MATERIALS[self.material].sight(split, seed, index)
        start = f"{self.name}/{self.material}"
        generator = scene_generator(f"{start}/questions", split, seed, index)
        there = sighting.objects
        chance = scene_generator(f"{start}/{self.difficulty}", split, seed, index)
        absent = negatives(chance, self.material, sighting, self.difficulty)
        num_each = min(len(there), len(absent), (self.num_questions + 1) // 2)
        named = [there[number] for number in generator.permutation(len(there))[:num_each]]
        every = [(thing, "yes") for thing in named] + [(thing, "no") for thing in absent[:num_each]]
        order = generator.permutation(2 * num_each)[: self.num_questions]
        return Scene(
            scene_id=f"{start}/{self.difficulty}/{self.px}px/{split}/{seed}:{index}",
            images=(sighting.show(self.px),),
            questions=tuple(self._question(*every[number]) for number in order),
            description=sighting.description,
        )

    def _question(self, thing: str, answer: str) -> Question:
        article = "an" if thing[0] in "aeiou" else "a"
        prompt = self.wording.format(f"{article} {thing}")
        return Question(prompt=prompt, answer=answer, kind="existence")


def negatives(
    generator: np.random.Generator, material: str, sighting: Sighting, how: str
) -> list[str]:
    """Objects that are not there, the first ones to be asked for first.

    Args:
        generator: Of the random ones, and of the order of equals.
        material: A key of ``MATERIALS``.
        sighting: Says what is there.
        how: One of ``NEGATIVES``.
    """
    there = sighting.objects
    not_asked = {*there, *sighting.unknown}
    absent = [thing for thing in MATERIALS[material].vocabulary if thing not in not_asked]
    shuffled = [absent[number] for number in generator.permutation(len(absent))]
    if how == "random":
        return shuffled
    counts = count(material)
    if how == "popular":
        return sorted(shuffled, key=lambda thing: -counts.single[thing])
    return sorted(shuffled, key=lambda thing: -sum(counts.pairs[thing, each] for each in there))


@dataclass(frozen=True, slots=True)
class Counts:
    """How often objects occur in a material.

    Attributes:
        single: Pictures with an object.
        pairs: Pictures with two of them, in both orders.
    """

    single: Counter[str]
    pairs: Counter[tuple[str, str]]


@lru_cache(maxsize=len(MATERIALS))
def count(material: str) -> Counts:
    """Count objects in the training part: what a model may have learned to be usual.

    Args:
        material: A key of ``MATERIALS``.
    """
    single, pairs = Counter[str](), Counter[tuple[str, str]]()
    for index in range(COUNTED_SCENES):
        objects = MATERIALS[material].sight("train", 0, index).objects
        single.update(objects)
        pairs.update(itertools.permutations(objects, 2))
    return Counts(single, pairs)
