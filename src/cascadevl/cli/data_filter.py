"""``cascadevl data filter STORE OUT.jsonl``: questions neither too hard nor too easy for GSPO."""

from __future__ import annotations

import argparse
from pathlib import Path

from cascadevl.cli.arguments import Subparsers

KEPT_NOTHING = 1


def add_parser(actions: Subparsers) -> None:
    """Describe the action."""
    parser = actions.add_parser(
        "filter",
        help="choose the questions that GSPO learns from, by their accuracy in a store",
        description="Write the questions of a store whose answers are right now and then: with an "
        "accuracy from 0.2 to 0.8, as MMPR-Tiny has them. The file is one that GSPO and `data "
        "rollouts` read.",
    )
    parser.add_argument("store", type=Path, metavar="STORE", help="folder of the rollouts")
    parser.add_argument("out", type=Path, metavar="OUT.jsonl", help="file of questions to write")
    parser.add_argument(
        "--least", type=float, default=0.2, metavar="X", help="lowest accuracy (0.2)"
    )
    parser.add_argument(
        "--most", type=float, default=0.8, metavar="X", help="highest accuracy (0.8)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Filter, and print how many questions are left."""
    from rich.console import Console

    from cascadevl.workflows.query_filter import filter_queries

    report = filter_queries(args.store, args.out, least=args.least, most=args.most)
    console = Console()
    for kind, count in report.skipped.items():
        console.print(f"left out: {count:,} x {kind}", highlight=False)
    if report.num_open:
        console.print(f"{report.num_open:,} questions have no reference", highlight=False)
    console.print(
        f"{report.num_kept:,} questions from {args.least:g} to {args.most:g}; "
        f"{report.num_too_hard:,} are harder ({report.num_unsolved:,} never solved), "
        f"{report.num_too_easy:,} easier ({report.num_mastered:,} always solved)",
        highlight=False,
        soft_wrap=True,
    )
    console.print(f"questions: {args.out}", markup=False, highlight=False, soft_wrap=True)
    return 0 if report.num_kept else KEPT_NOTHING
