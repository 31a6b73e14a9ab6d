r"""Thinking data: worked solutions inside ``<think>``, filtered, beside direct answers.

InternVL3.5 report, section 3.5: solutions are sampled, and those kept whose answer is right and
whose thinking is clear, not redundant and well-formed (`cascadevl.scoring.reasoning` has the
rules). Each kept one becomes a conversation that begins with the Thinking system prompt; the same
questions also become conversations without it, answered directly. So the system prompt, and
nothing else, chooses the mode.

What is written is in the released format, with a meta file that trains as it is. Interrupted work
goes on where it stopped.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import PIL.Image

from cascadevl.data.conversation import thinking_answer
from cascadevl.data.journal import Journal
from cascadevl.data.writing import conversation_fields, save_picture, write_meta
from cascadevl.errors import ConfigError, DataError
from cascadevl.eval.responder import Responder
from cascadevl.scoring.reasoning import Solution
from cascadevl.tasks.problems import Problem, Problems
from cascadevl.types import ImageRef, Message
from cascadevl.workflows.thinking_config import ThinkingConfig, ThinkingReport
from cascadevl.workflows.thinking_solutions import good_solutions, prompt_of, solutions_of

THINKING, DIRECT = "thinking", "direct"
"""Names of the two data sets; each is one file of records."""

META, REPORT = "meta.json", "report.json"
"""What else is left in the folder."""


def make_thinking_data(
    problems: Problems,
    config: ThinkingConfig,
    *,
    responder: Responder | None = None,
    judge: Responder | None = None,
    facts: Mapping[str, Any] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> ThinkingReport:
    """Make thinking records, and direct ones, of some problems.

    Args:
        problems: What is asked.
        config: How.
        responder: Samples solutions; None if only those that problems bring along are used.
        judge: Scores solutions that passed all rules; None for no such filter.
        facts: JSON values about the responders, such as the model's name: an attempt with others
            does not go on with this one.
        on_progress: Called with groups done and all groups.

    Raises:
        ConfigError: If there is nothing to take solutions from, or the folder belongs to other
            work.
        RequestError: If a responder cannot be asked; the same call with ``resume`` goes on.
    """
    if responder is None and not config.own:
        raise ConfigError("there is neither a responder nor leave to use the problems' own steps")
    journal = Journal(
        config.out,
        [f"{THINKING}.jsonl", f"{DIRECT}.jsonl"],
        {"problems": problems.settings(), **_settings(config, responder, judge), **(facts or {})},
        resume=config.resume,
    )
    counts = Counter[str](journal.state)
    num_groups = -(-len(problems) // config.group)
    for number in range(journal.num_chunks, num_groups):
        first = number * config.group
        asked = _take(problems, range(first, min(first + config.group, len(problems))), counts)
        solutions = solutions_of(asked, config, responder, number)
        kept = good_solutions(asked, solutions, config, judge, counts, number)
        journal.commit(_records(asked, kept, config, counts), counts)
        if on_progress is not None:
            on_progress(number + 1, num_groups)
    return _finish(config, counts)


def _settings(
    config: ThinkingConfig, responder: Responder | None, judge: Responder | None
) -> dict[str, Any]:
    """What the content depends on; where it is written and how an attempt goes on is free."""
    values = {key: value for key, value in asdict(config).items() if key not in ("out", "resume")}
    return {
        **values,
        "system": config.system_prompt,
        "responder": responder is not None,
        "judge": judge is not None,
    }


def _take(problems: Problems, numbers: Sequence[int], counts: Counter[str]) -> list[Problem]:
    """The problems of some groups; a group that cannot be used is counted."""
    taken: list[Problem] = []
    for number in numbers:
        try:
            taken += problems[number]
        except DataError as error:
            counts[f"skipped/{error.kind}"] += 1
    counts["problems"] += len(taken)
    return taken


def _records(
    problems: Sequence[Problem],
    kept: Sequence[Sequence[Solution]],
    config: ThinkingConfig,
    counts: Counter[str],
) -> dict[str, list[dict[str, Any]]]:
    """The records of a group by file: all kept solutions, and direct answers in their ratio."""
    thinking: list[dict[str, Any]] = []
    direct: list[dict[str, Any]] = []
    for problem, solutions in zip(problems, kept, strict=True):
        counts["thinking"] += len(solutions)
        counts["unsolved"] += not solutions
        wants_direct = counts["direct"] < config.direct_ratio * counts["thinking"]
        counts["direct"] += wants_direct
        if not solutions and not wants_direct:
            continue
        images = _images(problem, config.out)
        thinking += [
            _thinking_record(problem, solution, order, images, config)
            for order, solution in enumerate(solutions)
        ]
        if wants_direct:
            direct.append(_direct_record(problem, images))
    return {f"{THINKING}.jsonl": thinking, f"{DIRECT}.jsonl": direct}


def _images(problem: Problem, folder: Path) -> list[str]:
    """Paths of a problem's pictures for its records; those that are no files become files."""
    images = [part for part in problem.prompt.parts if isinstance(part, ImageRef)]
    paths = []
    for order, image in enumerate(images):
        if isinstance(image.source, Path):
            paths.append(str(image.source.resolve()))
            continue
        assert isinstance(image.source, PIL.Image.Image), "problems hold files or pictures"
        # Several questions about one scene share its picture.
        name = problem.problem_id.partition("#")[0]
        paths.append(save_picture(image.source, folder, f"{name}-{order}"))
    return paths


def _thinking_record(
    problem: Problem,
    solution: Solution,
    order: int,
    images: Sequence[str],
    config: ThinkingConfig,
) -> dict[str, Any]:
    answer = Message.of("assistant", thinking_answer(solution.thinking, solution.answer))
    return conversation_fields(
        [*prompt_of(problem, config), answer],
        record_id=f"{problem.problem_id}/think/{order}",
        images=images,
    )


def _direct_record(problem: Problem, images: Sequence[str]) -> dict[str, Any]:
    return conversation_fields(
        [problem.prompt, Message.of("assistant", problem.reference)],
        record_id=f"{problem.problem_id}/direct",
        images=images,
    )


def _finish(config: ThinkingConfig, counts: Counter[str]) -> ThinkingReport:
    """Write the meta file and the report."""

    def part(prefix: str) -> dict[str, int]:
        found = {k.removeprefix(prefix): v for k, v in counts.items() if k.startswith(prefix) and v}
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    datasets: dict[str, dict[str, Any]] = {}
    if counts["thinking"]:
        datasets[THINKING] = {"annotation": f"{THINKING}.jsonl", "length": counts["thinking"]}
    if counts["direct"]:
        wanted = config.direct_ratio * counts["thinking"]
        datasets[DIRECT] = {
            "annotation": f"{DIRECT}.jsonl",
            "length": counts["direct"],
            "repeat_time": max(1.0, round(wanted / counts["direct"], 4)),
        }
    if datasets:
        write_meta(config.out / META, datasets)
    report = ThinkingReport(
        num_problems=counts["problems"],
        num_unsolved=counts["unsolved"],
        num_solutions=counts["solutions"],
        num_thinking=counts["thinking"],
        num_direct=counts["direct"],
        dropped=part("dropped/"),
        skipped=part("skipped/"),
        meta=config.out / META if datasets else None,
    )
    content = json.dumps(asdict(report), default=str, indent=2) + "\n"
    (config.out / REPORT).write_text(content, "utf-8")
    return report
