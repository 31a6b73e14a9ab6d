"""``cascadevl chat [MODEL]``: ask a model about pictures, in the terminal."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from cascadevl.cli.arguments import Subparsers, increment, positive_int
from cascadevl.cli.best_of import add_best_of, critics_beside, wanted_best
from cascadevl.cli.talk import HELP, Chat, check_picture
from cascadevl.cli.thinking import add_thinking, opening_of
from cascadevl.cli.verifying import add_verifying, verifier
from cascadevl.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from cascadevl.cli.talk import Session
    from cascadevl.engine.conversation import Session as Asking


def add_parser(subparsers: Subparsers) -> None:
    """Describe the command."""
    parser = subparsers.add_parser(
        "chat",
        help="ask a model about pictures",
        description=f"Talk with a model. In the conversation: {HELP}.",
    )
    parser.add_argument(
        "model",
        nargs="?",
        default="micro",
        metavar="MODEL",
        help="a checkpoint folder, a released name, or micro, which comes with the package "
        "(default: micro)",
    )
    parser.add_argument(
        "--image",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="a picture for the first question; may be given several times",
    )
    parser.add_argument("--question", metavar="TEXT", help="ask this one thing and stop")
    parser.add_argument("--system", metavar="TEXT", help="system message, instead of the model's")
    add_thinking(parser)
    parser.add_argument(
        "--increment",
        type=increment,
        metavar="X",
        help="position step of a visual token, such as 1/16 (default: the model's)",
    )
    parser.add_argument(
        "--visual-budget",
        metavar="B",
        help="tiles that a Flash model keeps full: full, compressed, a share (0.5 or 50%%), or "
        "threshold=P[,quantile=Q] (default: the model's thresholds)",
    )
    parser.add_argument("--max-new-tokens", type=positive_int, default=1024, metavar="N")
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0, the default, is greedy"
    )
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="(default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of sampling (default: 0)")
    parser.add_argument("--device", default="cpu", help="cpu (the default), cuda, ...")
    add_best_of(parser)
    add_verifying(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Load the model and talk."""
    for file in args.image:
        check_picture(file)

    from rich.console import Console

    import cascadevl
    from cascadevl.engine import conversation
    from cascadevl.engine.engine import Engine
    from cascadevl.engine.sampling import SamplingParams
    from cascadevl.model.loading import find
    from cascadevl.model.routing import parse_budget

    budget = None if args.visual_budget is None else parse_budget(args.visual_budget)
    console, device, folder = Console(), usable_device(args.device), find(args.model)
    wishes = SamplingParams(
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
        max_tokens=args.max_new_tokens,
    )
    opening = opening_of(args)
    with Console(stderr=True).status(f"loading {args.model}"):
        model, processor = cascadevl.load(folder, device=device)
        session = conversation.Session(
            engine=Engine(model, processor),
            sampling=wishes,
            increments=args.increment,
            thinking={"on": True, "off": False, None: None}[args.thinking],
            force_thinking=args.force_thinking,
            thinking_budget=args.thinking_budget,
            visual_budget=budget,
        )
        answering = _answering(args, session)
    chat = Chat(answering, console, system=args.system, images=list(args.image), opening=opening)
    chat.verify = verifier(args, session)
    if args.question is not None:
        chat.notes = Console(stderr=True)  # what goes into a pipe is the answer alone
        chat.ask(args.question)
        return 0
    console.print(introduction(folder), style="dim", highlight=False, markup=False)
    chat.show_images()
    chat.talk(line_reader())
    return 0


def _answering(args: argparse.Namespace, session: Asking) -> Session:
    """Who answers: the model, or the best of several of its answers."""
    from cascadevl.engine.best_session import BestSession

    config = wanted_best(args)
    if config is None:
        return session
    selection = critics_beside(args, session.engine).selection(config)
    return BestSession(session=session, config=config, selection=selection)


def introduction(folder: Path) -> str:
    """What is said before the first question: whom one talks with, and what can be typed.

    Args:
        folder: Of the checkpoint.
    """
    from cascadevl.model.shipped import edition

    number = edition(folder)
    if number is None:
        return HELP
    return f"{folder.name}, edition {number}; what it can do: {folder / 'README.md'}\n{HELP}"


def usable_device(name: str) -> torch.device:
    """The device of this name.

    Args:
        name: As torch names it.

    Raises:
        ConfigError: If there is no such device, or none on this machine.
    """
    import torch

    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(f"--device {name} cannot be used here: {reason}") from error
    return device


def line_reader() -> Callable[[], str]:
    """A function that asks for a line, with cursor keys and a history where Python has them."""
    with suppress(ImportError):  # Windows has none; its terminal brings an editor of its own
        importlib.import_module("readline")  # from now on input() edits its line
    return lambda: input("you> ")
