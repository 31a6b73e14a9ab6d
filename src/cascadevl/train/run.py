"""What every recipe does around the loop: begin, take up a run again, save, end.

The recipes stay readable because these steps have names; none of them knows what a stage trains.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from rich.console import Console
from torch import nn

from cascadevl.config import dump_config
from cascadevl.data.processor import CascadeVLProcessor
from cascadevl.data.stream import merge_states, skipped_of
from cascadevl.errors import TrainingError
from cascadevl.model.adapter_files import save_adapter
from cascadevl.model.adapters import fingerprint, has_adapters
from cascadevl.model.loading import save
from cascadevl.model.modeling import CascadeVLForConditionalGeneration
from cascadevl.model.sharding import put_together
from cascadevl.train import checkpoint
from cascadevl.train.checkpoint import Snapshot
from cascadevl.train.config import FREE_KEYS, TrainConfig, plain
from cascadevl.train.log import RunLog, write_facts
from cascadevl.train.loop import TrainState
from cascadevl.train.objective import BatchT
from cascadevl.train.tensor_parts import parts_of

CHECKPOINTS = "checkpoints"
"""Folder of the checkpoints within a run folder."""

MODEL = "model"
"""Folder of the finished model within a run folder."""

ADAPTER = "adapter"
"""Folder of the finished adapter within the folder of a LoRA run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainResult:
    """What a recipe hands back.

    Attributes:
        steps: Updates done.
        finished: Whether the run reached its last step; otherwise it was asked to stop.
        loss: Loss of the last update; None if there was nothing left to do.
        counters: Tokens, tiles and samples seen.
        skipped: Records left out, by data set and kind of fault.
        model_path: The exported model; None where the run was stopped before its end. Of a LoRA
            run the merged model; the adapter, if that was not to be merged.
        adapter_path: The exported adapter of a LoRA run.
    """

    steps: int
    finished: bool
    loss: float | None
    counters: Mapping[str, int]
    skipped: Mapping[tuple[str, str], int]
    model_path: Path | None
    adapter_path: Path | None = None


def begin(seed: int) -> Accelerator:
    """Settle device and processes, and seed what draws at random in each of them.

    Denormal numbers are set to zero on CPUs: AdamW's second moments fall into that range for
    weights that rarely get a gradient, and then each of them costs a hundred cycles.
    """
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    torch.manual_seed(seed + accelerator.process_index)
    if accelerator.device.type == "cpu":
        torch.set_flush_denormal(True)
    return accelerator


def compile_bodies(model: nn.Module, log: RunLog) -> bool:
    """Compile vision tower and language model in place, where a compiler works.

    The wrapper around them is left alone: it looks at token counts, which would break the graph.

    Returns:
        Whether they are compiled. If not, the log says why, and training goes on without.
    """
    try:
        torch.compile(torch.neg)(torch.ones(2))
    except (RuntimeError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        log.message(f"training goes on without torch.compile, which failed here: {reason}")
        return False
    model.get_submodule("model.vision_tower").compile()
    model.get_submodule("model.language_model").compile()
    return True


def saver(config: TrainConfig) -> Callable[[TrainState[BatchT]], Path]:
    """The function that writes a checkpoint of a state, from all its processes together."""
    folder = config.run.out / CHECKPOINTS

    def save(state: TrainState[BatchT]) -> Path:
        accelerator = state.accelerator
        snapshot = Snapshot(
            step=state.step,
            config=_settings(config, state.model),
            world_size=accelerator.num_processes,
            weights=checkpoint.model_tensors(state.model),
            optimiser=state.optimiser.state_dict(),
            stream=state.stream.state_dict(),
            counters=state.counters,
            generators=checkpoint.generator_states(),
            memory=state.memory.state_dict() if state.memory is not None else {},
            parts=parts_of(state.model),
        )
        if accelerator.is_main_process:
            checkpoint.write_shared(folder, snapshot)
        accelerator.wait_for_everyone()
        checkpoint.write_own(folder, snapshot, accelerator.process_index)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            checkpoint.publish(folder, state.step, keep_last=config.run.keep_last)
        accelerator.wait_for_everyone()
        return folder / f"checkpoint-{state.step:08d}"

    return save


def _settings(config: TrainConfig, model: nn.Module) -> dict[str, Any]:
    """What a resumed run must agree with: the configuration, and the base under adapters.

    A checkpoint of adapters is worth nothing on another base.
    """
    base = {"base_fingerprint": fingerprint(model)} if has_adapters(model) else {}
    return plain(config) | base


def older_run(out: Path) -> Path | None:
    """What a run folder holds of a run: its latest checkpoint, its model or adapter, or None."""
    finished = (path for path in (out / MODEL, out / ADAPTER) if path.exists())
    return checkpoint.latest(out / CHECKPOINTS) or next(finished, None)


def spare_older(config: TrainConfig) -> None:
    """Refuse to begin a run in the folder of an older one.

    Raises:
        TrainingError: If there is one and it is not to be resumed.
    """
    older = older_run(config.run.out)
    if older is not None and not config.run.resume:
        raise TrainingError(
            f"{older} is there from an older run; go on with that run with --run.resume true, "
            "or choose another --run.out"
        )


def take_up(state: TrainState[BatchT], config: TrainConfig) -> Path | None:
    """Continue from the latest checkpoint of the run folder, if resuming is asked for.

    On as many processes as before the run goes on bit for bit; on another number it sees the
    same samples, in other batches.

    Returns:
        The checkpoint; None if there is none, or the run is to begin anew.

    Raises:
        TrainingError: If the checkpoint belongs to another configuration or model, or a new run
            would overwrite an old one's checkpoints.
    """
    spare_older(config)
    path = checkpoint.latest(config.run.out / CHECKPOINTS)
    if path is None:
        return None
    snapshot = checkpoint.load(
        path, rank=state.accelerator.process_index, parts=parts_of(state.model)
    )
    settings = _settings(config, state.model)
    checkpoint.check_same_run(snapshot.config, settings, free=FREE_KEYS, path=path)
    checkpoint.load_model_tensors(state.model, snapshot.weights)
    state.optimiser.load_state_dict(snapshot.optimiser)
    state.step, state.counters = snapshot.step, dict(snapshot.counters)
    if state.memory is not None:
        state.memory.load_state_dict(snapshot.memory)
    if snapshot.world_size == state.accelerator.num_processes:
        state.stream.load_state_dict(dict(snapshot.stream))
        checkpoint.restore_generators(snapshot.generators)
    else:
        streams = checkpoint.load_streams(path)
        state.stream.load_state_dict(merge_states(streams))
    return path


@contextmanager
def open_log(
    stage: str, config: TrainConfig, state: TrainState[BatchT], console: Console | None
) -> Iterator[RunLog]:
    """The run's log, its facts written, and the bodies compiled if that is asked for."""
    is_main = state.accelerator.is_main_process
    if is_main:
        write_facts(config.run.out, dump_config(config), seed=config.run.seed)
    with RunLog(
        config.run.out,
        title=stage,
        num_steps=config.run.num_steps,
        first_step=state.step,
        console=console,
        is_main=is_main,
    ) as log:
        if config.lora is not None:
            log.message(trained_share(state.model))
        if state.step:
            log.message(f"{stage} goes on after step {state.step}")
        if config.run.compile:
            compile_bodies(state.model, log)
        yield log


def export(
    state: TrainState[BatchT],
    model: CascadeVLForConditionalGeneration,
    processor: CascadeVLProcessor,
    config: TrainConfig,
    *,
    finished: bool,
    keeps_context: bool = False,
) -> TrainResult:
    """Write the finished model as a folder that `cascadevl.load` opens, and sum up the run.

    The context it was trained for goes with it, so that positions can be fitted into it. A LoRA
    run leaves its adapter, and a model with the adapter merged in unless that is switched off.
    ``keeps_context`` is for runs in which the language half learned nothing.
    """
    skipped = skipped_records(state)
    paths = _folders(config) if finished else {}
    if finished:
        put_together(model, is_main=state.accelerator.is_main_process, dtype=config.model.dtype)
    if finished and state.accelerator.is_main_process:
        if not keeps_context:
            _note_context(model, config)
        for path in paths.values():
            if path.exists():  # of the same run, taken up again after its end
                shutil.rmtree(path)
        if ADAPTER in paths:
            save_adapter(model, paths[ADAPTER], base=str(config.model.path))
        if MODEL in paths:
            save(model, processor, paths[MODEL])
    state.accelerator.wait_for_everyone()
    return TrainResult(
        steps=state.step,
        finished=finished,
        loss=state.metrics.get("loss"),
        counters=dict(state.counters),
        skipped=skipped,
        model_path=paths.get(MODEL, paths.get(ADAPTER)),
        adapter_path=paths.get(ADAPTER),
    )


def _note_context(model: CascadeVLForConditionalGeneration, config: TrainConfig) -> None:
    """Write into a model's configuration what positions it was trained with."""
    model.config.trained_context = max(model.config.trained_context or 0, config.data.max_tokens)
    if config.data.increment == "random":
        model.config.increment = "auto"
    elif config.data.increment != 1:
        model.config.increment = config.data.increment


def _folders(config: TrainConfig) -> dict[str, Path]:
    """The folders a finished run leaves."""
    names = [MODEL] if config.lora is None else [ADAPTER, *[MODEL] * config.lora.merge]
    return {name: config.run.out / name for name in names}


def trained_share(model: nn.Module) -> str:
    """How much of a model is trained, in words."""
    every = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return f"{trained:,} of {every:,} parameters are trained ({trained / every:.2%})"


def skipped_records(state: TrainState[BatchT]) -> dict[tuple[str, str], int]:
    """Records that all processes left out so far, by data set and kind of fault."""
    own = {key: value.count for key, value in skipped_of(state.stream.state_dict()).items()}
    totals: Counter[tuple[str, str]] = Counter()
    every = gather_object([own]) if state.accelerator.num_processes > 1 else [own]
    for counts in every:
        totals.update(counts)
    return dict(totals)
