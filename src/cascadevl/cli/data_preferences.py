"""``cascadevl data preferences STORE OUT``: preference pairs of rollouts, as MMPR has them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from cascadevl.cli.arguments import Subparsers, positive_int
from cascadevl.cli.backends import add_backend, backend_facts, open_backend
from cascadevl.cli.data_making import add_drawing, drawing, progress_bar

if TYPE_CHECKING:
    from rich.console import Console

    from cascadevl.workflows.preference_config import PreferenceConfig, PreferenceReport

MADE_NOTHING = 1


def add_parser(actions: Subparsers) -> None:
    """Describe the action."""
    parser = actions.add_parser(
        "preferences",
        help="make preference pairs for MPO of stored rollouts",
        description="Make preference pairs of the rollouts of a store: right answers against wrong "
        "ones, and, with --model, answers against what the model writes without the picture "
        "(DropoutNTP). What is left trains: a meta file and JSONL in the format of MMPR. The same "
        "command goes on after an interruption.",
    )
    parser.add_argument("store", type=Path, metavar="STORE", help="folder of the rollouts")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    group = parser.add_argument_group("right against wrong")
    group.add_argument(
        "--max-pairs",
        type=positive_int,
        metavar="N",
        help="of a question (15; 3 of more than 500,000 questions)",
    )
    group.add_argument(
        "--keep-entailed",
        action="store_true",
        help="also pairs whose rejected answer contains the chosen one",
    )
    _add_dropout(parser)
    add_backend(parser)
    parser.set_defaults(run=run)


def _add_dropout(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("DropoutNTP")
    group.add_argument("--model", metavar="MODEL", help="continues answers without their pictures")
    group.add_argument(
        "--dropout",
        choices=("open", "all"),
        default="open",
        help="questions without a reference (default), or all that show a picture",
    )
    group.add_argument(
        "--num-dropout", type=positive_int, default=1, metavar="N", help="of a question (1)"
    )
    group.add_argument(
        "--kept-share",
        type=float,
        default=0.5,
        metavar="X",
        help="share of the chosen answer that the rejected one begins with (0.5)",
    )
    add_drawing(group)


def run(args: argparse.Namespace) -> int:
    """Make the pairs, and print what became of the questions."""
    from rich.console import Console

    from cascadevl.workflows.preference_data import make_preferences

    config, screen = _config(args), Console(stderr=True)
    backend = processor = None
    if args.model is not None:
        with screen.status(f"loading {args.model}"):
            backend, processor = open_backend(args)
    with progress_bar("questions", screen) as show:
        report = make_preferences(
            config,
            processor=processor,
            backend=backend,
            facts=backend_facts(args) if backend else None,
            on_progress=show,
        )
    print_report(report, Console(), has_model=backend is not None)
    return 0 if report.meta else MADE_NOTHING


def _config(args: argparse.Namespace) -> PreferenceConfig:
    from cascadevl.workflows.preference_config import PreferenceConfig

    return PreferenceConfig(
        store=args.store,
        out=args.out,
        max_pairs=args.max_pairs,
        skip_entailed=not args.keep_entailed,
        dropout=args.dropout,
        num_dropout=args.num_dropout,
        kept_share=args.kept_share,
        sampling=drawing(args),
        seed=args.seed,
    )


def print_report(report: PreferenceReport, console: Console, *, has_model: bool) -> None:
    """Print how many pairs there are, and why others are not.

    Args:
        report: What became of the questions.
        console: Where to print.
        has_model: Whether there was a model for DropoutNTP.
    """
    from rich.table import Table

    table = Table("questions", box=None, pad_edge=False)
    table.add_column("number", justify="right")
    for name, count in report.outcomes.items():
        table.add_row(name.replace("_", " "), f"{count:,}")
    console.print(table)
    for what, counts in (("DropoutNTP", report.dropped), ("left out", report.skipped)):
        for reason, count in counts.items():
            console.print(f"{what}: {count:,} x {reason.replace('_', ' ')}", highlight=False)
    if report.outcomes.get("open") and not has_model:
        console.print("open questions give pairs with --model (DropoutNTP)", highlight=False)
    console.print(
        f"{report.num_pairs:,} pairs of a right and a wrong answer "
        f"({report.num_entailed:,} left out: the wrong one contains the right one), "
        f"{report.num_dropout:,} of DropoutNTP",
        highlight=False,
        soft_wrap=True,
    )
    if report.meta is None:
        console.print("there are no pairs", style="bold red")
        return
    chosen, rejected = report.mean_characters
    console.print(
        f"chosen answers have {chosen:.0f} characters on average, rejected ones {rejected:.0f}",
        highlight=False,
    )
    console.print(f"train with: --data {report.meta}", highlight=False, soft_wrap=True)
