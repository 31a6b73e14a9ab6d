"""The questions online RL learns from: their accuracy, and a file that asks them again."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tests.data.some_rollouts import answers, rollout

from cascadevl.data.image import open_image
from cascadevl.data.rollouts import StoredRollouts, open_store
from cascadevl.errors import ConfigError
from cascadevl.tasks.problems import FileProblems
from cascadevl.types import ImageRef, Rollout
from cascadevl.workflows.query_filter import filter_queries


def asked(number: int, right: int, wrong: int, **more: object) -> Rollout:
    drawn = answers([f"r{each}" for each in range(right)], [f"w{each}" for each in range(wrong)])
    return rollout(number, answers=drawn, **more)


def keep(folder: Path, *rollouts: Rollout) -> Path:
    with open_store(folder, {}) as store:
        store.append(rollouts)
    return folder


def test_both_ends_of_the_range_are_kept(tmp_path: Path) -> None:
    counts = [(0, 10), (1, 9), (2, 8), (5, 5), (8, 2), (9, 1), (10, 0)]
    store = keep(tmp_path / "s", *(asked(n, *count) for n, count in enumerate(counts)))
    report = filter_queries(store, tmp_path / "q.jsonl")
    problems = FileProblems(tmp_path / "q.jsonl")
    kept = [problem.problem_id for number in range(3) for problem in problems[number]]
    assert kept == ["q:1:sums:2", "q:2:sums:3", "q:3:sums:4"]
    assert (report.num_kept, report.num_too_hard, report.num_too_easy) == (3, 2, 2)
    assert (report.num_unsolved, report.num_mastered, report.num_open) == (1, 1, 0)
    lines = (tmp_path / "q.jsonl").read_text().splitlines()
    shares = [json.loads(line)["accuracy"] for line in lines]
    assert shares == [0.2, 0.5, 0.8]
    report = filter_queries(store, tmp_path / "r.jsonl", least=0.0, most=0.1)
    assert (report.num_kept, report.num_too_hard, report.num_unsolved) == (2, 0, 0)


def test_answers_of_all_weights_count_together(tmp_path: Path) -> None:
    store = keep(
        tmp_path / "s",
        *(
            asked(1, 0, 4),
            asked(1, 4, 0, weights="w2"),
            asked(2, 1, 7),
            asked(2, 0, 8, weights="w2"),
        ),
    )
    report = filter_queries(store, tmp_path / "q.jsonl")
    assert (report.num_kept, report.num_too_hard) == (1, 1)
    assert json.loads((tmp_path / "q.jsonl").read_text())["id"] == "sums:1"


def test_the_file_asks_the_same_questions_and_checks_them_alike(tmp_path: Path) -> None:
    choices = (("A", "one"), ("B", "two"))
    store = keep(
        tmp_path / "s",
        asked(0, 1, 1),
        asked(1, 1, 1, metric="choice", choices=choices, reference="B"),
        asked(2, 1, 1, metric="relaxed", reference="100"),
    )
    assert filter_queries(store, tmp_path / "q.jsonl").num_kept == 3
    problems = FileProblems(tmp_path / "q.jsonl")
    for number, stored in enumerate(StoredRollouts(store)):
        (problem,) = problems[number]
        assert problem.reference == stored.reference
        assert (problem.metric, problem.choices) == (stored.metric, stored.choices)
        for mine, kept in zip(problem.prompt.parts, stored.prompt[-1].parts, strict=True):
            if isinstance(mine, ImageRef) and isinstance(kept, ImageRef):
                pixels = [np.asarray(open_image(each, source="x")) for each in (mine, kept)]
                np.testing.assert_array_equal(*pixels)
            elif isinstance(kept, str):
                assert mine == kept
    (shown,), (chosen,), (near,) = problems[0], problems[1], problems[2]
    assert isinstance(shown.prompt.parts[0], ImageRef)
    assert chosen.check("two")
    assert not chosen.check("A")
    assert near.check("104")
    assert not near.check("106")


def test_questions_without_a_reference_have_no_accuracy(tmp_path: Path) -> None:
    store = keep(tmp_path / "s", asked(0, 1, 1), asked(1, 0, 2, metric="", reference=""))
    report = filter_queries(store, tmp_path / "q.jsonl")
    assert (report.num_kept, report.num_too_hard, report.num_open) == (1, 0, 1)


@pytest.mark.parametrize(("least", "most"), [(0.8, 0.2), (-0.1, 0.5), (0.5, 1.1)])
def test_an_empty_range_is_refused(tmp_path: Path, least: float, most: float) -> None:
    with pytest.raises(ConfigError, match="range of accuracies"):
        filter_queries(tmp_path, tmp_path / "q.jsonl", least=least, most=most)
