"""How micro learned: the small examinations and the losses of all its stages, as two pictures.

Reads what ``cascadevl micro --out RUN`` leaves and writes ``micro_scores.png`` and
``micro_losses.png``. The last line is one JSON document with the cost of every stage.
Run: ``python benchmarks/micro_curves.py --run runs/micro --out docs/figures``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cascadevl.workflows import micro

JOINT = ("pretrain", "sft", "anneal")


def main() -> None:
    """Draw both pictures and sum up what the stages took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("runs/micro"))
    parser.add_argument("--out", type=Path, default=Path("docs/figures"))
    args = parser.parse_args()
    course = json.loads((args.run / "course.json").read_text("utf-8"))
    logs = {stage: log_of(args.run / stage) for stage in micro.STAGES}
    draw_scores(course["points"], args.out / "micro_scores.png")
    draw_losses(logs, args.out / "micro_losses.png")
    print(json.dumps({stage: cost_of(lines) for stage, lines in logs.items()}))


def log_of(folder: Path) -> list[dict[str, Any]]:
    """The recorded lines of a stage."""
    text = (folder / "metrics.jsonl").read_text("utf-8")
    return [json.loads(line) for line in text.splitlines()]


def cost_of(lines: list[dict[str, Any]]) -> dict[str, float]:
    """Steps, tokens, tiles and samples of a stage, and its hours at the recorded speed."""
    seconds, before = 0.0, 0.0
    for line in lines:
        seconds += (line["tokens"] - before) / line["tokens_per_s"]
        before = line["tokens"]
    last = lines[-1]
    counts = {name: last[name] for name in ("step", "tokens", "tiles", "samples", "loss")}
    return counts | {"hours": round(seconds / 3600, 3)}


def draw_scores(points: dict[str, dict[str, dict[str, float]]], path: Path) -> None:
    """Right answers of every row against joint steps."""
    figure = Figure(figsize=(11, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    first = 0
    curves: dict[str, list[tuple[int, float]]] = {}
    for stage in JOINT:
        for step, shares in sorted(points.get(stage, {}).items(), key=lambda each: int(each[0])):
            for row, share in shares.items():
                curves.setdefault(row, []).append((first + int(step), 100 * share))
        first += micro.STAGES[stage].num_steps
        axes.axvline(first, color="0.6", linewidth=1, linestyle="--")
    for number, (row, curve) in enumerate(curves.items()):
        style = "-o" if number < 10 else "--s"
        axes.plot(*zip(*curve, strict=True), style, markersize=3, label=row)
    axes.set(xlabel="joint steps (dashed: a stage ends)", ylabel="percent right", ylim=(-2, 102))
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8)
    figure.savefig(path, dpi=100)


def draw_losses(logs: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """The loss of every stage, each in a panel of its own."""
    figure = Figure(figsize=(14, 3), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (stage, lines) in zip(figure.subplots(1, len(logs)), logs.items(), strict=True):
        axes.plot([line["step"] for line in lines], [line["loss"] for line in lines], linewidth=0.8)
        axes.set(title=stage, xlabel="step", yscale="log")
        axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=90)


if __name__ == "__main__":
    main()
