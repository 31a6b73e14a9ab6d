"""Micro's demo from beginning to end with a tiny model in its place."""

from __future__ import annotations

import io
import json
import signal
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tests.eval.page import Page
from tests.workflows.small_nano import save_small

import cascadevl
from cascadevl.cli.main import main
from cascadevl.errors import TrainingError
from cascadevl.eval.report import change, percent
from cascadevl.eval.responder import ModelResponder
from cascadevl.eval.runner import run_suite
from cascadevl.eval.suite import draw_row
from cascadevl.model import shipped
from cascadevl.tasks.base import TaskSource
from cascadevl.workflows import (
    boxes,
    boxes_reinforcement,
    demo,
    demonstration,
    micro,
    watching,
)

QUESTIONS = 2
SCALE = 0.01
ASSETS = shipped.ASSETS


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Generator[Path, None, None]:
    """A few thousand parameters as the shipped micro, taught for four short steps."""
    assets = tmp_path_factory.mktemp("assets")
    save_small(assets / "micro")
    (assets / "micro" / "README.md").write_text(f"---\n{shipped.EDITION_KEY}: 4\n---\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shipped, "ASSETS", assets)
        patch.setattr(boxes, "NUM_STEPS", 400)
        patch.setattr(boxes, "ROW_TOKENS", 1024)
        patch.chdir(tmp_path_factory.mktemp("work"))
        yield assets / "micro"


def run(out: Path) -> str:
    """Run the demo; returns what the terminal showed."""
    console = Console(file=io.StringIO(), width=80)
    demo.run(out=out, steps_scale=SCALE, num_questions=QUESTIONS, console=console)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


@pytest.fixture(scope="module")
def finished(start: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("demo") / "run"
    return out, run(out)


def page(out: Path, name: str = "report.html") -> Page:
    return Page((out / name).read_text("utf-8"))


def test_the_report_compares_the_left_model_with_micro(
    start: Path, finished: tuple[Path, str]
) -> None:
    out, _ = finished
    scores = []
    for folder in (start, out / "model"):
        model, processor = cascadevl.load(folder, dtype=torch.bfloat16)
        responder = ModelResponder(
            model=model, processor=processor, max_new_tokens=demo.ANSWER_TOKENS
        )
        scores.append(run_suite(responder, boxes.suite(QUESTIONS), seed=demonstration.EXAM_SEED))
    head, *rows = page(out).rows
    assert head[3:] == ["before", "SFT", "change, in points"]
    assert [row[0] for row in rows] == [row.name for row in boxes.suite(QUESTIONS)]
    for row, before, after in zip(rows, *scores, strict=True):
        assert row[3:5] == [" ".join(percent(score.estimate)) for score in (before, after)]
        assert row[5] == change(before.estimate, after.estimate)[0]
    assert "micro, edition 4: " in page(out).of("dd")[0]


def test_a_page_of_answers_is_there_before_anything_is_trained(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **settings: Any) -> None:
        assert page(tmp_path / "run", demo.PAGE).rows == []
        cards = page(tmp_path / "run", demo.PAGE).of("b", "bad")
        assert len(cards) > demo.PAGE_QUESTIONS
        raise TrainingError("seen")

    monkeypatch.setattr(demo, "examine", refuse)
    with pytest.raises(TrainingError, match="seen"):
        run(tmp_path / "run")


def test_the_terminal_shows_answers_scores_and_what_is_next(finished: tuple[Path, str]) -> None:
    out, shown = finished
    assert "micro, edition 4" in shown
    assert shown.index("pictures it never saw") < shown.index("before the lesson")
    assert f"with the pictures: {out / demo.PAGE}" in shown
    assert "change" in shown
    assert f"report: {out / 'report.html'}" in shown
    assert f"chat {out / 'model'} --image" in shown
    assert max(map(len, shown.partition("with the pictures")[0].splitlines())) <= 80


def interrupted_at(step: int) -> Callable[..., Any]:
    def watcher(*args: Any, **settings: Any) -> Callable[[Any], None]:
        watch = watching.watcher(*args, **settings)

        def interrupted(state: Any) -> None:
            watch(state)
            if state.step == step:
                signal.raise_signal(signal.SIGINT)

        return interrupted

    return watcher


def test_an_interrupted_demo_goes_on_and_ends_with_the_same_model(
    start: Path, finished: tuple[Path, str], tmp_path: Path
) -> None:
    whole, out = finished[0], tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demonstration, "watcher", interrupted_at(2))
        with pytest.raises(TrainingError, match="stopped in boxes after step 2 of 4; start it"):
            run(out)
    assert not (out / "report.html").exists()
    assert "kept as" not in run(out)
    notes, wanted = (json.loads((path / "course.json").read_text()) for path in (out, whole))
    assert notes["points"] == wanted["points"]
    assert page(out).rows == page(whole).rows
    weights = [(path / "model" / "model.safetensors").read_bytes() for path in (out, whole)]
    assert weights[0] == weights[1]


def test_what_micro_knew_is_rehearsed_and_the_new_family_is_new() -> None:
    sources = boxes.sources()
    new, *kept = sources
    assert sum(each.weight or 0.0 for each in sources) == pytest.approx(1.0)
    assert new.weight == boxes.NEW_SHARE
    mixture = micro.sources("sft")
    total = sum(each.weight or 0.0 for each in mixture)
    for mine, theirs in zip(kept, mixture, strict=True):
        share = (theirs.weight or 0.0) / total
        assert mine.weight == pytest.approx((1 - boxes.NEW_SHARE) * share)
        assert mine.source.name == theirs.source.name
    assert isinstance(new.source, TaskSource)
    assert new.source.task.name == "grounding"
    assert new.source.split == "train"
    for stage in ("decoder", "pretrain", "sft"):
        assert not any("grounding" in each.source.name for each in micro.sources(stage))


def test_the_lessons_questions_are_held_out_and_of_their_kind() -> None:
    rows = boxes.suite(5)
    assert len(rows) == 2 + len(micro.suite(1))
    assert {row.num_questions for row in rows} == {5}
    assert tuple(row.label for row in boxes.curve_suite(5)) == boxes.WATCHED
    assert max(len(row.label) for row in rows) <= 14
    one, every = (draw_row(row, split="test", seed=demonstration.EXAM_SEED) for row in rows[:2])
    assert {each.question.kind for each in one} == {"box"}
    assert {each.question.kind for each in every} == {"boxes"}
    assert all("/test/" in each.scene.scene_id for each in (*one, *every))


def test_the_command_passes_its_options(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(demo, "run", lambda **settings: asked.append(settings))
    options = ["--model", "m", "--steps-scale", "2", "--questions", "9"]
    assert main(["demo", "--out", str(tmp_path), *options]) == 0
    assert asked == [{"out": tmp_path, "model": "m", "steps_scale": 2.0, "num_questions": 9}]


def test_after_too_few_steps_there_is_nothing_to_reinforce(finished: tuple[Path, str]) -> None:
    out, shown = finished
    assert "left out: " in " ".join(shown.split())
    assert not (out / "mpo").exists()


def test_what_is_right_now_and_then_is_reinforced_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Micro itself, on questions that it answers without a lesson."""
    monkeypatch.setattr(shipped, "ASSETS", ASSETS)  # not the fixture's tiny model
    monkeypatch.setattr(boxes_reinforcement, "TASK", "charts:easy")
    monkeypatch.setattr(boxes_reinforcement, "SCENES", 600)
    monkeypatch.setattr(demo, "ANSWER_TOKENS", 32)
    console = Console(file=io.StringIO(), width=80)
    demo.run(out=tmp_path / "run", steps_scale=SCALE, num_questions=1, console=console)
    stages = ["before", "SFT", "MPO", "GSPO"]
    assert page(tmp_path / "run").rows[0][3:] == [*stages, "change, in points"]
    curves = json.loads((tmp_path / "run/course.json").read_text("utf-8"))
    assert {"boxes", "mpo", "gspo"} <= set(curves["points"])
    assert {"rollouts", "pairs", "filter", "whole demo"} <= set(curves["seconds"])
    weights = [
        (tmp_path / "run" / folder / "model.safetensors").read_bytes()
        for folder in ("boxes/model", "mpo/run/model", "gspo/run/model", "model")
    ]
    assert len(set(weights)) == 3
    assert weights[2] == weights[3]
