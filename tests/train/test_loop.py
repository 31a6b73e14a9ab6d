from __future__ import annotations

import json
import math
import os
import signal
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from tests.train.small_run import QUIET
from torch import Tensor, nn

from cascadevl.errors import ConfigError, TrainingError
from cascadevl.train.log import RunLog
from cascadevl.train.loop import RunConfig, TrainState, settled, stop_requests, train, update
from cascadevl.train.objective import Objective, Terms
from cascadevl.train.optim import OptimConfig, Optimiser


@dataclass(frozen=True)
class Points:
    """A batch for a line through the origin."""

    x: Tensor
    sources: tuple[str, ...]
    num_tokens: int = 5
    num_tiles: int = 2

    def to(self, device: torch.device | str) -> Points:
        del device
        return self


class Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor([2.0]))


class Stream:
    def __init__(self, make: Callable[[int], Points], length: int = 1000) -> None:
        self.make, self.length, self.cursor = make, length, 0

    def __next__(self) -> Points:
        if self.cursor == self.length:
            raise StopIteration
        self.cursor += 1
        return self.make(self.cursor)

    def state_dict(self) -> dict[str, object]:
        return {"cursor": self.cursor}

    def load_state_dict(self, state: dict[str, object], /) -> None:
        self.cursor = int(str(state["cursor"]))


def points(*values: float, name: str = "points.jsonl:1") -> Points:
    return Points(torch.tensor(values), (name,))


def loss(model: nn.Module, batch: Points, weight_sum: float) -> Terms:
    share = (model.get_parameter("slope") * batch.x).sum() / weight_sum
    return Terms(share, {"largest": batch.x.abs().max() / 2})


OBJECTIVE = Objective(weigh=lambda batch: float(len(batch.x)), loss=loss)


def make_state(make: Callable[[int], Points] = lambda n: points(1.0), **kwargs: int) -> TrainState:
    model = Line()
    optimiser = Optimiser(
        model.named_parameters(),
        OptimConfig(lr=0.1, max_grad_norm=0.0, schedule="constant", warmup_ratio=0.0),
    )
    return TrainState(
        model=model,
        optimiser=optimiser,
        stream=Stream(make, **kwargs),
        accelerator=Accelerator(cpu=True),
    )


def run(state: TrainState, out: Path | None = None, **settings: object) -> bool:
    config = RunConfig(**{"num_steps": 3, "log_interval": 1, **settings})  # type: ignore[arg-type]
    with RunLog(out, title="test", num_steps=config.num_steps, console=QUIET) as log:
        return train(state, config, OBJECTIVE, log=log)


def test_update_divides_by_the_weight_of_the_whole_step_and_adds_shares_up() -> None:
    state = make_state()
    update(state, [points(1.0, 2.0, 3.0), points(10.0)], OBJECTIVE)
    (gradient,) = state.optimiser.gradients()
    assert gradient.item() == pytest.approx((1 + 2 + 3 + 10) / 4)
    assert state.metrics["loss"] == pytest.approx(2.0 * 16 / 4)
    assert state.metrics["largest"] == pytest.approx((3 + 10) / 2)
    assert state.metrics["grad_norm"] == pytest.approx(4.0)
    assert state.counters == {"tokens": 10, "tiles": 4, "samples": 2}


def test_what_is_recorded_is_made_of_the_sums_of_the_whole_step() -> None:
    state = make_state()
    seen: list[dict[str, float]] = []

    def doubled(sums: Mapping[str, float]) -> dict[str, float]:
        seen.append(dict(sums))
        return {f"twice_{name}": 2 * value for name, value in sums.items()}

    update(state, [points(1.0), points(-10.0)], replace(OBJECTIVE, recorded=doubled))
    assert seen == [{"largest": pytest.approx(5.5)}]
    assert state.metrics.keys() == {"loss", "grad_norm", "twice_largest"}
    assert state.metrics["twice_largest"] == pytest.approx(11.0)


class Steps:
    """Remembers the loss of every step that was applied."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def advance(self, metrics: Mapping[str, float]) -> None:
        self.losses.append(metrics["loss"])

    def state_dict(self) -> dict[str, object]:
        return {"losses": self.losses}

    def load_state_dict(self, state: Mapping[str, object], /) -> None:
        raise AssertionError(state)


def test_what_an_objective_remembers_goes_on_once_a_step() -> None:
    state, memory = make_state(lambda n: points(float(n))), Steps()
    state.memory = memory
    run(state, num_steps=2, accumulation=2)
    # slopes 2 and 1.9 (AdamW moves by its rate); micro-batches (1, 2) and (3, 4)
    assert memory.losses == pytest.approx([2.0 * 3 / 2, 1.9 * 7 / 2], rel=1e-3)


def test_a_broken_step_is_not_remembered() -> None:
    state, memory = make_state(lambda n: points(math.nan if n == 2 else 1.0)), Steps()
    state.memory = memory
    with pytest.raises(TrainingError):
        run(state)
    assert len(memory.losses) == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_before_the_weights_and_names_its_samples(
    bad: float,
) -> None:
    state = make_state()
    batches = [points(1.0, name="good.jsonl:1"), points(bad, name="bad.jsonl:7")]
    with pytest.raises(TrainingError) as error:
        update(state, batches, OBJECTIVE)
    assert "step 1" in str(error.value)
    assert "bad.jsonl:7" in str(error.value)
    assert "good.jsonl" not in str(error.value)
    assert state.model.get_parameter("slope").item() == 2.0


def test_a_gradient_that_is_not_finite_stops_too_although_the_loss_is() -> None:
    def root(model: nn.Module, batch: Points, weight_sum: float) -> Terms:
        return Terms((model.get_parameter("slope") * batch.x).sum().sqrt() / weight_sum)

    state = make_state()
    with pytest.raises(TrainingError, match=r"gradient.*points\.jsonl:1"):
        update(state, [points(0.0)], Objective(weigh=OBJECTIVE.weigh, loss=root))


def test_many_samples_are_counted_not_all_named() -> None:
    batch = Points(torch.tensor([math.nan]), tuple(f"s:{n}" for n in range(30)))
    with pytest.raises(TrainingError, match=r"s:7 and 22 more"):
        update(make_state(), [batch], OBJECTIVE)


def test_a_step_without_targets_is_refused() -> None:
    with pytest.raises(TrainingError, match=r"nothing to learn.*points\.jsonl:1"):
        update(make_state(), [Points(torch.zeros(0), ("points.jsonl:1",))], OBJECTIVE)


def test_training_steps_logs_and_takes_accumulated_batches(tmp_path: Path) -> None:
    state = make_state()
    assert run(state, tmp_path, accumulation=2)
    assert state.step == 3
    assert state.stream.state_dict() == {"cursor": 6}
    assert state.model.get_parameter("slope").item() == pytest.approx(1.7, abs=1e-4)
    lines = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    values = [json.loads(line) for line in lines]
    assert [value["step"] for value in values] == [1, 2, 3]
    assert [value["loss"] for value in values] == pytest.approx([2.0, 1.9, 1.8], abs=1e-4)
    assert values[-1]["tokens"] == 3 * 2 * 5
    assert values[-1]["lr"] == pytest.approx(0.1)
    assert (tmp_path / "tensorboard").is_dir()


def test_only_every_so_many_steps_are_logged_saved_and_evaluated(tmp_path: Path) -> None:
    state = make_state()
    saved: list[int] = []
    seen: list[tuple[int, bool]] = []
    config = RunConfig(num_steps=7, log_interval=3, eval_interval=4, checkpoint_interval=5)
    with RunLog(tmp_path, title="test", num_steps=7, console=QUIET) as log:
        train(
            state,
            config,
            OBJECTIVE,
            log=log,
            save=lambda s: saved.append(s.step),
            on_step=lambda s: seen.append((s.step, s.model.training)),
        )
    assert saved == [5, 7]
    assert seen == [(4, False), (7, False)]
    assert state.model.training
    lines = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 3, 6, 7]


def test_evaluation_cannot_change_what_training_draws() -> None:
    def draws(on_step: Callable[[TrainState], None] | None) -> list[float]:
        drawn: list[float] = []

        def noisy(model: nn.Module, batch: Points, weight_sum: float) -> Terms:
            drawn.append(torch.rand(()).item())
            return loss(model, batch, weight_sum)

        torch.manual_seed(3)
        objective = Objective(weigh=OBJECTIVE.weigh, loss=noisy)
        with RunLog(None, title="test", num_steps=3, console=QUIET) as log:
            config = RunConfig(num_steps=3, eval_interval=1)
            train(make_state(), config, objective, log=log, on_step=on_step)
        return drawn

    assert draws(lambda state: torch.manual_seed(0) and None) == draws(None)


def test_data_that_end_are_said_to_end() -> None:
    with pytest.raises(TrainingError, match="ended at step 3"):
        run(make_state(length=2))


def test_sigint_stops_after_the_step_and_a_second_one_at_once() -> None:
    def interrupt(number: int) -> Points:
        if number == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return points(1.0)

    state = make_state(interrupt)
    before = signal.getsignal(signal.SIGINT)  # a shell has background jobs ignore it
    assert run(state) is False
    assert state.step == 2
    assert signal.getsignal(signal.SIGINT) is before
    with stop_requests() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.is_set()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_thread_that_may_not_handle_signals_trains_all_the_same() -> None:
    results: list[bool] = []
    thread = threading.Thread(target=lambda: results.append(run(make_state())))
    thread.start()
    thread.join()
    assert results == [True]


@pytest.mark.parametrize(
    "settings",
    [
        {"num_steps": 0},
        {"accumulation": 0},
        {"global_batch": 0},
        {"eval_interval": -1},
        {"keep_last": -1},
    ],
)
def test_impossible_counts_are_refused(settings: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        RunConfig(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("rows", "num_processes", "accumulation"), [(1, 1, 512), (1, 64, 8), (4, 8, 16), (8, 64, 1)]
)
def test_a_global_batch_is_shared_by_the_processes(
    rows: int, num_processes: int, accumulation: int
) -> None:
    run = settled(RunConfig(global_batch=512), rows=rows, num_processes=num_processes)
    assert run == RunConfig(accumulation=accumulation)


def test_without_a_global_batch_the_accumulation_is_left_alone() -> None:
    for config in (RunConfig(), RunConfig(accumulation=3)):
        assert settled(config, rows=5, num_processes=7) == config


@pytest.mark.parametrize(
    ("rows", "num_processes", "remedy"),
    [(1, 12, "use 504 or 516"), (3, 8, "use 504 or 528"), (1, 513, "use 513,")],
)
def test_a_global_batch_that_cannot_be_shared_is_refused(
    rows: int, num_processes: int, remedy: str
) -> None:
    with pytest.raises(ConfigError, match=remedy) as error:
        settled(RunConfig(global_batch=512), rows=rows, num_processes=num_processes)
    for number in ("run.global_batch is 512", f"{num_processes} process", f"batch.rows {rows}"):
        assert number in str(error.value)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_size_of_a_step_is_given_once(accumulation: int) -> None:
    with pytest.raises(ConfigError, match=f"accumulation is {accumulation} and .*global_batch 512"):
        RunConfig(accumulation=accumulation, global_batch=512)
