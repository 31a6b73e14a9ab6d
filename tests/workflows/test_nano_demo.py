"""Nano's demo from beginning to end with a tiny model: report, interruption, older runs."""

from __future__ import annotations

import io
import json
import shlex
import signal
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tests.eval.page import Page
from tests.workflows.small_nano import shrink

import cascadevl
from cascadevl.cli.main import main
from cascadevl.engine.conversation import Session
from cascadevl.engine.engine import Engine
from cascadevl.engine.sampling import SamplingParams
from cascadevl.errors import TrainingError
from cascadevl.eval.report import StageScores, percent
from cascadevl.eval.responder import ModelResponder
from cascadevl.eval.runner import Score, run_suite
from cascadevl.eval.suite import draw_row
from cascadevl.scoring.metrics import Estimate
from cascadevl.tasks.base import to_prompt
from cascadevl.workflows import demonstration, nano, watching
from cascadevl.workflows import nano_demo as demo
from cascadevl.workflows.demo_report import read_losses, score_table

QUESTIONS = 6
SCALE = 0.005


@pytest.fixture(scope="module")
def small() -> Generator[None, None, None]:
    """Every demo of this module trains a few thousand parameters for about ten steps."""
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        patch.setattr(nano, "PRETRAIN_STEPS", 600)
        patch.setattr(nano, "SFT_STEPS", 1000)
        yield


def run(out: Path, *, width: int = 80) -> str:
    """Run the demo; returns what the terminal showed."""
    console = Console(file=io.StringIO(), width=width)
    demo.run(out=out, steps_scale=SCALE, num_questions=QUESTIONS, console=console)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


@pytest.fixture(scope="module")
def finished(small: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("demo") / "run"
    return out, run(out)


def table(out: Path) -> list[list[str]]:
    return Page((out / "report.html").read_text("utf-8")).rows


def test_the_report_holds_what_the_left_model_scores(finished: tuple[Path, str]) -> None:
    out, _ = finished
    model, processor = cascadevl.load(str(out / "model"), dtype=torch.bfloat16)
    responder = ModelResponder(model=model, processor=processor, max_new_tokens=demo.ANSWER_TOKENS)
    scores = run_suite(responder, nano.suite(QUESTIONS), seed=demonstration.EXAM_SEED)
    head, *rows = table(out)
    assert head[3:] == ["untrained", "after pretrain", "after sft"]
    assert [row[0] for row in rows] == [row.name for row in nano.suite(QUESTIONS)]
    assert [row[-1] for row in rows] == [" ".join(percent(score.estimate)) for score in scores]


def test_the_report_shows_curves_of_all_examinations(finished: tuple[Path, str]) -> None:
    out, _ = finished
    noted = json.loads((out / "course.json").read_text())["points"]
    assert list(noted["pretrain"]) == ["1", "2", "3"]
    assert list(noted["sft"]) == ["1", "2", "3", "4", "5"]
    page = Page((out / "report.html").read_text("utf-8"))
    assert [kind for kind, _ in page.images].count("plot") == 2
    assert "3 steps" in page.of("dd")[1]
    assert "5 steps" in page.of("dd")[2]


def test_chat_opens_the_left_model(
    finished: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = finished
    commands = Page((out / "report.html").read_text("utf-8")).of("pre")[0].splitlines()
    assert len(commands) == len(nano.suite(1))
    words = shlex.split(commands[1])
    sampling = ["--max-new-tokens", "5", "--temperature", "3", "--seed", "4"]
    assert main([*words[1:], *sampling]) == 0

    # The same asked in Python, with the picture of the suite instead of the saved file.
    model, processor = cascadevl.load(str(out / "model"))
    asked = draw_row(nano.suite(1)[1], split="test", seed=demonstration.EXAM_SEED)[0]
    prompt = to_prompt(asked.scene, asked.question)
    wishes = SamplingParams(max_tokens=5, temperature=3.0, seed=4)
    said = Session(engine=Engine(model, processor), sampling=wishes).ask(prompt).answer().text
    assert said.strip()
    assert capsys.readouterr().out == f"{said}\n"


def interrupted_in(stage: str, step: int) -> Callable[..., Any]:
    """The demo's watcher, but one that gets Ctrl-C at a step of a stage."""

    def watcher(name: str, *args: Any, **settings: Any) -> Callable[[Any], None]:
        watch = watching.watcher(name, *args, **settings)

        def interrupted(state: Any) -> None:
            watch(state)
            if (name, state.step) == (stage, step):
                signal.raise_signal(signal.SIGINT)

        return interrupted

    return watcher


def test_an_interrupted_demo_goes_on_and_ends_with_the_same_numbers(
    finished: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = finished[0], tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(demonstration, "watcher", interrupted_in("sft", 2))
        with pytest.raises(TrainingError, match="stopped in sft after step 2 of 5; start it again"):
            run(out)
    assert not (out / "report.html").exists()

    asked: list[int] = []

    def counting(responder: Any, suite: Sequence[Any], *, seed: int) -> list[Score]:
        asked.append(seed)
        return run_suite(responder, suite, seed=seed)

    monkeypatch.setattr(watching, "run_suite", counting)
    shown = run(out)
    assert "kept as" not in shown
    assert asked == [demonstration.CURVE_SEED] * 3  # steps 3 to 5: the others are known from before
    assert table(out) == table(whole)
    notes, wanted = (json.loads((path / "course.json").read_text()) for path in (out, whole))
    assert notes["points"] == wanted["points"]
    assert notes["num_steps"] == wanted["num_steps"]
    losses, wanted_losses = (
        read_losses(path / stage) for path in (out, whole) for stage in ("sft",)
    )
    assert losses[0] == wanted_losses[0]
    assert losses[-1] == wanted_losses[-1]
    weights = [(path / "model" / "model.safetensors").read_bytes() for path in (out, whole)]
    assert weights[0] == weights[1]


def test_an_older_demo_is_kept(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demonstration, "watcher", interrupted_in("pretrain", 1))
    for name in ("run", "run-1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.html").write_text(name)
    with pytest.raises(TrainingError, match="stopped in pretrain after step 1 of 3"):
        run(tmp_path / "run")
    assert (tmp_path / "run-1" / "report.html").read_text() == "run-1"
    assert (tmp_path / "run-2" / "report.html").read_text() == "run"
    assert not (tmp_path / "run" / "report.html").exists()


def test_an_interrupted_demo_of_other_settings_is_refused(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(demonstration, "watcher", interrupted_in("pretrain", 1))
        with pytest.raises(TrainingError, match="start it again"):
            run(out)
    with pytest.raises(TrainingError, match=r"run\.num_steps was 3 and is 6"):
        demo.run(out=out, steps_scale=0.01, num_questions=1, console=Console(file=io.StringIO()))


def test_the_terminal_tells_what_to_do_next(finished: tuple[Path, str]) -> None:
    out, shown = finished
    assert f"report: {out / 'report.html'}" in shown
    assert f"chat {out / 'model'} --image" in shown
    assert "step 1, % right: one digit" in shown


def test_tables_fit_a_narrow_terminal(finished: tuple[Path, str]) -> None:
    """Every row on one line, nothing cut, with the widest numbers."""
    _, shown = finished
    lines = [line for line in shown.splitlines() if line.startswith("│")]
    assert len(lines) == len(nano.suite(1)) * 3
    assert max(map(len, shown.partition("report:")[0].splitlines())) <= 80

    widest = Estimate(value=1.0, low=0.99, high=1.0, num=400)
    scores = run_suite(lambda c: ["yes"] * len(c), nano.suite(QUESTIONS), seed=1)
    scores = [replace(score, estimate=widest) for score in scores]
    names = ("untrained", "after pretrain", "after sft")
    console = Console(file=io.StringIO(), width=80)
    console.print(score_table([StageScores(name=name, scores=scores) for name in names]))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert text.count("100.0 (99-100)") == 3 * len(scores)
    assert sum(line.startswith("│") for line in text.splitlines()) == len(scores)
