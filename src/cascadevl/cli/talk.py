"""One conversation in the terminal: what is typed, what is answered, and what is told beside it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from cascadevl.cli.verifying import verdict_lines
from cascadevl.cli.wording import worded
from cascadevl.errors import CascadeVLError, RequestError

if TYPE_CHECKING:
    from rich.console import Console

    from cascadevl.scoring.verdicts import Verification
    from cascadevl.serving.answer_parts import Piece
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

    @property
    def note(self) -> str:
        """What else is to be said of it once it has come; empty for nothing."""
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
        opening: What answers begin with that the prompt holds already: ``<think>`` where reasoning
            is forced, so that it is told from the answer, and stands in the conversation.
        is_reasoning: Whether the last piece that was printed is of the reasoning.
        verify: Checks what is said in answer to a conversation; None where nothing is checked.
    """

    session: Session
    console: Console
    system: str | None = None
    images: list[Path] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    increment: float | None = None
    notes: Console | None = None
    tiles: tuple[int, int] = (0, 0)
    opening: str = ""
    is_reasoning: bool = False
    verify: Callable[[Sequence[Message], str], Verification | None] | None = None

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
        reply = self.session.ask(start)
        self._show_increment(reply.increments)
        self._show_tiles(reply)
        answer = self._show_answer(reply)
        if reply.finish_reason == "length":
            self._note("cut off; a larger --max-new-tokens lets an answer end by itself", "yellow")
        if reply.note:
            self._note(reply.note, "dim")
        self.messages = [*start, Message.of("assistant", self._checked(start, answer))]
        self.images = []

    def _checked(self, start: Sequence[Message], answer: str) -> str:
        """What the conversation goes on with: the answer without what is withdrawn."""
        found = None if self.verify is None else self.verify(start, answer)
        if found is None:
            return answer
        for line, style in verdict_lines(found):
            self._note(_CONTROL.sub("\ufffd", line), style)
        return found.text or answer

    def _show_answer(self, reply: Reply) -> str:
        """Print an answer as it comes, its reasoning where notes go; gives all that was said."""
        from cascadevl.serving.answer_parts import AnswerParts

        parts, said, self.is_reasoning = AnswerParts(), [self.opening], False
        self._print(parts.push(self.opening))
        for piece in reply:
            said.append(piece)
            self._print(parts.push(piece))
        self._print(parts.flush())
        self.console.print()
        return "".join(said)

    def _print(self, pieces: Sequence[Piece]) -> None:
        from cascadevl.serving.answer_parts import Content, Reasoning

        for piece in pieces:
            assert isinstance(piece, Content | Reasoning), "no tools were given"
            was, self.is_reasoning = self.is_reasoning, isinstance(piece, Reasoning)
            notes = self.notes or self.console
            if was and not self.is_reasoning:
                notes.print("\n")
            # A model may write an escape sequence, which the terminal must not obey.
            (notes if self.is_reasoning else self.console).print(
                _CONTROL.sub("\ufffd", piece.text),
                end="",
                style="dim" if self.is_reasoning else None,
                markup=False,
                highlight=False,
                emoji=False,
                soft_wrap=True,
            )

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
