"""The examination of best of N: answers are drawn once, and then judged by whoever is compared."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from best_of_n_material import (
    EXAM_SEED,
    PLANTED_SEED,
    RULES,
    SYSTEM,
    Size,
    each_of,
    opened,
    questions,
    worked,
)
from best_of_n_tasks import plant, truth_of

from cascadevl.data.rollouts import StoredRollouts
from cascadevl.engine.backends import generate
from cascadevl.engine.best_of_n import Scorer
from cascadevl.engine.critics import Critics, critics_of
from cascadevl.engine.process_reward import SolutionScore
from cascadevl.engine.requests import Request
from cascadevl.engine.sampling import SamplingParams
from cascadevl.errors import DataError
from cascadevl.model.loading import load
from cascadevl.scoring.steps import steps_of
from cascadevl.scoring.voting import ballot
from cascadevl.tasks.problems import TaskProblems
from cascadevl.types import Message, Rollout
from cascadevl.workflows.rollouts import RolloutConfig, sample_rollouts

NOTHING = SolutionScore(score=0.0, steps=(), step_scores=())
"""Of a solution that cannot be judged."""


def exam(size: Size, seed: int) -> TaskProblems:
    """The held-out questions of a seed."""
    return questions(size, size.exam_scenes, EXAM_SEED + seed, "test")


def greedy(policy: Path, size: Size, seed: int) -> dict[str, list[bool]]:
    """Whether the most probable answer to each question is right, at once and with worked steps."""
    backend, processor = opened(policy)
    # In the order of stores, in which all other columns stand.
    asked = sorted(each_of(exam(size, seed)), key=lambda each: each.problem_id)
    found = {}
    for mode, system in (("base", None), ("thinking", SYSTEM)):
        requests = [
            Request(
                prompt=processor.prompt([each.prompt], system=system),
                sampling=SamplingParams(max_tokens=size.max_tokens),
            )
            for each in asked
        ]
        answers = generate(backend, requests)
        found[mode] = [p.check(one.text) for p, (one,) in zip(asked, answers, strict=True)]
    return found


def drawn(policy: Path, size: Size, out: Path, seed: int, temperature: float) -> None:
    """Draw the answers that are compared, with worked steps; what is there is not drawn again."""
    backend, processor = opened(policy)
    sampling = SamplingParams(
        temperature=temperature, max_tokens=size.max_tokens, seed=seed, logprobs=0
    )
    config = RolloutConfig(out=out, num_samples=size.num_samples, sampling=sampling, system=SYSTEM)
    sample_rollouts(exam(size, seed), config, processor, backend, weight_version="policy")


def said(store: Path, size: Size, seed: int) -> list[dict[str, Any]]:
    """What is known of the answers to each question without a judge."""
    references = worked(exam(size, seed))
    return [_said(rollout, references[rollout.problem_id]) for rollout in StoredRollouts(store)]


def _said(rollout: Rollout, reference: Sequence[str]) -> dict[str, Any]:
    answers = rollout.answers
    ended = [each.finish_reason == "stop" for each in answers]
    return {
        "kind": rollout.problem_id.split("/")[1],
        "right": [each.correct for each in answers],
        "ended": ended,
        "votes": [
            ballot(each.text) if end else None for each, end in zip(answers, ended, strict=True)
        ],
        "likelihood": [sum(each.logprobs) / max(len(each.logprobs), 1) for each in answers],
        "truth": [truth_of(steps_of(each.text, RULES), reference) for each in answers],
    }


def judges(path: Path) -> Critics:
    """A judge in both of its uses."""
    return critics_of(*load(path, dtype=torch.float32))


def scored(store: Path, scorer: Scorer) -> list[list[list[float]]]:
    """The scores of the steps of each answer to each question.

    Equal answers are judged once.
    """
    found = []
    for rollout in StoredRollouts(store):
        texts = list(dict.fromkeys(each.text for each in rollout.answers))
        scores = dict(zip(texts, scores_of(scorer, rollout.prompt, texts), strict=True))
        found.append([list(scores[each.text].step_scores) for each in rollout.answers])
    return found


def scores_of(
    scorer: Scorer, prompt: Sequence[Message], texts: Sequence[str]
) -> list[SolutionScore]:
    """Scores of several answers; one that cannot be judged does not stand in the others' way."""
    try:
        return scorer(prompt, texts)
    except DataError:
        if len(texts) == 1:
            return [NOTHING]
        return [scores_of(scorer, prompt, [text])[0] for text in texts]


def planted(judge: Path, size: Size, seed: int) -> dict[str, dict[str, list[Any]]]:
    """Scores and labels of the steps of worked solutions, each once right and once with an error.

    Returns:
        Those by which a threshold is chosen, and those that are measured.
    """
    scorer = judges(judge).process
    assert scorer is not None, "a judge of steps"
    rng = np.random.default_rng(seed)
    parts: dict[str, dict[str, list[Any]]] = {}
    for part, offset in (("chosen", 0), ("measured", 1)):
        first = PLANTED_SEED + 1000 * seed + offset
        scores: list[float] = []
        truth: list[bool] = []
        for problem in each_of(questions(size, size.planted_scenes, first, "test")):
            clean = steps_of(problem.solutions[0], RULES)
            wrong, labels = plant(problem.prompt.text, clean, rng)
            texts = [RULES.join(steps) for steps in (clean, wrong)]
            for found in scorer([problem.prompt], texts):
                scores += found.step_scores
            truth += [*[True] * len(clean), *labels]
        parts[part] = {"scores": scores, "truth": truth}
    return parts
