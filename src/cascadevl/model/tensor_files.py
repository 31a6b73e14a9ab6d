"""Safetensors files of a checkpoint, read tensor by tensor and written shard by shard.

Nothing here needs more memory than the tensors of one shard, and nothing is ever unpickled:
a checkpoint that only has ``pytorch_model.bin`` files is refused.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cascadevl.errors import CheckpointError
from cascadevl.model.checkpoint_names import Reader

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MAX_SHARD_BYTES = 5_000_000_000

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, slots=True)
class TensorFiles:
    """The tensors of a checkpoint folder.

    Attributes:
        path: The folder.
        places: The file that holds each tensor.
    """

    path: Path
    places: Mapping[str, Path]
    _handles: dict[Path, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path) -> TensorFiles:
        """Find the tensors of a folder, in one file or several with or without an index.

        Raises:
            CheckpointError: If there are no safetensors files, one named in the index is missing,
                or one cannot be read.
        """
        files = sorted(path.glob("*.safetensors"))
        index = path / INDEX_NAME
        if index.is_file():
            files = _files_of_index(path, index)
        if not files:
            raise CheckpointError(_nothing_to_read(path))
        opened = cls(path, {}, {})
        places: dict[str, Path] = {}
        for file in files:
            for name in opened._open(file).keys():  # noqa: SIM118 (not a dict)
                if name in places:
                    raise CheckpointError(
                        f"{path}: tensor {name!r} is in both {places[name].name} and {file.name}; "
                        "files of two checkpoints seem to be mixed: remove one set"
                    )
                places[name] = file
        return cls(path, places, opened._handles)

    def read(self, name: str) -> Tensor:
        """The tensor of that name, backed by its file until something copies it."""
        handle = self._open(self.places[name])
        tensor: Tensor = handle.get_tensor(name)
        return tensor

    def outline(self, name: str) -> Tensor:
        """The tensor's shape and type without its values: a tensor on the ``meta`` device."""
        part = self._open(self.places[name]).get_slice(name)
        return torch.empty(part.get_shape(), dtype=_DTYPES[part.get_dtype()], device="meta")

    def _open(self, file: Path) -> Any:
        if file not in self._handles:
            try:
                self._handles[file] = safe_open(file, framework="pt")  # type: ignore[no-untyped-call]
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"{file}: not a readable safetensors file ({error}); is the download complete?"
                ) from error
        return self._handles[file]


def plan_shards(names: list[str], outline: Reader, max_shard_bytes: int) -> list[list[str]]:
    """Group tensors, in their order, into shards of at most so many bytes.

    A tensor larger than that gets a shard of its own.
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for name in names:
        size = outline(name).nbytes
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def write_tensors(
    path: Path, names: list[str], read: Reader, outline: Reader, *, max_shard_bytes: int
) -> None:
    """Write tensors into a folder, one shard in memory at a time, with an index if several.

    Args:
        path: An existing folder.
        names: What to write, in this order.
        read: Gives a tensor.
        outline: Gives a tensor's shape and type on the ``meta`` device.
        max_shard_bytes: Largest size of a file.
    """
    shards = plan_shards(names, outline, max_shard_bytes)
    weight_map: dict[str, str] = {}
    total_bytes = 0
    for number, shard in enumerate(shards, start=1):
        several = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        file_name = several if len(shards) > 1 else SINGLE_NAME
        tensors = {name: read(name).contiguous() for name in shard}
        save_file(tensors, path / file_name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file_name))
        total_bytes += sum(tensor.nbytes for tensor in tensors.values())
        del tensors  # or the next shard would be read while this one is still in memory
    if len(shards) > 1:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        (path / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill beside ``path``, which takes its name only when all went well.

    Raises:
        CheckpointError: If ``path`` exists and is not an empty folder.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise CheckpointError(
            f"{path} exists and is not empty; nothing is overwritten: name another folder or "
            "remove this one"
        )
    unfinished = path.with_name(path.name + ".tmp")
    if unfinished.exists():
        shutil.rmtree(unfinished)  # left behind by a run that was killed
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        if path.exists():
            path.rmdir()
        unfinished.rename(path)
    finally:
        if unfinished.exists():
            shutil.rmtree(unfinished)


def _files_of_index(path: Path, index: Path) -> list[Path]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted({path / file_name for file_name in weight_map.values()})
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: not an index of safetensors files ({error})") from error
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise CheckpointError(
            f"{path}: {len(missing)} of {len(files)} files named in {index.name} are missing, "
            f"first {missing[0]}; is the download complete?"
        )
    return files


def _nothing_to_read(path: Path) -> str:
    pickles = sorted([*path.glob("*.bin"), *path.glob("*.pth"), *path.glob("*.pt")])
    if not pickles:
        return (
            f"{path}: no *.safetensors files; is this the folder of a checkpoint, and were its "
            "weights downloaded too?"
        )
    return (
        f"{path}: only pickled weights ({pickles[0].name}), which run code when opened and are "
        "refused; convert them once where you trust them: "
        "safetensors.torch.save_file(torch.load('pytorch_model.bin', weights_only=True), "
        "'model.safetensors')"
    )
