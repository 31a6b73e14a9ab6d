"""``make demo``: a model trained from scratch, examined before and after each stage, shown.

Everything is left in one folder: the two runs with their logs, the model that `cascadevl chat`
opens, and ``report.html``. An interrupted demo goes on where it stopped.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerFast

from cascadevl.data.processor import CascadeVLProcessor
from cascadevl.errors import TrainingError
from cascadevl.eval.report import Curve, Plot, Report, StageScores, percent, write_report
from cascadevl.eval.responder import ModelResponder
from cascadevl.eval.runner import Score, run_suite
from cascadevl.model.loading import load
from cascadevl.model.modeling import CascadeVLForConditionalGeneration
from cascadevl.train.config import ModelConfig
from cascadevl.train.loop import TrainState
from cascadevl.train.pretrain import pretrain
from cascadevl.train.run import TrainResult, from_scratch
from cascadevl.train.sft import sft
from cascadevl.types import Batch
from cascadevl.version import __version__
from cascadevl.workflows import nano

EXAM_SEED = 2024
CURVE_SEED = 7
ANSWER_TOKENS = 8
"""Longest answer asked for: all of the suite's answers are shorter."""


@dataclass(slots=True)
class _Course:
    """What is noted on the way.

    Attributes:
        stages: Scores before and after each stage.
        points: Step and share of right answers of every small examination, by row.
        ends: Steps at which stages end.
        losses: Step and loss.
        facts: What the report says about the run.
    """

    stages: list[StageScores] = field(default_factory=list)
    points: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    ends: list[int] = field(default_factory=list)
    losses: list[tuple[int, float]] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)


def run(
    *,
    out: Path,
    steps_scale: float = 1.0,
    num_questions: int = 400,
    console: Console | None = None,
) -> Path:
    """Train nano from scratch, examine it, write the report.

    Args:
        out: The demo's folder. One that holds a finished demo is kept under another name.
        steps_scale: Factor on all numbers of steps.
        num_questions: Held-out questions of each row.
        console: Where progress is shown.

    Returns:
        The report.

    Raises:
        TrainingError: If a stage was asked to stop; the same call goes on with it.
    """
    console = console or Console()
    report_path = out / "report.html"
    if report_path.exists():
        console.print(f"an older demo is kept as {_set_aside(out)}")
    began_s = time.perf_counter()
    tokenizer, course = nano.tokenizer(), _Course()
    model, processor = from_scratch(ModelConfig(preset="nano"), tokenizer, seed=nano.SEED)
    course.facts["model"] = (
        f"nano, {_millions(model.model.vision_tower)} of vision, {_millions(model)} in all, "
        f"{len(tokenizer)} tokens, from random weights"
    )
    console.rule("before training")
    _examine(course, "untrained", model, processor, num_questions, console)

    path: Path | None = None
    lengths = {"pretrain": nano.PRETRAIN_STEPS, "sft": nano.SFT_STEPS}
    for stage, length in lengths.items():
        num_steps = max(2, round(length * steps_scale))
        console.rule(f"{stage}: {num_steps} steps")
        path = _train(course, stage, out, num_steps, path, (tokenizer, processor), console)
        model, processor = load(str(path), dtype=torch.bfloat16)
        _examine(course, f"after {stage}", model, processor, num_questions, console)
    assert path is not None
    course.facts["whole demo"] = _minutes(time.perf_counter() - began_s)
    course.facts["machine"] = f"{_cpu()}, {os.cpu_count()} cores, torch threads {_threads()}"
    course.facts["versions"] = f"cascadevl {__version__}, torch {torch.__version__}"
    write_report(_report(course, path), report_path)
    _show_result(course, path, report_path, console)
    return report_path


def _train(
    course: _Course,
    stage: str,
    out: Path,
    num_steps: int,
    start: Path | None,
    parts: tuple[PreTrainedTokenizerFast, CascadeVLProcessor],
    console: Console,
) -> Path:
    """One stage; its curve goes to the course, its model stays in the run folder."""
    tokenizer, processor = parts
    config = nano.stage_config(stage, out / stage, num_steps=num_steps, model=start)
    first = course.ends[-1] if course.ends else 0
    watch = _watcher(course, processor, first, console)
    began_s = time.perf_counter()
    result: TrainResult
    if stage == "pretrain":
        result = pretrain(
            config,
            sources=nano.pretrain_sources(),
            tokenizer=tokenizer,
            on_step=watch,
            console=console,
        )
    else:
        result = sft(config, sources=nano.sft_sources(), on_step=watch, console=console)
    if result.model_path is None:
        raise TrainingError(
            f"the demo was stopped in {stage} after step {result.steps} of {num_steps}; "
            "start it again to go on"
        )
    course.ends.append(first + num_steps)
    course.losses += [(first + step, loss) for step, loss in _losses(out / stage)]
    counts = ", ".join(f"{value:,} {name}" for name, value in result.counters.items())
    elapsed = _minutes(time.perf_counter() - began_s)
    course.facts[stage] = f"{num_steps} steps in {elapsed} (with small examinations); {counts}"
    return result.model_path


def _watcher(
    course: _Course, processor: CascadeVLProcessor, first: int, console: Console
) -> Callable[[TrainState[Batch]], None]:
    """A small examination for the learning curves, called now and then in training."""
    rows = nano.suite(num_questions=60)

    def watch(state: TrainState[Batch]) -> None:
        assert isinstance(state.model, CascadeVLForConditionalGeneration)
        responder = ModelResponder(
            model=state.model, processor=processor, max_new_tokens=ANSWER_TOKENS
        )
        scores = run_suite(responder, rows, seed=CURVE_SEED)
        for score in scores:
            course.points.setdefault(score.row, []).append(
                (first + state.step, score.estimate.value)
            )
        line = ", ".join(f"{score.row} {100 * score.estimate.value:.0f}" for score in scores)
        console.print(f"step {state.step}: {line}", style="dim", highlight=False)

    return watch


def _examine(
    course: _Course,
    name: str,
    model: CascadeVLForConditionalGeneration,
    processor: CascadeVLProcessor,
    num_questions: int,
    console: Console,
) -> None:
    model.eval()
    responder = ModelResponder(model=model, processor=processor, max_new_tokens=ANSWER_TOKENS)
    scores = run_suite(responder, nano.suite(num_questions), seed=EXAM_SEED)
    course.stages.append(StageScores(name=name, scores=scores))
    console.print(_score_table(course.stages))


def _score_table(stages: Sequence[StageScores]) -> Table:
    table = Table(title="percent right on held-out material (95 % interval)")
    table.add_column("question")
    table.add_column("most frequent answer", justify="right")
    for stage in stages:
        table.add_column(stage.name, justify="right")
    for number, first in enumerate(stages[0].scores):
        cells = ["{} ({})".format(*percent(stage.scores[number].estimate)) for stage in stages]
        table.add_row(first.row, f"{100 * first.baseline.share:.1f}", *cells)
    return table


def _report(course: _Course, model: Path) -> Report:
    rows = [
        Curve(name=row, steps=[s for s, _ in points], values=[100 * v for _, v in points])
        for row, points in course.points.items()
    ]
    loss = Curve(
        name="loss", steps=[s for s, _ in course.losses], values=[v for _, v in course.losses]
    )
    return Report(
        title="From a picture to a trained answer",
        lead="A model of the InternVL architecture, trained from random weights on handwriting, "
        "shapes and easy-VQA through pre-training and SFT, and asked about pictures it never saw.",
        stages=course.stages,
        plots=[
            Plot(
                title="Learning curves",
                curves=rows,
                y_label="percent right",
                marks=course.ends[:-1],
                note="60 held-out questions a point, others than in the table; the dashed line is "
                "where pre-training ends and SFT begins.",
            ),
            Plot(
                title="Loss",
                curves=[loss],
                y_label="square-averaged loss",
                marks=course.ends[:-1],
                smooth=9,
                note="Pre-training also predicts descriptions, so the two stages' losses are not "
                "of the same text.",
            ),
        ],
        facts=course.facts,
        commands=_next_commands(model),
    )


def _next_commands(model: Path) -> str:
    return f".venv/bin/cascadevl chat {model}"


def _show_result(course: _Course, model: Path, report: Path, console: Console) -> None:
    console.rule("result")
    console.print(_score_table(course.stages))
    console.print(f"report:  {report}\nchat:    {_next_commands(model)}", highlight=False)
    console.print(f"done in {course.facts['whole demo']}")


def _losses(folder: Path) -> list[tuple[int, float]]:
    lines = (folder / "metrics.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [(int(row["step"]), float(row["loss"])) for row in rows if "loss" in row]


def _set_aside(out: Path) -> Path:
    number = 1
    while (other := out.with_name(f"{out.name}-{number}")).exists():
        number += 1
    out.rename(other)
    return other


def _millions(module: torch.nn.Module) -> str:
    return f"{sum(p.numel() for p in module.parameters()) / 1e6:.2f} M parameters"


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} minutes"


def _threads() -> int:
    return torch.get_num_threads()


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
