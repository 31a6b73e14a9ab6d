"""``cascadevl data rollouts OUT``: many answers to each of many questions, checked and kept."""

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

    from cascadevl.workflows.rollouts import RolloutConfig, RolloutReport

SOME_FAILED = 1


def add_parser(actions: Subparsers) -> None:
    """Describe the action."""
    parser = actions.add_parser(
        "rollouts",
        help="sample answers to questions with references, and keep them in a store",
        description="Sample many answers to each question of tasks or a file, check them, and keep "
        "them in a folder, from which preference pairs, the choice of questions for GSPO and data "
        "for process rewards are made. After an interruption of any kind the same command goes "
        "on, and nothing that was finished is lost.",
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of the store")
    parser.add_argument(
        "--model", required=True, metavar="MODEL", help="a checkpoint folder, or a released name"
    )
    parser.add_argument("--seed", type=int, default=0, help="of scenes and sampling (default: 0)")
    group = add_problems(parser)
    group.add_argument(
        "--open",
        action="store_true",
        help="the file's questions have no references: for DropoutNTP",
    )
    _add_sampling(parser)
    add_backend(parser)
    parser.set_defaults(run=run)


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("answers (defaults: MMPR)")
    group.add_argument(
        "--num-samples", type=positive_int, default=32, metavar="N", help="of each question (32)"
    )
    add_drawing(group)
    group.add_argument("--system", metavar="TEXT", help="system message, instead of the model's")
    group.add_argument(
        "--thinking", action="store_true", help="reason first, by the Thinking system message"
    )
    group.add_argument("--boxed", action="store_true", help=r"ask for the answer within \boxed{}")
    add_increment(group)
    group.add_argument(
        "--logprobs", action="store_true", help="keep the log-probability of every token, too"
    )


def run(args: argparse.Namespace) -> int:
    """Sample, and print what came of it."""
    from rich.console import Console

    from cascadevl.workflows.rollouts import sample_rollouts

    config = _config(args)
    problems = problems_of(args, worked_only=False, is_open=args.open)
    screen = Console(stderr=True)
    with screen.status(f"loading {args.model}"):
        backend, processor = open_backend(args)
    with progress_bar("questions", screen) as show:
        report = sample_rollouts(
            problems,
            config,
            processor,
            backend,
            weight_version=args.model,
            facts=backend_facts(args),
            on_progress=show,
        )
    print_report(report, config, Console())
    return SOME_FAILED if report.failures else 0


def _config(args: argparse.Namespace) -> RolloutConfig:
    from cascadevl.workflows.rollouts import RolloutConfig

    return RolloutConfig(
        out=args.out,
        num_samples=args.num_samples,
        sampling=replace(drawing(args), seed=args.seed, logprobs=0 if args.logprobs else None),
        increments=args.increment,
        system=args.system,
        thinking=args.thinking,
        boxed=args.boxed,
    )


def print_report(report: RolloutReport, config: RolloutConfig, console: Console) -> None:
    """Print how many questions have answers now, and how good these are.

    Args:
        report: What became of the questions.
        config: Where the answers are.
        console: Where to print.
    """
    print_failures(report.failures, console)
    before = f" ({report.num_before:,} before)" if report.num_before else ""
    console.print(
        f"{report.num_before + report.num_answered:,} questions have answers{before}; "
        f"{len(report.failures):,} failed",
        highlight=False,
    )
    if report.num_answers:
        right, cut = (
            f"{100 * count / report.num_answers:.1f} %"
            for count in (report.num_correct, report.num_cut)
        )
        console.print(
            f"{report.num_answers:,} new answers: {right} right, {cut} cut off, "
            f"{report.num_tokens / report.num_answers:.0f} tokens on average",
            highlight=False,
        )
    console.print(f"rollouts: {config.out}", markup=False, highlight=False, soft_wrap=True)
