"""Chains of calculations: their worked steps, what is held out, and their turns."""

from __future__ import annotations

import re

import pytest

from cascadevl.data.conversation import split_thinking
from cascadevl.tasks.base import Split
from cascadevl.tasks.chains import Chains
from cascadevl.tasks.text import is_test_pair


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_worked_solution_leads_to_its_answer(split: Split) -> None:
    chains = Chains()
    for index in range(60):
        (question,) = chains.draw(split, 1, index).questions
        thinking, answer = split_thinking(question.response("think"))
        steps = thinking.split("\n\n")
        read = steps.pop(0) if question.kind == "column" else None
        start = total = int(steps[0].partition(" ")[0])
        for step in steps:
            left, sign, right, result = re.fullmatch(r"(\d+) ([+-]) (\d+) = (\d+)", step).groups()
            assert int(left) == total
            total += int(right) if sign == "+" else -int(right)
            assert int(result) == total
        assert answer == question.answer == str(total)
        assert question.check(question.response("think"))
        if read is not None:
            numbers = [int(number) for number in read.split(", ")]
            assert (numbers[0], sum(numbers), len(numbers)) == (start, total, 3)
        else:
            pair = [int(number) for number in re.findall(r"\d+", question.prompt)[:2]]
            assert is_test_pair(*pair) == (split == "test")
            assert 3 <= len(re.findall(r"\d+", question.prompt)) <= 5


def test_the_kinds_take_turns_and_signs_occur() -> None:
    chains = Chains()
    questions = [chains.draw("train", 0, index).questions[0] for index in range(90)]
    assert [each.kind for each in questions] == ["sum", "signs", "column"] * 30
    assert any(" - " in each.prompt for each in questions if each.kind == "signs")
    images = [bool(chains.draw("train", 0, index).images) for index in range(3)]
    assert images == [False, False, True]
