"""``cascadevl data process STORE OUT``: solutions whose steps are judged by continuations."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from cascadevl.cli.arguments import Subparsers, positive_int
from cascadevl.cli.backends import add_backend, backend_facts, open_backend
from cascadevl.cli.data_making import add_drawing, add_increment, drawing, progress_bar
from cascadevl.cli.problems import add_problems, problems_of
from cascadevl.cli.wording import print_failures

if TYPE_CHECKING:
    from rich.console import Console

    from cascadevl.data.processor import CascadeVLProcessor
    from cascadevl.engine.backends import Backend
    from cascadevl.workflows.process_config import ProcessConfig, ProcessReport

MADE_NOTHING = 1


def add_parser(actions: Subparsers) -> None:
    """Describe the action."""
    parser = actions.add_parser(
        "process",
        help="judge the steps of stored solutions, for a process reward model",
        description="Take the answers of a store of rollouts apart into steps, go on from each "
        "several times, and label it by how many of these continuations are right. What is left "
        "trains a process reward model: a meta file and JSONL in the format of VisualPRM. With "
        "--task or --questions the solutions are sampled into the store first. The same command "
        "goes on after an interruption.",
    )
    parser.add_argument("store", type=Path, metavar="STORE", help="folder of the rollouts")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    parser.add_argument("--model", required=True, metavar="MODEL", help="goes on from each step")
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    add_problems(parser)
    _add_steps(parser)
    add_backend(parser)
    parser.set_defaults(run=run)


def _add_steps(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("solutions and steps (defaults: VisualPRM)")
    group.add_argument(
        "--num-solutions", type=positive_int, default=4, metavar="N", help="of a question (4)"
    )
    group.add_argument(
        "--balanced",
        action="store_true",
        help="as many solutions that end right as end wrong, of questions that have both: sample "
        "more of them first, with data rollouts",
    )
    group.add_argument(
        "--num-continuations", type=positive_int, default=16, metavar="N", help="of a step (16)"
    )
    group.add_argument(
        "--max-steps",
        type=positive_int,
        default=12,
        metavar="N",
        help="of a solution; neighbours are joined where there are more (12; v1.1: 16)",
    )
    group.add_argument(
        "--lines", action="store_true", help="every line is a step, not every paragraph"
    )
    group.add_argument(
        "--threshold",
        type=float,
        default=0.0,
        metavar="X",
        help='a step is "+" if a larger share of its continuations is right (0)',
    )
    group.add_argument(
        "--max-chance",
        type=float,
        default=0.05,
        metavar="X",
        help="leave out questions that a guess answers this often (0.05)",
    )
    add_increment(group)
    add_drawing(group)


def run(args: argparse.Namespace) -> int:
    """Judge, and print what became of the questions."""
    from rich.console import Console

    from cascadevl.workflows.process_data import make_process_data

    config, screen = _config(args), Console(stderr=True)
    with screen.status(f"loading {args.model}"):
        backend, processor = open_backend(args)
    if args.task or args.questions:
        _sample(args, config, processor, backend, screen)
    with progress_bar("questions", screen) as show:
        report = make_process_data(
            config,
            processor,
            backend,
            facts=backend_facts(args),
            on_progress=show,
        )
    print_report(report, Console())
    return 0 if report.meta else MADE_NOTHING


def _config(args: argparse.Namespace) -> ProcessConfig:
    from cascadevl.scoring.steps import StepRules
    from cascadevl.workflows.process_config import ProcessConfig

    return ProcessConfig(
        store=args.store,
        out=args.out,
        num_solutions=args.num_solutions,
        choose="balanced" if args.balanced else "first",
        num_continuations=args.num_continuations,
        rules=StepRules(separator="\n" if args.lines else "\n\n", max_steps=args.max_steps),
        threshold=args.threshold,
        max_chance=args.max_chance,
        sampling=replace(drawing(args), seed=args.seed),
        increments=args.increment,
    )


def _sample(
    args: argparse.Namespace,
    config: ProcessConfig,
    processor: CascadeVLProcessor,
    backend: Backend,
    screen: Console,
) -> None:
    """Put solutions of the named questions into the store."""
    from cascadevl.cli.data_rollouts import print_report as print_rollouts
    from cascadevl.workflows.rollouts import RolloutConfig, sample_rollouts

    solutions = RolloutConfig(
        out=config.store,
        num_samples=config.num_solutions,
        sampling=config.sampling,
        increments=config.increments,
    )
    with progress_bar("questions", screen) as show:
        report = sample_rollouts(
            problems_of(args, worked_only=False),
            solutions,
            processor,
            backend,
            weight_version=args.model,
            facts=backend_facts(args),
            on_progress=show,
        )
    print_rollouts(report, solutions, screen)


def print_report(report: ProcessReport, console: Console) -> None:
    """Print how many solutions there are, how good they are, and why questions were left out.

    Args:
        report: What became of the questions.
        console: Where to print.
    """
    from rich.table import Table

    print_failures(report.failures, console)
    table = Table("questions", box=None, pad_edge=False)
    table.add_column("number", justify="right")
    for name, count in report.outcomes.items():
        table.add_row(name.replace("_", " "), f"{count:,}")
    console.print(table)
    for kind, count in report.skipped.items():
        console.print(f"left out: {count:,} x {kind.replace('_', ' ')}", highlight=False)
    if report.meta is None:
        console.print("there are no judged solutions", style="bold red")
        return
    console.print(
        f"{report.num_solutions:,} solutions, {report.num_right / report.num_solutions:.1%} right; "
        f"{report.num_steps:,} steps, {report.num_minus / report.num_steps:.1%} of them wrong",
        highlight=False,
    )
    if report.num_continuations:
        console.print(
            f"{report.num_continuations:,} continuations of "
            f"{report.num_tokens / report.num_continuations:.0f} tokens on average; "
            f"{report.num_cached_tokens / report.num_prompt_tokens:.1%} of the tokens before them "
            "were shared",
            highlight=False,
        )
    console.print(
        f"train with: --data {report.meta}", markup=False, highlight=False, soft_wrap=True
    )
