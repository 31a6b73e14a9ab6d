"""Do steps choose better than votes? Best of N on worked calculations that micro learns to write.

The InternVL3 report's table 2 and VisualPRM's comparison (arXiv 2503.10291), small: for each seed,
micro is fine-tuned to calculate in two modes, at once and with worked steps inside ``<think>``
(`cascadevl data think`); its own solutions of other training questions are judged step by step by
sixteen continuations (`data process`), and a reward model is trained on them, from the very model
that is judged (`train prm`). Then held-out questions, whose numbers were in no training data:

* ``base``: answered at once, greedily. ``thinking``: with worked steps, greedily.
* at N = 2, 4, 8, 16, 32 answers drawn with worked steps: ``vote``, the final answer that most of
  them give; ``ORM``, the reward model on whole answers; ``PRM``, the mean over steps; and
  ``oracle``, whether any of them is right. All read the same answers, the first N of 32.
* planted errors: worked reference solutions with one number changed in a known step, from which on
  every step is wrong; macro-F1 of the steps, the threshold chosen on other solutions.

Intervals are 95 %, over the questions of all seeds. PRM counts as better than the vote where their
intervals stand apart; since both choose among the same answers, the paired difference is reported
beside it, with its interval by resampling questions. What is done is not done again.

Cost, an estimate: about one core-hour a seed at the defaults (half of it continuations), so three
core-hours in all; nothing is measured in seconds, so the machine may be busy. ``--tiny`` proves in
minutes that it works. Run: ``python benchmarks/best_of_n_arms.py --out runs/best_of_n``. The last
line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from experiment import finished, kept, markdown, pooled, quiet, written
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cascadevl.config import load_config
from cascadevl.data.processor import CascadeVLProcessor
from cascadevl.engine.backends import generate
from cascadevl.engine.critics import Critics, critics_of
from cascadevl.engine.engine import Engine
from cascadevl.engine.engine_backend import EngineBackend
from cascadevl.engine.offline import seed_of
from cascadevl.engine.requests import Completion, EngineConfig, Request
from cascadevl.engine.sampling import SamplingParams
from cascadevl.host_memory import keep_freed_memory
from cascadevl.model.loading import load
from cascadevl.scoring.steps import best_threshold, macro_f1, split_steps
from cascadevl.scoring.voting import ballot, tally
from cascadevl.tasks.base import Scene, Split
from cascadevl.tasks.problems import Problem, TaskProblems
from cascadevl.tasks.text import Text
from cascadevl.train.prm import PRMConfig, prm
from cascadevl.train.sft import sft
from cascadevl.types import Message
from cascadevl.workflows import boxes
from cascadevl.workflows.process_config import ProcessConfig
from cascadevl.workflows.process_data import make_process_data
from cascadevl.workflows.rollouts import RolloutConfig, sample_rollouts
from cascadevl.workflows.thinking_config import ThinkingConfig
from cascadevl.workflows.thinking_data import make_thinking_data

SYSTEM = "Think first."
"""Thinking system prompt: the released page is longer than micro's questions."""

TEMPERATURE = 0.7
"""Of all that is drawn (VisualPRM's best of N). Its solutions and continuations were drawn at 1;
the lower one was chosen after short trials, so the examination asks questions none of them saw."""

CONFIGS = Path(__file__).parents[1] / "configs"
NUMBERS = (2, 4, 8, 16, 32)
KINDS = ("add", "subtract", "multiply", "sum")
TRAINING_SEED, JUDGED_SEED, PLANTED_SEED, EXAM_SEED = 40, 50, 60, 1700
"""Of scenes: what is fine-tuned on, whose solutions are judged, planted errors, the examination."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Calculations:
    """The calculations of the text family that come with worked steps, a paragraph a step.

    Attributes:
        difficulty: A key of `cascadevl.tasks.text.LEVELS`.
    """

    difficulty: str = "full"
    name: ClassVar[str] = "calculations"
    kinds: ClassVar[tuple[str, ...]] = KINDS

    def draw(self, split: Split, seed: int, index: int) -> Scene:
        """Draw one calculation of each kind, in the order of the draw."""
        task = Text(num_questions=len(Text.kinds), difficulty=self.difficulty)
        scene = task.draw(split, seed, index)
        questions = [
            replace(each, reasoning=(each.reasoning or "").replace(", ", "\n\n"))
            for each in scene.questions
            if each.kind in KINDS
        ]
        return replace(scene, questions=tuple(questions))


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How much is done; the defaults are those of the experiment.

    Attributes:
        difficulty: Of the calculations.
        thinking_scenes: Scenes of fine-tuning.
        sft_steps: Steps of it.
        judged_scenes: Scenes whose solutions are judged.
        continuations: Of every step.
        prm_steps: Steps of training the reward model.
        exam_scenes: Held-out scenes, of four questions each.
        planted_scenes: Scenes of planted errors, to choose the threshold and again to be measured.
        num_samples: Answers drawn to a held-out question.
        max_tokens: Of an answer.
    """

    difficulty: str = "full"
    thinking_scenes: int = 4000
    sft_steps: int = 600
    judged_scenes: int = 300
    continuations: int = 16  # VisualPRM
    prm_steps: int = 400
    exam_scenes: int = 75
    planted_scenes: int = 50
    num_samples: int = 32
    max_tokens: int = 160


TINY = Size(
    difficulty="easy",
    thinking_scenes=12,
    sft_steps=3,
    judged_scenes=2,
    continuations=2,
    prm_steps=2,
    exam_scenes=2,
    planted_scenes=2,
    num_samples=4,
    max_tokens=48,
)


def problems_of(size: Size, num_scenes: int, seed: int, split: Split = "train") -> list[Problem]:
    """Calculations with their worked solutions."""
    groups = grouped(size, num_scenes, seed, split)
    return [problem for number in range(len(groups)) for problem in groups[number]]


def grouped(size: Size, num_scenes: int, seed: int, split: Split = "train") -> TaskProblems:
    """The same, a scene a group."""
    task = Calculations(difficulty=size.difficulty)
    return TaskProblems(tasks=[task], num_scenes=num_scenes, seed=seed, split=split)


def fine_tuned(model: str, size: Size, out: Path, seed: int) -> Path:
    """Micro, calculating at once or with worked steps as the system prompt says."""
    if (done := out / "sft" / "model").exists():
        return done
    data = ThinkingConfig(out=out / "thinking", resume=True, system=SYSTEM, seed=seed)
    report = make_thinking_data(
        grouped(size, size.thinking_scenes, TRAINING_SEED + 1000 * seed), data
    )
    if report.meta is None:
        raise SystemExit("no thinking data were made; ask for more scenes")
    config = boxes.train_config(out / "sft", model=model, num_steps=size.sft_steps)
    config = replace(
        config,
        data=replace(config.data, meta=(report.meta,)),
        run=replace(config.run, seed=seed, eval_interval=0),
    )
    return finished(sft(config, console=quiet()))


def opened(path: Path) -> tuple[EngineBackend, CascadeVLProcessor]:
    """An engine for a model."""
    model, processor = load(path, dtype=torch.float32)
    engine = Engine(model, processor, EngineConfig(cache_bytes=2**28))
    return EngineBackend(engine=engine), processor


def reward_model(policy: Path, size: Size, out: Path, seed: int) -> tuple[Path, dict[str, Any]]:
    """A reward model of solutions of the policy, and what its data are like."""
    backend, processor = opened(policy)
    sampling = SamplingParams(temperature=TEMPERATURE, max_tokens=size.max_tokens, seed=seed)
    asked = grouped(size, size.judged_scenes, JUDGED_SEED + 1000 * seed)
    rollouts = RolloutConfig(out=out / "store", num_samples=4, sampling=sampling, system=SYSTEM)
    sample_rollouts(asked, rollouts, processor, backend, weight_version="policy")
    judged = ProcessConfig(
        store=out / "store",
        out=out / "steps",
        num_continuations=size.continuations,
        sampling=sampling,
        max_chance=1.0,  # calculations have no answer that is guessed more often than another
    )
    report = make_process_data(judged, processor, backend)
    if report.meta is None:
        raise SystemExit("no solution came to its end, so that nothing can be judged")
    facts = {
        "solutions": report.num_solutions,
        "right": report.num_right,
        "steps": report.num_steps,
        "wrong_steps": report.num_minus,
    }
    if (done := out / "prm" / "model").exists():
        return done, facts
    config = load_config(PRMConfig, files=[CONFIGS / "prm_micro.yaml"])
    config = replace(
        config,
        model=replace(config.model, path=str(policy)),
        data=replace(config.data, meta=(report.meta,)),
        run=replace(config.run, num_steps=size.prm_steps, seed=seed, out=out / "prm", resume=True),
    )
    return finished(prm(config, console=quiet())), facts


@dataclass(frozen=True, slots=True)
class Judged:
    """An answer, whether it is right, and what is thought of it."""

    right: bool
    ended: bool
    vote: str | None
    scores: dict[str, float]


def examine(policy: Path, judge: Path, size: Size, seed: int) -> dict[str, Any]:
    """Every arm on the held-out questions, a list of right and wrong each."""
    backend, processor = opened(policy)
    critics = critics_of(*load(judge, dtype=torch.float32))
    asked = problems_of(size, size.exam_scenes, EXAM_SEED + seed, "test")
    right: dict[str, list[bool]] = {
        "base": greedy(backend, processor, asked, size, None),
        "thinking": greedy(backend, processor, asked, size, SYSTEM),
    }
    for problem, drawn in zip(asked, answers(backend, processor, asked, size, seed), strict=True):
        found = judged(problem, drawn, critics)
        for number in numbers(size):
            for arm, value in arms(found[:number]).items():
                right.setdefault(f"{arm} @{number}", []).append(value)
        right.setdefault("one drawn", []).append(found[0].right)
    return {"right": right}


def numbers(size: Size) -> list[int]:
    """N, as far as so many answers are drawn."""
    return [number for number in NUMBERS if number <= size.num_samples]


def request_of(
    processor: CascadeVLProcessor, problem: Problem, system: str | None, sampling: SamplingParams
) -> Request:
    """A question in one of the modes."""
    prompt = processor.prompt([problem.prompt], system=system)
    return Request(prompt=prompt, sampling=sampling)


def greedy(
    backend: EngineBackend,
    processor: CascadeVLProcessor,
    asked: Sequence[Problem],
    size: Size,
    system: str | None,
) -> list[bool]:
    """Whether the most probable answer to each question is right."""
    sampling = SamplingParams(max_tokens=size.max_tokens)
    found = generate(backend, [request_of(processor, each, system, sampling) for each in asked])
    return [p.check(answer.text) for p, (answer,) in zip(asked, found, strict=True)]


def answers(
    backend: EngineBackend,
    processor: CascadeVLProcessor,
    asked: Sequence[Problem],
    size: Size,
    seed: int,
) -> list[tuple[Completion, ...]]:
    """Answers drawn to each question, with worked steps."""
    requests = []
    for problem in asked:
        own = seed_of(seed, problem.problem_id)
        sampling = SamplingParams(temperature=TEMPERATURE, max_tokens=size.max_tokens, seed=own)
        request = request_of(processor, problem, SYSTEM, sampling)
        requests.append(replace(request, num_samples=size.num_samples))
    return generate(backend, requests)


def judged(problem: Problem, drawn: Sequence[Completion], critics: Critics) -> list[Judged]:
    """What each answer says, and what the judges think of it."""
    assert critics.process is not None
    assert critics.outcome is not None
    texts = [each.text for each in drawn]
    steps = critics.process([problem.prompt], texts)
    whole = critics.outcome([problem.prompt], texts)
    return [
        Judged(
            right=problem.check(each.text),
            ended=each.finish_reason == "stop",
            vote=ballot(each.text) if each.finish_reason == "stop" else None,
            scores={"PRM": one.score, "ORM": other.score},
        )
        for each, one, other in zip(drawn, steps, whole, strict=True)
    ]


def arms(found: Sequence[Judged]) -> dict[str, bool]:
    """Whether each way to choose among these answers gives a right one."""
    values = {"oracle": any(each.right for each in found)}
    votes = tally([each.vote for each in found])
    chosen = next((each for each in found if votes and each.vote == votes[0][0]), found[0])
    values["vote"] = chosen.right
    for name in ("ORM", "PRM"):
        best = max(found, key=lambda each: (each.ended, each.scores[name]))
        values[name] = best.right
    return values


def plant(problem: Problem, rng: np.random.Generator) -> tuple[list[str], list[bool]] | None:
    """The worked solution with one number changed, and which steps are still right.

    Args:
        problem: Has a worked solution.
        rng: Chooses the step and the number.

    Returns:
        Steps and labels; None where the chosen step has no number.
    """
    steps = split_steps(problem.solutions[0])
    place = int(rng.integers(0, len(steps)))
    digits = [at for at, letter in enumerate(steps[place]) if letter.isdigit()]
    if not digits:
        return None
    at = digits[-1]  # of the result: what is calculated with is given
    wrong = (int(steps[place][at]) + int(rng.integers(1, 10))) % 10
    steps[place] = f"{steps[place][:at]}{wrong}{steps[place][at + 1 :]}"
    return steps, [number < place for number in range(len(steps))]


def planted_errors(judge: Path, size: Size, seed: int) -> dict[str, Any]:
    """Scores and labels of the steps of solutions with a known error, and of as many without."""
    critics = critics_of(*load(judge, dtype=torch.float32))
    assert critics.process is not None
    rng = np.random.default_rng(seed)
    parts: dict[str, dict[str, list[Any]]] = {}
    for part, offset in (("chosen", 0), ("measured", 1)):
        scores: list[float] = []
        truth: list[bool] = []
        first = PLANTED_SEED + 1000 * seed + offset
        for problem in problems_of(size, size.planted_scenes, first, "test"):
            clean = split_steps(problem.solutions[0])
            for case in ((clean, [True] * len(clean)), plant(problem, rng)):
                if case is None:
                    continue
                text = "\n\n".join(case[0])
                (found,) = critics.process([Message("user", problem.prompt.parts)], [text])
                if len(found.steps) == len(case[1]):  # neighbours of long ones are joined
                    scores += found.step_scores
                    truth += case[1]
        parts[part] = {"scores": scores, "truth": truth}
    return parts


def step_f1(parts: dict[str, Any]) -> dict[str, float]:
    """Macro-F1 of the measured steps at the threshold of the others, and of calling all right."""
    threshold, _ = best_threshold(parts["chosen"]["scores"], parts["chosen"]["truth"])
    truth = parts["measured"]["truth"]
    said = [score > threshold for score in parts["measured"]["scores"]]
    return {
        "threshold": threshold,
        "macro_f1": macro_f1(said, truth),
        "all_right": macro_f1([True] * len(truth), truth),
        "steps": len(truth),
        "wrong": truth.count(False),
    }


def one_seed(model: str, size: Size, out: Path, seed: int) -> dict[str, Any]:
    """Everything of one seed."""
    policy = fine_tuned(model, size, out, seed)
    judge, facts = reward_model(policy, size, out, seed)
    planted = planted_errors(judge, size, seed)
    return {**examine(policy, judge, size, seed), "data": facts, "planted": step_f1(planted)}


def difference(results: Sequence[dict[str, Any]], one: str, other: str) -> dict[str, float]:
    """How many points more of the questions one arm answers than another, the same questions."""
    pairs = [
        float(a) - float(b)
        for result in results
        for a, b in zip(result["right"][one], result["right"][other], strict=True)
    ]
    rng, values = np.random.default_rng(0), np.array(pairs)
    means = values[rng.integers(0, len(values), (2000, len(values)))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5]).tolist()
    return {"points": 100 * values.mean(), "low": 100 * low, "high": 100 * high}


def summarise(results: Sequence[dict[str, Any]], size: Size) -> dict[str, Any]:
    """Scores of every arm over all seeds, and how the judge compares with the vote."""
    scores = {
        arm: pooled([result["right"][arm] for result in results]) for arm in results[0]["right"]
    }
    return {
        "scores": scores,
        "PRM over vote": {
            str(number): difference(results, f"PRM @{number}", f"vote @{number}")
            for number in numbers(size)
        },
        "PRM over one drawn": {
            str(number): difference(results, f"PRM @{number}", "one drawn")
            for number in numbers(size)
        },
        "planted": [result["planted"] for result in results],
        "data": [result["data"] for result in results],
    }


def table(summary: dict[str, Any], size: Size) -> str:
    """The arms as a Markdown table, a row an arm, a column an N; and the planted errors."""
    scores, columns = summary["scores"], numbers(size)
    rows = [
        [arm, *[written(scores[f"{arm} @{number}"]) for number in columns]]
        for arm in ("vote", "ORM", "PRM", "oracle")
    ]
    for arm in ("base", "thinking", "one drawn"):
        rows.insert(0, [f"{arm}: {written(scores[arm])}", *[""] * len(columns)])
    gains = [summary["PRM over vote"][str(number)] for number in columns]
    points = [
        f"{each['points']:+.1f} ({each['low']:+.1f} to {each['high']:+.1f})" for each in gains
    ]
    rows.append(["PRM - vote, points", *points])
    text = markdown(["percent right", *[f"N = {number}" for number in columns]], rows)
    planted = [
        [f"{n}", f"{each['macro_f1']:.3f}", f"{each['all_right']:.3f}", f"{each['wrong']}"]
        for n, each in enumerate(summary["planted"])
    ]
    header = ["seed", "macro-F1 of steps", "all called right", "wrong steps"]
    return f"{text}\n{markdown(header, planted)}"


def draw(summary: dict[str, Any], size: Size, path: Path) -> None:
    """Percent right against N, with intervals."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes, columns = figure.add_subplot(), numbers(size)
    for arm in ("vote", "ORM", "PRM", "oracle"):
        scores = [summary["scores"][f"{arm} @{number}"] for number in columns]
        middle = [each["percent"] for each in scores]
        ends = [
            [each["percent"] - each["low"] for each in scores],
            [each["high"] - each["percent"] for each in scores],
        ]
        axes.errorbar(columns, middle, yerr=ends, marker="o", capsize=3, label=arm)
    for arm, style in (("base", ":"), ("thinking", "--"), ("one drawn", "-.")):
        height = summary["scores"][arm]["percent"]
        axes.axhline(height, color="0.5", linestyle=style, label=arm)
    axes.set_xscale("log", base=2)
    axes.set_xticks(columns, [str(number) for number in columns])
    axes.set(xlabel="answers drawn, N", ylabel="percent right, 95 % interval")
    axes.legend(frameon=False, ncols=2)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run what is missing, and write table and picture."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="micro", help="what is fine-tuned (micro)")
    parser.add_argument("--out", type=Path, default=Path("runs/best_of_n"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tiny", action="store_true", help="little of all, to see that it works")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    size = TINY if args.tiny else Size()
    results = [
        kept(
            args.out / f"seed-{seed}.json",
            lambda seed=seed: one_seed(args.model, size, args.out / f"{seed}", seed),
        )
        for seed in args.seeds
    ]
    summary = summarise(results, size)
    (args.out / "best_of_n.md").write_text(table(summary, size), "utf-8")
    draw(summary, size, args.out / "best_of_n.png")
    print(table(summary, size))
    print(json.dumps({"model": args.model, "tiny": args.tiny, **summary}))


if __name__ == "__main__":
    main()
