"""Worked solutions of problems: taken along, sampled, filtered, judged, chosen."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from cascadevl.data.conversation import thinking_answer
from cascadevl.data.prompts import BOXED_INSTRUCTION
from cascadevl.eval.responder import Reply, Responder, replies
from cascadevl.scoring.reasoning import (
    Rules,
    Solution,
    choose,
    distinct,
    fault_of,
    judge_question,
    judge_score,
    take_apart,
)
from cascadevl.tasks.problems import Problem
from cascadevl.types import Message
from cascadevl.workflows.thinking_config import ThinkingConfig


def prompt_of(problem: Problem, config: ThinkingConfig) -> tuple[Message, Message]:
    """A problem as a conversation that asks for thinking: how it is sampled, and trained on.

    Args:
        problem: The problem.
        config: Says the system prompt, and whether a box is asked for.
    """
    user = problem.prompt
    if config.boxed:
        user = Message("user", (*user.parts, f"\n{BOXED_INSTRUCTION}"))
    return Message.of("system", config.system_prompt), user


def solutions_of(
    problems: Sequence[Problem], config: ThinkingConfig, responder: Responder | None, number: int
) -> list[list[Reply]]:
    """Of each problem its own solutions, then the sampled ones.

    Args:
        problems: A group of problems.
        config: How many are sampled, and how they are asked for.
        responder: Samples them; None for no sampled ones.
        number: The group's number, from which its seed comes.
    """
    solutions: list[list[Reply]] = [
        [Reply(_own(text, config)) for text in problem.solutions] if config.own else []
        for problem in problems
    ]
    if responder is None or not problems:
        return solutions
    asked = [prompt_of(problem, config) for problem in problems for _ in range(config.num_samples)]
    answers = replies(responder, asked, seed=_seed(config, number, "solutions"))
    for place, reply in enumerate(answers):
        solutions[place // config.num_samples].append(reply)
    return solutions


def _own(text: str, config: ThinkingConfig) -> str:
    """A worked solution in the form that is asked for."""
    if not config.boxed or "\\boxed" in text:
        return text
    parts = take_apart(text)
    if not isinstance(parts, Solution):
        return text
    return thinking_answer(parts.thinking, f"\\boxed{{{parts.answer}}}")


def _seed(config: ThinkingConfig, number: int, what: str) -> int:
    """A seed for every group and use, far enough from others that counting up stays apart."""
    return zlib.crc32(f"{config.seed}/{what}/{number}".encode()) * 1000 % 2**31


def good_solutions(
    problems: Sequence[Problem],
    solutions: Sequence[Sequence[Reply]],
    config: ThinkingConfig,
    judge: Responder | None,
    counts: Counter[str],
    number: int,
) -> list[list[Solution]]:
    """Of each problem the solutions to keep; all others are counted by reason.

    Args:
        problems: A group of problems.
        solutions: Those of each problem.
        config: The rules.
        judge: Scores what the rules let pass; None for no judge.
        counts: Counts solutions, and those dropped as ``dropped/REASON``.
        number: The group's number.
    """
    good = [
        _without_faults(problem, replied, config, counts)
        for problem, replied in zip(problems, solutions, strict=True)
    ]
    if judge is not None:
        seed = _seed(config, number, "judge")
        good = _judged(problems, good, judge, config.judge_threshold, seed, counts)
    kept = []
    for texts in good:
        taken = choose(texts, config.keep, config.choice)
        counts["dropped/surplus"] += len(texts) - len(taken)
        kept.append([_well_formed(texts[place], config) for place in taken])
    return kept


def _without_faults(
    problem: Problem, replied: Sequence[Reply], config: ThinkingConfig, counts: Counter[str]
) -> list[str]:
    rules = _rules(config)
    good = []
    for reply in replied:
        counts["solutions"] += 1
        if reply.finish == "refused":
            counts["dropped/refused"] += 1
            continue
        fault = fault_of(
            reply.text,
            question=f"{problem.prompt.text}\n{problem.reference}",
            check=problem.check,
            rules=rules,
            finished=reply.finish == "stop",
        )
        if fault is None:
            good.append(reply.text)
        else:
            counts[f"dropped/{fault}"] += 1
    different = [good[place] for place in distinct(good)]
    counts["dropped/duplicate"] += len(good) - len(different)
    return different


def _rules(config: ThinkingConfig) -> Rules:
    return replace(config.rules, boxed=config.rules.boxed or config.boxed)


def _judged(
    problems: Sequence[Problem],
    good: Sequence[Sequence[str]],
    judge: Responder,
    threshold: float,
    seed: int,
    counts: Counter[str],
) -> list[list[str]]:
    asked = [
        (_judge_message(problem, text),)
        for problem, texts in zip(problems, good, strict=True)
        for text in texts
    ]
    if not asked:
        return [[] for _ in good]
    scores = iter([judge_score(reply.text) for reply in replies(judge, asked, seed=seed)])
    passed: list[list[str]] = []
    for texts in good:
        passed.append([])
        for text in texts:
            score = next(scores)
            if score is None:
                counts["dropped/no_score"] += 1
            elif score < threshold:
                counts["dropped/unclear"] += 1
            else:
                passed[-1].append(text)
    return passed


def _judge_message(problem: Problem, text: str) -> Message:
    images = [part for part in problem.prompt.parts if not isinstance(part, str)]
    return Message.of("user", *images, judge_question(problem.prompt.text.strip(), text))


def _well_formed(text: str, config: ThinkingConfig) -> Solution:
    parts = take_apart(text, _rules(config))
    assert isinstance(parts, Solution), "it passed the filters"
    return parts
