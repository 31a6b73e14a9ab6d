"""Numbers to be found by their sum: one choice alone is right, and what is held out."""

from __future__ import annotations

import re
from itertools import combinations

import pytest

from cascadevl.data.conversation import split_thinking
from cascadevl.tasks.base import Split
from cascadevl.tasks.subset_sum import LEVELS, SubsetSum
from cascadevl.tasks.text import is_test_pair


@pytest.mark.parametrize("difficulty", list(LEVELS))
@pytest.mark.parametrize("split", ["train", "test"])
def test_one_choice_alone_is_right(split: Split, difficulty: str) -> None:
    task = SubsetSum(difficulty=difficulty)
    for index in range(60):
        (question,) = task.draw(split, 1, index).questions
        thinking, answer = split_thinking(question.response("think"))
        steps = thinking.split("\n\n")
        listed = steps.pop(0) if question.kind == "column" else question.prompt
        wanted = int(question.prompt.split()[-1].rstrip("?"))
        numbers = [int(n) for n in re.findall(r"\d+", listed)]
        if question.kind != "column":
            assert numbers.pop() == wanted
        chosen = [int(n) for n in answer.split(", ")]
        assert len(chosen) == (3 if question.kind == "three" else 2)
        right = [each for each in combinations(numbers, len(chosen)) if sum(each) == wanted]
        assert right == [tuple(chosen)]
        assert steps[-1].endswith(f" = {wanted}")
        assert len(steps) == len(chosen) - 1
        assert is_test_pair(*chosen[:2]) == (split == "test")
        assert question.check(", ".join(map(str, reversed(chosen))))
        assert not question.check(", ".join(map(str, [chosen[0], *chosen[:-1]])))


def test_the_kinds_take_turns() -> None:
    scenes = [SubsetSum().draw("train", 0, index) for index in range(6)]
    assert [scene.questions[0].kind for scene in scenes] == ["two", "three", "column"] * 2
    assert [bool(scene.images) for scene in scenes] == [False, False, True] * 2
