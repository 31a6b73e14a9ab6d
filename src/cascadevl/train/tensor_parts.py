"""Parts of tensors in files: each process writes the rows it has, any number of them reads them.

A file tells of each tensor which rows of the whole it holds, so that a run may go on with other
processes than it stopped with. Rows are those of the first axis, along which FSDP2 divides.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor, nn

from cascadevl.errors import TrainingError
from cascadevl.model.sharding import is_written_here, own_rows

_KEY = "first rows"


@dataclass(frozen=True, slots=True)
class Parts:
    """Which rows of each divided parameter a process has.

    Attributes:
        rows: First row and the one behind the last, by the parameter's name.
        is_written: Whether this process writes them; of equal copies the first does.
    """

    rows: Mapping[str, tuple[int, int]]
    is_written: bool

    def of(self, name: str, tensor: Tensor | None = None) -> tuple[int, int] | None:
        """The rows of a parameter or of what an optimiser keeps of it; None if it is whole.

        Args:
            name: Of the parameter, or ``parameter.key``.
            tensor: What is kept; one without axes, as a count of steps, is whole.
        """
        if tensor is not None and tensor.ndim == 0:
            return None
        return self.rows.get(name) or self.rows.get(name.rpartition(".")[0])


def parts_of(model: nn.Module) -> Parts | None:
    """Which rows this process has of a divided model's parameters; None of another model."""
    rows = {name: own_rows(parameter) for name, parameter in model.named_parameters()}
    divided = {name: place for name, place in rows.items() if place is not None}
    if not divided:
        return None
    return Parts(divided, all(is_written_here(each) for each in model.parameters()))


def write_parts(path: Path, tensors: Mapping[str, Tensor], parts: Parts) -> None:
    """Write what a process has, and flush it to the disk.

    Args:
        path: File to make.
        tensors: Its parts, and what every process has whole.
        parts: Which rows they are.
    """
    places = {name: parts.of(name, tensor) for name, tensor in tensors.items()}
    firsts = {name: place[0] for name, place in places.items() if place is not None}
    safetensors.torch.save_file(
        {name: tensor.detach().contiguous() for name, tensor in tensors.items()},
        path,
        metadata={_KEY: json.dumps(firsts)},
    )
    with path.open("rb") as file:
        os.fsync(file.fileno())


def read_parts(folder: Path, kind: str, parts: Parts) -> dict[str, Tensor]:
    """Read what a process needs, from the files of all processes that wrote.

    Args:
        folder: Of the files.
        kind: What their names begin with.
        parts: Which rows the process needs.

    Raises:
        TrainingError: If rows are in no file.
        SafetensorError: If a file is damaged.
    """
    found: dict[str, list[tuple[int, Tensor]]] = {}
    for path in sorted(folder.glob(f"{kind}-*.safetensors")):
        for name, first, rows in _overlapping(path, parts):
            found.setdefault(name, []).append((first, rows))
    return {name: _joined(name, pieces, parts, folder) for name, pieces in found.items()}


def _overlapping(path: Path, parts: Parts) -> Iterator[tuple[str, int, Tensor]]:
    """What a file has of the rows that are needed: name, first row in the whole, rows."""
    with safe_open(path, "pt") as file:
        firsts: dict[str, int] = json.loads(file.metadata()[_KEY])
        for name in file.keys():  # noqa: SIM118  # no mapping
            place = parts.of(name)
            if name not in firsts or place is None:  # whole; or of another model, as will be seen
                yield name, 0, file.get_tensor(name)
                continue
            piece, first = file.get_slice(name), firsts[name]
            begin, end = max(place[0], first), min(place[1], first + piece.get_shape()[0])
            if begin < end:
                yield name, begin, piece[begin - first : end - first]
            elif place[0] == place[1]:  # fewer rows than processes
                yield name, place[0], file.get_tensor(name)[:0]


def _joined(name: str, pieces: list[tuple[int, Tensor]], parts: Parts, folder: Path) -> Tensor:
    """The rows of all files as one tensor."""
    place = parts.of(name, pieces[0][1])
    if place is None or place[0] == place[1]:
        return pieces[0][1]
    pieces = sorted(pieces, key=lambda each: each[0])
    joined = torch.cat([rows for _, rows in pieces])
    if pieces[0][0] != place[0] or len(joined) != place[1] - place[0]:
        raise TrainingError(
            f"{folder} has {len(joined)} of the rows {place[0]} to {place[1]} of {name}: files are "
            "missing; copy those of all processes there, or resume from an older checkpoint"
        )
    return joined
