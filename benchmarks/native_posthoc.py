"""Native pre-training against the post-hoc route, at equal tokens and at equal compute.

InternVL3 report, section 2.2 and figure 3: the native way trains everything together on text and
multimodal data from the start; the usual way first trains the MLP alone between two frozen halves
(the warm-up), then everything. Both start here from the same halves: a nano decoder trained on
text alone and a nano vision tower trained on labelled pages. "Equal tokens" gives the post-hoc
route as many steps in all; "equal compute" as many multiplications, of which a step of the warm-up
takes fewer: no weight gradients in either half, no backward pass through the vision tower.
Scores do not depend on the machine. What is done is not done again.
Run: ``python benchmarks/native_posthoc.py --out runs/native``. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from experiment import finished, kept, markdown, pooled, quiet, written
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cascadevl.data.mixture import WeightedSource
from cascadevl.eval.responder import ModelResponder
from cascadevl.eval.runner import run_suite
from cascadevl.eval.suite import SuiteRow
from cascadevl.model.loading import load
from cascadevl.tasks.base import Scene, Split, Stage, Task, TaskSource
from cascadevl.tasks.easy_vqa import EasyVQA
from cascadevl.tasks.handwriting import Handwriting
from cascadevl.tasks.pages import CLASSES, Pages
from cascadevl.tasks.shapes import Shapes
from cascadevl.tasks.text import Text
from cascadevl.train.config import DataConfig, ModelConfig, TrainConfig
from cascadevl.train.loop import TrainState
from cascadevl.train.posthoc import PosthocConfig, WarmupConfig, posthoc
from cascadevl.train.pretrain import pretrain
from cascadevl.train.vision import pretrain_vision
from cascadevl.types import Batch
from cascadevl.workflows import micro, nano
from cascadevl.workflows.held_out import held_out_losses

ARMS = ("native", "post-hoc, equal tokens", "post-hoc, equal compute")
WARMUP_SHARE = 0.2
"""Steps of the warm-up, as a share of the native run's."""

EXAM_SEED = 1300
SCENES = 1_000_000
PICTURES: tuple[Task, ...] = (
    Handwriting(difficulty="two", num_questions=3),
    Shapes(difficulty="easy", num_questions=4),
    EasyVQA(num_questions=4),
)
TEXTS: tuple[Task, ...] = (Text(difficulty="easy", num_questions=4),)


@dataclass(frozen=True, slots=True, kw_only=True)
class Unseen:
    """The descriptions of a family's pictures, as texts without the pictures.

    Attributes:
        task: The family.
    """

    task: Task
    kinds: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The family's, marked."""
        return f"{self.task.name}, described"

    def draw(self, split: Split, seed: int, index: int) -> Scene:
        """The scene's description alone."""
        return replace(self.task.draw(split, seed, index), images=(), questions=())


def main() -> None:
    """Train the models that are missing, examine them, and write table and picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/native"))
    parser.add_argument("--half-steps", type=int, default=400, help="of each half by itself")
    parser.add_argument("--steps", type=int, default=400, help="of the native run")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--questions", type=int, default=200, help="of each row and seed")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    halves = join_halves(args.out / "halves", args.half_steps)

    def run(arm: str, seed: int) -> dict[str, Any]:
        folder = args.out / f"{ARMS.index(arm)}-{seed}"
        model, steps, curve = train(arm, seed, halves, folder, args.steps)
        result = {"arm": arm, "seed": seed, "steps": steps, "curve": curve}
        return result | examine(model, seed, args.questions)

    results = [
        kept(args.out / f"{ARMS.index(arm)}-{seed}.json", partial(run, arm, seed))
        for seed in args.seeds
        for arm in ARMS
    ]
    start = kept(args.out / "start.json", lambda: examine(halves, 0, args.questions))
    summary = summarise(results, start)
    (args.out / "native.md").write_text(table(summary), "utf-8")
    draw(results, args.out / "native.png")
    print(table(summary))
    steps = {arm: next(r["steps"] for r in results if r["arm"] == arm) for arm in ARMS}
    print(json.dumps({"steps": steps, "scores": summary}))


def sources(tasks: Sequence[Task], stage: Stage) -> list[WeightedSource]:
    """Families as equally frequent sources."""
    return [
        WeightedSource(
            source=TaskSource(task=task, length=SCENES, seed=21, stage=stage), weight=1.0
        )
        for task in tasks
    ]


def settings(out: Path, num_steps: int, seed: int, model: Path | None) -> TrainConfig:
    """Rows of equally many tokens, so that equal steps are equal tokens."""
    config = nano.stage_config("sft", out, num_steps=num_steps, model=model)
    return replace(
        config,
        batch=replace(config.batch, packing="fill", row_tokens=3584, row_tiles=64, buffer_rows=4),
        run=replace(config.run, seed=seed, eval_interval=0),
    )


def join_halves(out: Path, num_steps: int) -> Path:
    """A decoder trained on texts and a vision tower trained on pages, in one untrained whole."""
    if (done := out / "model").exists():
        return done
    texts = [*sources(TEXTS, "sft"), *sources([Unseen(task=task) for task in PICTURES], "document")]
    config = settings(out / "decoder", num_steps, 1, None)
    decoder = finished(pretrain(config, sources=texts, tokenizer=nano.tokenizer(), console=quiet()))
    config = nano.stage_config("pretrain", out / "vision", num_steps=num_steps, model=None)
    vision = finished(
        pretrain_vision(
            replace(config, model=ModelConfig(preset="nano")),
            pages=Pages(px=112),
            num_classes=len(CLASSES),
            tokenizer=nano.tokenizer(),
            console=quiet(),
        )
    )
    return micro.join_halves(decoder, vision, done)


def train(
    arm: str, seed: int, halves: Path, out: Path, num_steps: int
) -> tuple[Path, list[int], list[dict[str, float]]]:
    """Train one arm; the model, the steps of its stages, and held-out losses on the way."""
    shutil.rmtree(out, ignore_errors=True)  # the curve of a run that was cut off is lost
    warmup, joint = steps_of(arm, halves, num_steps)
    config = settings(out, joint, 100 + seed, halves)
    config = replace(
        config,
        data=replace(config.data, mixture="internvl3"),
        run=replace(config.run, eval_interval=40),
    )
    own = [*sources(PICTURES, "pretrain"), *sources(TEXTS, "sft")]
    curve = Curve(halves, seed, config.data)
    if not warmup:
        path = finished(pretrain(config, sources=own, on_step=curve, console=quiet()))
        return path, [0, joint], curve.points
    both = PosthocConfig(
        **{key.name: getattr(config, key.name) for key in fields(config)},
        warmup=WarmupConfig(num_steps=warmup, lr=config.optim.muon_lr or config.optim.lr),
    )
    path = finished(posthoc(both, sources=own, on_step=curve, console=quiet()))
    return path, [warmup, joint], curve.points


class Curve:
    """Held-out losses against the tokens of all stages."""

    def __init__(self, halves: Path, seed: int, data: DataConfig) -> None:
        """Start without a point; the processor is that of the halves."""
        _, self._processor = load(str(halves), dtype=torch.bfloat16)
        self._seed, self._data = seed, data
        self._before, self._last = 0, 0
        self.points: list[dict[str, float]] = []

    def __call__(self, state: TrainState[Batch]) -> None:
        """Add a point; every stage counts its tokens from zero."""
        tokens = state.counters["tokens"]
        if tokens < self._last:
            self._before += self._last
        self._last = tokens
        losses = held_out_losses(
            state.model,  # type: ignore[arg-type]
            self._processor,
            held_out(self._seed, 40),
            self._data,
            num_examples=40,
            seed=self._seed,
        )
        self.points.append({"tokens": float(self._before + tokens), **losses})


def held_out(seed: int, num_scenes: int) -> dict[str, TaskSource]:
    """Held-out records of every family."""
    return {
        task.name: TaskSource(task=task, split="test", length=num_scenes, seed=EXAM_SEED + seed)
        for task in (*PICTURES, *TEXTS)
    }


def steps_of(arm: str, halves: Path, num_steps: int) -> tuple[int, int]:
    """Steps of warm-up and joint training."""
    if arm == "native":
        return 0, num_steps
    warmup = round(WARMUP_SHARE * num_steps)
    if arm.endswith("tokens"):
        return warmup, num_steps - warmup
    return warmup, num_steps - round(warmup * warmup_cost(halves))


def warmup_cost(halves: Path) -> float:
    """Multiplications of a step of the warm-up, as a share of those of a joint step.

    By parameters and tokens: a forward pass is one unit of each part, its backward pass one for
    the inputs and one for the weights. The warm-up leaves out the backward pass of the vision
    tower and the weights of the decoder.
    """
    model, processor = load(str(halves), dtype=torch.bfloat16)
    counts = {"vision": 0, "projector": 0, "language": 0}
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2 and "embed" not in name:
            part = "vision" if "vision" in name else "projector"
            part = "language" if "language_model" in name else part
            counts[part] += parameter.numel()
    patches = (model.config.tile_px // model.config.vision_config.patch_size[0]) ** 2 + 1
    task = TaskSource(task=PICTURES[0], length=1, stage="pretrain")
    example = processor.builder(task[0])
    vision = counts["vision"] * patches
    projector = counts["projector"] * processor.tokens_per_tile
    language = counts["language"] * (len(example.input_ids) + processor.tokens_per_tile)
    return float((vision + 3 * projector + 2 * language) / (3 * (vision + projector + language)))


def examine(path: Path, seed: int, num_questions: int) -> dict[str, Any]:
    """Right answers and held-out losses."""
    model, processor = load(str(path), dtype=torch.bfloat16)
    data = nano.stage_config("sft", path, num_steps=1, model=path).data
    losses = held_out_losses(
        model, processor, held_out(seed, 200), data, num_examples=200, seed=seed
    )
    suite = [
        SuiteRow(name=task.name, task=task, num_questions=num_questions)
        for task in (*PICTURES, *TEXTS)
    ]
    responder = ModelResponder(model=model, processor=processor, max_new_tokens=48)
    scores = run_suite(responder, suite, seed=EXAM_SEED + seed)
    return {
        "right": {score.row: [each.right for each in score.answered] for score in scores},
        "most_frequent": {score.row: score.baseline.share for score in scores},
        "loss": losses,
    }


def summarise(results: Sequence[dict[str, Any]], start: dict[str, Any]) -> list[dict[str, Any]]:
    """Every row of every arm, all seeds together, and of the untrained whole."""
    summary = []
    for row in start["right"]:
        for arm in ("start", *ARMS):
            of_arm = [r for r in results if r["arm"] == arm] or [start]
            losses = [result["loss"][row] for result in of_arm]
            chance = [result["most_frequent"][row] for result in of_arm]
            summary.append(
                {
                    "row": row,
                    "arm": arm,
                    "loss": sum(losses) / len(losses),
                    "losses": losses,
                    "most_frequent": 100 * sum(chance) / len(chance),
                    **pooled([result["right"][row] for result in of_arm]),
                }
            )
    return summary


def table(summary: Sequence[dict[str, Any]]) -> str:
    """A Markdown table: right answers and losses of each row, a column for each arm."""
    arms = ("start", *ARMS)
    lines = []
    for row in dict.fromkeys(s["row"] for s in summary):
        scores = {s["arm"]: s for s in summary if s["row"] == row}
        texts = [f"{written(scores[arm])}; {scores[arm]['loss']:.3f}" for arm in arms]
        lines.append([row, f"{scores['native']['most_frequent']:.1f}", *texts])
    return markdown(["questions", "most frequent", *(f"{arm}: right; loss" for arm in arms)], lines)


def draw(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Held-out losses against tokens, a panel for each family, a thin line for each seed."""
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    rows = [row for row in results[0]["curve"][0] if row != "tokens"]
    axes = figure.subplots(1, len(rows))
    for axis, row in zip(axes, rows, strict=True):
        for arm, colour in zip(ARMS, ("C0", "C1", "C2"), strict=True):
            of_arm = [result for result in results if result["arm"] == arm]
            for number, result in enumerate(of_arm):
                x = [point["tokens"] / 1e6 for point in result["curve"]]
                y = [point[row] for point in result["curve"]]
                axis.plot(x, y, colour, alpha=0.6, label=arm if number == 0 else None)
        axis.set_title(row)
        axis.set_yscale("log")
        axis.set_xlabel("tokens after joining, millions")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("held-out loss, nats a token")
    axes[-1].legend(fontsize=8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
