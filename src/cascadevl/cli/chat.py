"""``cascadevl chat [MODEL]``: ask a model about pictures, in the terminal."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from cascadevl.cli.arguments import Subparsers, increment, positive_int
from cascadevl.cli.wording import worded
from cascadevl.errors import CascadeVLError, ConfigError, RequestError

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from cascadevl.types import Message


@runtime_checkable
class Reply(Protocol):
    """An answer as it comes."""

    def __iter__(self) -> Iterator[str]:
        """Its pieces."""
        ...

    @property
    def finish_reason(self) -> str | None:
        """``"length"`` if it was cut off at the limit of tokens."""
        ...

    @property
    def increments(self) -> tuple[float, ...]:
        """Position step with which each picture was read."""
        ...

    @property
    def num_tiles(self) -> int:
        """Tiles of the conversation's pictures."""
        ...

    @property
    def num_compressed(self) -> int:
        """Of them, those that a router gave fewer visual tokens."""
        ...


@runtime_checkable
class Session(Protocol):
    """Who answers, and remembers the conversation."""

    def ask(self, messages: Sequence[Message], /) -> Reply:
        """Answer the last turn of a conversation."""
        ...

    def reset(self) -> None:
        """Forget the conversation."""
        ...


HELP = (
    "/image FILE adds a picture to the next question, /reset starts anew, Ctrl-C stops an answer, "
    "/quit ends"
)

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


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
    parser.add_argument(
        "--thinking", choices=("on", "off"), help="whether to reason first (default: the model's)"
    )
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
    with Console(stderr=True).status(f"loading {args.model}"):
        model, processor = cascadevl.load(folder, device=device)
    wishes = SamplingParams(
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
        max_tokens=args.max_new_tokens,
    )
    session = conversation.Session(
        engine=Engine(model, processor),
        sampling=wishes,
        increments=args.increment,
        thinking={"on": True, "off": False, None: None}[args.thinking],
        visual_budget=budget,
    )
    chat = Chat(session, console, system=args.system, images=list(args.image))
    if args.question is not None:
        chat.notes = Console(stderr=True)  # what goes into a pipe is the answer alone
        chat.ask(args.question)
        return 0
    console.print(introduction(folder), style="dim", highlight=False, markup=False)
    chat.show_images()
    chat.talk(line_reader())
    return 0


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


@dataclass(slots=True)
class Chat:
    """One conversation in the terminal.

    Attributes:
        session: Answers, and remembers what was said.
        console: Where answers are printed.
        system: System message, if not the model's own.
        images: Pictures of the next question.
        messages: The conversation so far.
        increment: Position step with which its pictures were last read.
        notes: Where everything else is printed; None for the same place.
        tiles: Tiles of the conversation, and how many of them were compressed.
    """

    session: Session
    console: Console
    system: str | None = None
    images: list[Path] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    increment: float | None = None
    notes: Console | None = None
    tiles: tuple[int, int] = (0, 0)

    def talk(self, read: Callable[[], str]) -> None:
        """Read commands and questions until ``/quit`` or the end of the input.

        Args:
            read: Gives the next line; raises EOFError at the end.
        """
        while True:
            try:
                line = read().strip()
            except EOFError:
                self.console.print()
                return
            except KeyboardInterrupt:
                self._note("\n/quit or Ctrl-D ends", "dim")
                continue
            command, _, rest = line.partition(" ")
            if command == "/quit":
                return
            try:
                self._obey(command, rest.strip(), line)
            except CascadeVLError as error:
                self._note(f"error: {worded(error)}", "red")

    def ask(self, question: str) -> None:
        """Stream the answer to a question; the conversation grows only if it comes to an end.

        Args:
            question: Asked about the pictures added since the last one.

        Raises:
            CascadeVLError: If the model cannot be asked so.
        """
        from cascadevl.types import Message

        if not question.strip():
            raise RequestError("the question is empty")
        start = list(self.messages)
        if not start and self.system is not None:
            start.append(Message.of("system", self.system))
        start.append(user_message(question, self.images))
        answer: list[str] = []
        reply = self.session.ask(start)
        self._show_increment(reply.increments)
        self._show_tiles(reply)
        for piece in reply:
            # A model may write an escape sequence, which the terminal must not obey.
            shown = _CONTROL.sub("\ufffd", piece)
            self.console.print(
                shown, end="", markup=False, highlight=False, emoji=False, soft_wrap=True
            )
            answer.append(piece)
        self.console.print()
        if reply.finish_reason == "length":
            self._note("cut off; a larger --max-new-tokens lets an answer end by itself", "yellow")
        self.messages = [*start, Message.of("assistant", "".join(answer))]
        self.images = []

    def show_images(self) -> None:
        """Say which pictures go with the next question, if any do."""
        if self.images:
            names = ", ".join(file.name for file in self.images)
            self._note(f"with the next question: {names}", "dim")

    def _obey(self, command: str, argument: str, line: str) -> None:
        if command == "/image":
            self.images.append(picture_named(argument))
            self.show_images()
        elif command == "/reset":
            self.messages, self.images, self.increment = [], [], None
            self.session.reset()
            self._note("a new conversation", "dim")
        elif command == "/help":
            self._note(HELP, "dim")
        elif command.startswith("/"):
            raise RequestError(f"there is no command {command}; {HELP}")
        elif line:
            self._ask_until_interrupted(line)

    def _ask_until_interrupted(self, question: str) -> None:
        """Ctrl-C ends an answer, not the conversation."""
        try:
            self.ask(question)
        except KeyboardInterrupt:
            self._note("\nstopped; the question is not part of the conversation", "dim")

    def _show_increment(self, increments: tuple[float, ...]) -> None:
        """Say where the conversation became too long for the increment it had."""
        before, now = self.increment, min(increments, default=None)
        if before is not None and now is not None and now < before:
            new, old = (Fraction(each).limit_denominator(4096) for each in (now, before))
            self._note(
                f"the conversation is read again: it fits only with increment {new}, "
                f"no longer with {old}",
                "dim",
            )
        self.increment = now

    def _show_tiles(self, reply: Reply) -> None:
        """Say how many tiles were compressed, where it is not the same as in the last turn."""
        now = (reply.num_tiles, reply.num_compressed)
        if now != self.tiles and reply.num_compressed:
            self._note(f"{now[1]} of {now[0]} tiles compressed", "dim")
        self.tiles = now

    def _note(self, text: str, style: str) -> None:
        notes = self.notes or self.console
        notes.print(text, style=style, markup=False, highlight=False)


def user_message(question: str, images: Sequence[Path]) -> Message:
    """A question with its pictures, written as in the released conversation data.

    One picture stands on a line before the question; several are numbered.

    Args:
        question: The text.
        images: The pictures, in order.
    """
    from cascadevl.types import ImageRef, Message, Part

    parts: list[Part] = []
    for number, file in enumerate(images, start=1):
        if len(images) > 1:
            parts.append(f"Image-{number}: ")
        parts += [ImageRef(file), "\n"]
    return Message("user", (*parts, question))


def picture_named(text: str) -> Path:
    """The picture that a person named, also in the quotes a terminal writes around a dropped file.

    Args:
        text: The name as typed.

    Raises:
        CascadeVLError: If there is no such picture, or it cannot be opened.
    """
    file = Path(text).expanduser()
    if not file.is_file():
        try:
            words = shlex.split(text)
        except ValueError:  # a quote that is part of the name
            words = []
        if len(words) == 1:
            file = Path(words[0]).expanduser()
    check_picture(file)
    return file


def check_picture(file: Path) -> None:
    """Refuse what is no picture before anything slow is done.

    Args:
        file: The file.

    Raises:
        CascadeVLError: If it is not there, or not a picture.
    """
    if not file.is_file():
        raise RequestError(f"there is no picture {file}")
    from cascadevl.data.image import open_image
    from cascadevl.types import ImageRef

    open_image(ImageRef(file), source=str(file))
