"""``cascadevl nano``: train a small model from scratch, and show what it learned."""

from __future__ import annotations

import argparse
from pathlib import Path

from cascadevl.cli.arguments import Subparsers


def add_parser(subparsers: Subparsers) -> None:
    """Describe the command."""
    parser = subparsers.add_parser(
        "nano",
        help="train a small model from scratch and report what it learned",
        description="Train the nano preset from scratch on three families of tasks, through "
        "pre-training and SFT, examine it on held-out material before and after each stage, and "
        "write a report and a checkpoint. About ten minutes on two quiet cores.",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/nano"), help="folder to write (runs/nano)"
    )
    parser.add_argument(
        "--steps-scale",
        type=float,
        default=1.0,
        metavar="X",
        help="multiply all numbers of steps, 0.01 for a quick look (default: 1)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the training."""
    from cascadevl.workflows.nano_demo import run as run_nano

    run_nano(out=args.out, steps_scale=args.steps_scale)
    return 0
