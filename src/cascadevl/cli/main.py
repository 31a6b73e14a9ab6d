"""The ``cascadevl`` command: finds the sub-command and words its errors for people.

Every command is one small module with ``add_parser`` and ``run``. Only ``run`` imports what is
heavy, so that help and mistyped arguments are answered at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from cascadevl.cli import (
    cascade,
    chat,
    convert,
    data,
    demo,
    generate,
    join,
    merge,
    micro,
    mixture_search,
    nano,
    plan,
    serve,
    show,
    train,
    web,
    zoo,
)
from cascadevl.cli.wording import worded
from cascadevl.errors import CascadeVLError
from cascadevl.host_memory import keep_freed_memory
from cascadevl.version import __version__

UNREAD = 1
MISTAKE = 2
INTERRUPTED = 130
"""Exit codes: nobody reads the output any more, as rich has it; something a person can mend, as
argparse has it; Ctrl-C, as shells have it."""

COMMANDS = (
    chat,
    generate,
    serve,
    web,
    plan,
    show,
    train,
    cascade,
    data,
    mixture_search,
    merge,
    convert,
    join,
    zoo,
    demo,
    nano,
    micro,
)


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="cascadevl",
        description="Train, run and convert InternVL3 and InternVL3.5 models.",
    )
    parser.add_argument("--version", action="version", version=f"cascadevl {__version__}")
    parser.add_argument(
        "--traceback", action="store_true", help="show where an error arose, to report it"
    )
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: Its words; those of the process if None.

    Returns:
        The exit code: what the command gives (0 if all is well), 2 for a mistake that a person
        can mend, 130 after Ctrl-C.
    """
    args = make_parser().parse_args(argv)
    try:
        code = int(args.run(args))
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # The reader (`cascadevl zoo | head`) has enough; Python must not complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return UNREAD
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except (CascadeVLError, OSError) as error:
        if args.traceback:
            raise
        print(f"error: {worded(error)}", file=sys.stderr)
        return MISTAKE


def program() -> int:
    """A command as a process of its own, whose memory nobody else needs.

    Returns:
        The exit code.
    """
    keep_freed_memory()
    return main()


if __name__ == "__main__":
    sys.exit(program())
