"""Notes on disk: what an interrupted attempt noted is there for the next one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cascadevl.workflows import course as course_module
from cascadevl.workflows.course import Course


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in seconds, set by a test."""
    now = [0.0]
    monkeypatch.setattr(course_module.time, "perf_counter", lambda: now[0])
    return now


def test_curves_go_on_through_stages_and_attempts(tmp_path: Path) -> None:
    first = Course(tmp_path / "new" / "course.json")
    first.begin_stage("pretrain", 10)
    first.note("pretrain", 5, {"a": 0.1, "b": 0.2})
    first.note("pretrain", 10, {"a": 0.3, "b": 0.4})
    first.begin_stage("sft", 8)
    first.note("sft", 4, {"a": 0.5, "b": 0.6})

    second = Course(tmp_path / "new" / "course.json")  # nothing of the first is left in memory
    second.begin_stage("pretrain", 10)
    second.begin_stage("sft", 8)
    second.note("sft", 4, {"a": 0.5, "b": 0.6})  # done again from the checkpoint before it
    second.note("sft", 8, {"a": 0.7, "b": 0.8})
    assert second.curves() == {
        "a": [(5, 0.1), (10, 0.3), (14, 0.5), (18, 0.7)],
        "b": [(5, 0.2), (10, 0.4), (14, 0.6), (18, 0.8)],
    }


def test_notes_of_a_stage_of_another_length_are_forgotten(
    tmp_path: Path, clock: list[float]
) -> None:
    old = Course(tmp_path / "course.json")
    old.begin_stage("pretrain", 100)
    clock[0] = 50.0
    old.note("pretrain", 99, {"a": 1.0})
    new = Course(tmp_path / "course.json")
    new.begin_stage("pretrain", 10)
    clock[0] = 51.0
    new.note("pretrain", 5, {"a": 0.1})
    assert new.curves() == {"a": [(5, 0.1)]}
    assert new.seconds == {"pretrain": 1.0}


def test_clocks_go_on_and_overlap(tmp_path: Path, clock: list[float]) -> None:
    first = Course(tmp_path / "course.json")
    first.start("whole")
    clock[0] = 3.0
    first.begin_stage("sft", 4)
    clock[0] = 5.0
    first.note("sft", 1, {"a": 0.0})
    clock[0] = 100.0  # killed here: the last note is what is known

    second = Course(tmp_path / "course.json")
    second.start("whole")
    second.begin_stage("sft", 4)
    clock[0] = 110.0
    second.stop("sft")
    clock[0] = 120.0
    second.stop("whole")
    assert second.seconds == {"whole": 25.0, "sft": 12.0}
    assert Course(tmp_path / "course.json").seconds == second.seconds


def test_saving_leaves_one_whole_file(tmp_path: Path) -> None:
    course = Course(tmp_path / "course.json")
    course.begin_stage("sft", 4)
    course.save()
    assert [path.name for path in tmp_path.iterdir()] == ["course.json"]
    assert json.loads((tmp_path / "course.json").read_text())["num_steps"] == {"sft": 4}


def test_a_stage_without_points_has_no_curve(tmp_path: Path) -> None:
    course = Course(tmp_path / "course.json")
    course.begin_stage("pretrain", 10)
    course.begin_stage("sft", 8)
    course.note("sft", 2, {"a": 0.5})
    assert course.curves() == {"a": [(12, 0.5)]}
