"""Long context with V2PE: find a handwritten number among 1 to 8 times the trained pictures.

A nano model that can read (nano's two stages, shortened, each picture alone, increment 1) goes
on with haystacks of 1 to 8 pictures, once with increments drawn per image (V2PE) and once with
increment 1, on the same draws for the same number of steps and with the same RoPE. Then both are
asked about haystacks of 8, 16, 32 and 64 pictures with each increment and with ``auto``, which
keeps a prompt within the trained positions (InternVL3 report, section 3.14, table 12).
Scores do not depend on the machine. What is done already is not done again.
Run: ``python benchmarks/needle.py --out runs/needle``. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from experiment import fine_tuned, finished, kept, markdown, pooled, quiet, written
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cascadevl.data.mixture import WeightedSource
from cascadevl.data.processor import CascadeVLProcessor
from cascadevl.engine.conversation import answer
from cascadevl.eval.suite import Asked, SuiteRow, draw_row, most_frequent
from cascadevl.model.loading import load
from cascadevl.model.modeling import CascadeVLForConditionalGeneration
from cascadevl.model.v2pe import choose_increment
from cascadevl.tasks.base import Task, TaskSource, to_prompt
from cascadevl.tasks.easy_vqa import EasyVQA
from cascadevl.tasks.handwriting import Handwriting
from cascadevl.tasks.needle import Needle
from cascadevl.tasks.shapes import Shapes
from cascadevl.train.config import TrainConfig
from cascadevl.train.sft import sft
from cascadevl.workflows import nano

TRAINED_PICTURES = 8
MULTIPLES = (1, 2, 4, 8)
INCREMENTS = (1.0, 1 / 4, 1 / 16, 1 / 64, 1 / 256)
ARMS: dict[str, float | Literal["random"]] = {"V2PE": "random", "no V2PE": 1.0}
ANSWER_TOKENS = 4
EXAM_SEED = 500
SCENES = 1_000_000


def main() -> None:
    """Train the models that are missing, examine them, and write table and picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/needle"))
    parser.add_argument("--base-steps", type=int, default=600, help="of each of the two stages")
    parser.add_argument("--steps", type=int, default=600, help="with haystacks")
    parser.add_argument("--rows", type=int, default=16, help="samples a step")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--questions", type=int, default=200, help="of each length and seed")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    base = fine_tuned(args.out / "base", args.base_steps)

    def run(arm: str, seed: int) -> dict[str, Any]:
        path = train_arm(arm, seed, base, args.out, args.steps, args.rows)
        return {"arm": arm, "seed": seed, **examine(path, seed, args.questions)}

    results = [
        kept(args.out / f"{arm.replace(' ', '_')}-{seed}.json", partial(run, arm, seed))
        for seed in args.seeds
        for arm in ARMS
    ]
    summary = summarise(results)
    (args.out / "needle.md").write_text(table(summary), "utf-8")
    draw(summary, args.out / "needle.png")
    print(table(summary))
    print(json.dumps({"steps": args.steps, "rows": args.rows, "scores": summary}))


def sources() -> list[WeightedSource]:
    """Three haystacks in five records; the rest are single pictures, so that none is forgotten."""
    haystacks = Needle(num_pictures=(1, TRAINED_PICTURES), num_questions=2)
    digits = Handwriting(difficulty="two", num_questions=2)
    shapes = Shapes(difficulty="full", num_questions=3)
    shares = ((haystacks, 0.6), (digits, 0.15), (shapes, 0.15), (EasyVQA(num_questions=2), 0.1))
    return [
        WeightedSource(source=TaskSource(task=task, length=SCENES, seed=7), weight=weight)
        for task, weight in shares
    ]


def train_arm(arm: str, seed: int, base: Path, out: Path, num_steps: int, rows: int) -> Path:
    """Train one model with haystacks; both arms of a seed see the same draws."""
    folder = out / f"{arm.replace(' ', '_')}-{seed}"
    config: TrainConfig = nano.stage_config("sft", folder, num_steps=num_steps, model=base)
    config = replace(
        config,
        data=replace(config.data, increment=ARMS[arm]),
        batch=replace(config.batch, row_samples=rows),
        run=replace(config.run, seed=100 + seed, eval_interval=0),
    )
    return finished(sft(config, sources=sources(), console=quiet()))


def examine(path: Path, seed: int, num_questions: int) -> dict[str, Any]:
    """Right answers of a model by length and increment, for each place of the needle."""
    model, processor = load(str(path), dtype=torch.bfloat16)
    model.train(False)
    context = trained_positions(processor)
    lengths: dict[str, Any] = {}
    for multiple in MULTIPLES:
        pictures = multiple * TRAINED_PICTURES
        task = Needle(num_pictures=(pictures, pictures))
        row = SuiteRow(name=f"{multiple}x", task=task, num_questions=num_questions)
        asked = draw_row(row, split="test", seed=EXAM_SEED + seed)
        right = answers_right(model, processor, asked, context)
        lengths[row.name] = {"right": right, "most_frequent": most_frequent(asked).share}
    short = {}
    singles: tuple[Task, ...] = (Handwriting(), Shapes(difficulty="full"), EasyVQA())
    for single in singles:
        row = SuiteRow(name=single.name, task=single, num_questions=num_questions)
        asked = draw_row(row, split="test", seed=EXAM_SEED + seed)
        right = answers_right(model, processor, asked, context)
        short[row.name] = {"right": right, "most_frequent": most_frequent(asked).share}
    return {"context": context, "needle": lengths, "short": short}


def trained_positions(processor: CascadeVLProcessor) -> int:
    """Positions of the longest haystack seen in training, its answer included."""
    task = Needle(num_pictures=(TRAINED_PICTURES, TRAINED_PICTURES))
    scene = task.draw("train", 0, 0)
    lengths = []
    for question in scene.questions:
        example = processor.prompt(to_prompt(scene, question))
        visual = sum(example.tiles_per_image) * processor.tokens_per_tile
        lengths.append(len(example.input_ids) - len(scene.images) + visual)
    return max(lengths) + ANSWER_TOKENS


def answers_right(
    model: CascadeVLForConditionalGeneration,
    processor: CascadeVLProcessor,
    asked: Sequence[Asked],
    context: int,
) -> dict[str, list[bool]]:
    """Whether each question is answered rightly, under each increment and ``auto``.

    The prompts of a question differ in positions alone, so its pictures are encoded once.
    """
    right: dict[str, list[bool]] = defaultdict(list)
    for each in asked:
        example = processor.prompt(to_prompt(each.scene, each.question))
        visual = sum(example.tiles_per_image) * processor.tokens_per_tile
        text = len(example.input_ids) - len(example.tiles_per_image)
        auto = choose_increment(text, visual, num_new_tokens=ANSWER_TOKENS, trained_context=context)
        names = {"auto": auto} | {label(value): value for value in INCREMENTS}
        steps = sorted(set(names.values()))
        said = answer(model, processor, [example] * len(steps), max_new_tokens=40, increments=steps)
        texts = [one.text for one in said]
        given = dict(zip(steps, texts, strict=True))
        for name, step in names.items():
            right[name].append(each.question.check(given[step]))
    return right


def label(increment: float) -> str:
    """An increment as it is written: 1, 1/4, ..."""
    return "1" if increment == 1 else f"1/{round(1 / increment)}"


def summarise(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Scores of all seeds together, with intervals, and of each seed."""
    summary = []
    for arm, kind, row, increment in _cells(results):
        of_arm = [result for result in results if result["arm"] == arm]
        each = [result[kind][row]["right"][increment] for result in of_arm]
        base = [result[kind][row]["most_frequent"] for result in of_arm]
        summary.append(
            {
                "arm": arm,
                "kind": kind,
                "row": row,
                "increment": increment,
                **pooled(each),
                "most_frequent": 100 * sum(base) / len(base),
            }
        )
    return summary


def _cells(results: Sequence[dict[str, Any]]) -> Iterator[tuple[str, str, str, str]]:
    for arm in ARMS:
        for kind in ("needle", "short"):
            for row in results[0][kind]:
                for increment in ("auto", *(label(value) for value in INCREMENTS)):
                    if any(result["arm"] == arm for result in results):
                        yield arm, kind, row, increment


def table(summary: Sequence[dict[str, Any]]) -> str:
    """A Markdown table: one line for each row and increment, one column for each arm."""
    cells = {(s["row"], s["increment"], s["arm"]): s for s in summary}
    lines = []
    for row, increment in dict.fromkeys((s["row"], s["increment"]) for s in summary):
        scores = [cells.get((row, increment, arm)) for arm in ARMS]
        chance = next(s["most_frequent"] for s in scores if s is not None)
        texts = ["" if score is None else written(score) for score in scores]
        lines.append([row, increment, f"{chance:.1f}", *texts])
    return markdown(["row", "increment", "most frequent", *ARMS], lines)


def draw(summary: Sequence[dict[str, Any]], path: Path) -> None:
    """Share of needles found against the length, one line an increment, one panel an arm."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(ARMS), sharey=True)
    for axis, arm in zip(axes, ARMS, strict=True):
        for number, increment in enumerate(("auto", *(label(value) for value in INCREMENTS))):
            points = [
                s
                for s in summary
                if (s["arm"], s["kind"], s["increment"]) == (arm, "needle", increment)
            ]
            if not points:
                continue
            shift = 1.02 ** (number - 3)  # side by side, so that intervals can be told apart
            x = [int(s["row"].rstrip("x")) * shift for s in points]
            y = [s["percent"] for s in points]
            spread = [[s["percent"] - s["low"] for s in points],
                      [s["high"] - s["percent"] for s in points]]  # fmt: skip
            style = {"linewidth": 2.5, "color": "black"} if increment == "auto" else {}
            axis.errorbar(x, y, spread, label=increment, capsize=3, marker="o", **style)
        axis.set_xscale("log", base=2)
        axis.set_xticks(MULTIPLES, [f"{m}x\n{m * TRAINED_PICTURES}" for m in MULTIPLES])
        axis.set_xlabel("haystack: multiple of the trained one, pictures")
        axis.set_title(f"trained with {arm}" if arm == "V2PE" else "trained with increment 1")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("needles read, % (95 % intervals)")
    axes[0].set_ylim(0, 100)
    axes[-1].legend(title="increment asked with")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
