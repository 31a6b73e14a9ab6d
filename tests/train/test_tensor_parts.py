"""Parts of tensors in files: written by some processes, read by any number of others."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from cascadevl.errors import TrainingError
from cascadevl.train.tensor_parts import Parts, parts_of, read_parts, write_parts

WHOLE = {
    "matrix": torch.arange(35.0).view(7, 5),
    "short": torch.tensor([3.0]),
    "matrix.exp_avg": torch.arange(35.0).view(7, 5) / 9,
    "matrix.step": torch.tensor(4.0),
    "buffer": torch.tensor([1, 2]),
}
DIVIDED = ("matrix", "short")


def rows(number: int, rank: int) -> Parts:
    """Which rows a process has, as torch.chunk gives them."""
    places = {}
    for name in DIVIDED:
        length = len(WHOLE[name])
        share = -(-length // number)
        places[name] = min(rank * share, length), min((rank + 1) * share, length)
    return Parts(places, is_written=True)


def cut(parts: Parts) -> dict[str, Tensor]:
    cut = {}
    for name, tensor in WHOLE.items():
        place = parts.of(name, tensor)
        cut[name] = tensor if place is None else tensor[slice(*place)]
    return cut


def write(folder: Path, number: int) -> None:
    for rank in range(number):
        parts = rows(number, rank)
        write_parts(folder / f"weights-{rank:05d}.safetensors", cut(parts), parts)


@pytest.mark.parametrize("writers", [1, 2, 3, 8])
@pytest.mark.parametrize("readers", [1, 2, 4, 9])
def test_any_number_of_processes_reads_what_others_wrote(
    tmp_path: Path, writers: int, readers: int
) -> None:
    write(tmp_path, writers)
    for rank in range(readers):
        parts = rows(readers, rank)
        read, expected = read_parts(tmp_path, "weights", parts), cut(parts)
        assert read.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(read[name], tensor), name
            assert read[name].dtype == tensor.dtype


def test_missing_files_are_named_with_the_rows(tmp_path: Path) -> None:
    write(tmp_path, 3)
    (tmp_path / "weights-00001.safetensors").unlink()
    with pytest.raises(TrainingError, match=r"has 4 of the rows 0 to 7 of matrix.*missing"):
        read_parts(tmp_path, "weights", rows(1, 0))


def test_a_damaged_file_is_one(tmp_path: Path) -> None:
    write(tmp_path, 2)
    (tmp_path / "weights-00001.safetensors").write_bytes(b"no tensors")
    with pytest.raises(safetensors.SafetensorError):
        read_parts(tmp_path, "weights", rows(1, 0))


def test_a_model_that_nobody_divided_has_no_parts() -> None:
    assert parts_of(nn.Linear(2, 2)) is None
