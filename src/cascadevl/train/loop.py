"""The one training loop: collect, weigh, differentiate, reduce, clip, step, record.

All recipes call these functions; there is no trainer class to inherit from. Replicas keep full
copies of the model and add up their float32 gradients once a step, after the last micro-batch:
each already divided its loss by the weight of the whole step, so the sum is the gradient of the
step's loss, whatever the ranks' shares (docs/decisions/0002). A rank without pictures needs no
special case: a gradient that did not come is zero. A divided model adds up its gradients itself,
in the backward pass (`cascadevl.model.sharding`).
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import torch
import torch.distributed
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from cascadevl.errors import ConfigError, TrainingError
from cascadevl.train.log import RunLog
from cascadevl.train.objective import BatchT, Memory, Objective
from cascadevl.train.optim import Optimiser, lr_factor

BatchT_co = TypeVar("BatchT_co", covariant=True)

NAMED_SOURCES = 8
"""How many samples an error about a batch names."""

REDUCED_NUMBERS = 2**25
"""Gradient entries that ranks exchange in one message (128 MiB)."""


@runtime_checkable
class Stream(Protocol[BatchT_co]):
    """An endless iterator of batches that knows where it stands."""

    def __next__(self) -> BatchT_co:
        """The next batch."""

    def state_dict(self) -> dict[str, Any]:
        """Where it stands, as plain JSON values."""

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Go to where a state was taken."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """How long a run goes, and what it leaves where.

    Attributes:
        num_steps: Optimiser steps.
        accumulation: Micro-batches of a step on each process; None for 1, or for as many as
            ``global_batch`` asks for.
        global_batch: Rows of a step on all processes together, as the reports count their
            batches; ``accumulation`` follows from it (`settled`).
        seed: Seed of everything that is drawn.
        out: The run folder.
        resume: Go on from the latest checkpoint in the run folder, if there is one.
        log_interval: Steps between recorded lines.
        eval_interval: Steps between calls of the evaluation that a caller gives; 0 for none.
        checkpoint_interval: Steps between checkpoints; 0 for one at the end only.
        keep_last: Checkpoints to keep; 0 keeps all.
        compile: Compile the two bodies with torch.compile; needs a C++ compiler on a CPU.
    """

    num_steps: int = 8000  # InternVL3.5 SFT scripts; 15000 in the GPT-OSS pre-training
    accumulation: int | None = None
    global_batch: int | None = None
    seed: int = 42  # released SFT and MPO scripts
    out: Path = Path("runs/latest")
    resume: bool = False
    log_interval: int = 10
    eval_interval: int = 0
    checkpoint_interval: int = 200
    keep_last: int = 2
    compile: bool = False

    def __post_init__(self) -> None:
        """Refuse counts that are none."""
        for name in ("num_steps", "accumulation", "global_batch", "log_interval"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"run.{name} is {value}; it must be at least 1")
        if self.accumulation is not None and self.global_batch is not None:
            raise ConfigError(
                f"run.accumulation is {self.accumulation} and run.global_batch "
                f"{self.global_batch}; each decides the size of a step, so set one of them to null"
            )
        for name in ("eval_interval", "checkpoint_interval", "keep_last"):
            if getattr(self, name) < 0:
                raise ConfigError(f"run.{name} is {getattr(self, name)}; use 0 to switch it off")


def settled(config: RunConfig, *, rows: int, num_processes: int) -> RunConfig:
    """The configuration with the accumulation it comes to on some processes.

    What is written into checkpoints stays as it was given: a run that goes on with other processes
    keeps its global batch, and so its steps.

    Args:
        config: As it was given.
        rows: Rows of a micro-batch.
        num_processes: Processes that share a step.

    Raises:
        ConfigError: If the global batch is not a whole number of micro-batches for each process.
    """
    if config.global_batch is None:
        return config
    at_once = rows * num_processes
    accumulation, rest = divmod(config.global_batch, at_once)
    if rest:
        near = [n for n in (config.global_batch - rest, config.global_batch - rest + at_once) if n]
        raise ConfigError(
            f"run.global_batch is {config.global_batch} rows, which are no whole number of "
            f"micro-batches for each of {num_processes} process(es) with batch.rows {rows}; use "
            f"{' or '.join(map(str, near))}, or another number of processes or rows"
        )
    return replace(config, accumulation=accumulation, global_batch=None)


@dataclass(kw_only=True, slots=True)
class TrainState(Generic[BatchT]):
    """What changes while a run goes on.

    Attributes:
        model: The model in training.
        optimiser: Its optimiser.
        stream: Where batches come from.
        accelerator: Device and processes.
        memory: What the objective remembers from step to step, if it does.
        step: Updates done.
        counters: Totals over the run and all processes: tokens, tiles, samples.
        metrics: The values of the last update.
    """

    model: nn.Module
    optimiser: Optimiser
    stream: Stream[BatchT]
    accelerator: Accelerator
    memory: Memory | None = None
    step: int = 0
    counters: dict[str, int] = field(
        default_factory=lambda: {"tokens": 0, "tiles": 0, "samples": 0}
    )
    metrics: dict[str, float] = field(default_factory=dict)


def total(accelerator: Accelerator, values: Sequence[float]) -> list[float]:
    """Sums of some numbers over all processes, in float64."""
    if accelerator.num_processes == 1:
        return list(values)
    numbers = torch.tensor(values, dtype=torch.float64, device=accelerator.device)
    reduced: list[float] = accelerator.reduce(numbers, reduction="sum").tolist()
    return reduced


def largest(accelerator: Accelerator, value: int) -> int:
    """The largest of a number of every process."""
    return max(gather_object([value])) if accelerator.num_processes > 1 else value


def update(
    state: TrainState[BatchT], micro_batches: Sequence[BatchT], objective: Objective[BatchT]
) -> None:
    """Differentiate one step's micro-batches and leave the step's gradient with the optimiser.

    The caller applies it (`Optimiser.step`). ``state.metrics`` and ``state.counters`` are brought
    up to date.

    Raises:
        TrainingError: If a loss or the gradient is not finite, or nothing is to be learned;
            the weights are untouched then.
    """
    accelerator = state.accelerator
    (weight_sum,) = total(accelerator, [sum(objective.weigh(b) for b in micro_batches)])
    if not weight_sum > 0:
        raise TrainingError(
            f"step {state.step + 1} has nothing to learn: its targets weigh {weight_sum}; the "
            f"samples are {_named(micro_batches)}"
        )
    losses: list[Tensor] = []
    metrics: dict[str, Tensor] = {}
    for batch in micro_batches:
        terms = objective.loss(state.model, batch.to(accelerator.device), weight_sum)
        if terms.loss.requires_grad:  # text alone, where only the vision tower is trained
            terms.loss.backward()
        state.optimiser.collect()
        losses.append(terms.loss.detach())
        for name, value in terms.metrics.items():
            metrics[name] = metrics.get(name, torch.zeros_like(value)) + value.detach()
    if accelerator.num_processes > 1 and not state.optimiser.is_divided:
        reduce_gradients(accelerator, state.optimiser.gradients())
    norm = state.optimiser.clip()
    # One transfer from the device a step: a broken step must not reach the weights.
    *shares, norm_value = torch.stack([*losses, *metrics.values(), norm]).double().tolist()
    shares, extras = shares[: len(losses)], shares[len(losses) :]
    _stop_if_broken(state, micro_batches, shares, norm_value)
    counts = {
        "tokens": sum(batch.num_tokens for batch in micro_batches),
        "tiles": sum(batch.num_tiles for batch in micro_batches),
        "samples": sum(len(batch.sources) for batch in micro_batches),
    }
    loss, *sums = total(accelerator, [sum(shares), *extras, *map(float, counts.values())])
    for name, count in zip(counts, sums[len(extras) :], strict=True):
        state.counters[name] += int(count)
    state.metrics = {
        "loss": loss,
        "grad_norm": norm_value,
        **objective.recorded(dict(zip(metrics, sums, strict=False))),
    }


def reduce_gradients(accelerator: Accelerator, gradients: Sequence[Tensor]) -> None:
    """Add up the gradients of all processes, in place and in float32.

    Gradients are joined into long messages: a model has hundreds of small ones.
    """
    if accelerator.num_processes == 1:
        return
    bucket: list[Tensor] = []
    for number, gradient in enumerate(gradients):
        bucket.append(gradient)
        full = sum(g.numel() for g in bucket) >= REDUCED_NUMBERS
        if full or number == len(gradients) - 1:
            joined = torch.cat([g.flatten() for g in bucket])
            torch.distributed.all_reduce(joined)
            for g, piece in zip(bucket, joined.split([g.numel() for g in bucket]), strict=True):
                g.copy_(piece.view_as(g))
            bucket = []


def train(
    state: TrainState[BatchT],
    config: RunConfig,
    objective: Objective[BatchT],
    *,
    log: RunLog,
    save: Callable[[TrainState[BatchT]], object] | None = None,
    on_step: Callable[[TrainState[BatchT]], None] | None = None,
) -> bool:
    """Train until ``config.num_steps``, or until the process is asked to stop.

    SIGINT and SIGTERM let the running step finish, save, and return; a second SIGINT stops at
    once.

    Args:
        state: The state; changed in place.
        config: Length and intervals, `settled`.
        objective: What to minimise.
        log: Where values go.
        save: Writes a checkpoint.
        on_step: Called every ``eval_interval`` steps and at the end, in evaluation mode; it
            may draw random numbers without changing the run.

    Returns:
        Whether the run reached its last step.

    Raises:
        TrainingError: If a step is broken (see `update`) or the data end.
    """
    assert config.global_batch is None, "the recipe has settled it"
    meter = _Meter(dict(state.counters))
    with stop_requests() as stop:
        while state.step < config.num_steps:
            state.model.train()
            update(state, _collect(state, config.accumulation or 1), objective)
            factor = lr_factor(state.step, config.num_steps, state.optimiser.config)
            state.optimiser.step(factor)
            state.optimiser.zero_grad()
            if state.memory is not None:
                state.memory.advance(state.metrics)
            state.step += 1
            is_last = state.step == config.num_steps
            log.advance(state.step)
            if is_last or state.step == 1 or state.step % config.log_interval == 0:
                state.metrics["lr"] = state.optimiser.config.lr * factor
                log.write(state.step, {**state.metrics, **meter.read(state.counters)})
            if on_step and (is_last or due(state.step, config.eval_interval)):
                evaluate(state, on_step)
                meter.restart(state.counters)
            stopping = total(state.accelerator, [float(stop.is_set())])[0] > 0
            if save and (is_last or stopping or due(state.step, config.checkpoint_interval)):
                save(state)
            if stopping and not is_last:
                log.message(
                    f"stopped after step {state.step} of {config.num_steps}, everything is saved; "
                    "run the same command with --run.resume true to go on"
                )
                return False
    return True


@contextmanager
def stop_requests() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set, instead of ending the process, while it is open."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event  # only the main thread may handle signals
        return

    def request(number: int, frame: FrameType | None) -> None:
        del frame
        if event.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        event.set()

    before = {s: signal.signal(s, request) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Meter:
    """Speed since the last reading."""

    def __init__(self, counters: dict[str, int]) -> None:
        self.restart(counters)

    def restart(self, counters: dict[str, int]) -> None:
        self._counters, self._time_s = dict(counters), time.perf_counter()

    def read(self, counters: dict[str, int]) -> dict[str, float]:
        elapsed_s = max(time.perf_counter() - self._time_s, 1e-9)
        rates = {
            f"{name}_per_s": (count - self._counters[name]) / elapsed_s
            for name, count in counters.items()
        }
        self.restart(counters)
        return {**rates, **{name: float(count) for name, count in counters.items()}}


def due(step: int, interval: int) -> bool:
    """Whether something that comes every so many steps comes after this one; never for 0."""
    return interval > 0 and step % interval == 0


def _collect(state: TrainState[BatchT], count: int) -> list[BatchT]:
    """The micro-batches of one step."""
    batches: list[BatchT] = []
    for _ in range(count):
        try:
            batches.append(next(state.stream))
        except StopIteration as end:
            raise TrainingError(
                f"the data ended at step {state.step + 1}; give a stream that repeats, "
                "or fewer steps"
            ) from end
    return batches


def evaluate(state: TrainState[BatchT], on_step: Callable[[TrainState[BatchT]], None]) -> None:
    """Call the evaluation so that the run goes on as if it had not happened."""
    devices = [state.accelerator.device] if state.accelerator.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        state.model.eval()
        on_step(state)
    state.model.train()


def _stop_if_broken(
    state: TrainState[BatchT], batches: Sequence[BatchT], losses: Sequence[float], norm: float
) -> None:
    """Stop on every process if a loss of any of them, or the gradient, is not finite."""
    broken = [b for b, loss in zip(batches, losses, strict=True) if not math.isfinite(loss)]
    (num_broken,) = total(state.accelerator, [float(len(broken))])
    if num_broken == 0 and math.isfinite(norm):
        return
    what = f"the loss is {losses}" if num_broken else f"the gradient's length is {norm}"
    names = [_named(broken if num_broken else batches)]
    if state.accelerator.num_processes > 1:
        names = gather_object(names)
    raise TrainingError(
        f"step {state.step + 1}: {what}; samples: {'; '.join(n for n in names if n)}; look at "
        "these samples, lower the learning rate, or resume from the last checkpoint"
    )


def _named(batches: Sequence[BatchT]) -> str:
    """The samples of some batches, the first few by name."""
    sources = [source for batch in batches for source in batch.sources]
    more = len(sources) - NAMED_SOURCES
    return ", ".join(sources[:NAMED_SOURCES]) + (f" and {more} more" if more > 0 else "")
