"""Text questions: every answer is computed again from the prompt, and test pairs are held out."""

from __future__ import annotations

import re

import numpy as np
import pytest

from cascadevl.tasks.base import Question
from cascadevl.tasks.text import LEVELS, Text, draw_pair, is_test_pair
from cascadevl.tasks.words import load_words


def right_answer(question: Question) -> str:
    """The answer by other means than the task's."""
    prompt = question.prompt.rstrip("?.")
    numbers = [int(number) for number in re.findall(r"[0-9]+", prompt)]
    match question.kind:
        case "add" | "subtract" | "multiply":
            return str(eval(prompt.removeprefix("What is ")))
        case "sum":
            return str(sum(numbers))
        case "compare":
            return "yes" if numbers[0] > numbers[1] else "no"
        case "sort":
            return ", ".join(str(number) for number in sorted(numbers))
        case "spell":
            return "-".join(prompt.split()[-1])
        case "num_letters":
            return str(len(prompt.split()[-1]))
        case "count_letter":
            words = prompt.split()
            return str(words[-1].count(words[3]))
        case "alphabetical":
            return ", ".join(sorted(prompt.split(": ")[1].split(", ")))
        case "reverse":
            return "".join(reversed(prompt.split()[1]))
    raise AssertionError(question.kind)


@pytest.mark.parametrize("difficulty", sorted(LEVELS))
@pytest.mark.parametrize("split", ["train", "test"])
def test_answers_are_right(difficulty: str, split: str) -> None:
    task = Text(difficulty=difficulty, num_questions=20)
    for index in range(60):
        for question in task.draw(split, 0, index).questions:
            assert question.answer == right_answer(question), question


def test_words_and_pairs_are_held_out() -> None:
    task = Text(difficulty="full", num_questions=20)
    for split in ("train", "test"):
        words = set(load_words(split))
        for index in range(60):
            for question in task.draw(split, 1, index).questions:
                if question.kind in ("spell", "num_letters"):
                    assert question.prompt.rstrip("?.").split()[-1] in words
                if question.kind in ("add", "multiply", "subtract"):
                    left, right = re.findall(r"[0-9]+", question.prompt)[:2]
                    assert is_test_pair(int(left), int(right)) is (split == "test")


def test_both_orders_of_a_pair_are_in_the_same_part() -> None:
    pairs = [(left, right) for left in range(60) for right in range(60)]
    assert all(is_test_pair(*pair) is is_test_pair(*reversed(pair)) for pair in pairs)
    assert sum(is_test_pair(*pair) for pair in pairs) / len(pairs) == pytest.approx(0.1, abs=0.03)


def test_pairs_stay_within_their_limits() -> None:
    generator = np.random.default_rng(0)
    pairs = [draw_pair(generator, "train", (9, 99)) for _ in range(500)]
    assert {left for left, _ in pairs} == set(range(10))
    assert 90 < max(right for _, right in pairs) <= 99
