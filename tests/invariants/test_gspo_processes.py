"""A GSPO run of two processes: the questions of one, shared, and the same updates."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.processes import shared_by
from tests.train import small_gspo
from tests.train.run_folders import logged

NUM_STEPS = 4


def run(out: Path, start: Path) -> None:
    small_gspo.run(out, start, run__num_steps=NUM_STEPS, run__checkpoint_interval=0)


@pytest.mark.slow
def test_two_processes_make_the_updates_of_one(tmp_path: Path) -> None:
    start = small_gspo.write_start(tmp_path)
    run(tmp_path / "one", start)
    shared_by(2, run, tmp_path / "two", start)
    one, two = (logged(tmp_path / name) for name in ("one", "two"))
    assert len(one) == len(two) == NUM_STEPS
    for alone, together in zip(one[:2], two[:2], strict=True):  # the very same first answers
        assert together["loss"] == pytest.approx(alone["loss"], abs=1e-5)
        assert together["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-3)
    assert two[1]["reward"] == pytest.approx(one[1]["reward"])
    assert two[1]["skipped_groups"] == pytest.approx(one[1]["skipped_groups"])
    assert two[0]["ratio"] == pytest.approx(1.0, abs=1e-12)
