"""What demos show of themselves: the table in the terminal, plots, commands to try next."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from rich.table import Table
from rich.text import Text

from cascadevl.eval.report import Curve, Plot, StageScores, change, percent
from cascadevl.version import __version__

_STYLES = {"up": "bold green", "down": "bold red", "open": ""}


def score_table(stages: Sequence[StageScores], *, compare: bool = False) -> Table:
    """Scores of all stages so far, narrow enough for a terminal of 80 columns.

    Of more than three stages, intervals stand in the report alone.

    Args:
        stages: The scores.
        compare: Add what changed from the first stage to the last, in points; bold where the two
            intervals do not meet.
    """
    has_intervals = len(stages) <= 3
    title = "percent right (95 % interval)" if has_intervals else "percent right"
    table = Table(title=title, title_justify="left")
    table.add_column("question")
    table.add_column("most\nfrequent", justify="right")
    for stage in stages:
        table.add_column(stage.name, justify="right")
    if compare:
        table.add_column("change", justify="right")
    for number, first in enumerate(stages[0].scores):
        shares = [percent(stage.scores[number].estimate) for stage in stages]
        cells: list[str | Text] = [
            f"{value} ({interval.replace(' to ', '-')})" if has_intervals else value
            for value, interval in shares
        ]
        if compare:
            points, verdict = change(first.estimate, stages[-1].scores[number].estimate)
            cells.append(
                Text(points, style={"up": "bold green", "down": "bold red"}.get(verdict, ""))
            )
        table.add_row(first.label, f"{100 * first.baseline.share:.1f}", *cells)
    return table


def course_plots(
    curves: Mapping[str, Sequence[tuple[int, float]]],
    losses: Sequence[tuple[int, float]],
    *,
    curve_note: str,
    loss_note: str,
    marks: Sequence[int] = (),
) -> list[Plot]:
    """What happened while a model learned: the small examinations, and the loss.

    Args:
        curves: Of every row, step and share of right answers.
        losses: Step and loss.
        curve_note: A sentence below the first.
        loss_note: A sentence below the second.
        marks: Steps at which a stage ends and another begins.
    """
    rows = [
        Curve(
            name=row,
            steps=[step for step, _ in points],
            values=[100 * share for _, share in points],
        )
        for row, points in curves.items()
    ]
    loss = Curve(
        name="loss", steps=[step for step, _ in losses], values=[value for _, value in losses]
    )
    return [
        Plot(
            title="Learning curves",
            curves=rows,
            y_label="percent right",
            marks=marks,
            y_range=(-2.0, 102.0),
            note=curve_note,
        ),
        Plot(
            title="Loss",
            curves=[loss],
            y_label="square-averaged loss",
            marks=marks,
            smooth=9,
            log_scale=True,
            note=loss_note,
        ),
    ]


def save_pictures(stage: StageScores, folder: Path) -> list[tuple[Path, str]]:
    """Write one held-out picture of each row, so that a reader has something to ask about.

    Args:
        stage: Whose pictures; the first that was answered rightly, else the first.
        folder: Where they go.

    Returns:
        Each file with a question about it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pairs: list[tuple[Path, str]] = []
    for score in stage.scores:
        answered = next((each for each in score.answered if each.right), score.answered[0])
        if answered.asked.scene.image is not None:
            words = "".join(c if c.isalnum() else " " for c in score.label).split()
            path = folder / f"{'-'.join(words)}.png"
            answered.asked.scene.image.save(path)
            pairs.append((path, answered.asked.question.prompt))
    return pairs


def chat_commands(model: Path, pictures: Sequence[tuple[Path, str]]) -> str:
    """Commands that ask the model about the saved pictures, one a line."""
    beside = Path(sys.executable).with_name("cascadevl")
    local = Path(".venv/bin/cascadevl")
    program = str(local if local.exists() and local.samefile(beside) else "cascadevl")
    return "\n".join(
        shlex.join([program, "chat", str(model), "--image", str(path), "--question", question])
        for path, question in pictures
    )


def read_losses(folder: Path) -> list[tuple[int, float]]:
    """Step and loss of a run, from its log."""
    lines = (folder / "metrics.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [(int(row["step"]), float(row["loss"])) for row in rows if "loss" in row]


def machine_facts() -> dict[str, str]:
    """What the run was made on and with."""
    return {
        "machine": f"{_cpu()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "versions": f"cascadevl {__version__}, torch {torch.__version__}",
    }


def num_parameters(module: torch.nn.Module) -> str:
    """Parameters in millions, for people."""
    return f"{sum(p.numel() for p in module.parameters()) / 1e6:.2f} M parameters"


def minutes(seconds: float) -> str:
    """A duration for people."""
    return f"{seconds / 60:.1f} minutes"


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
