"""How many labels does a small judge need before it checks anything? Planted errors, true labels.

A process reward model is trained on numbers found by their sum (`cascadevl.tasks.subset_sum`), half
of them with one wrong number, each step labelled by the truth: no continuation, no noise, and no
solution seen twice unless there are to be only so many (``--scenes``). Its macro-F1 on held-out
solutions is printed as it learns, beside that of calling every step right and of an answer that
knows nothing but which step it is. A run goes on from its last checkpoint, and the curve is kept
beside it.

Cost, an estimate: half a core-hour for 1,500 steps of 64 solutions.
Run: ``python benchmarks/judge_learning.py --difficulty easy --threads 1``. The last line is one
JSON document.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from best_of_n_material import CONFIGS, RULES, Size, each_of, questions
from best_of_n_tasks import plant
from experiment import finished, markdown, quiet

from cascadevl.config import load_config
from cascadevl.data.mixture import WeightedSource
from cascadevl.data.process_records import JudgedSolution, conversation_of
from cascadevl.engine.process_reward import ProcessRewardModel
from cascadevl.host_memory import keep_freed_memory
from cascadevl.model.loading import load
from cascadevl.scoring.steps import best_threshold, macro_f1, steps_of
from cascadevl.tasks.problems import Problem
from cascadevl.tasks.subset_sum import LEVELS
from cascadevl.train.loop import TrainState
from cascadevl.train.prm import PRMConfig, prm
from cascadevl.types import Batch, Record

NUM_SCENES = 1_000_000


class Planted:
    """Judged solutions, every other one with a wrong number."""

    name = "planted"

    def __init__(self, difficulty: str, seed: int, length: int) -> None:
        """Name the material."""
        self.asked = questions(Size(difficulty=difficulty), length, seed)
        self.seed = seed

    def __len__(self) -> int:
        """Number of solutions."""
        return len(self.asked)

    def __getitem__(self, index: int, /) -> Record:
        """The record of one solution."""
        (problem,) = self.asked[index]
        steps, labels = judged(problem, np.random.default_rng([self.seed, index]))
        solution = JudgedSolution(question=problem.prompt, steps=tuple(steps), labels=tuple(labels))
        name = problem.problem_id
        turns = conversation_of(solution)
        return Record(source=name, record_id=name, messages=turns, dataset=self.name)


def judged(problem: Problem, rng: np.random.Generator) -> tuple[list[str], list[bool]]:
    """The worked solution of a problem or, as often, one that goes wrong; with its labels."""
    steps = list(steps_of(problem.solutions[0], RULES))
    if rng.integers(2):
        return plant(problem.prompt.text, steps, rng)
    return steps, [True] * len(steps)


def held_out(
    judge: ProcessRewardModel, difficulty: str, num: int, seed: int
) -> dict[str, list[Any]]:
    """Scores, truth and kind of step of held-out solutions."""
    rng = np.random.default_rng(seed)
    found: dict[str, list[Any]] = {"scores": [], "truth": [], "which": []}
    for problem in each_of(questions(Size(difficulty=difficulty), num, seed, "test")):
        steps, labels = judged(problem, rng)
        (scored,) = judge([problem.prompt], [RULES.join(steps)])
        kind = problem.problem_id.split("/")[1]
        found["scores"] += scored.step_scores
        found["truth"] += labels
        found["which"] += [f"{kind} {number}" for number in range(len(labels))]
    return found


def knows_the_place(chosen: dict[str, list[Any]], measured: dict[str, list[Any]]) -> list[bool]:
    """What is said of a step by its question's kind and its number alone."""
    by_place: dict[str, list[bool]] = defaultdict(list)
    for which, truth in zip(chosen["which"], chosen["truth"], strict=True):
        by_place[which].append(truth)
    return [2 * sum(by_place[which]) > len(by_place[which]) for which in measured["which"]]


def measured_f1(judge: ProcessRewardModel, difficulty: str, num: int) -> dict[str, float]:
    """Macro-F1 with the threshold of other solutions, and of two answers that look at nothing."""
    chosen, measured = (held_out(judge, difficulty, num, seed) for seed in (70, 71))
    threshold, _ = best_threshold(chosen["scores"], chosen["truth"])
    truth = measured["truth"]
    return {
        "macro_f1": macro_f1([score > threshold for score in measured["scores"]], truth),
        "all_right": macro_f1([True] * len(truth), truth),
        "by_place": macro_f1(knows_the_place(chosen, measured), truth),
    }


def learned(args: argparse.Namespace, difficulty: str) -> list[dict[str, float]]:
    """Train one judge, and measure it as it learns."""
    config = load_config(PRMConfig, files=[CONFIGS / "prm_micro.yaml"], overrides=args.overrides)
    config = replace(
        config,
        model=replace(config.model, path=args.model),
        batch=replace(config.batch, row_samples=args.row),
        run=replace(
            config.run,
            num_steps=args.steps,
            seed=0,
            out=args.out / difficulty,
            resume=True,
            eval_interval=args.every,
        ),
    )
    processor = load(args.model, dtype=torch.float32)[1]
    curve = config.run.out / "curve.jsonl"

    def measure(state: TrainState[Batch]) -> None:
        judge = ProcessRewardModel(state.model, processor)  # type: ignore[arg-type]
        row = {"step": state.step, **measured_f1(judge, difficulty, args.questions)}
        with curve.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(difficulty, {name: round(value, 3) for name, value in row.items()}, flush=True)

    sources: Sequence[WeightedSource] = [
        WeightedSource(source=Planted(difficulty, args.seed, args.scenes))
    ]
    finished(prm(config, sources=sources, on_step=measure, console=quiet()))
    rows = [json.loads(line) for line in curve.read_text("utf-8").splitlines()]
    return list({row["step"]: row for row in rows}.values())  # some may be measured twice


def main() -> None:
    """Train, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of prm_micro.yaml")
    parser.add_argument("--model", default="micro", help="what the judge is trained from")
    parser.add_argument("--difficulty", nargs="+", choices=[*LEVELS], default=["easy", "full"])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--row", type=int, default=64, help="solutions of a step")
    parser.add_argument("--scenes", type=int, default=NUM_SCENES, help="different solutions")
    parser.add_argument("--every", type=int, default=250, help="steps between measurements")
    parser.add_argument("--questions", type=int, default=200, help="held out, to be measured on")
    parser.add_argument("--seed", type=int, default=80, help="of the solutions")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("runs/judge_learning"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    curves = {difficulty: learned(args, difficulty) for difficulty in args.difficulty}
    for difficulty, curve in curves.items():
        rows = [
            [f"{value:.3f}" if value < 1 else f"{value:g}" for value in row.values()]
            for row in curve
        ]
        print(f"\n{difficulty}\n\n{markdown(list(curve[0]), rows)}")
    print(
        json.dumps(
            {
                "model": args.model,
                "steps": args.steps,
                "row": args.row,
                "scenes": args.scenes,
                **curves,
            }
        )
    )


if __name__ == "__main__":
    main()
