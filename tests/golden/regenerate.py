"""Freezes what the tasks ask: ``python tests/golden/regenerate.py`` rewrites tasks.json.

A score means little if the task changed under it, so the difficulty of every family, the parts
that are held out, and the questions of the first scenes are pinned before anything is trained
on them. Run this only when a task is meant to change, and say why in the commit.

Questions, answers and descriptions are pinned exactly, by a hash; they depend on numpy's random
streams, on the material and on the code alone. Pictures are pinned by the mean colour of a few
fields, with a tolerance, because Pillow and its font library may draw an edge a little
differently from version to version.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import numpy as np

from cascadevl.tasks import (
    TASKS,
    chains,
    charts,
    existence,
    handwriting,
    letters,
    printed,
    shape_drawing,
    shapes,
    subset_sum,
    tables,
    text,
    words,
)
from cascadevl.tasks.base import Scene, Split, Task

PATH = Path(__file__).with_name("tasks.json")
NUM_SCENES = 25
NUM_PICTURES = 3
PICTURE_PX = 112
FIELDS = 4

DIFFICULTIES = {
    "chains": tuple(chains.LEVELS),
    "charts": tuple(charts.LEVELS),
    "existence": existence.NEGATIVES,
    "grounding": tuple(shapes.LEVELS),
    "handwriting": tuple(handwriting.LEVELS),
    "letters": tuple(letters.LEVELS),
    "printed": tuple(printed.LEVELS),
    "shapes": tuple(shapes.LEVELS),
    "subset_sum": tuple(subset_sum.LEVELS),
    "text": tuple(text.LEVELS),
}


ONE_WORDING = ("chains", "existence", "grounding", "subset_sum")


def setups() -> dict[str, Task]:
    """Every family at every difficulty, all questions asked in all wordings."""
    tasks: dict[str, Task] = {
        "easy_vqa": TASKS["easy_vqa"](num_questions=50),
        "needle": TASKS["needle"](num_pictures=(3, 3), num_questions=3, num_phrasings=2),
    }
    for family, difficulties in DIFFICULTIES.items():
        wordings = {} if family in ONE_WORDING else {"num_phrasings": 2}
        for difficulty in difficulties:
            tasks[f"{family}/{difficulty}"] = TASKS[family](
                px=PICTURE_PX, difficulty=difficulty, num_questions=20, **wordings
            )
    return tasks


def digest(items: Iterable[object]) -> str:
    """A short hash of texts and numbers, one a line."""
    lines = "\n".join(str(item) for item in items)
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


def scene_lines(scene: Scene) -> list[str]:
    """All that is said about a scene."""
    lines = [scene.scene_id, scene.description]
    for question in scene.questions:
        lines += [question.kind, question.metric, question.prompt, question.response()]
    return lines


def picture_fields(scene: Scene) -> list[int]:
    """Mean colour of 4 x 4 fields of each picture, rounded; empty without one."""
    colours: list[int] = []
    for image in scene.images:
        pixels = np.asarray(image, dtype=np.float64)
        side = len(pixels) // FIELDS
        fields = pixels.reshape(FIELDS, side, FIELDS, side, 3).mean(axis=(1, 3))
        colours += [round(value) for value in fields.ravel().tolist()]
    return colours


def snapshot_scenes(task: Task, split: Split) -> dict[str, Any]:
    """What the first scenes of one part say and show."""
    scenes = [task.draw(split, 0, index) for index in range(NUM_SCENES)]
    return {
        "kinds": list(task.kinds),
        "first": [f"{q.prompt} -> {q.response()}" for q in scenes[0].questions],
        "questions": digest(line for scene in scenes for line in scene_lines(scene)),
        "pictures": [picture_fields(scene) for scene in scenes[:NUM_PICTURES]],
    }


def snapshot() -> dict[str, Any]:
    """Everything that is frozen."""
    splits: tuple[Split, ...] = get_args(Split)
    return {
        "levels": {
            "charts": {name: asdict(level) for name, level in charts.LEVELS.items()},
            "handwriting": {name: asdict(level) for name, level in handwriting.LEVELS.items()},
            "letters": {name: list(words) for name, words in letters.LEVELS.items()},
            "printed": {name: asdict(level) for name, level in printed.LEVELS.items()},
            "shapes": {name: asdict(level) for name, level in shapes.LEVELS.items()},
            "text": {name: asdict(level) for name, level in text.LEVELS.items()},
        },
        "colours": {name: list(colour) for name, colour in shape_drawing.COLOURS.items()},
        "fonts": dict(words.FONTS),
        "digits": {
            split: {
                "num": len(scans.indices),
                "indices": digest(scans.indices.tolist()),
                "pixels": digest(scans.images.ravel().tolist()),
            }
            for split in splits
            for scans in [handwriting.load_scans(split)]
        },
        "words": {
            split: {"num": len(words.load_words(split)), "words": digest(words.load_words(split))}
            for split in splits
        },
        "tables": {
            table.key: {
                "part": "test" if table.held_out else "train",
                "cells": digest(
                    f"{label} {value:.9g}"
                    for label, value in zip(table.labels, table.values, strict=True)
                ),
            }
            for table in tables.all_tables()
        },
        "scenes": {
            f"{name}/{split}": snapshot_scenes(task, split)
            for name, task in setups().items()
            for split in splits
        },
    }


def as_json(frozen: dict[str, Any]) -> dict[str, Any]:
    """The same with lists for tuples, as it comes back from a file."""
    loaded: dict[str, Any] = json.loads(json.dumps(frozen))
    return loaded


if __name__ == "__main__":
    text_form = json.dumps(snapshot(), indent=1, ensure_ascii=False)
    PATH.write_text(text_form + "\n", encoding="utf-8")
