"""What the comparison of best of N is made of: the policy, its judged solutions, and two judges."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from best_of_n_tasks import truth_of
from experiment import finished, quiet

from cascadevl.config import load_config
from cascadevl.data.parsing import parse_record
from cascadevl.data.process_records import read_judged
from cascadevl.data.processor import CascadeVLProcessor
from cascadevl.engine.engine import Engine
from cascadevl.engine.engine_backend import EngineBackend
from cascadevl.engine.requests import EngineConfig
from cascadevl.engine.sampling import SamplingParams
from cascadevl.model.loading import load
from cascadevl.scoring.steps import StepRules, macro_f1, steps_of
from cascadevl.tasks.base import Split
from cascadevl.tasks.problems import Problem, TaskProblems
from cascadevl.tasks.subset_sum import SubsetSum
from cascadevl.train.prm import PRMConfig, prm
from cascadevl.train.sft import sft
from cascadevl.workflows import boxes
from cascadevl.workflows.process_config import Choice, ProcessConfig, ProcessReport
from cascadevl.workflows.process_data import PROCESS, make_process_data
from cascadevl.workflows.rollouts import RolloutConfig, sample_rollouts
from cascadevl.workflows.thinking_config import ThinkingConfig
from cascadevl.workflows.thinking_data import make_thinking_data

CONFIGS = Path(__file__).parents[1] / "configs"

SYSTEM = "Think first."
"""Thinking system prompt: the released page is longer than micro's questions."""

RULES = StepRules(max_steps=12)

TRAINING_SEED, JUDGED_SEED, PLANTED_SEED, EXAM_SEED = 40, 50, 60, 1700
"""Of scenes: what is fine-tuned on, whose solutions are judged, planted errors, the examination."""

THRESHOLDS = (0.0, 1 / 16, 1 / 8, 1 / 4)
"""Of ``mc``, at which labels are held against the truth."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How much is done; the defaults are those of the experiment.

    Attributes:
        difficulty: Of the questions.
        sft_scenes: Scenes of fine-tuning.
        sft_steps: Steps of it.
        judged_scenes: Scenes whose solutions are judged.
        judged_samples: Answers drawn to each, of which up to four are judged, right and wrong ones.
        choose: Which solutions are judged.
        continuations: Of every step.
        threshold: A step is right if a larger share of its continuations is.
        judge_steps: Steps of training each judge.
        judge_row: Solutions of such a step.
        exam_scenes: Held-out scenes, a question each.
        planted_scenes: Scenes of planted errors, to choose the threshold and again to be measured.
        num_samples: Answers drawn to a held-out question.
        temperatures: Of these, each a comparison of its own.
        max_tokens: Of an answer.
    """

    difficulty: str = "full"
    sft_scenes: int = 9000
    sft_steps: int = 250
    judged_scenes: int = 3000
    judged_samples: int = 16
    choose: Choice = "balanced"  # the policy is right once in ten answers
    continuations: int = 16  # VisualPRM
    threshold: float = 0.0  # VisualPRM
    judge_steps: int = 800
    judge_row: int = 64
    exam_scenes: int = 200
    planted_scenes: int = 100
    num_samples: int = 32
    temperatures: tuple[float, ...] = (0.7, 1.0)
    max_tokens: int = 96


TINY = Size(
    difficulty="easy",
    sft_scenes=12,
    sft_steps=3,
    judged_scenes=6,
    judged_samples=4,
    choose="first",
    continuations=2,
    judge_steps=2,
    judge_row=2,
    exam_scenes=3,
    planted_scenes=3,
    num_samples=4,
    max_tokens=40,
)


def questions(size: Size, num_scenes: int, seed: int, split: Split = "train") -> TaskProblems:
    """Questions with their worked solutions, a scene a group."""
    task = SubsetSum(difficulty=size.difficulty)
    return TaskProblems(tasks=[task], num_scenes=num_scenes, seed=seed, split=split)


def each_of(asked: TaskProblems) -> list[Problem]:
    """The questions one by one."""
    return [problem for number in range(len(asked)) for problem in asked[number]]


def worked(asked: TaskProblems) -> dict[str, list[str]]:
    """The steps of the worked solution of each question, by its identity."""
    return {each.problem_id: steps_of(each.solutions[0], RULES) for each in each_of(asked)}


def opened(path: Path) -> tuple[EngineBackend, CascadeVLProcessor]:
    """An engine for a model."""
    model, processor = load(path, dtype=torch.float32)
    engine = Engine(model, processor, EngineConfig(cache_bytes=2**28))
    return EngineBackend(engine=engine), processor


def fine_tuned(model: str, size: Size, out: Path, seed: int) -> Path:
    """Micro, answering at once or with worked steps as the system prompt says."""
    if (done := out / "sft" / "model").exists():
        return done
    # A direct answer for four worked ones: what is compared are worked ones.
    data = ThinkingConfig(
        out=out / "thinking", resume=True, system=SYSTEM, seed=seed, direct_ratio=0.25
    )
    asked = questions(size, size.sft_scenes, TRAINING_SEED + 1000 * seed)
    report = make_thinking_data(asked, data)
    if report.meta is None:
        raise SystemExit("no thinking data were made; ask for more scenes")
    config = boxes.train_config(out / "sft", model=model, num_steps=size.sft_steps)
    config = replace(
        config,
        data=replace(config.data, meta=(report.meta,)),
        run=replace(config.run, seed=seed, eval_interval=0, checkpoint_interval=50),
    )
    return finished(sft(config, console=quiet()))


def judged_questions(size: Size, seed: int) -> TaskProblems:
    """The training questions whose solutions are judged."""
    return questions(size, size.judged_scenes, JUDGED_SEED + 1000 * seed)


def solutions(policy: Path, size: Size, out: Path, seed: int) -> tuple[ProcessReport, Path]:
    """The policy's solutions of training questions: steps judged by continuations, and ends alone.

    Returns:
        What became of the steps, and the meta file of whole solutions with their outcome.
    """
    backend, processor = opened(policy)
    # VisualPRM draws what it judges at temperature 1 (script of v1.1).
    sampling = SamplingParams(temperature=1.0, max_tokens=size.max_tokens, seed=seed)
    config = RolloutConfig(
        out=out / "store", num_samples=size.judged_samples, sampling=sampling, system=SYSTEM
    )
    asked = judged_questions(size, seed)
    sample_rollouts(asked, config, processor, backend, weight_version="policy")
    steps = ProcessConfig(
        store=out / "store",
        out=out / "steps",
        choose=size.choose,
        num_continuations=size.continuations,
        rules=RULES,
        threshold=size.threshold,
        sampling=sampling,
        max_chance=1.0,  # of two numbers of four a guess finds one in six, which mc then shows
    )
    report = make_process_data(steps, processor, backend)
    # A whole solution is one step, whose end is known: nothing is continued.
    whole = replace(steps, out=out / "outcomes", rules=StepRules(max_steps=1))
    outcomes = make_process_data(whole, processor, backend)
    if report.meta is None or outcomes.meta is None:
        raise SystemExit("no solution came to its end, so that nothing can be judged")
    return report, outcomes.meta


def judge(policy: Path, meta: Path, size: Size, out: Path, seed: int) -> Path:
    """A judge, trained from the policy on the labels of a meta file."""
    if (done := out / "model").exists():
        return done
    config = load_config(PRMConfig, files=[CONFIGS / "prm_micro.yaml"])
    config = replace(
        config,
        model=replace(config.model, path=str(policy)),
        data=replace(config.data, meta=(meta,)),
        batch=replace(config.batch, row_samples=size.judge_row),
        run=replace(config.run, num_steps=size.judge_steps, seed=seed, out=out, resume=True),
    )
    return finished(prm(config, console=quiet()))


def facts(report: ProcessReport, folder: Path, asked: TaskProblems) -> dict[str, Any]:
    """What the judged steps are like, and how well their labels agree with the truth.

    Args:
        report: Of the steps.
        folder: Where they are.
        asked: The questions.
    """
    references = worked(asked)
    shares: list[float] = []
    truth: list[bool] = []
    for number, line in enumerate((folder / PROCESS).read_text("utf-8").splitlines(), start=1):
        fields = json.loads(line)
        record = parse_record(fields, source=f"{folder}:{number}", root=folder)
        question, _, _ = str(fields["id"]).rpartition("/")
        shares += fields["mc"]
        truth += truth_of(read_judged(record).steps, references[question])
    return {
        "solutions": report.num_solutions,
        "right": report.num_right,
        "steps": report.num_steps,
        "wrong_steps": report.num_minus,
        "really_wrong_steps": truth.count(False),
        "continuations": report.num_continuations,
        "continued_tokens": report.num_tokens,
        "label_macro_f1": {
            f"{limit:g}": macro_f1([share > limit for share in shares], truth)
            for limit in THRESHOLDS
        },
    }
