"""Judges steps in processes that are killed: ``python -m ... CHECKPOINT FOLDER``.

A program of its own because it forks, which a process with threads must not.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from tests.killing import attempts, killed
from tests.workflows.some_problems import SAMPLING, Sights, opened

from cascadevl.data.rollouts import open_store
from cascadevl.types import Rollout, SampledAnswer
from cascadevl.workflows.process_config import ProcessConfig
from cascadevl.workflows.process_data import PROCESS, QUESTIONS, make_process_data

NUMBER, KILLS = 24, 10


def stored(folder: Path) -> Path:
    """Solutions of some paragraphs, every other one right."""
    with open_store(folder, {}) as store:
        for place in range(NUMBER):
            (problem,) = Sights(NUMBER)[place]
            answers = tuple(
                SampledAnswer(
                    text="\n\n".join(f"Door {place} {kind} {n}" for n in range(2 + place % 3)),
                    token_ids=(1,),
                    finish_reason="stop",
                    correct=kind == "red",
                    rewards={},
                    reward=0.0,
                )
                for kind in ("red", "blue")
            )
            store.append(
                [
                    Rollout(
                        problem_id=problem.problem_id,
                        prompt=(problem.prompt,),
                        reference=problem.reference,
                        answers=answers,
                        metric="exact",
                    )
                ]
            )
    return folder


def main() -> None:
    torch.set_num_threads(1)
    checkpoint, folder = Path(sys.argv[1]), Path(sys.argv[2])
    backend, processor = opened(checkpoint)
    store = stored(folder / "store")

    def judge(out: Path, tell: Callable[[int], None]) -> None:
        config = ProcessConfig(
            store=store, out=out, num_continuations=3, max_chance=1.0, sampling=SAMPLING
        )
        report = make_process_data(config, processor, backend)
        assert not report.failures
        tell(report.num_solutions)

    parts, before = folder / "parts", 0
    for finished, ended in attempts(lambda tell: judge(parts, tell), KILLS, 0.5, least=3, seed=1):
        now = lines(parts / QUESTIONS)
        assert now >= before, "what was there is there"
        before = now
        if ended:
            assert finished == {2 * NUMBER}
    assert killed(lambda tell: judge(folder / "whole", tell), 300.0)[1]
    for name in (PROCESS, QUESTIONS):
        one, other = (
            sorted((folder / each / name).read_bytes().splitlines()) for each in ("whole", "parts")
        )
        assert one == other, f"{name} is the same as without an interruption"


def lines(path: Path) -> int:
    return len(path.read_bytes().splitlines()) if path.exists() else 0


if __name__ == "__main__":
    main()
