"""What a meta file says beyond the released keys: modality, tasks, streams."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cascadevl.data.meta import DatasetSpec, StreamSpec, TaskSpec, read_meta
from cascadevl.errors import DataError


def write(folder: Path, **entry: Any) -> Path:
    (folder / "a.jsonl").write_text("")
    (folder / "a.parquet").write_text("")
    path = folder / "meta.json"
    path.write_text(json.dumps({"x": entry}))
    return path


def test_modality_task_and_stream_are_read(tmp_path: Path) -> None:
    common: dict[str, Any] = {"name": "x", "root": tmp_path}
    (spec,) = read_meta(write(tmp_path, annotation="a.jsonl", modality="text"))
    assert spec == DatasetSpec(annotation=tmp_path / "a.jsonl", modality="text", **common)

    task = {"settings": {"difficulty": "one"}, "stage": "pretrain", "split": "test", "seed": 3}
    (spec,) = read_meta(write(tmp_path, annotation="task:shapes", task=task, length=50))
    wanted = TaskSpec(
        name="shapes", settings={"difficulty": "one"}, stage="pretrain", split="test", seed=3
    )
    assert (spec.annotation, spec.length, spec.task) == (Path("task:shapes"), 50, wanted)
    (spec,) = read_meta(write(tmp_path, annotation="task:text", length=1))
    assert spec.task == TaskSpec(name="text")
    assert (spec.task.stage, spec.task.style, spec.task.split) == ("sft", "steps", "train")

    (spec,) = read_meta(write(tmp_path, annotation="a.parquet", stream=True, length=9))
    assert (spec.annotation, spec.stream) == (tmp_path / "a.parquet", StreamSpec())
    hub = {"lanes": 4, "buffer": 9, "subset": "en", "split": "all", "revision": "abc"}
    (spec,) = read_meta(write(tmp_path, annotation="hub:some/set", stream=hub, length=9))
    assert (spec.annotation, spec.stream) == (Path("hub:some/set"), StreamSpec(**hub))
    for none in (False, None):
        (spec,) = read_meta(write(tmp_path, annotation="a.parquet", stream=none))
        assert spec.stream is None


@pytest.mark.parametrize(
    ("entry", "field", "words"),
    [
        ({"annotation": "a.jsonl", "modality": "image"}, "x.modality", "write text or multimodal"),
        ({"annotation": "a.jsonl", "task": {}}, "x.task", "the annotation names no task"),
        ({"annotation": "task:text"}, "x.length", "number of scenes of a task is known from no"),
        ({"annotation": "task:text", "length": 0}, "x.length", "is 0"),
        (
            {"annotation": "task:text", "length": 1, "task": {"stlye": "x"}},
            "x.task.stlye",
            "did you mean 'style'?",
        ),
        (
            {"annotation": "task:text", "length": 1, "task": {"settings": 3}},
            "x.task.settings",
            "write an object",
        ),
        (
            {"annotation": "task:text", "length": 1, "task": {"seed": -1}},
            "x.task.seed",
            "is -1",
        ),
        (
            {"annotation": "task:text", "length": 1, "task": {"stage": 5}},
            "x.task.stage",
            "is 5; give a word",
        ),
        ({"annotation": "task:text", "length": 1, "task": 4}, "x.task", "write an object with"),
        ({"annotation": "hub:some/set", "length": 1}, "x.stream", 'write "stream": true'),
        ({"annotation": "a.parquet", "stream": True}, "x.length", "number of records of a stream"),
        ({"annotation": "a.parquet", "stream": True, "length": True}, "x.length", "is True"),
        ({"annotation": "a.jsonl", "stream": True, "length": 1}, "x.stream", "nothing to stream"),
        ({"annotation": "task:text", "stream": True, "length": 1}, "x.stream", "leave it out"),
        (
            {"annotation": "a.parquet", "stream": {"lane": 2}, "length": 1},
            "x.stream.lane",
            "did you mean 'lanes'?",
        ),
        (
            {"annotation": "a.parquet", "stream": {"buffer": 0}, "length": 1},
            "x.stream.buffer",
            "is 0",
        ),
        ({"annotation": "a.parquet", "stream": 3, "length": 1}, "x.stream", "is 3"),
    ],
)
def test_wrong_values_are_named(
    tmp_path: Path, entry: dict[str, Any], field: str, words: str
) -> None:
    with pytest.raises(DataError) as caught:
        read_meta(write(tmp_path, **entry))
    assert (caught.value.kind, caught.value.field) == ("bad_meta", field)
    assert words in str(caught.value)
