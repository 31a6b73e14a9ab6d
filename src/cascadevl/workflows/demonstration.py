"""What every demo does: examine, train while watching, keep what was noted, leave a report.

Everything is left in one folder: the runs with their logs, the model that `cascadevl chat` opens,
a few pictures to ask it about, and ``report.html``. An interrupted demo goes on where it stopped.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from cascadevl.data.processor import CascadeVLProcessor
from cascadevl.errors import TrainingError
from cascadevl.eval.report import Report, StageScores, write_report
from cascadevl.eval.responder import ModelResponder
from cascadevl.eval.runner import run_suite
from cascadevl.eval.suite import SuiteRow
from cascadevl.eval.tile_routes import RoutedAnswer, routed_answers
from cascadevl.model.checkpoint import configuration, open_checkpoint
from cascadevl.model.loading import load
from cascadevl.model.modeling import CascadeVLForConditionalGeneration
from cascadevl.model.routing import VisualBudget
from cascadevl.train.loop import TrainState
from cascadevl.train.run import TrainResult
from cascadevl.workflows.course import Course
from cascadevl.workflows.demo_report import (
    chat_commands,
    machine_facts,
    minutes,
    read_losses,
    save_pictures,
    score_table,
)
from cascadevl.workflows.watching import watcher

EXAM_SEED = 2024
CURVE_SEED = 7

WHOLE = "whole demo"
"""The clock that runs from the beginning to the end."""

COURSE = "course.json"
REPORT = "report.html"
MODEL = "model"
"""What is left in the demo's folder."""

Watch = Callable[[TrainState[Any]], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Demonstration:
    """What all steps of one demo share.

    Attributes:
        out: Its folder.
        rows: What is asked in the examinations before and after a stage.
        curve_rows: What is asked in the small ones in between.
        answer_tokens: Longest answer.
        processor: The model's processor.
        course: Notes that outlive an interruption.
        console: Where progress is shown.
        compare: Whether the last examination is compared with the first.
        stages: Scores before and after each stage.
        facts: What the report says about the run.
        losses: Step, counted through all stages, and loss.
        ends: Steps at which stages end.
    """

    out: Path
    rows: Sequence[SuiteRow]
    curve_rows: Sequence[SuiteRow]
    answer_tokens: int
    processor: CascadeVLProcessor
    course: Course
    console: Console
    compare: bool = False
    stages: list[StageScores] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)
    losses: list[tuple[int, float]] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)


def begin(out: Path, console: Console) -> Course:
    """Keep a finished demo under another name, and take up the notes of one that was interrupted.

    Args:
        out: The demo's folder.
        console: Where it is told.
    """
    if (out / REPORT).exists():
        console.print(f"an older demo is kept as {_set_aside(out)}", highlight=False)
    course = Course(out / COURSE)
    course.start(WHOLE)
    return course


def examine(
    demo: Demonstration,
    name: str,
    model: CascadeVLForConditionalGeneration,
    *,
    visual_budget: VisualBudget | None = None,
) -> None:
    """Ask all questions, and show the scores so far.

    Args:
        demo: The demo.
        name: Of this point of the training, for example "after sft".
        model: Who answers.
        visual_budget: Which tiles are compressed, instead of what the model's thresholds say.
    """
    responder = ModelResponder(
        model=model,
        processor=demo.processor,
        max_new_tokens=demo.answer_tokens,
        visual_budget=visual_budget,
    )
    number = demo.rows[0].num_questions
    with demo.console.status(f"asking {number} questions of each kind"):
        scores = run_suite(responder, demo.rows, seed=EXAM_SEED)
    demo.stages.append(StageScores(name=name, scores=scores))
    demo.console.print(score_table(demo.stages, compare=demo.compare and len(demo.stages) > 1))


def train(
    demo: Demonstration,
    stage: str,
    num_steps: int,
    recipe: Callable[[Watch], TrainResult],
    *,
    folder: Path | None = None,
    plots_loss: bool = True,
) -> Path:
    """One stage; its curve and loss are noted, its model stays in the run folder.

    Args:
        demo: The demo.
        stage: Its name, which is that of its run folder.
        num_steps: Its steps.
        recipe: Trains, calling what it is given now and then, if the stage is to have a curve.
        folder: Its run folder, where that is not the demo's of that name.
        plots_loss: Whether its loss tells anything.

    Returns:
        The model.

    Raises:
        TrainingError: If the stage was asked to stop; the same demo goes on with it.
    """
    demo.console.rule(f"{stage}: {num_steps} steps")
    demo.course.begin_stage(stage, num_steps)
    watch = watcher(
        stage,
        demo.course,
        demo.processor,
        demo.curve_rows,
        seed=CURVE_SEED,
        answer_tokens=demo.answer_tokens,
        console=demo.console,
    )
    result = recipe(watch)
    demo.course.stop(stage)
    if result.model_path is None:
        raise TrainingError(
            f"the demo was stopped in {stage} after step {result.steps} of {num_steps}; "
            "start it again to go on"
        )
    first = demo.ends[-1] if demo.ends else 0
    demo.ends.append(first + num_steps)
    if plots_loss:
        losses = read_losses(folder or demo.out / stage)
        demo.losses.extend((first + step, loss) for step, loss in losses)
    counts = ", ".join(f"{value:,} {name}" for name, value in result.counters.items())
    elapsed = minutes(demo.course.seconds[stage])
    watched = " (with small examinations)" if demo.course.points[stage] else ""
    demo.facts[stage] = f"{num_steps} steps in {elapsed}{watched}; {counts}"
    return result.model_path


def finish(demo: Demonstration, trained: Path, report: Callable[[str], Report]) -> Path:
    """Leave the model, the pictures and the report, and say where they are.

    Args:
        demo: The demo.
        trained: The model of the last stage.
        report: Makes the page, given the commands that a reader can type next.

    Returns:
        The page.
    """
    model = demo.out / MODEL
    shutil.copytree(trained, model, dirs_exist_ok=True)
    pictures = save_pictures(demo.stages[-1], demo.out / "pictures")
    commands = chat_commands(model, pictures)
    demo.course.stop(WHOLE)
    elapsed = minutes(demo.course.seconds[WHOLE])
    demo.facts.update({WHOLE: elapsed, **machine_facts()})
    path = demo.out / REPORT
    write_report(replace(report(commands), routed=_routed(trained, demo)), path)
    demo.console.rule(f"done in {elapsed}")
    first = commands.partition("\n")[0]
    text = f"report: {path}\nmodel:  {model}\nask it (more pictures in the report): {first}"
    demo.console.print(text, highlight=False, markup=False, soft_wrap=True)
    return path


def _routed(trained: Path, demo: Demonstration) -> list[RoutedAnswer]:
    """Answers with the tiles that were compressed for them, if the model can do that."""
    if not configuration(open_checkpoint(trained)).flash_mode:
        return []
    model, processor = load(trained)
    return routed_answers(model, processor, demo.stages[-1].scores)


def _set_aside(out: Path) -> Path:
    """Rename a folder to the first free name beside it."""
    out = out.absolute()
    number = 1
    while (other := out.with_name(f"{out.name}-{number}")).exists():
        number += 1
    out.rename(other)
    return other
