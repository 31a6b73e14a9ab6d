"""Token, square and sample averaging on a mixture of very short and very long answers.

InternVL3 report, section 2.2: token averaging (w = 1) draws the gradient towards long answers,
sample averaging (w = 1 / l) towards short ones, square averaging (w = 1 / sqrt l) balances. One
nano model that describes pictures goes on with the same draws under each averaging; half of the
samples ask for one word or number, half for a list of 20 to 60 tokens. Held-out answers and losses
of both classes are compared. Scores do not depend on the machine. What is done is not done again.
Run: ``python benchmarks/averaging.py --out runs/averaging``. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from experiment import finished, kept, markdown, pooled, pretrained, quiet, written
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cascadevl.data.mixture import WeightedSource
from cascadevl.eval.responder import ModelResponder
from cascadevl.eval.runner import run_suite
from cascadevl.eval.suite import SuiteRow
from cascadevl.losses.next_token import Averaging
from cascadevl.model.loading import load
from cascadevl.tasks.base import Scene, Split, Task, TaskSource
from cascadevl.tasks.handwriting import Handwriting
from cascadevl.tasks.shapes import Shapes
from cascadevl.train.sft import sft
from cascadevl.workflows import nano
from cascadevl.workflows.held_out import held_out_losses

AVERAGINGS: tuple[Averaging, ...] = get_args(Averaging)
EXAM_SEED = 900
SCENES = 1_000_000
ANSWER_TOKENS = 80


@dataclass(frozen=True, slots=True, kw_only=True)
class Asking:
    """A family of which only some kinds of questions are asked.

    Attributes:
        name: Of the data set.
        task: The family; it must ask every kind about every scene.
        kinds: What is asked.
    """

    name: str
    task: Task
    kinds: tuple[str, ...]

    def draw(self, split: Split, seed: int, index: int) -> Scene:
        """The family's scene with the questions of these kinds."""
        scene = self.task.draw(split, seed, index)
        return replace(scene, questions=tuple(q for q in scene.questions if q.kind in self.kinds))


FULL = Shapes(difficulty="full", num_questions=8)
CLASSES: dict[str, tuple[Asking, ...]] = {
    "short": (
        Asking(name="how many?", task=FULL, kinds=("count",)),
        Asking(name="is there?", task=FULL, kinds=("existence",)),
        Asking(name="what number?", task=Handwriting(num_questions=4), kinds=("number",)),
    ),
    "long": (Asking(name="list all", task=FULL, kinds=("list",)),),
}


def main() -> None:
    """Train the models that are missing, examine them, and write table and picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/averaging"))
    parser.add_argument("--base-steps", type=int, default=600)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--questions", type=int, default=200, help="of each row and seed")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    base = pretrained(args.out / "base", args.base_steps)

    def run(averaging: Averaging, seed: int) -> dict[str, Any]:
        model = train(averaging, seed, base, args.out / f"{averaging}-{seed}", args.steps)
        return {"averaging": averaging, "seed": seed} | examine(model, seed, args.questions)

    results = [
        kept(args.out / f"{averaging}-{seed}.json", partial(run, averaging, seed))
        for seed in args.seeds
        for averaging in AVERAGINGS
    ]
    summary = summarise(results)
    (args.out / "averaging.md").write_text(table(summary), "utf-8")
    draw(summary, args.out / "averaging.png")
    print(table(summary))
    print(json.dumps({"steps": args.steps, "scores": summary}))


def train(averaging: Averaging, seed: int, base: Path, out: Path, num_steps: int) -> Path:
    """One model; all averagings of a seed see the same draws."""
    config = nano.stage_config("sft", out, num_steps=num_steps, model=base)
    config = replace(
        config,
        batch=replace(config.batch, averaging=averaging),
        run=replace(config.run, seed=100 + seed, eval_interval=0),
    )
    sources = [
        WeightedSource(
            source=TaskSource(task=asking, length=SCENES, seed=11, label=asking.name),
            weight=0.5 / len(askings),
        )
        for askings in CLASSES.values()
        for asking in askings
    ]
    return finished(sft(config, sources=sources, console=quiet()))


def examine(path: Path, seed: int, num_questions: int) -> dict[str, Any]:
    """Right answers and held-out loss of every row."""
    model, processor = load(str(path), dtype=torch.bfloat16)
    data = nano.stage_config("sft", path, num_steps=1, model=path).data
    askings = [asking for askings in CLASSES.values() for asking in askings]
    held_out = {
        asking.name: TaskSource(
            task=asking, split="test", length=num_questions, seed=EXAM_SEED + seed
        )
        for asking in askings
    }
    losses = held_out_losses(
        model, processor, held_out, data, num_examples=num_questions, seed=seed
    )
    suite = [
        SuiteRow(name=asking.name, task=asking, num_questions=num_questions) for asking in askings
    ]
    responder = ModelResponder(model=model, processor=processor, max_new_tokens=ANSWER_TOKENS)
    scores = run_suite(responder, suite, seed=EXAM_SEED + seed)
    return {
        "right": {score.row: [each.right for each in score.answered] for score in scores},
        "most_frequent": {score.row: score.baseline.share for score in scores},
        "loss": losses,
    }


def summarise(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every row under every averaging, all seeds together."""
    summary = []
    for length, askings in CLASSES.items():
        for row in (asking.name for asking in askings):
            for averaging in AVERAGINGS:
                of_arm = [result for result in results if result["averaging"] == averaging]
                losses = [result["loss"][row] for result in of_arm]
                chance = [result["most_frequent"][row] for result in of_arm]
                summary.append(
                    {
                        "class": length,
                        "row": row,
                        "averaging": averaging,
                        "loss": sum(losses) / len(losses),
                        "losses": losses,
                        "most_frequent": 100 * sum(chance) / len(chance),
                        **pooled([result["right"][row] for result in of_arm]),
                    }
                )
    return summary


def table(summary: Sequence[dict[str, Any]]) -> str:
    """A Markdown table: right answers and losses of each row, a column for each averaging."""
    lines = []
    for row in dict.fromkeys(s["row"] for s in summary):
        scores = {s["averaging"]: s for s in summary if s["row"] == row}
        first = scores[AVERAGINGS[0]]
        lines.append(
            [
                f"{row} ({first['class']})",
                f"{first['most_frequent']:.1f}",
                *(written(scores[averaging]) for averaging in AVERAGINGS),
                *(f"{scores[averaging]['loss']:.3f}" for averaging in AVERAGINGS),
            ]
        )
    names = [f"{averaging}, right" for averaging in AVERAGINGS]
    names += [f"{averaging}, loss" for averaging in AVERAGINGS]
    return markdown(["question (answers)", "most frequent", *names], lines)


def draw(summary: Sequence[dict[str, Any]], path: Path) -> None:
    """Right answers of each row, a bar for each averaging, dots for the seeds."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    rows = list(dict.fromkeys((s["row"], s["class"]) for s in summary))
    for number, averaging in enumerate(AVERAGINGS):
        scores = [s for s in summary if s["averaging"] == averaging]
        x = [place + 0.25 * (number - 1) for place in range(len(rows))]
        spread = [
            [s["percent"] - s["low"] for s in scores],
            [s["high"] - s["percent"] for s in scores],
        ]
        heights = [s["percent"] for s in scores]
        axis.bar(x, heights, 0.23, yerr=spread, capsize=3, alpha=0.7, label=averaging)
        for place, score in zip(x, scores, strict=True):
            axis.plot([place] * len(score["seeds"]), score["seeds"], "k.", markersize=4)
    axis.set_xticks(range(len(rows)), [f"{row}\n({length} answers)" for row, length in rows])
    axis.set_ylabel("right, % (95 % intervals; dots: seeds)")
    axis.set_ylim(0, 100)
    axis.legend(title="averaging")
    axis.grid(axis="y", alpha=0.3)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
