"""Samples rollouts in processes that are killed: ``python -m ... CHECKPOINT FOLDER``.

A program of its own because it forks, which a process with threads must not.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from tests.killing import attempts, killed
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

    parts, before = folder / "parts", 0
    for finished, ended in attempts(lambda tell: sample(parts, tell), KILLS, 0.5, least=3, seed=1):
        if ended:
            assert finished == {NUMBER - before}, "nothing is sampled twice"
        now = len(StoredRollouts(parts)) if (parts / "journal.jsonl").exists() else 0
        assert now >= before, "what was there is there"
        before = now
    assert killed(lambda tell: sample(folder / "whole", tell), 300.0)[1]
    one, other = (
        sorted((folder / name / ROLLOUTS).read_bytes().splitlines()) for name in ("whole", "parts")
    )
    assert len(one) == NUMBER
    assert one == other, "the store is the same as without an interruption"


if __name__ == "__main__":
    main()
