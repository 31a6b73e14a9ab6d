"""Resumed = uninterrupted, bit for bit on a CPU: weights, optimiser, data order, drop path."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest
from tests.processes import killed_after_a_checkpoint
from tests.train.run_folders import crashing_at, differing, logged
from tests.train.small_run import QUIET, small_config, sources, tokenizer

from cascadevl.train.config import TrainConfig
from cascadevl.train.loop import TrainState
from cascadevl.train.pretrain import pretrain
from cascadevl.train.run import TrainResult
from cascadevl.types import Batch

NUM_STEPS = 6


def config(out: Path, **values: Any) -> TrainConfig:
    """Everything that draws at random is on, and every kind of state is in use."""
    return small_config(
        out,
        **{
            "model__precision": "bfloat16",
            "model__drop_path": 0.3,
            "data__increment": "random",
            "data__jpeg": True,
            "optim__name": "muon",
            "run__num_steps": NUM_STEPS,
            "run__eval_interval": 1,
            **values,
        },
    )


def run(out: Path, on_step: Any = None, **values: Any) -> TrainResult:
    return pretrain(
        config(out, **values),
        sources=sources(),
        tokenizer=tokenizer(),
        on_step=on_step,
        console=QUIET,
    )


def run_that_saves_often(out: Path, **values: Any) -> None:
    run(out, run__checkpoint_interval=1, **values)


def losses(out: Path) -> list[tuple[float, float, float]]:
    return [(line["step"], line["loss"], line["grad_norm"]) for line in logged(out)]


def assert_same_run(first: Path, second: Path) -> None:
    assert differing(first, second, NUM_STEPS) == []
    assert losses(first) == losses(second)
    assert len(losses(first)) == NUM_STEPS


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("uninterrupted")
    run(out / "run")
    return out / "run"


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_run_that_crashed_goes_on_as_if_nothing_happened(
    uninterrupted: Path, tmp_path: Path, prefetch: int
) -> None:
    crash = crashing_at(random.Random(prefetch).randrange(3, NUM_STEPS))
    with pytest.raises(MemoryError):
        run(tmp_path / "run", on_step=crash, data__prefetch=prefetch)
    result = run(tmp_path / "run", run__resume=True, data__prefetch=prefetch)
    assert result.finished
    assert_same_run(uninterrupted, tmp_path / "run")


def test_sigterm_finishes_the_step_saves_and_the_run_goes_on(
    uninterrupted: Path, tmp_path: Path
) -> None:
    def ask(state: TrainState[Batch]) -> None:
        if state.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    stopped = run(tmp_path / "run", on_step=ask)
    assert (stopped.finished, stopped.steps, stopped.model_path) == (False, 3, None)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    run(tmp_path / "run", run__resume=True)
    assert_same_run(uninterrupted, tmp_path / "run")


@pytest.mark.slow
def test_a_killed_process_leaves_a_run_that_goes_on(uninterrupted: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    after_s = random.Random(0).uniform(0.0, 0.3)
    killed_after_a_checkpoint(out, run_that_saves_often, out, after_s=after_s)
    run_that_saves_often(out, run__resume=True)
    assert_same_run(uninterrupted, out)
