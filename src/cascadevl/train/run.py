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
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from cascadevl.config import dump_config
from cascadevl.data.conversation import IMAGE_CONTEXT
from cascadevl.data.processor import CascadeVLProcessor
from cascadevl.data.stream import merge_states, skipped_of
from cascadevl.data.tiling import TilingConfig
from cascadevl.errors import ConfigError, TrainingError
from cascadevl.model.adapter_files import is_adapter_folder, save_adapter
from cascadevl.model.adapters import fingerprint, has_adapters
from cascadevl.model.drop_path import DropPath
from cascadevl.model.loading import find, load, save
from cascadevl.model.modeling import CascadeVLForConditionalGeneration
from cascadevl.model.presets import initialise, micro_config, nano_config
from cascadevl.train import checkpoint
from cascadevl.train.checkpoint import Snapshot
from cascadevl.train.config import FREE_KEYS, ModelConfig, TrainConfig, plain
from cascadevl.train.log import RunLog, write_facts
from cascadevl.train.loop import TrainState
from cascadevl.train.lora import LoraConfig, add_adapters
from cascadevl.train.objective import BatchT
from cascadevl.train.optim import set_precision

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


def from_scratch(
    config: ModelConfig, tokenizer: PreTrainedTokenizerBase | None, *, seed: int
) -> tuple[CascadeVLForConditionalGeneration, CascadeVLProcessor]:
    """A preset with random weights, and its processor.

    Args:
        config: Names the preset, and the folder of its tokenizer.
        tokenizer: Instead of the one in the folder.
        seed: Seed of the weights.

    Raises:
        ConfigError: If there is no tokenizer.
    """
    if tokenizer is None:
        if config.tokenizer is None:
            raise ConfigError(
                f"preset {config.preset!r} has no tokenizer; name its folder with "
                "--model.tokenizer, or start from a model with --model.path"
            )
        tokenizer = AutoTokenizer.from_pretrained(config.tokenizer)
    shape = {"nano": nano_config, "micro": micro_config}[config.preset or "nano"](
        len(tokenizer),
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_CONTEXT),
    )
    model = CascadeVLForConditionalGeneration(shape)
    initialise(model, seed)
    tiling = TilingConfig(
        tile_px=shape.tile_px,
        min_tiles=shape.min_tiles,
        max_tiles=shape.max_tiles,
        thumbnail=shape.use_thumbnail,
    )
    processor = CascadeVLProcessor(
        tokenizer,
        template=shape.template,
        system_message=shape.system_message,
        tiling=tiling,
        tokens_per_tile=shape.tokens_per_tile,
    )
    return model, processor


def start_from(config: ModelConfig) -> tuple[CascadeVLForConditionalGeneration, CascadeVLProcessor]:
    """The model to go on with, and its processor.

    Raises:
        ConfigError: If it is an adapter.
        CheckpointError: If it cannot be opened.
    """
    assert config.path is not None, "the recipe checked it"
    if is_adapter_folder(find(config.path)):
        raise ConfigError(
            f"model.path is {config.path!r}, an adapter; training starts from a model: merge it "
            f"first (cascadevl merge {config.path} --out DIR), or name the merged model beside it"
        )
    dtype = torch.bfloat16 if config.precision == "bfloat16" else torch.float32
    return load(config.path, dtype=dtype)


def make_trainable(
    model: CascadeVLForConditionalGeneration,
    config: ModelConfig,
    accelerator: Accelerator,
    *,
    lora: LoraConfig | None = None,
    seed: int = 0,
) -> None:
    """Bring a model into the state a run wants.

    That is: precision, drop path, frozen parts, adapters, checkpointing, device.

    Args:
        model: The model; changed in place.
        config: What the run wants.
        accelerator: Its device.
        lora: Adapters to train instead of weights.
        seed: Of the adapters' random values.

    Raises:
        ConfigError: If the adapters do not fit the model, or there is nothing to adapt.
    """
    set_precision(model, config.precision)
    if config.drop_path is not None and config.drop_path != model.config.drop_path_rate:
        model.model.drop_path.paused += 1  # for good: another one takes its place
        model.model.drop_path = DropPath(model.model.vision_tower.encoder.layer, config.drop_path)
        model.config.drop_path_rate = config.drop_path
    model.freeze(
        vision="vision" in config.frozen,
        projector="projector" in config.frozen,
        language="language" in config.frozen,
    )
    if lora is not None:
        if config.preset is not None:
            raise ConfigError(
                f"LoRA adapts a trained model, and preset {config.preset!r} starts from random "
                "weights; name a model with --model DIR, or leave --lora out"
            )
        add_adapters(model, lora, frozen=config.frozen, seed=seed)
    if config.gradient_checkpointing:
        model.activation_checkpointing_enable()
    nn.Module.to(model, accelerator.device)
    model.train()


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
    snapshot = checkpoint.load(path, rank=state.accelerator.process_index)
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
