"""Letters joined and taken apart: answers by other means, and held-out words kept out."""

from __future__ import annotations

import re

import pytest

from cascadevl.tasks.base import Question
from cascadevl.tasks.letters import LEVELS, Letters
from cascadevl.tasks.words import load_words


def right_answer(question: Question) -> str:
    """The answer, made of the prompt alone."""
    match question.kind:
        case "join":
            return question.prompt.partition(": ")[2].replace("-", "")
        case "split":
            words = question.prompt.removeprefix("Write ").removesuffix(" in single letters.")
            return re.sub(r"(?<=[a-z])(?=[a-z])", "-", words)
        case "nth_letter":
            found = re.fullmatch(r"What is letter ([1-8]) of ([a-z]+)\?", question.prompt)
            assert found
            return found[2][int(found[1]) - 1]
    raise AssertionError(question.kind)


@pytest.mark.parametrize("difficulty", sorted(LEVELS))
@pytest.mark.parametrize("split", ["train", "test"])
def test_answers_are_right(difficulty: str, split: str) -> None:
    task = Letters(difficulty=difficulty, num_questions=9)
    for index in range(60):
        questions = task.draw(split, 0, index).questions
        assert sorted(question.kind for question in questions) == sorted(task.kinds)
        for question in questions:
            assert question.answer == right_answer(question)
            assert question.reasoning is None


def joined_words(split: str) -> list[str]:
    task = Letters(difficulty="line", num_questions=9)
    return [
        word
        for index in range(400)
        for question in task.draw(split, 0, index).questions
        if question.kind == "join"
        for word in question.answer.split()
    ]


def test_half_are_words_of_the_part_and_none_of_the_other() -> None:
    for split, other in (("train", "test"), ("test", "train")):
        words = joined_words(split)
        assert {len(word) for word in words} == set(range(3, 9))
        known = set(load_words(split))
        assert sum(word in known for word in words) / len(words) == pytest.approx(0.5, abs=0.06)
        assert not set(words) & set(load_words(other))
