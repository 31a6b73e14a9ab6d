"""The best router of a run is the one that is kept, and what a run exports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.train.small_router import run, write_start
from torch import nn

import cascadevl
from cascadevl.errors import TrainingError
from cascadevl.train.checkpoint import latest
from cascadevl.train.router import FACTS
from cascadevl.train.router_choice import BEST, BestRouter, merit

Start = tuple[Path, Path]
STEPS = 8
AUCS = {1: 0.6, 2: 0.5, 3: 0.9, 4: 0.9, 5: 0.7, 6: 0.8, 7: 0.4, 8: 0.3}
"""Of examinations that are made up: the third is the best, and the fourth no better."""


def weighing(value: float) -> nn.Linear:
    layer = nn.Linear(2, 2)
    nn.init.constant_(layer.weight, value)
    return layer


def test_the_best_of_all_stays_and_of_equal_ones_the_first(tmp_path: Path) -> None:
    best = BestRouter(tmp_path / BEST, step=0)
    for step, auc in AUCS.items():
        best.offer(step, weighing(step), {"loss": 1.0, "auc": auc})
    trained = weighing(0.0)
    assert best.restore(trained) == 3
    assert torch.equal(trained.weight, weighing(3.0).weight)
    assert [path.name for path in tmp_path.iterdir()] == [BEST]


def test_without_an_area_the_lowest_loss_decides() -> None:
    assert merit({"loss": 0.2}) > merit({"loss": 0.3})
    assert merit({"loss": 0.9, "auc": 0.7}) > merit({"loss": 0.1, "auc": 0.6})


def test_what_was_kept_outlives_the_process(tmp_path: Path) -> None:
    BestRouter(tmp_path / BEST, step=0).offer(4, weighing(4.0), {"loss": 1.0, "auc": 0.8})
    taken_up = BestRouter(tmp_path / BEST, step=2)
    taken_up.offer(3, weighing(3.0), {"loss": 1.0, "auc": 0.7})
    trained = weighing(0.0)
    assert taken_up.restore(trained) == 4
    assert torch.equal(trained.weight, weighing(4.0).weight)
    # A run that begins anew has not seen it.
    assert BestRouter(tmp_path / BEST, step=0).restore(trained) is None


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / BEST).write_bytes(b"torn")
    with pytest.raises(TrainingError, match=r"best_router\.safetensors cannot be read"):
        BestRouter(tmp_path / BEST, step=2)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Start:
    return write_start(tmp_path_factory.mktemp("router"))


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Areas that the examinations to come find, one after the other."""
    areas: list[float] = []

    def examined(*_: Any) -> dict[str, float]:
        return {"loss": 1.0, "auc": areas.pop(0) if areas else 0.0}

    monkeypatch.setattr("cascadevl.train.router.examined", examined)
    return areas


class EndedError(Exception):
    """A process ends here."""


class Seen:
    """Notes the router of each step, and ends the run at one of them."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.routers: dict[int, dict[str, torch.Tensor]] = {}
        self._stop_at = stop_at

    def __call__(self, state: Any) -> None:
        tensors = state.model.state_dict()
        self.routers[state.step] = {name: each.clone() for name, each in tensors.items()}
        if state.step == self._stop_at:
            raise EndedError


def is_exported(out: Path, router: dict[str, torch.Tensor]) -> bool:
    model, _ = cascadevl.load(out / "model", dtype=torch.float32)
    assert model.model.router is not None
    tensors = model.model.router.state_dict()
    return all(torch.equal(tensor, router[name]) for name, tensor in tensors.items())


def chosen_step(out: Path) -> int:
    step: int = json.loads((out / FACTS).read_text("utf-8"))["chosen_step"]
    return step


EVERY = {"run__num_steps": STEPS, "run__eval_interval": 1, "run__checkpoint_interval": 2}


def test_a_run_exports_the_router_of_its_best_examination(
    start: Start, tmp_path: Path, found: list[float]
) -> None:
    seen, out = Seen(), tmp_path / "run"
    found += AUCS.values()
    assert run(out, start, on_step=seen, **EVERY).finished
    assert chosen_step(out) == 3
    assert is_exported(out, seen.routers[3])
    assert not is_exported(out, seen.routers[STEPS])


def test_the_last_router_is_exported_if_it_is_wanted(
    start: Start, tmp_path: Path, found: list[float]
) -> None:
    seen, out = Seen(), tmp_path / "run"
    found += AUCS.values()
    run(out, start, on_step=seen, router__choose="last", **EVERY)
    assert chosen_step(out) == STEPS
    assert is_exported(out, seen.routers[STEPS])
    assert not (out / BEST).exists()


def test_a_run_that_goes_on_chooses_as_one_that_never_stopped(
    start: Start, tmp_path: Path, found: list[float]
) -> None:
    first, out = Seen(stop_at=4), tmp_path / "run"
    areas = list(AUCS.values())
    found += areas
    with pytest.raises(EndedError):
        run(out, start, on_step=first, **EVERY)
    checkpoint = latest(out / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.name.endswith("2"), "the best router is ahead of it"
    found[:] = areas[2:]
    again = Seen()
    assert run(out, start, on_step=again, run__resume=True, **EVERY).finished
    assert chosen_step(out) == 3
    assert is_exported(out, first.routers[3])
    assert is_exported(out, again.routers[3])
