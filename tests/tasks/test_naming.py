"""Tasks named in a meta file are the tasks set up in code."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cascadevl.data.meta import DatasetSpec, TaskSpec
from cascadevl.data.mixture import WeightedSource
from cascadevl.data.records import JsonlSource
from cascadevl.data.source import Source
from cascadevl.errors import ConfigError
from cascadevl.tasks.base import TaskSource, to_record
from cascadevl.tasks.charts import Charts
from cascadevl.tasks.naming import held_out, open_entry, task_named, task_of, weighted
from cascadevl.tasks.needle import Needle
from cascadevl.tasks.shapes import Shapes


def spec(name: str = "shapes", *, settings: dict[str, Any] | None = None, **task: Any):
    made = TaskSpec(name=name, settings=settings or {}, **task)
    return DatasetSpec(
        name="mine", annotation=Path(f"task:{name}"), root=Path(), length=40, task=made
    )


def test_an_entry_draws_what_the_task_draws() -> None:
    settings = {"difficulty": "easy", "num_questions": 2, "px": 56}
    entry = spec(settings=settings, stage="pretrain", style="short", seed=9)
    source = open_entry(replace(entry, max_dynamic_patch=2, data_augment=True))
    assert isinstance(source, Source)
    assert (source.name, len(source)) == ("mine", 40)
    task = Shapes(difficulty="easy", num_questions=2, px=56)
    scene = task.draw("train", 9, 17)
    wanted = to_record(scene, task="mine", stage="pretrain", style="short")
    found = source[17]
    assert (found.record_id, found.dataset) == (wanted.record_id, "mine")
    assert [[turn.text for turn in b] for b in found.branches] == [
        [turn.text for turn in b] for b in wanted.branches
    ]
    assert (found.max_tiles, found.augment) == (2, True)
    # a list of a JSON file is the tuple that the task wants
    assert task_of(spec("needle", settings={"num_pictures": [2, 3]})) == Needle(num_pictures=(2, 3))


def test_what_an_entry_weighs(tmp_path: Path) -> None:
    entry = replace(spec(), repeat_time=2.5, modality="multimodal")
    found = weighted(entry)
    assert (found.weight, found.repeat, found.modality) == (40.0, 2.5, "multimodal")
    assert found.draws == 100
    (tmp_path / "a.jsonl").write_text("{}\n" * 4)
    file = DatasetSpec(
        name="f", annotation=tmp_path / "a.jsonl", root=tmp_path, repeat_time=2.5, modality="text"
    )
    found = weighted(file)
    assert isinstance(found.source, JsonlSource)
    assert found == WeightedSource(source=found.source, modality="text")
    assert found.draws == 10  # the repeats are among its records: not counted twice


def test_the_held_out_part_is_the_tasks_test_part() -> None:
    source = open_entry(held_out(spec()))
    assert isinstance(source, TaskSource)
    assert source.split == "test"
    with pytest.raises(ConfigError, match="is the test part of its task"):
        held_out(spec(split="test"))
    file = DatasetSpec(name="f", annotation=Path("a.jsonl"), root=Path())
    with pytest.raises(ConfigError, match="'f' is no task, so it has no part that is held out"):
        held_out(file)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (spec("shape"), r"'mine': annotation: there is no 'shape'; did you mean 'shapes'\?"),
        (spec(settings={"dificulty": "easy"}), r"settings: there is no 'dificulty'.*'difficulty'"),
        (spec(settings={"difficulty": "hard"}), r"'mine': task\.settings: shapes has no diff"),
        (spec(stage="pretraining"), r"stage: there is no 'pretraining'.*did you mean 'pretrain'"),
        (spec(style="long"), r"style: there is no 'long'.*short, steps, think"),
        (spec(split="dev"), r"split: there is no 'dev'"),
    ],
)
def test_wrong_names_are_answered_with_the_nearest(entry: DatasetSpec, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_entry(entry)


def test_a_word_names_a_task_its_difficulty_and_the_side_of_its_pictures():
    assert task_named("charts") == Charts()
    assert task_named("charts:easy", px=112) == Charts(difficulty="easy", px=112)
    assert task_named("charts:easy@224", px=112) == Charts(difficulty="easy", px=224)
    for word, complaint in (
        ("chart", "there is no task 'chart'; choose from"),
        ("charts@big", "the side of the pictures of 'charts' is 'big'; write charts@224"),
        ("charts:odd", "odd"),
        ("needle:easy", "has no difficulties"),
    ):
        with pytest.raises(ConfigError, match=complaint):
            task_named(word)
