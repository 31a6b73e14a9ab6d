from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from cascadevl.errors import TrainingError
from cascadevl.train import checkpoint
from cascadevl.train.checkpoint import Snapshot, check_same_run, latest, load, save


def snapshot(step: int, **changes: Any) -> Snapshot:
    values = Snapshot(
        step=step,
        config={"optim": {"lr": 0.1}},
        world_size=1,
        weights={"w": torch.full((2, 3), float(step), dtype=torch.bfloat16)},
        optimiser={"w.master": torch.arange(6.0).view(3, 2).T, "w.step": torch.tensor(4.0)},
        stream={"cursor": 7, "rows": [[1, 2]]},
        counters={"tokens": 12},
        generators=checkpoint.generator_states(),
        memory={"total": 0.1, "count": 4.0},
    )
    return replace(values, **changes)


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    before = snapshot(3)
    path = save(tmp_path / "runs", before)
    after = load(path)
    assert path.name == "checkpoint-00000003"
    assert (after.step, after.config, after.stream) == (3, before.config, before.stream)
    assert after.counters == {"tokens": 12}
    assert after.memory == {"total": 0.1, "count": 4.0}
    for field in ("weights", "optimiser"):
        tensors: Mapping[str, torch.Tensor] = getattr(after, field)
        assert tensors.keys() == getattr(before, field).keys()
        for name, tensor in getattr(before, field).items():
            assert torch.equal(tensors[name], tensor)
            assert tensors[name].dtype == tensor.dtype


def test_generators_draw_the_same_again(tmp_path: Path) -> None:
    def draw() -> tuple[Any, ...]:
        return (
            torch.rand(3).tolist(),
            random.random(),
            random.gauss(0, 1),
            np.random.standard_normal(),  # noqa: NPY002
        )

    draw()  # an odd number of normal draws: one is kept back in the state
    path = save(tmp_path, snapshot(1, generators=checkpoint.generator_states()))
    expected = draw()
    draw()
    checkpoint.restore_generators(load(path).generators)
    assert draw() == expected


def test_only_json_and_safetensors_are_written(tmp_path: Path) -> None:
    path = save(tmp_path, snapshot(1))
    assert {file.suffix for file in path.iterdir()} == {".json", ".safetensors"}


def test_the_latest_is_found_by_number_and_old_ones_go(tmp_path: Path) -> None:
    assert latest(tmp_path / "nowhere") is None
    for step in (8, 9, 100_000_000, 10):
        save(tmp_path, snapshot(step), keep_last=0)
    assert latest(tmp_path) == tmp_path / "checkpoint-100000000"
    save(tmp_path, snapshot(100_000_001), keep_last=2)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["checkpoint-100000000", "checkpoint-100000001"]


@pytest.mark.parametrize("written", ["nothing", "shared", "all"])
def test_a_half_written_checkpoint_is_never_read_and_is_written_over(
    tmp_path: Path, written: str
) -> None:
    save(tmp_path, snapshot(2))
    later = snapshot(4)
    if written == "nothing":
        checkpoint.partial_path(tmp_path, 4).mkdir()
    else:
        checkpoint.write_shared(tmp_path, later)
        if written == "all":
            checkpoint.write_own(tmp_path, later, rank=0)
    assert latest(tmp_path) == tmp_path / "checkpoint-00000002"
    save(tmp_path, later)
    assert latest(tmp_path) == tmp_path / "checkpoint-00000004"
    assert not list(tmp_path.glob(".*"))


def test_a_step_saved_twice_is_replaced(tmp_path: Path) -> None:
    save(tmp_path, snapshot(2))
    path = save(tmp_path, snapshot(2, stream={"cursor": 99}))
    assert load(path).stream == {"cursor": 99}
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-00000002"]


@pytest.mark.parametrize("name", ["state.json", "weights.safetensors", "rank-00000.json"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str) -> None:
    path = save(tmp_path, snapshot(2))
    content = (path / name).read_bytes()
    (path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(TrainingError, match=name):
        load(path)


def test_differing_settings_are_named_with_both_values_and_free_ones_ignored() -> None:
    saved = {"optim": {"lr": 0.1, "name": "adamw"}, "run": {"out": "a", "seed": 1}}
    now = {"optim": {"lr": 0.2, "name": "adamw"}, "run": {"out": "b", "seed": 1}, "more": 1}
    check_same_run(saved, json.loads(json.dumps(saved)), free=(), path=Path("c"))
    with pytest.raises(TrainingError) as error:
        check_same_run(saved, now, free=("run.out",), path=Path("c"))
    assert "optim.lr was 0.1 and is 0.2" in str(error.value)
    assert "more was None and is 1" in str(error.value)
    assert "run.out" not in str(error.value)


def test_tuples_and_lists_are_the_same_setting() -> None:
    check_same_run({"betas": [0.9, 0.99]}, {"betas": (0.9, 0.99)}, free=(), path=Path("c"))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(3, 2)
        self.head = nn.Linear(2, 3, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("seen", torch.tensor([5.0]))
        self.register_buffer("scratch", torch.zeros(1), persistent=False)


def test_a_tied_weight_is_stored_once_and_buffers_if_they_persist() -> None:
    model, other = Tied(), Tied()
    model.get_buffer("seen").fill_(6.0)
    tensors = checkpoint.model_tensors(model)
    assert tensors.keys() == {"embedding.weight", "seen"}
    checkpoint.load_model_tensors(other, tensors)
    assert torch.equal(other.head.weight, model.head.weight)
    assert other.get_buffer("seen").item() == 6.0


def test_weights_of_another_model_are_refused_by_name() -> None:
    tensors = dict(checkpoint.model_tensors(Tied()))
    with pytest.raises(TrainingError, match=r"embedding\.weight"):
        checkpoint.load_model_tensors(Tied(), {**tensors, "embedding.weight": torch.zeros(1)})
    with pytest.raises(TrainingError, match="extra"):
        checkpoint.load_model_tensors(Tied(), {**tensors, "extra": torch.zeros(1)})


def test_a_new_rank_reads_the_state_of_the_first_and_all_places_are_there(tmp_path: Path) -> None:
    two = snapshot(5, world_size=2)
    checkpoint.write_shared(tmp_path, two)
    for rank in range(2):
        checkpoint.write_own(tmp_path, replace(two, stream={"cursor": rank}), rank)
    path = checkpoint.publish(tmp_path, 5, keep_last=1)
    assert load(path, rank=1).stream == {"cursor": 1}
    assert load(path, rank=2).stream == {"cursor": 0}
    assert load(path, rank=2).world_size == 2
    assert checkpoint.load_streams(path) == [{"cursor": 0}, {"cursor": 1}]
