"""Which questions: the arguments of commands that ask some with references."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from cascadevl.cli.arguments import positive_int

if TYPE_CHECKING:
    from cascadevl.tasks.problems import Problems


def add_problems(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Describe the arguments.

    Args:
        parser: Gets them, and has ``--seed``.

    Returns:
        Their group, for what else a command asks about questions.
    """
    group = parser.add_argument_group("questions")
    group.add_argument(
        "--task",
        action="append",
        default=[],
        metavar="NAME[:DIFFICULTY]",
        help="draw questions of a task, as text or handwriting:add_digits; may be repeated",
    )
    group.add_argument(
        "--scenes", type=positive_int, default=1000, metavar="N", help="of each task (1000)"
    )
    group.add_argument(
        "--questions", type=Path, metavar="FILE.jsonl", help="lines with question and answer"
    )
    group.add_argument("--root", type=Path, metavar="DIR", help="of the file's pictures")
    return group


def problems_of(args: argparse.Namespace, *, worked_only: bool, is_open: bool = False) -> Problems:
    """The questions that the arguments name.

    Args:
        args: With those of `add_problems`, and ``seed``.
        worked_only: Only a task's questions that come with worked reasoning.
        is_open: Whether the file's questions have no references.

    Raises:
        ConfigError: If they name no questions, or two kinds of them.
        DataError: If the file cannot be read.
    """
    from cascadevl.errors import ConfigError
    from cascadevl.tasks.naming import task_named
    from cascadevl.tasks.problems import FileProblems, OpenProblems, TaskProblems

    if bool(args.task) == (args.questions is not None):
        raise ConfigError("name either tasks (--task) or a file (--questions) to take them from")
    if args.questions is not None:
        kind = OpenProblems if is_open else FileProblems
        return kind(args.questions, root=args.root)
    if is_open:
        raise ConfigError("open questions come from a file: give --questions FILE.jsonl")
    return TaskProblems(
        tasks=[task_named(text) for text in args.task],
        num_scenes=args.scenes,
        seed=args.seed,
        worked_only=worked_only,
    )
