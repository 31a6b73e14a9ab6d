"""What the commands that make data share: how answers are drawn, and a bar while they are."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from cascadevl.cli.arguments import increment, positive_int

if TYPE_CHECKING:
    from rich.console import Console

    from cascadevl.engine.sampling import SamplingParams


def add_drawing(group: argparse._ArgumentGroup) -> None:
    """How tokens are drawn.

    Args:
        group: Gets the arguments.
    """
    group.add_argument("--temperature", type=float, default=1.0, metavar="T", help="(default: 1)")
    group.add_argument("--top-p", type=float, default=1.0, metavar="P", help="(default: 1, off)")
    group.add_argument("--top-k", type=int, default=0, metavar="K", help="(default: 0, off)")
    group.add_argument(
        "--max-tokens", type=positive_int, default=4096, metavar="N", help="of an answer (4096)"
    )


def drawing(args: argparse.Namespace) -> SamplingParams:
    """What `add_drawing` was told; without a seed.

    Args:
        args: The arguments.
    """
    from cascadevl.engine.sampling import SamplingParams

    return SamplingParams(
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        max_tokens=args.max_tokens,
    )


def add_increment(group: argparse._ArgumentGroup) -> None:
    """Where visual tokens sit.

    Args:
        group: Gets the argument.
    """
    group.add_argument(
        "--increment",
        type=increment,
        metavar="X",
        help="position step of a visual token, such as 1/16 (default: the model's)",
    )


@contextmanager
def progress_bar(title: str, screen: Console) -> Iterator[Callable[[int, int], None]]:
    """A bar in a terminal, which is gone afterwards; nothing elsewhere.

    Args:
        title: What is counted.
        screen: Where people look.

    Yields:
        To be called with how many are done, and of how many.
    """
    from rich.progress import Progress

    with Progress(console=screen, transient=True, disable=not screen.is_terminal) as progress:
        bar = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(bar, completed=done, total=total)
