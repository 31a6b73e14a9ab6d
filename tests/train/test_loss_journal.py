"""The journal of losses: nothing is lost or measured twice, whoever measures and whatever ends."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.train.kill_losses import NUMBER, MadeUp, losses_of
from tests.train.small_run import QUIET

from cascadevl.errors import ConfigError
from cascadevl.train.loss_journal import TileLosses, measured_losses, stored_losses
from cascadevl.train.tile_losses import Losses
from cascadevl.types import Example


class Process:
    """One of several processes, as threads that wait for each other."""

    def __init__(self, index: int, number: int, barrier: threading.Barrier) -> None:
        self.process_index, self.num_processes, self._barrier = index, number, barrier

    def wait_for_everyone(self) -> None:
        self._barrier.wait(timeout=60)


def measured_by(number: int, folder: Path, num_draws: int) -> tuple[list[TileLosses], list[int]]:
    """What so many processes find, and which draws they measured."""
    barrier = threading.Barrier(number)
    seen: list[int] = []

    def measure(examples: Sequence[Example]) -> list[Losses]:
        seen.extend(int(example.record_id) for example in examples)
        return [losses_of(example) for example in examples]

    def work(index: int) -> list[TileLosses]:
        return measured_losses(
            MadeUp(),
            measure,
            Process(index, number, barrier),
            folder=folder,
            settings={"seed": 0},
            num_draws=num_draws,
            chunk=4,
            console=QUIET,
        )

    with ThreadPoolExecutor(number) as pool:
        found = list(pool.map(work, range(number)))
    assert all(each == found[0] for each in found)
    return found[0], seen


def test_any_number_of_processes_goes_on_with_what_is_there(tmp_path: Path) -> None:
    first, seen = measured_by(3, tmp_path / "a", 22)
    assert [each.position for each in first] == list(range(22))
    assert sorted(seen) == [n for n in range(22) if n % 3]
    more, seen = measured_by(2, tmp_path / "a", NUMBER)
    assert sorted(seen) == [n for n in range(22, NUMBER) if n % 3]
    assert more[:22] == first
    alone, _ = measured_by(1, tmp_path / "b", NUMBER)
    assert alone == more
    again, seen = measured_by(1, tmp_path / "a", NUMBER)
    assert (again, seen) == (more, [])
    for each in alone:
        wanted = losses_of(MadeUp()(each.position))
        assert (each.fault == "no_tiles") == (each.position % 3 == 0)
        if not each.fault:
            assert (each.full, each.compressed) == (wanted.full, wanted.compressed)


def test_losses_of_other_settings_are_refused_whoever_wrote_them(tmp_path: Path) -> None:
    measured_by(3, tmp_path, 20)
    (tmp_path / "losses-000.jsonl").unlink()
    (tmp_path / "journal-losses-000.jsonl").unlink()
    with pytest.raises(ConfigError, match="was begun with seed = 0 and cannot go on with 1"):
        stored_losses(tmp_path, {"seed": 1})
    assert stored_losses(tmp_path, {"seed": 0})


def test_a_chunk_that_was_not_noted_is_not_read(tmp_path: Path) -> None:
    measured_by(1, tmp_path, 8)
    with (tmp_path / "losses-000.jsonl").open("a") as file:
        file.write('{"position": 8, "datas')
    assert len(stored_losses(tmp_path, {"seed": 0})) == 8
    _, seen = measured_by(1, tmp_path, 12)
    assert sorted(seen) == [8, 10, 11]


def test_killed_anywhere_it_ends_with_the_same(tmp_path: Path) -> None:
    program = [sys.executable, "-m", "tests.train.kill_losses", str(tmp_path)]
    subprocess.run(program, check=True, cwd=Path(__file__).parents[2], timeout=300)
