"""``make demo``: a model trained from scratch, examined before and after each stage, shown.

Everything is left in one folder: the two runs with their logs, the model that `cascadevl chat`
opens, a few pictures to ask it about, and ``report.html``. An interrupted demo goes on where it
stopped.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from transformers import PreTrainedTokenizerFast

from cascadevl.data.processor import CascadeVLProcessor
from cascadevl.errors import TrainingError
from cascadevl.eval.report import StageScores, write_report
from cascadevl.eval.responder import ModelResponder
from cascadevl.eval.runner import run_suite
from cascadevl.model.loading import load
from cascadevl.model.modeling import CascadeVLForConditionalGeneration
from cascadevl.train.config import ModelConfig
from cascadevl.train.loop import TrainState
from cascadevl.train.pretrain import pretrain
from cascadevl.train.run import TrainResult, from_scratch
from cascadevl.train.sft import sft
from cascadevl.types import Batch
from cascadevl.workflows import nano
from cascadevl.workflows.course import Course
from cascadevl.workflows.demo_report import (
    build_report,
    chat_commands,
    machine_facts,
    minutes,
    num_parameters,
    read_losses,
    save_pictures,
    score_table,
)

EXAM_SEED = 2024
CURVE_SEED = 7
CURVE_QUESTIONS = 60
"""Questions of each row in the small examinations during training."""

ANSWER_TOKENS = 32
"""Longest answer asked for: all of the suite's answers are shorter."""

REPORT = "report.html"
MODEL = "model"
"""What is left in the demo's folder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Demo:
    """What all steps of one demo share.

    Attributes:
        out: Its folder.
        num_questions: Of each row in the examinations before and after a stage.
        tokenizer: The tokenizer.
        processor: The processor around it.
        course: Notes that outlive an interruption.
        console: Where progress is shown.
        stages: Scores before and after each stage.
        facts: What the report says about the run.
        losses: Step, counted through all stages, and loss.
        ends: Steps at which stages end.
    """

    out: Path
    num_questions: int
    tokenizer: PreTrainedTokenizerFast
    processor: CascadeVLProcessor
    course: Course
    console: Console
    stages: list[StageScores] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)
    losses: list[tuple[int, float]] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)


def run(
    *,
    out: Path,
    steps_scale: float = 1.0,
    num_questions: int = 400,
    console: Console | None = None,
) -> Path:
    """Train nano from scratch, examine it, write the report.

    Args:
        out: The demo's folder. One that holds a finished demo is kept under another name; one
            that holds a demo which was interrupted is gone on with.
        steps_scale: Factor on all numbers of steps.
        num_questions: Held-out questions of each row.
        console: Where progress is shown.

    Returns:
        The report.

    Raises:
        TrainingError: If a stage was asked to stop; the same call goes on with it. Or if the
            folder holds an interrupted demo of other settings.
    """
    console = console or Console()
    if (out / REPORT).exists():
        console.print(f"an older demo is kept as {_set_aside(out)}", highlight=False)
    course = Course(out / "course.json")
    course.start("whole demo")
    tokenizer = nano.tokenizer()
    model, processor = from_scratch(ModelConfig(preset="nano"), tokenizer, seed=nano.SEED)
    demo = _Demo(
        out=out,
        num_questions=num_questions,
        tokenizer=tokenizer,
        processor=processor,
        course=course,
        console=console,
    )
    demo.facts["model"] = (
        f"nano, {num_parameters(model.model.vision_tower)} of vision, {num_parameters(model)} in "
        f"all, {len(tokenizer)} tokens, from random weights"
    )
    console.rule("before training")
    _examine(demo, "untrained", model)

    path: Path | None = None
    lengths = {"pretrain": nano.PRETRAIN_STEPS, "sft": nano.SFT_STEPS}
    for stage, length in lengths.items():
        num_steps = max(2, round(length * steps_scale))
        console.rule(f"{stage}: {num_steps} steps")
        path = _train(demo, stage, num_steps, path)
        model, _ = load(str(path), dtype=torch.bfloat16)
        _examine(demo, f"after {stage}", model)
    assert path is not None
    return _finish(demo, path)


def _train(demo: _Demo, stage: str, num_steps: int, start: Path | None) -> Path:
    """One stage; its curve and loss are noted, its model stays in the run folder."""
    folder = demo.out / stage
    config = nano.stage_config(stage, folder, num_steps=num_steps, model=start)
    watch = _watcher(demo, stage)
    demo.course.begin_stage(stage, num_steps)
    result: TrainResult
    if stage == "pretrain":
        result = pretrain(
            config,
            sources=nano.pretrain_sources(),
            tokenizer=demo.tokenizer,
            on_step=watch,
            console=demo.console,
        )
    else:
        result = sft(config, sources=nano.sft_sources(), on_step=watch, console=demo.console)
    demo.course.stop(stage)
    if result.model_path is None:
        raise TrainingError(
            f"the demo was stopped in {stage} after step {result.steps} of {num_steps}; "
            "start it again to go on"
        )
    first = demo.ends[-1] if demo.ends else 0
    demo.ends.append(first + num_steps)
    demo.losses.extend((first + step, loss) for step, loss in read_losses(folder))
    counts = ", ".join(f"{value:,} {name}" for name, value in result.counters.items())
    elapsed = minutes(demo.course.seconds[stage])
    demo.facts[stage] = f"{num_steps} steps in {elapsed} (with small examinations); {counts}"
    return result.model_path


def _watcher(demo: _Demo, stage: str) -> Callable[[TrainState[Batch]], None]:
    """A small examination for the learning curves, called now and then in training."""
    rows = nano.suite(min(CURVE_QUESTIONS, demo.num_questions))

    def watch(state: TrainState[Batch]) -> None:
        assert isinstance(state.model, CascadeVLForConditionalGeneration)
        responder = ModelResponder(
            model=state.model, processor=demo.processor, max_new_tokens=ANSWER_TOKENS
        )
        scores = run_suite(responder, rows, seed=CURVE_SEED)
        demo.course.note(stage, state.step, {score.row: score.estimate.value for score in scores})
        line = " · ".join(f"{score.label} {100 * score.estimate.value:.0f}" for score in scores)
        demo.console.print(f"step {state.step}, % right: {line}", style="dim", highlight=False)

    return watch


def _examine(demo: _Demo, name: str, model: CascadeVLForConditionalGeneration) -> None:
    responder = ModelResponder(model=model, processor=demo.processor, max_new_tokens=ANSWER_TOKENS)
    with demo.console.status(f"asking {demo.num_questions} questions of each kind"):
        scores = run_suite(responder, nano.suite(demo.num_questions), seed=EXAM_SEED)
    demo.stages.append(StageScores(name=name, scores=scores))
    demo.console.print(score_table(demo.stages))


def _finish(demo: _Demo, trained: Path) -> Path:
    """Leave the model, the pictures and the report, and say where they are."""
    model = demo.out / MODEL
    shutil.copytree(trained, model, dirs_exist_ok=True)
    pictures = save_pictures(demo.stages[-1], demo.out / "pictures")
    commands = chat_commands(model, pictures)
    demo.course.stop("whole demo")
    elapsed = minutes(demo.course.seconds["whole demo"])
    report = build_report(
        demo.stages,
        demo.course.curves(),
        demo.losses,
        marks=demo.ends[:-1],
        facts={**demo.facts, "whole demo": elapsed, **machine_facts()},
        commands=commands,
    )
    path = demo.out / REPORT
    write_report(report, path)
    demo.console.rule(f"done in {elapsed}")
    first = commands.partition("\n")[0]
    text = f"report: {path}\nmodel:  {model}\nask it (more pictures in the report): {first}"
    demo.console.print(text, highlight=False, markup=False, soft_wrap=True)
    return path


def _set_aside(out: Path) -> Path:
    """Rename a folder to the first free name beside it."""
    out = out.absolute()
    number = 1
    while (other := out.with_name(f"{out.name}-{number}")).exists():
        number += 1
    out.rename(other)
    return other
