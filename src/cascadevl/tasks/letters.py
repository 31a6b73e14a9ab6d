"""Words put together from letters and taken apart again.

A model that writes words letter by letter must carry any row of letters over, one after the
other, whether it ever met the word or not. Half of what is asked are rows of letters that are
no words at all. Words of the test part (`cascadevl.tasks.words`) never occur in training.
"""

from __future__ import annotations

import string
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from cascadevl.tasks.base import (
    Question,
    Scene,
    Split,
    check_difficulty,
    pick,
    pick_kinds,
    scene_generator,
)
from cascadevl.tasks.text import spelled
from cascadevl.tasks.words import is_test_word, words_of_length

LEVELS = {"word": (1, 1), "line": (2, 3)}
"""Fewest and most words asked about."""

_LENGTHS = (3, 8)

PROMPTS = {
    "join": ("What do these letters make: {}", "Put these letters together: {}"),
    "split": ("Write {} in single letters.", "Take {} apart."),
    "nth_letter": ("What is letter {1} of {0}?", "Which letter of {0} is number {1}?"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Letters:
    """Letters joined and taken apart.

    Attributes:
        px: Not used; there so that every family is set up alike.
        num_questions: At most so many questions a scene, each of another kind.
        difficulty: A key of ``LEVELS``.
        num_phrasings: How many wordings of each question are used.
    """

    px: int = 112
    num_questions: int = 1
    difficulty: str = "word"
    num_phrasings: int = 1
    name: ClassVar[str] = "letters"
    kinds: ClassVar[tuple[str, ...]] = tuple(PROMPTS)

    def __post_init__(self) -> None:
        """Refuse an unknown difficulty."""
        check_difficulty(self.name, self.difficulty, LEVELS)

    def draw(self, split: Split, seed: int, index: int) -> Scene:
        """Draw questions of different kinds, each about words of its own."""
        generator = scene_generator(f"{self.name}/{self.difficulty}", split, seed, index)
        questions = []
        for kind in pick_kinds(generator, self.kinds, self.num_questions):
            words = draw_words(generator, self.difficulty, split)
            prompt = pick(generator, PROMPTS[kind][: self.num_phrasings])
            about, answer = _ASKERS[kind](generator, words)
            questions.append(Question(prompt=prompt.format(*about), answer=answer, kind=kind))
        return Scene(
            scene_id=f"{self.name}/{self.difficulty}/{split}/{seed}:{index}",
            images=(),
            questions=tuple(questions),
            description="",
        )


def draw_words(generator: np.random.Generator, difficulty: str, split: Split) -> list[str]:
    """Words of this part, and as often rows of letters that are none of the other's."""
    fewest, most = LEVELS[difficulty]
    return [_word(generator, split) for _ in range(int(generator.integers(fewest, most + 1)))]


def _word(generator: np.random.Generator, split: Split) -> str:
    length = int(generator.integers(_LENGTHS[0], _LENGTHS[1] + 1))
    if generator.integers(2):
        return pick(generator, words_of_length(split, length, length))
    while True:
        drawn = generator.integers(0, len(string.ascii_lowercase), size=length)
        row = "".join(string.ascii_lowercase[letter] for letter in drawn.tolist())
        if is_test_word(row) == (split == "test"):
            return row


_Asked = tuple[tuple[object, ...], str]


def _join(generator: np.random.Generator, words: list[str]) -> _Asked:
    return (" ".join(map(spelled, words)),), " ".join(words)


def _split(generator: np.random.Generator, words: list[str]) -> _Asked:
    return (" ".join(words),), " ".join(map(spelled, words))


def _nth_letter(generator: np.random.Generator, words: list[str]) -> _Asked:
    word = pick(generator, words)
    number = int(generator.integers(len(word)))
    return (word, number + 1), word[number]


_ASKERS: dict[str, Callable[[np.random.Generator, list[str]], _Asked]] = {
    "join": _join,
    "split": _split,
    "nth_letter": _nth_letter,
}
