"""Checkpoints of a running training: written whole or not at all, safetensors and JSON only.

A checkpoint is a folder ``checkpoint-<step>``. It is written beside its final place, flushed to
the disk and renamed, so that a crash at any moment leaves either the old state or the new one;
what a crash left half-written starts with a dot and is never read. Nothing is pickled, so a
checkpoint of somebody else is safe to open. Of a divided model each process writes its parts, which
any number of processes can read (`cascadevl.train.tensor_parts`).
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from cascadevl.errors import TrainingError
from cascadevl.model.adapters import has_adapters, is_adapter
from cascadevl.model.sharding import own_part
from cascadevl.train.tensor_parts import Parts, read_parts, write_parts

T = TypeVar("T")

WEIGHTS, OPTIMISER = "weights", "optimiser"
"""Files of a checkpoint, one of each; or one a process, with its number, of a divided model."""

_NAME = re.compile(r"checkpoint-(\d{8,})")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Snapshot:
    """Everything a run needs to go on as if it had never stopped.

    Attributes:
        step: Updates done.
        config: The resolved configuration, as plain JSON values.
        world_size: Number of processes of the run.
        weights: Parameters and persistent buffers of the model by name, each tensor once; of a
            model with adapters the adapters alone.
        optimiser: The optimiser's tensors.
        stream: Where this process stands in the data; plain JSON values.
        counters: Totals of the run, such as tokens seen.
        generators: States of the random generators of this process.
        memory: What the objective remembers from step to step; plain JSON values.
        parts: Of a divided model: which rows of each weight this process has; else None.
    """

    step: int
    config: Mapping[str, Any]
    world_size: int
    weights: Mapping[str, Tensor]
    optimiser: Mapping[str, Tensor]
    stream: Mapping[str, Any]
    counters: Mapping[str, int]
    generators: Mapping[str, Any]
    memory: Mapping[str, Any] = field(default_factory=dict)
    parts: Parts | None = None


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, a tied one under its first name only.

    Of a model with adapters these alone: its base does not change, and is where the run began. Of a
    divided model what this process has of them.
    """
    if has_adapters(model):
        return {n: own_part(p.detach()) for n, p in model.named_parameters() if is_adapter(n)}
    tensors: dict[str, Tensor] = dict(model.named_parameters())
    every = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    tensors.update({n: t for n, t in model.state_dict().items() if n not in every})
    return {name: own_part(tensor.detach()) for name, tensor in tensors.items()}


@torch.no_grad()
def load_model_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Write a checkpoint's weights into a model of the same shape.

    Raises:
        TrainingError: If names or shapes differ.
    """
    own = model_tensors(model)
    odd = sorted(set(own) ^ set(tensors))
    odd += [n for n in own if n in tensors and own[n].shape != tensors[n].shape]
    if odd:
        raise TrainingError(
            f"the checkpoint is of another model: {len(odd)} tensors differ in name or shape, "
            f"the first is {odd[0]}; resume with the model the run was started with"
        )
    for name, tensor in own.items():
        tensor.copy_(tensors[name])


def generator_states() -> dict[str, Any]:
    """States of the process's random generators, which drop path and third-party code draw from."""
    kind, words, position, has_normal, normal = np.random.get_state(legacy=True)  # noqa: NPY002
    version, internal, gauss = random.getstate()
    states: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": [kind, np.asarray(words).tolist(), position, has_normal, normal],
        "python": [version, list(internal), gauss],
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_generators(states: Mapping[str, Any]) -> None:
    """Put the process's random generators back into a state of `generator_states`."""
    torch.set_rng_state(states["torch"])
    kind, words, position, has_normal, normal = states["numpy"]
    np.random.set_state(  # noqa: NPY002
        (kind, np.asarray(words, dtype=np.uint32), position, has_normal, normal)
    )
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def partial_path(folder: Path, step: int) -> Path:
    """Where a checkpoint is written before it is complete."""
    return folder / f".checkpoint-{step:08d}.partial"


def write_shared(folder: Path, snapshot: Snapshot) -> None:
    """Write what all processes share: weights, optimiser, configuration. For rank 0."""
    partial = partial_path(folder, snapshot.step)
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    if snapshot.parts is None:
        _write_tensors(partial / f"{WEIGHTS}.safetensors", snapshot.weights)
        _write_tensors(partial / f"{OPTIMISER}.safetensors", snapshot.optimiser)
    facts = {
        "step": snapshot.step,
        "world_size": snapshot.world_size,
        "counters": dict(snapshot.counters),
        "config": snapshot.config,
        "memory": dict(snapshot.memory),
    }
    _write_json(partial / "state.json", facts)


def write_own(folder: Path, snapshot: Snapshot, rank: int) -> None:
    """Write what belongs to one process: its place in the data, its generators, its parts."""
    partial = partial_path(folder, snapshot.step)
    if snapshot.parts is not None and snapshot.parts.is_written:
        for name, tensors in ((WEIGHTS, snapshot.weights), (OPTIMISER, snapshot.optimiser)):
            write_parts(partial / f"{name}-{rank:05d}.safetensors", tensors, snapshot.parts)
    states = {k: v for k, v in snapshot.generators.items() if isinstance(v, Tensor)}
    plain = {k: v for k, v in snapshot.generators.items() if not isinstance(v, Tensor)}
    _write_tensors(partial / f"rank-{rank:05d}.safetensors", states)
    _write_json(partial / f"rank-{rank:05d}.json", {"stream": snapshot.stream, "generators": plain})


def publish(folder: Path, step: int, *, keep_last: int) -> Path:
    """Turn a fully written checkpoint into the latest one, and drop the oldest. For rank 0.

    Args:
        folder: The run's folder of checkpoints.
        step: The step it was written for.
        keep_last: How many to keep; 0 keeps all.
    """
    partial, final = partial_path(folder, step), folder / f"checkpoint-{step:08d}"
    _sync_folder(partial)
    if final.exists():  # a run repeated from an older checkpoint comes by here a second time
        aside = folder / f".{final.name}.old"
        final.rename(aside)
        partial.rename(final)
        shutil.rmtree(aside)
    else:
        partial.rename(final)
    _sync_folder(folder)
    if keep_last:
        for old in _complete(folder)[:-keep_last]:
            shutil.rmtree(old)
    return final


def save(folder: Path, snapshot: Snapshot, *, keep_last: int = 0) -> Path:
    """Write the checkpoint of a run of one process; returns its folder."""
    write_shared(folder, snapshot)
    write_own(folder, snapshot, rank=0)
    return publish(folder, snapshot.step, keep_last=keep_last)


def latest(folder: Path) -> Path | None:
    """The complete checkpoint with the most steps, or None."""
    found = _complete(folder)
    return found[-1] if found else None


def load(path: Path, *, rank: int = 0, parts: Parts | None = None) -> Snapshot:
    """Read a checkpoint as one process of a run sees it.

    A rank that the run did not have gets the place and generators of rank 0, which its caller
    must not use (`load_streams` gives all places, to be divided anew).

    Args:
        path: The checkpoint.
        rank: Of the process.
        parts: Which rows of each weight the process has, if the model is divided.

    Raises:
        TrainingError: If files are missing or damaged.
    """
    state = _read_json(path / "state.json")
    name = f"rank-{rank if rank < state['world_size'] else 0:05d}"
    own = _read_json(path / f"{name}.json")
    weights, optimiser = (
        _read_tensors(path / f"{kind}.safetensors")
        if parts is None
        else _unless_broken(path, partial(read_parts, path, kind, parts))
        for kind in (WEIGHTS, OPTIMISER)
    )
    return Snapshot(
        step=state["step"],
        config=state["config"],
        world_size=state["world_size"],
        weights=weights,
        optimiser=optimiser,
        stream=own["stream"],
        counters=state["counters"],
        generators={**own["generators"], **_read_tensors(path / f"{name}.safetensors")},
        memory=state.get("memory", {}),  # a checkpoint of a stage that remembers nothing
        parts=parts,
    )


def load_streams(path: Path) -> list[dict[str, Any]]:
    """Where every process of the run stood in the data, by rank."""
    return [_read_json(file)["stream"] for file in sorted(path.glob("rank-*.json"))]


def check_same_run(
    saved: Mapping[str, Any], current: Mapping[str, Any], *, free: Sequence[str], path: Path
) -> None:
    """Refuse to go on with settings that would make another run of it.

    Args:
        saved: Configuration in the checkpoint.
        current: Configuration of the run that resumes.
        free: Dotted keys that may differ, such as intervals and folders.
        path: The checkpoint, for the message.

    Raises:
        TrainingError: Naming every key that differs, with both values.
    """
    before, now = _flat(saved), _flat(json.loads(json.dumps(current)))
    differing = [
        f"{key} was {before.get(key)!r} and is {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if key not in free and before.get(key) != now.get(key)
    ]
    if differing:
        raise TrainingError(
            f"{path} cannot be resumed with this configuration: {'; '.join(differing)}; "
            "restore these values, or start a new run in another folder"
        )


def _complete(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    found = [
        (int(match.group(1)), path)
        for path in folder.iterdir()
        if (match := _NAME.fullmatch(path.name)) and (path / "state.json").is_file()
    ]
    return [path for _, path in sorted(found)]


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """``{"optim": {"lr": 1}}`` as ``{"optim.lr": 1}``."""
    if not isinstance(tree, Mapping):
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(_flat(value, f"{prefix}.{key}" if prefix else str(key)))
    return flat


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    safetensors.torch.save_file({n: t.detach().contiguous() for n, t in tensors.items()}, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())


def _read_json(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = _unless_broken(
        path, lambda: json.loads(path.read_text(encoding="utf-8"))
    )
    return value


def _read_tensors(path: Path) -> dict[str, Tensor]:
    return _unless_broken(path, lambda: safetensors.torch.load_file(path))


def _unless_broken(path: Path, read: Callable[[], T]) -> T:
    try:
        return read()
    except (OSError, json.JSONDecodeError, safetensors.SafetensorError) as error:
        raise TrainingError(
            f"{path} cannot be read ({error}); delete this checkpoint and resume from an older one"
        ) from error


def _sync_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk: a rename is not durable before."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
