"""Samples rollouts in processes that are killed: ``python -m ... CHECKPOINT FOLDER``.

A program of its own because it forks, which a process with threads must not.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from tests.killing import killed
from tests.workflows.some_problems import SAMPLING, Sights, opened

from cascadevl.data.rollouts import ROLLOUTS, StoredRollouts
from cascadevl.workflows.rollouts import RolloutConfig, sample_rollouts

NUMBER, KILLS = 40, 12


def main() -> None:
    torch.set_num_threads(1)
    checkpoint, folder = Path(sys.argv[1]), Path(sys.argv[2])
    backend, processor = opened(checkpoint)

    def sample(out: Path, tell: Callable[[int], None]) -> None:
        config = RolloutConfig(out=out, num_samples=4, sampling=SAMPLING)
        report = sample_rollouts(Sights(NUMBER), config, processor, backend)
        tell(report.num_answered)

    parts, chance = folder / "parts", random.Random(1)
    before = num_killed = 0
    for _ in range(KILLS):
        _, ended = killed(lambda tell: sample(parts, tell), chance.uniform(0.0, 0.5))
        now = len(StoredRollouts(parts)) if (parts / "journal.jsonl").exists() else 0
        assert now >= before, "what was there is there"
        before, num_killed = now, num_killed + (not ended)
    assert num_killed >= 3, "too few attempts were killed"
    finished, ended = killed(lambda tell: sample(parts, tell), 300.0)
    assert ended
    assert finished == {NUMBER - before}, "nothing is sampled twice"
    assert killed(lambda tell: sample(folder / "whole", tell), 300.0)[1]
    one, other = (
        sorted((folder / name / ROLLOUTS).read_bytes().splitlines()) for name in ("whole", "parts")
    )
    assert len(one) == NUMBER
    assert one == other, "the store is the same as without an interruption"


if __name__ == "__main__":
    main()
