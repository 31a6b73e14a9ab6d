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


SOLUTION = ["<think>\n47 + 28 = 75", "75 - 13 = 62\n</think>", "62"]


@pytest.mark.parametrize(
    ("place", "by", "expected"),
    [
        (0, 10, ["<think>\n47 + 28 = 85", "85 - 13 = 72\n</think>", "72"]),
        (1, -1, ["<think>\n47 + 28 = 75", "75 - 13 = 61\n</think>", "61"]),
        (1, -70, None),
    ],
)
def test_what_follows_a_planted_error_is_calculated_from_it(
    tasks: ModuleType, place: int, by: int, expected: list[str] | None
) -> None:
    assert tasks.with_error(SOLUTION, place, by) == expected


def test_all_is_wrong_from_a_planted_error_on(tasks: ModuleType) -> None:
    rng, solution = np.random.default_rng(0), ["<think>\n47, 28, 13", *SOLUTION]
    solution[1] = solution[1].removeprefix("<think>\n")
    places = set()
    for _ in range(40):
        planted, labels = tasks.plant(solution, rng)
        assert labels == tasks.truth_of(planted, solution)
        places.add(labels.index(False))
    assert places == {1, 2}, "what is read holds no total"


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
