"""What a cascade shows: score, time and operations of every stage, as a table and as JSON."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Table

from cascadevl.eval.runner import Score


@dataclass(frozen=True, slots=True, kw_only=True)
class ExamRow:
    """The score of one row of held-out questions.

    Attributes:
        name: The row.
        share: Share of right answers.
        low: Lower end of its 95 % interval.
        high: Upper end.
        num: Questions.
        constant: What the most frequent answer scores.
    """

    name: str
    share: float
    low: float
    high: float
    num: int
    constant: float

    @classmethod
    def of(cls, score: Score) -> ExamRow:
        """What stays of a score once its pictures are forgotten."""
        estimate = score.estimate
        return cls(
            name=score.row,
            share=estimate.value,
            low=estimate.low,
            high=estimate.high,
            num=len(score.answered),
            constant=score.baseline.share,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Examined:
    """What an examination found.

    Attributes:
        rows: Scores; none where nothing was asked.
        visual_share: Visual tokens that the pictures took, as a share of those of full tiles.
    """

    rows: Sequence[ExamRow] = ()
    visual_share: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StageLine:
    """A stage in the summary.

    Attributes:
        stage: Its name; ``start`` for the model before the first.
        seconds: Time it took in this process and earlier ones; examinations are not in it.
        flops: Floating point operations of the bodies, by formula.
        facts: What it says about itself.
        exam: Scores of the model it left; empty of a stage that leaves data.
        visual_share: Visual tokens that these took, as a share of those of full tiles.
    """

    stage: str
    seconds: float
    flops: float
    facts: Mapping[str, float]
    exam: Sequence[ExamRow]
    visual_share: float = 1.0

    @property
    def score(self) -> float | None:
        """Mean of the rows; None where nothing was asked."""
        return statistics.fmean(row.share for row in self.exam) if self.exam else None


@dataclass(frozen=True, slots=True, kw_only=True)
class CascadeSummary:
    """A finished cascade.

    Attributes:
        lines: One a stage.
        model: Folder of the last model.
        table: The Markdown file.
    """

    lines: Sequence[StageLine]
    model: str
    table: Path


def cells_of(lines: Sequence[StageLine]) -> tuple[list[str], list[list[str]]]:
    """The summary as headings and cells of text.

    How many visual tokens were taken is a column only where a router saved some.
    """
    examined = next((line.exam for line in lines if line.exam), ())
    rows = [row.name for row in examined]
    mean = ["mean"] if len(rows) > 1 else []
    spared = ["visual tokens, %"] if any(line.visual_share < 1 for line in lines) else []
    headings = ["stage", *mean, *rows, *spared, "time", "time in all", "TFLOP", "TFLOP in all"]
    cells = []
    seconds = flops = 0.0
    for line in lines:
        seconds, flops = seconds + line.seconds, flops + line.flops
        shares = [f"{100 * e.share:.1f} ({100 * e.low:.0f}-{100 * e.high:.0f})" for e in line.exam]
        average = [] if not mean else [f"{100 * line.score:.1f}" if line.score is not None else ""]
        times = [clock(line.seconds), clock(seconds)]
        work = [f"{line.flops / 1e12:.3g}", f"{flops / 1e12:.3g}"]
        visual = [f"{100 * line.visual_share:.1f}" if line.exam else ""] if spared else []
        scores = shares or [""] * len(rows)
        cells.append([line.stage, *average, *scores, *visual, *times, *work])
    if examined:
        constants = [f"{100 * row.constant:.1f}" for row in examined]
        overall = 100 * statistics.fmean(row.constant for row in examined)
        average = [f"{overall:.1f}"] if mean else []
        empty = [""] * (len(spared) + 4)
        cells.append(["most frequent answer", *average, *constants, *empty])
    return headings, cells


def clock(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.2f} h"


def terminal_table(lines: Sequence[StageLine]) -> Table:
    """The summary for a terminal: without the sums; a column a stage where that is narrower."""
    headings, cells = cells_of(lines)
    shown = [number for number, heading in enumerate(headings) if not heading.endswith("in all")]
    upright = [[each[number] for number in shown] for each in (headings, *cells)]
    sideways = [list(column) for column in zip(*upright, strict=True)]
    first, *others = min(upright, sideways, key=_width)
    is_sideways = first == sideways[0]
    table = Table(title="percent right on held-out questions (95 % interval)", title_justify="left")
    table.add_column(first[0], no_wrap=is_sideways)
    for heading in first[1:]:
        table.add_column(heading.replace(":", ":\n"), justify="right")
    for row in others:
        table.add_row(*row)
    return table


def _width(rows: Sequence[Sequence[str]]) -> int:
    """Characters that a table needs at least: its longest words, and the lines between them."""
    longest = [
        max(len(word) for cell in column for word in ["", *cell.split()])
        for column in zip(*rows, strict=True)
    ]
    return sum(longest) + 3 * len(longest)


def write_summary(lines: Sequence[StageLine], out: Path) -> Path:
    """Write ``summary.md`` and ``summary.json``; returns the first."""
    headings, cells = cells_of(lines)
    rows = [headings, ["---"] * len(headings), *cells]
    text = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    path = out / "summary.md"
    path.write_text(text + "\n", encoding="utf-8")
    document = json.dumps([asdict(line) for line in lines], indent=1)
    (out / "summary.json").write_text(document + "\n", encoding="utf-8")
    return path
