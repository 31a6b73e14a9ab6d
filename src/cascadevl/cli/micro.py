"""``cascadevl micro``: train the model that comes with the package, examine it, make it ready."""

from __future__ import annotations

import argparse
from pathlib import Path

from cascadevl.cli.arguments import Subparsers, positive_int
from cascadevl.errors import ConfigError

SCORES = "scores.json"
"""What the examination is written to, in the folder of the stages."""


def add_parser(subparsers: Subparsers) -> None:
    """Describe the command."""
    parser = subparsers.add_parser(
        "micro",
        help="train the model that comes with the package, from random weights",
        description="Train micro from random weights, stage by stage: a vision tower, a decoder, "
        "pre-training of the whole, SFT, annealing. It takes hours on one core; the same command "
        "goes on where it was stopped. At the end the model is examined on held-out questions.",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/micro"), help="folder of all stages (runs/micro)"
    )
    parser.add_argument(
        "--stages",
        nargs="+",
        metavar="STAGE",
        help="only these: vision, decoder (side by side, if you like), pretrain, sft, anneal",
    )
    parser.add_argument(
        "--steps-scale",
        type=float,
        default=1.0,
        metavar="X",
        help="multiply all numbers of steps, 0.003 for a quick look (default: 1)",
    )
    parser.add_argument(
        "--questions",
        type=positive_int,
        default=400,
        metavar="N",
        help="held-out questions of each row and seed in the examination (default: 400)",
    )
    parser.add_argument(
        "--ship", type=Path, metavar="DIR", help="also write the folder that the package ships"
    )
    parser.add_argument(
        "--edition", type=positive_int, metavar="N", help="its edition, with --ship"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Train what is not trained yet, examine, ship if asked to."""
    if (args.ship is None) != (args.edition is None):
        raise ConfigError("--ship DIR and --edition N belong together; give both or none")

    from cascadevl.workflows import micro
    from cascadevl.workflows.micro_training import run as train

    stages = tuple(args.stages or micro.STAGES)
    model = train(args.out, stages=stages, steps_scale=args.steps_scale)
    if stages[-1] != tuple(micro.STAGES)[-1]:
        if args.ship is not None:
            raise ConfigError(f"only the model of the last stage is shipped, not {stages[-1]}'s")
        return 0
    _examine_and_ship(args, model)
    return 0


def _examine_and_ship(args: argparse.Namespace, model: Path) -> None:
    from rich.console import Console
    from rich.markdown import Markdown

    from cascadevl.workflows.micro_examination import examine, known, table
    from cascadevl.workflows.micro_shipping import ship

    console = Console()
    file = args.out / SCORES
    scores = known(file, model, args.questions)
    if scores is None:
        scores = examine(model, num_questions=args.questions, progress=console.print)
        file.write_text(scores.json() + "\n", "utf-8")
    console.print(Markdown(table(scores)))
    console.print(f"model:  {model}\nscores: {file}", highlight=False, soft_wrap=True)
    if args.ship is not None:
        ship(model, args.ship, edition=args.edition, scores=scores)
        console.print(f"ready to ship: {args.ship}", highlight=False, soft_wrap=True)
