"""Checking answers in a terminal: the arguments, the guard that they name, and what it found."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cascadevl.errors import ConfigError

if TYPE_CHECKING:
    from cascadevl.data.processor import CascadeVLProcessor
    from cascadevl.engine.conversation import Session
    from cascadevl.engine.guard import Guard
    from cascadevl.scoring.verdicts import Verification
    from cascadevl.types import Message

_STYLES = {"kept": "green", "flagged": "yellow", "withdrawn": "red"}


def add_verifying(parser: argparse.ArgumentParser) -> None:
    """Describe the arguments.

    Args:
        parser: Gets them.
    """
    group = parser.add_argument_group("checking answers")
    group.add_argument(
        "--verify",
        action="store_true",
        help="hold every claim of an answer against the pictures (and documents), and say which "
        "are kept, flagged or withdrawn, and why",
    )
    add_sources(group)


def add_sources(group: argparse._ArgumentGroup) -> None:
    """What claims are held against, and how strictly.

    Args:
        group: Gets the arguments.
    """
    group.add_argument(
        "--documents",
        type=Path,
        metavar="DIR",
        help="hold claims against the text and Markdown files of this folder, too",
    )
    group.add_argument(
        "--limits",
        type=_limits,
        metavar="K,W",
        help="keep a claim from this probability on, withdraw it below that one (0.7,0.3)",
    )
    group.add_argument(
        "--claims",
        choices=("rules", "model"),
        default="rules",
        help="who finds the claims of an answer: rules (the default), or the model by a prompt",
    )


def _limits(text: str) -> tuple[float, float]:
    keep, _, withdraw = text.partition(",")
    return float(keep), float(withdraw)


def open_guard(args: argparse.Namespace, processor: CascadeVLProcessor) -> Guard:
    """The guard that the arguments of `add_sources` name.

    Args:
        args: The arguments.
        processor: Of the model that is asked.

    Raises:
        ConfigError: If limits mean nothing, or a library is missing.
        DataError: If documents cannot be read.
    """
    from cascadevl.data.documents import Documents
    from cascadevl.engine.guard import Guard, GuardConfig
    from cascadevl.scoring.verdicts import Limits

    limits = Limits()
    if args.limits is not None:
        limits = Limits(keep=args.limits[0], withdraw=args.limits[1])
    documents = None if args.documents is None else Documents.of_folder(args.documents)
    config = GuardConfig(limits=limits, extractor=args.claims)
    return Guard(processor=processor, config=config, documents=documents)


def verifier(
    args: argparse.Namespace, session: Session
) -> Callable[[Sequence[Message], str], Verification | None] | None:
    """What checks the answers of a conversation in a terminal; None if nothing is to be checked.

    Args:
        args: With those of `add_verifying`.
        session: Whose engine is asked.

    Raises:
        ConfigError: If there are documents, but nothing is to be checked.
    """
    from cascadevl.engine.engine_backend import EngineBackend
    from cascadevl.engine.guard import Said, verify
    from cascadevl.engine.requests import Request

    if not args.verify:
        if args.documents is not None or args.limits is not None:
            raise ConfigError("--documents and --limits are for checking answers; add --verify")
        return None
    processor = session.engine.processor
    assert processor is not None, "a session has one"
    guard, backend = open_guard(args, processor), EngineBackend(engine=session.engine)

    def check(messages: Sequence[Message], answer: str) -> Verification | None:
        about = Request(
            prompt=processor.prompt(list(messages), system=session.system),
            increments=session.increments,
            visual_budget=session.visual_budget,
        )
        if not guard.has_sources(about):
            return None
        said = Said(about=about, question=messages[-1].text, answer=answer)
        return verify(backend, guard, [said])[0]

    return check


def verdict_lines(found: Verification) -> Iterator[tuple[str, str]]:
    """What was found, line by line, each with its style.

    Args:
        found: Of an answer.
    """
    for check in found.checks:
        chance = "    " if check.probability is None else f"{check.probability:.2f}"
        why = "" if check.verdict == "kept" else f" ({check.reason})"
        yield f"{check.verdict:>9} {chance} {check.claim.text}{why}", _STYLES[check.verdict]
    if not found.checks:
        yield "no claim was found that could be checked", "dim"
    if found.text != found.answer:
        yield f"what is left: {found.text.rpartition('</think>')[2].strip()}", "dim"
