"""``cascadevl demo``: micro answers, is taught something new, and shows what that changed."""

from __future__ import annotations

import argparse
from pathlib import Path

from cascadevl.cli.arguments import Subparsers, positive_int


def add_parser(subparsers: Subparsers) -> None:
    """Describe the command."""
    parser = subparsers.add_parser(
        "demo",
        help="let micro answer, teach it something new, and report what that changed",
        description="Micro, the model that comes with the package, answers a page of pictures at "
        "once. Then it is taught something it does not know, boxes of shapes: fine-tuned, then "
        "reinforced by MPO and GSPO, and examined all along, on boxes and on all it knew. Last, a "
        "copy learns to do with fewer visual tokens (ViCO and the router). Leaves a report and "
        "both checkpoints.",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/demo"), help="folder to write (runs/demo)"
    )
    parser.add_argument(
        "--model",
        default="micro",
        metavar="MODEL",
        help="another edition of micro to start from, by its folder (default: micro)",
    )
    parser.add_argument(
        "--steps-scale",
        type=float,
        default=1.0,
        metavar="X",
        help="multiply the number of steps, 0.01 for a quick look (default: 1)",
    )
    parser.add_argument(
        "--questions",
        type=positive_int,
        default=200,
        metavar="N",
        help="held-out questions of each kind, before and after (default: 200)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the demo."""
    from cascadevl.workflows.demo import run as run_demo

    run_demo(
        out=args.out,
        model=args.model,
        steps_scale=args.steps_scale,
        num_questions=args.questions,
    )
    return 0
