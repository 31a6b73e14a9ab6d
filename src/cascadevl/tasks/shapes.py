"""Coloured shapes: counting, existence, colour, place, and a list of all of them.

Every object stands in a cell of its own of a 3 x 3 grid, so that objects never overlap and their
place has a name; cells, sizes and shifts inside the cell are random. Sizes are shares of the
picture, so one scene looks the same at every picture size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from cascadevl.tasks.base import Question, Scene, Split, check_difficulty, pick, scene_generator
from cascadevl.tasks.shape_drawing import COLOURS, SHAPES, Thing, render

PAPERS = ((250, 250, 250), (238, 234, 226), (226, 234, 240), (225, 225, 225))


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """How much is in a picture.

    Attributes:
        num_objects: Fewest and most objects, drawn evenly.
        num_colours: How many of ``COLOURS`` occur.
        num_shapes: How many of ``SHAPES`` occur.
        sizes: Width of an object by its name, as a share of the picture; one name only means
            that sizes are not spoken of.
        kinds: What is asked.
    """

    num_objects: tuple[int, int]
    num_colours: int
    num_shapes: int
    sizes: tuple[tuple[str, float], ...]
    kinds: tuple[str, ...]


_KINDS = ("count", "count_color", "count_shape", "existence", "color", "shape", "place", "list")
LEVELS = {
    "easy": Level(
        num_objects=(1, 4),
        num_colours=4,
        num_shapes=3,
        sizes=(("", 0.25),),
        kinds=("count", "existence", "color", "shape"),
    ),
    "full": Level(
        num_objects=(1, 6), num_colours=6, num_shapes=4, sizes=(("", 0.24),), kinds=_KINDS
    ),
    "sizes": Level(
        num_objects=(1, 6),
        num_colours=8,
        num_shapes=4,
        sizes=(("small", 0.15), ("large", 0.27)),
        kinds=(*_KINDS, "size"),
    ),
}

PROMPTS = {
    "count": ("How many shapes are there?", "Count the shapes."),
    "count_color": ("How many {} shapes are there?", "Count the {} shapes."),
    "count_shape": ("How many {}s are there?", "Count the {}s."),
    "existence": ("Is there {}?", "Can you see {}?"),
    "color": ("What color is the {}?", "Which color does the {} have?"),
    "shape": ("What shape is {}?", "Which shape is {}?"),
    "place": ("Where is the {}?", "In which part of the picture is the {}?"),
    "size": ("Is the {} small or large?", "What size is the {}?"),
    "list": ("List all shapes.", "Name every shape with its place."),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Shapes:
    """Coloured shapes on plain paper.

    Attributes:
        px: Side of the picture.
        num_questions: At most so many questions a picture.
        difficulty: A key of ``LEVELS``.
        num_phrasings: How many wordings of each question are used.
        worked: Whether what is asked about one object comes with worked steps: the objects in
            reading order up to this one.
    """

    px: int = 112
    num_questions: int = 3
    difficulty: str = "easy"
    num_phrasings: int = 1
    worked: bool = False
    name: ClassVar[str] = "shapes"

    def __post_init__(self) -> None:
        """Refuse an unknown difficulty."""
        check_difficulty(self.name, self.difficulty, LEVELS)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of questions asked at this difficulty."""
        return LEVELS[self.difficulty].kinds

    def draw(self, split: Split, seed: int, index: int) -> Scene:
        """Draw one picture with its questions."""
        generator = scene_generator(f"{self.name}/{self.difficulty}", split, seed, index)
        level = LEVELS[self.difficulty]
        things = draw_things(generator, level)
        paper = pick(generator, PAPERS)
        questions: list[Question] = []
        for number in generator.permutation(len(level.kinds)):
            kind = level.kinds[number]
            question = ask(generator, kind, things, level, self.num_phrasings, self.worked)
            if question is not None and len(questions) < self.num_questions:
                questions.append(question)
        return Scene(
            scene_id=f"{self.name}/{self.difficulty}/{self.px}px/{split}/{seed}:{index}",
            images=(render(things, paper, self.px),),
            questions=tuple(questions),
            description=describe(things),
        )


def draw_things(generator: np.random.Generator, level: Level) -> list[Thing]:
    """Objects in reading order, their number drawn evenly."""
    count = int(generator.integers(level.num_objects[0], level.num_objects[1] + 1))
    cells = sorted(generator.permutation(9)[:count].tolist())
    # Few colours and shapes a picture: otherwise nearly every count by colour would be 1.
    colours = _some(generator, tuple(COLOURS)[: level.num_colours])
    shapes = _some(generator, SHAPES[: level.num_shapes])
    return place_things(generator, level, cells, colours, shapes)


def place_things(
    generator: np.random.Generator,
    level: Level,
    cells: Sequence[int],
    colours: Sequence[str],
    shapes: Sequence[str],
) -> list[Thing]:
    """An object in each cell, of these colours and shapes."""
    things = []
    for cell in cells:
        size, width = pick(generator, level.sizes)
        width *= float(generator.uniform(0.92, 1.08))
        free = 1 / 3 - width - 0.02
        left = cell % 3 / 3 + 0.01 + float(generator.uniform(0, free))
        top = cell // 3 / 3 + 0.01 + float(generator.uniform(0, free))
        things.append(
            Thing(
                shape=pick(generator, shapes),
                colour=pick(generator, colours),
                size=size,
                cell=cell,
                box=(left, top, left + width, top + width),
            )
        )
    return things


def _some(generator: np.random.Generator, names: Sequence[str]) -> list[str]:
    count = int(generator.integers(2, len(names) + 1))
    return [names[number] for number in generator.permutation(len(names))[:count]]


def describe(things: Sequence[Thing]) -> str:
    """The dense description: how many, then each with its place."""
    return f"{len(things)} {'shape' if len(things) == 1 else 'shapes'}: {list_things(things)}."


def list_things(things: Sequence[Thing]) -> str:
    """Each object with its place, in reading order."""
    return ", ".join(f"{thing.full_name} {thing.place}" for thing in things)


def ask(
    generator: np.random.Generator,
    kind: str,
    things: Sequence[Thing],
    level: Level,
    num_phrasings: int,
    worked: bool = False,
) -> Question | None:
    """A question of one kind, or None where these objects allow none without ambiguity."""
    found = _ASKERS[kind](generator, things, level)
    if found is None:
        return None
    about, answer = found
    prompt = pick(generator, PROMPTS[kind][:num_phrasings]).format(about)
    return Question(
        prompt=prompt,
        answer=answer,
        kind=kind,
        reasoning=_way_to(about, kind, things) if worked and kind in _NAMED_BY else None,
        metric="list" if kind == "list" else "exact",
    )


def _way_to(about: str, kind: str, things: Sequence[Thing]) -> str:
    """The objects in reading order up to the one that the question calls so."""
    names = [_NAMED_BY[kind](thing) for thing in things]
    return list_things(things[: names.index(about) + 1])


Found = tuple[str, str] | None
Asker = Callable[[np.random.Generator, Sequence[Thing], Level], Found]


def _count(generator: np.random.Generator, things: Sequence[Thing], level: Level) -> Found:
    return "", str(len(things))


def _count_by(names: Callable[[Level], Sequence[str]], of: Callable[[Thing], str]) -> Asker:
    """Ask for the number of one colour or shape, and for large numbers, which are rare, first."""

    def asker(generator: np.random.Generator, things: Sequence[Thing], level: Level) -> Found:
        counts = Counter(of(thing) for thing in things)
        occurring = sorted({counts[name] for name in names(level)})
        wanted = pick(generator, [number for number in occurring for _ in range(number**2 or 1)])
        name = pick(generator, [name for name in names(level) if counts[name] == wanted])
        return name, str(wanted)

    return asker


def _existence(generator: np.random.Generator, things: Sequence[Thing], level: Level) -> Found:
    """Yes and no equally often; half of the no's name a colour and a shape that are both there."""
    present = sorted({(thing.colour, thing.shape) for thing in things})
    if generator.integers(2):
        return with_article(*pick(generator, present)), "yes"
    colours = {colour for colour, _ in present}
    shapes = {shape for _, shape in present}
    absent = [
        (colour, shape)
        for colour in tuple(COLOURS)[: level.num_colours]
        for shape in SHAPES[: level.num_shapes]
        if (colour, shape) not in present
    ]
    hard = [pair for pair in absent if pair[0] in colours and pair[1] in shapes]
    options = hard if hard and generator.integers(2) else absent
    return with_article(*pick(generator, options)), "no"


def with_article(colour: str, shape: str) -> str:
    """``a red circle``, ``an orange star``."""
    return f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {shape}"


def _unique(
    generator: np.random.Generator, things: Sequence[Thing], key: Callable[[Thing], str]
) -> Thing | None:
    counts = Counter(key(thing) for thing in things)
    single = [thing for thing in things if counts[key(thing)] == 1]
    return pick(generator, single) if single else None


_NAMED_BY: dict[str, Callable[[Thing], str]] = {
    "color": lambda thing: thing.shape,
    "shape": lambda thing: thing.colour,
    "place": lambda thing: thing.name,
    "size": lambda thing: thing.name,
}
"""What a question about one object calls it."""


def _about_one(kind: str, answer: Callable[[Thing], str]) -> Asker:
    """Ask about an object that its name points to without doubt."""
    key = _NAMED_BY[kind]

    def asker(generator: np.random.Generator, things: Sequence[Thing], level: Level) -> Found:
        thing = _unique(generator, things, key)
        return None if thing is None else (key(thing), answer(thing))

    return asker


_ASKERS: dict[str, Asker] = {
    "count": _count,
    "count_color": _count_by(
        lambda level: tuple(COLOURS)[: level.num_colours], lambda thing: thing.colour
    ),
    "count_shape": _count_by(lambda level: SHAPES[: level.num_shapes], lambda thing: thing.shape),
    "existence": _existence,
    "color": _about_one("color", lambda thing: thing.colour),
    "shape": _about_one("shape", lambda thing: thing.shape),
    "place": _about_one("place", lambda thing: thing.place),
    "size": _about_one("size", lambda thing: thing.size),
    "list": lambda generator, things, level: ("", list_things(things)),
}
