"""The comparison of best of N: its questions, its planted errors, and its ways to choose."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

PROGRAMS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def tasks() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(PROGRAMS))
        import best_of_n_tasks

        yield best_of_n_tasks


@pytest.fixture(scope="module")
def report() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(PROGRAMS))
        import best_of_n_report

        yield best_of_n_report


PROMPT = "Which three of 4, 7, 2, 9, 5 have the sum 18?"
TRUE = (4, 9, 5)
SOLUTION = ["<think>\n4 + 9 = 13", "13 + 5 = 18\n</think>", "4, 9, 5"]


def test_what_follows_a_planted_number_is_calculated_from_it(tasks: ModuleType) -> None:
    seen = set()
    for seed in range(60):
        planted, labels = tasks.plant(PROMPT, SOLUTION, np.random.default_rng(seed))
        numbers = [int(number) for number in planted[-1].split(", ")]
        (place,) = (
            n for n, (one, other) in enumerate(zip(numbers, TRUE, strict=True)) if one != other
        )
        assert numbers[place] in (7, 2)
        first = numbers[0] + numbers[1]
        assert planted == [
            f"<think>\n{numbers[0]} + {numbers[1]} = {first}",
            f"{first} + {numbers[2]} = {first + numbers[2]}\n</think>",
            ", ".join(map(str, numbers)),
        ]
        assert labels == [place == 2, False, False] == tasks.truth_of(planted, SOLUTION)
        seen.add(place)
    assert seen == {0, 1, 2}


def test_numbers_of_a_picture_are_those_that_are_read(tasks: ModuleType) -> None:
    solution = ["<think>\n11, 16, 4, 5", "16 + 5 = 21\n</think>", "16, 5"]
    prompt = "\nWhich two of the numbers have the sum 21?"
    planted, labels = tasks.plant(prompt, solution, np.random.default_rng(0))
    assert planted[0] == solution[0]
    assert labels == [True, False, False]
    assert set(planted[-1].split(", ")) & {"11", "4"}


def question(**columns: list[Any]) -> dict[str, Any]:
    number = len(columns["right"])
    return {
        "ended": [True] * number,
        "votes": ["a"] * number,
        "likelihood": [0.0] * number,
        "PRM": [[0.5]] * number,
        "ORM": [[0.5]] * number,
    } | columns


ASKED = question(
    right=[False, True, False, False],
    votes=["7", "8", "7", None],
    ended=[True, True, True, False],
    likelihood=[-0.3, -0.2, -0.1, 0.0],
    PRM=[[0.2, 0.3], [0.6, 0.8], [0.9, 0.1], [1.0, 1.0]],
    ORM=[[0.4], [0.3], [0.4], [0.9]],
)


@pytest.mark.parametrize(
    ("arm", "at_two", "at_four"),
    [
        ("vote", [0, 2], 0),
        ("likelihood", [1, 2], 2),
        ("ORM", [0, 2], 0),
        ("PRM", [1, 2], 1),
        ("PRM, its lowest step", [1, 2], 1),
        ("PRM, its last step", [1, 2], 1),
        ("vote weighted by PRM", [1, 2], 0),
    ],
)
def test_what_is_chosen_by_hand(
    report: ModuleType, arm: str, at_two: list[int], at_four: int
) -> None:
    """The fourth answer was cut off: it neither votes nor is taken for its score."""
    choose = report.CHOICES[arm]
    assert [choose(ASKED, hand) for hand in report.hands(4, 2)] == at_two
    assert choose(ASKED, range(4)) == at_four
    assert report.share_right(ASKED, arm, 2) == sum(place == 1 for place in at_two) / 2


def test_an_oracle_finds_what_is_there(report: ModuleType) -> None:
    assert report.share_right(ASKED, "oracle", 2) == 0.5
    assert report.share_right(ASKED, "oracle", 4) == 1.0


def test_intervals_are_of_questions(report: ModuleType) -> None:
    found = report.resampled([1.0] * 50 + [0.0] * 50)
    assert found["percent"] == 50
    half = 196 * (0.25 / 100) ** 0.5
    assert found["low"] == pytest.approx(50 - half, abs=1.5)
    assert found["high"] == pytest.approx(50 + half, abs=1.5)


@pytest.mark.slow
def test_the_program_runs_and_does_nothing_twice(tmp_path: Path) -> None:
    words = [sys.executable, str(PROGRAMS / "best_of_n_arms.py"), "--tiny", "--threads", "1"]
    words += ["--out", str(tmp_path), "--seeds", "0"]
    outputs = []
    for _ in range(2):
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        outputs.append(json.loads(done.stdout.splitlines()[-1]))
        (tmp_path / "seed-0.json").unlink()  # the second time its parts are put together again
    assert outputs[0]["temperatures"] == outputs[1]["temperatures"]
    assert outputs[0]["steps"] == outputs[1]["steps"]
    assert outputs[0]["numbers"] == [2, 4]
    for found in outputs[0]["temperatures"].values():
        scores = found["scores"]
        assert scores["oracle @4"]["percent"] >= scores["PRM @4"]["percent"]
        assert scores["oracle @4"]["percent"] >= scores["pass@1"]["percent"]
