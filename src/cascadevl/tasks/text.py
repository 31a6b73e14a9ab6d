"""Questions without a picture: small calculations with worked steps, and words letter by letter.

They keep the decoder able to calculate and spell, which the questions about pictures build on.
Words of the test part (`cascadevl.tasks.words`) are never spelled in training; of the
calculations, one pair of numbers in ten is held out.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from cascadevl.tasks.arithmetic import (
    addition_steps,
    multiplication_steps,
    subtraction_steps,
    sum_steps,
)
from cascadevl.tasks.base import Question, Scene, Split, check_difficulty, pick, scene_generator
from cascadevl.tasks.words import words_of_length

_HELD_OUT = 10
"""One pair of numbers in so many belongs to the test part."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """How large numbers and how long words are.

    Attributes:
        largest: Largest number added or subtracted.
        largest_factor: Largest number multiplied by one digit.
        word_letters: Fewest and most letters of a word.
        list_length: Fewest and most members of a list to order.
    """

    largest: int
    largest_factor: int
    word_letters: tuple[int, int]
    list_length: tuple[int, int]


LEVELS = {
    "easy": Level(largest=20, largest_factor=10, word_letters=(3, 5), list_length=(3, 3)),
    "full": Level(largest=999, largest_factor=99, word_letters=(3, 8), list_length=(3, 6)),
}

PROMPTS = {
    "add": ("What is {} + {}?", "Add {} and {}."),
    "subtract": ("What is {} - {}?", "Subtract {1} from {0}."),
    "multiply": ("What is {} * {}?", "Multiply {} by {}."),
    "sum": ("What is the sum of {}?", "Add up {}."),
    "compare": ("Is {} larger than {}?", "Is {} greater than {}?"),
    "sort": ("Sort from small to large: {}", "Put in ascending order: {}"),
    "spell": ("Spell the word {}.", "Write {} letter by letter."),
    "num_letters": ("How many letters has {}?", "Count the letters of {}."),
    "count_letter": ("How often does {} occur in {}?", "Count the letter {} in {}."),
    "alphabetical": ("Sort by the alphabet: {}", "Put in alphabetical order: {}"),
    "reverse": ("Write {} backwards.", "Reverse the word {}."),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """Calculations and spelling.

    Attributes:
        px: Not used; there so that every family is set up alike.
        num_questions: At most so many questions a scene, each of another kind.
        difficulty: A key of ``LEVELS``.
        num_phrasings: How many wordings of each question are used.
    """

    px: int = 112
    num_questions: int = 1
    difficulty: str = "easy"
    num_phrasings: int = 1
    name: ClassVar[str] = "text"
    kinds: ClassVar[tuple[str, ...]] = tuple(PROMPTS)

    def __post_init__(self) -> None:
        """Refuse an unknown difficulty."""
        check_difficulty(self.name, self.difficulty, LEVELS)

    def draw(self, split: Split, seed: int, index: int) -> Scene:
        """Draw questions of different kinds."""
        generator = scene_generator(f"{self.name}/{self.difficulty}", split, seed, index)
        order = generator.permutation(len(self.kinds))[: self.num_questions]
        questions = [self._ask(generator, self.kinds[int(number)], split) for number in order]
        return Scene(
            scene_id=f"{self.name}/{self.difficulty}/{split}/{seed}:{index}",
            images=(),
            questions=tuple(questions),
            description="",
        )

    def _ask(self, generator: np.random.Generator, kind: str, split: Split) -> Question:
        asked = _ASKERS[kind](generator, LEVELS[self.difficulty], split)
        prompt = pick(generator, PROMPTS[kind][: self.num_phrasings]).format(*asked.about)
        return Question(prompt=prompt, answer=asked.answer, kind=kind, reasoning=asked.reasoning)


@dataclass(frozen=True, slots=True)
class _Asked:
    about: tuple[object, ...]
    answer: str
    reasoning: str | None = None


def is_test_pair(left: int, right: int) -> bool:
    """Whether calculations with two numbers, in either order, belong to the test part."""
    pair = f"{min(left, right)},{max(left, right)}"
    return zlib.crc32(pair.encode()) % _HELD_OUT == 0


def draw_pair(
    generator: np.random.Generator, split: Split, largest: tuple[int, int]
) -> tuple[int, int]:
    """Two numbers of this part, from 0 up to and including the largest."""
    while True:
        left, right = (int(generator.integers(0, most + 1)) for most in largest)
        if is_test_pair(left, right) == (split == "test"):
            return left, right


def _sized(generator: np.random.Generator, largest: int) -> int:
    """A largest number with fewer digits as often as with many, so that small numbers occur."""
    digits = int(generator.integers(1, len(str(largest)) + 1))
    return min(largest, int(10**digits) - 1)


def _add(generator: np.random.Generator, level: Level, split: Split) -> _Asked:
    limits = (_sized(generator, level.largest), _sized(generator, level.largest))
    left, right = draw_pair(generator, split, limits)
    return _Asked((left, right), str(left + right), addition_steps(left, right))


def _subtract(generator: np.random.Generator, level: Level, split: Split) -> _Asked:
    limits = (_sized(generator, level.largest), _sized(generator, level.largest))
    pair = draw_pair(generator, split, limits)
    left, right = max(pair), min(pair)
    return _Asked((left, right), str(left - right), subtraction_steps(left, right))


def _multiply(generator: np.random.Generator, level: Level, split: Split) -> _Asked:
    left, right = draw_pair(generator, split, (level.largest_factor, 9))
    return _Asked((left, right), str(left * right), multiplication_steps(left, right))


def _sum(generator: np.random.Generator, level: Level, split: Split) -> _Asked:
    first, second = draw_pair(generator, split, (9, 9))
    count = int(generator.integers(*_closed(level.list_length)))
    numbers = [first, second, *generator.integers(0, 10, size=count - 2).tolist()]
    return _Asked((_listed(numbers),), str(sum(numbers)), sum_steps(numbers))


def _compare(generator: np.random.Generator, level: Level, split: Split) -> _Asked:
    limit = _sized(generator, level.largest)
    left, right = draw_pair(generator, split, (limit, limit))
    while left == right:
        left, right = draw_pair(generator, split, (limit, limit))
    return _Asked((left, right), "yes" if left > right else "no")


def _sort(generator: np.random.Generator, level: Level, split: Split) -> _Asked:
    limit = _sized(generator, level.largest)
    pair = draw_pair(generator, split, (limit, limit))
    count = int(generator.integers(*_closed(level.list_length)))
    numbers = [*pair, *generator.integers(0, limit + 1, size=count - 2).tolist()]
    return _Asked((_listed(numbers),), _listed(sorted(numbers)))


def _closed(limits: tuple[int, int]) -> tuple[int, int]:
    return limits[0], limits[1] + 1


def _listed(items: list[int] | list[str]) -> str:
    return ", ".join(str(item) for item in items)


def _word(generator: np.random.Generator, level: Level, split: Split) -> str:
    # The length first: otherwise nearly all words would have six letters.
    letters = int(generator.integers(*_closed(level.word_letters)))
    return pick(generator, words_of_length(split, letters, letters))


def spelled(word: str) -> str:
    """A word letter by letter: ``c-a-t``."""
    return "-".join(word)


def _spell(generator: np.random.Generator, level: Level, split: Split) -> _Asked:
    word = _word(generator, level, split)
    return _Asked((word,), spelled(word))


def _num_letters(generator: np.random.Generator, level: Level, split: Split) -> _Asked:
    word = _word(generator, level, split)
    return _Asked((word,), str(len(word)), spelled(word))


def _count_letter(generator: np.random.Generator, level: Level, split: Split) -> _Asked:
    wanted = int(generator.integers(3))  # none, one, or more: equally often
    while True:
        word = _word(generator, level, split)
        letters = sorted(set(word) | set("aeiorstnl"))
        options = [letter for letter in letters if min(2, word.count(letter)) == wanted]
        if options:
            break
    letter = pick(generator, options)
    return _Asked((letter, word), str(word.count(letter)), spelled(word))


def _alphabetical(generator: np.random.Generator, level: Level, split: Split) -> _Asked:
    count = int(generator.integers(*_closed(level.list_length)))
    words = list(dict.fromkeys(_word(generator, level, split) for _ in range(count)))
    return _Asked((_listed(words),), _listed(sorted(words)))


def _reverse(generator: np.random.Generator, level: Level, split: Split) -> _Asked:
    word = _word(generator, level, split)
    return _Asked((word,), word[::-1], spelled(word))


_ASKERS: dict[str, Callable[[np.random.Generator, Level, Split], _Asked]] = {
    "add": _add,
    "subtract": _subtract,
    "multiply": _multiply,
    "sum": _sum,
    "compare": _compare,
    "sort": _sort,
    "spell": _spell,
    "num_letters": _num_letters,
    "count_letter": _count_letter,
    "alphabetical": _alphabetical,
    "reverse": _reverse,
}
