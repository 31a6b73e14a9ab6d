"""One self-contained HTML page: scores with intervals and chance, curves, pictures with answers.

Everything is inlined, so the page can be opened from disk, mailed, or kept with a run.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Literal

import jinja2
import numpy as np
import PIL.Image
from jaxtyping import Float, Int
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cascadevl.eval.box_drawing import with_boxes
from cascadevl.eval.runner import Answered, Score
from cascadevl.eval.tile_routes import RoutedAnswer, painted
from cascadevl.scoring.metrics import Estimate

PICTURE_PX = 224
"""Width at which small pictures are embedded; browsers blur them less from there."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StageScores:
    """What a suite gave at one point of the training.

    Attributes:
        name: For example "after SFT".
        scores: One a row; the same rows in the same order at every stage.
    """

    name: str
    scores: Sequence[Score]


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """Values over steps.

    Attributes:
        name: Label of the line.
        steps: Where it was measured.
        values: What was measured.
    """

    name: str
    steps: Sequence[int]
    values: Sequence[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """A picture of some curves.

    Attributes:
        title: Heading.
        curves: The lines.
        y_label: What the values are.
        note: A sentence below.
        marks: Steps at which a stage ends.
        smooth: Values averaged for a line; the raw ones stay visible behind it.
        y_range: Ends of the vertical axis; None fits it to the values.
        log_scale: Whether the vertical axis is logarithmic.
    """

    title: str
    curves: Sequence[Curve]
    y_label: str
    note: str = ""
    marks: Sequence[int] = ()
    smooth: int = 1
    y_range: tuple[float, float] | None = None
    log_scale: bool = False


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Report:
    """What goes on the page.

    Attributes:
        title: Heading.
        lead: A few sentences below it.
        stages: Scores, in the order of training; the last one's answers are shown as pictures.
        plots: Curves.
        facts: Names and values about the run.
        commands: What a reader can type next.
        num_pictures: Pictures shown of each row; with 0 no answers are shown.
        show_scores: Whether scores stand in a table; few answers say little about shares.
        compare: Whether the last stage is compared with the first: what changed stands in the
            table, and what the first said stands on every card.
        routed: Answers of a Flash model whose pictures are shown with the tiles it compressed.
        pages: Titles and addresses of further pages, relative to this one.
    """

    title: str
    lead: str
    stages: Sequence[StageScores]
    plots: Sequence[Plot] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    commands: str = ""
    num_pictures: int = 5
    show_scores: bool = True
    compare: bool = False
    routed: Sequence[RoutedAnswer] = ()
    pages: Mapping[str, str] = field(default_factory=dict)


def write_report(report: Report, path: Path) -> None:
    """Render the page and write it to ``path``.

    Raises:
        ValueError: If there is no stage, or the stages do not score the same rows.
    """
    if not report.stages:
        raise ValueError("a report needs the scores of at least one stage")
    rows = [score.row for score in report.stages[0].scores]
    for stage in report.stages:
        if [score.row for score in stage.scores] != rows:
            raise ValueError(f"stage {stage.name!r} scores other rows than {rows}")
    source = files("cascadevl").joinpath("assets/report.html.jinja").read_text("utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    first, last = report.stages[0].scores, report.stages[-1].scores
    page = environment.from_string(source).render(
        title=report.title,
        lead=report.lead,
        stages=report.stages,
        show_scores=report.show_scores,
        compare=report.compare,
        rows=[_table_row(number, report.stages) for number in range(len(rows))],
        plots=[
            {"title": plot.title, "note": plot.note, "png": _encoded(draw(plot))}
            for plot in report.plots
        ],
        galleries=[
            {
                "title": f"Answers: {score.row}",
                "has_boxes": any(each.asked.question.metric == "box" for each in score.answered),
                "cards": [
                    _card(
                        score.answered[place], earlier.answered[place] if report.compare else None
                    )
                    for place in _shown(score, report.num_pictures)
                ],
            }
            for earlier, score in zip(first, last, strict=True)
            if report.num_pictures
        ],
        routed=[_routed_card(each) for each in report.routed],
        facts=list(report.facts.items()),
        commands=report.commands,
        pages=list(report.pages.items()),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, "utf-8")


def percent(estimate: Estimate) -> tuple[str, str]:
    """A share and its interval as percent, for people."""
    return f"{100 * estimate.value:.1f}", f"{100 * estimate.low:.0f} to {100 * estimate.high:.0f}"


def change(before: Estimate, after: Estimate) -> tuple[str, Literal["up", "down", "open"]]:
    """How much a share changed, in points, and which way if the two intervals do not meet."""
    points = f"{100 * (after.value - before.value):+.1f}"
    if after.low > before.high:
        return points, "up"
    return points, "down" if after.high < before.low else "open"


def draw(plot: Plot) -> bytes:
    """The curves as a PNG."""
    figure = Figure(figsize=(10, 4.2), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for curve in plot.curves:
        steps, values = np.asarray(curve.steps), np.asarray(curve.values, dtype=np.float64)
        if plot.smooth > 1 and len(values) > plot.smooth:
            (raw,) = axes.plot(steps, values, linewidth=0.7, alpha=0.25)
            steps, values = smoothed(steps, values, plot.smooth)
            axes.plot(steps, values, linewidth=1.8, color=raw.get_color(), label=curve.name)
        else:
            axes.plot(steps, values, linewidth=1.8, marker="o", markersize=3.5, label=curve.name)
    for mark in plot.marks:
        axes.axvline(mark, color="0.6", linewidth=1, linestyle="--")
    axes.set(xlabel="step", ylabel=plot.y_label, yscale="log" if plot.log_scale else "linear")
    if plot.y_range is not None:
        axes.set_ylim(*plot.y_range)
    axes.grid(alpha=0.25, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    if len(plot.curves) > 1:
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def smoothed(
    steps: Int[np.ndarray, " points"], values: Float[np.ndarray, " points"], window: int
) -> tuple[Int[np.ndarray, " means"], Float[np.ndarray, " means"]]:
    """Means over so many neighbouring values, each at the step in their middle."""
    means = np.convolve(values, np.ones(window) / window, mode="valid")
    middle = window // 2
    return steps[middle : middle + len(means)], means


def _table_row(number: int, stages: Sequence[StageScores]) -> dict[str, object]:
    scores = [stage.scores[number] for stage in stages]
    cells = []
    for score in scores:
        value, interval = percent(score.estimate)
        cells.append({"value": value, "interval": interval})
    baseline = scores[0].baseline
    points, verdict = change(scores[0].estimate, scores[-1].estimate)
    return {
        "name": scores[0].row,
        "num": scores[0].estimate.num,
        "baseline": f"{100 * baseline.share:.1f}",
        "baseline_answer": baseline.answer,
        "cells": cells,
        "change": points,
        "verdict": verdict,
    }


def _shown(score: Score, count: int) -> list[int]:
    """The first answers, and at least one mistake where there is one: no hand-picked pictures."""
    right = [each.right for each in score.answered]
    shown = list(range(min(count, len(right))))
    if shown and all(right[place] for place in shown) and not all(right):
        shown[-1] = right.index(False)
    return shown


def _card(answered: Answered, earlier: Answered | None) -> dict[str, object]:
    question = answered.asked.question
    return {
        "png": _picture(answered),
        "question": question.prompt,
        "response": answered.response,
        "right": answered.right,
        "truth": question.answer,
        "earlier": earlier and {"response": earlier.response, "right": earlier.right},
    }


def _routed_card(routed: RoutedAnswer) -> dict[str, object]:
    """A card whose picture shows which tiles were compressed."""
    image = routed.answered.asked.scene.image
    assert image is not None, "only questions about pictures are routed"
    buffer = io.BytesIO()
    shown = painted(_enlarged(image), routed.columns, routed.rows, routed.routes)
    shown.save(buffer, format="png")
    card = _card(routed.answered, None)
    return card | {"png": _encoded(buffer.getvalue()), "routes": routed.routes.words}


def _picture(answered: Answered) -> str | None:
    """A picture as it is shown: with its boxes, where it was asked for boxes."""
    image, question = answered.asked.scene.image, answered.asked.question
    if image is None:
        return None
    shown = _enlarged(image)
    if question.metric == "box":
        shown = with_boxes(shown, given=answered.response, truth=question.answer)
    buffer = io.BytesIO()
    shown.save(buffer, format="png")
    return _encoded(buffer.getvalue())


def _enlarged(image: PIL.Image.Image) -> PIL.Image.Image:
    height = max(1, round(image.height * PICTURE_PX / image.width))
    return image.resize((PICTURE_PX, height), PIL.Image.Resampling.BICUBIC)


def _encoded(png: bytes) -> str:
    return base64.b64encode(png).decode("ascii")
