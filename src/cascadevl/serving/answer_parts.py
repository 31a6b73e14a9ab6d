"""An answer taken apart while it comes: its reasoning, what it says, and its calls of tools.

Reasoning stands at the beginning, between ``<think>`` and ``</think>``; calls stand in
``<tool_call>`` as the templates of Qwen write them (`cascadevl.data.tools`). What is given out is
certain: joined, the pieces of a stream are those of the whole answer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from cascadevl.engine.text_stream import Scanner

THINK, THINK_END = "<think>", "</think>"
CALL, CALL_END = "<tool_call>", "</tool_call>"

_BEGINNING = re.compile(
    r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*(?=\{)', re.DOTALL
)


@dataclass(frozen=True, slots=True)
class Reasoning:
    """A piece of the reasoning."""

    text: str


@dataclass(frozen=True, slots=True)
class Content:
    """A piece of what is said."""

    text: str


@dataclass(frozen=True, slots=True)
class CallName:
    """A call begins: the number of the call, and what is called."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """A piece of the JSON text of a call's arguments."""

    index: int
    text: str


Piece: TypeAlias = Reasoning | Content | CallName | CallArguments
"""One piece of an answer."""


class AnswerParts:
    """Takes one answer apart."""

    def __init__(
        self, *, begins_thinking: bool = False, calls: bool = False, is_call: bool = False
    ) -> None:
        """Begin an answer.

        Args:
            begins_thinking: The prompt has opened the reasoning already.
            calls: Whether tools may be called; otherwise calls are text like any other.
            is_call: The whole answer is one call in JSON, without tags around it.
        """
        self._calls = calls
        self._num_calls = 0
        self._start: str | None = None if begins_thinking or is_call else ""
        self._reasoning = _Trimmed() if begins_thinking else None
        self._content = _Trimmed()
        self._content.is_begun = not begins_thinking
        self._think_end, self._call_begin = Scanner([THINK_END]), Scanner([CALL])
        self._call_end = Scanner([CALL_END])
        self._call: _Call | None = _Call(0) if is_call else None
        self._is_call = is_call

    def push(self, text: str) -> list[Piece]:
        """Take a piece of the answer's text; give what has become certain with it."""
        if self._start is not None:
            text = self._begin(self._start + text)
        return self._push(text)

    def flush(self) -> list[Piece]:
        """The rest, when the answer has ended."""
        rest, self._start = self._start or "", None
        pieces = self._push(rest)
        if self._reasoning is not None:
            pieces += _reasoning(self._reasoning.push(self._think_end.flush()))
        elif self._call is not None:
            pieces += self._call.push("" if self._is_call else self._call_end.flush())
            pieces += self._ended(is_closed=self._is_call)
        else:
            said = self._content.push(self._call_begin.flush()) + self._content.flush()
            pieces += _content(said)
        return pieces

    def _begin(self, text: str) -> str:
        """Find out whether the answer begins with reasoning; hold it back until that is known."""
        shown = text.lstrip()
        if shown.startswith(THINK):
            self._start, self._reasoning = None, _Trimmed()
            self._content.is_begun = False
            return shown.removeprefix(THINK)
        if THINK.startswith(shown):
            self._start = text
            return ""
        self._start = None
        return text

    def _push(self, text: str) -> list[Piece]:
        pieces: list[Piece] = []
        if self._reasoning is not None:
            certain, found = self._think_end.push(text)
            pieces += _reasoning(self._reasoning.push(certain))
            if found is None:
                return pieces
            self._reasoning, text = None, self._think_end.flush()
        if not self._calls:
            if self._is_call and self._call is not None:
                return pieces + self._call.push(text)
            said = self._content.push(text)
            return pieces + _content(said)
        return pieces + self._push_calls(text)

    def _push_calls(self, text: str) -> list[Piece]:
        pieces: list[Piece] = []
        while True:
            if self._call is None:
                certain, found = self._call_begin.push(text)
                pieces += _content(self._content.push(certain))
                if found is None:
                    return pieces
                self._call, text = _Call(self._num_calls), self._call_begin.flush()
            certain, found = self._call_end.push(text)
            pieces += self._call.push(certain)
            if found is None:
                return pieces
            text = self._call_end.flush()
            pieces += self._ended(is_closed=True)

    def _ended(self, *, is_closed: bool) -> list[Piece]:
        """End the call that is open."""
        assert self._call is not None
        pieces, text = self._call.end()
        self._call = None
        if pieces is None:  # no call after all: nothing of the answer is lost
            begin, end = ("", "") if self._is_call else (CALL, CALL_END if is_closed else "")
            return _content(self._content.push(begin + text + end) + self._content.flush())
        self._num_calls += 1
        self._content.drop()
        return pieces


class _Call:
    """One call as its JSON comes; arguments are given out while they do."""

    def __init__(self, index: int) -> None:
        self._index = index
        self._text = ""  # what is not given out
        self._object: _ObjectEnd | None = None  # once the arguments have begun

    def push(self, text: str) -> list[Piece]:
        if self._object is not None:
            return self._arguments(text)
        self._text += text
        match = _BEGINNING.match(self._text)
        if match is None or (name := _as_text(match[1])) is None:
            return []
        self._object = _ObjectEnd()
        return [CallName(self._index, name), *self._arguments(self._text[match.end() :])]

    def end(self) -> tuple[list[Piece] | None, str]:
        """What is left to give out; or None and the text, where it was no call."""
        if self._object is not None:
            return [], ""
        try:
            call = json.loads(self._text)
        except ValueError:
            return None, self._text
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            return None, self._text
        arguments = call.get("arguments", call.get("parameters", {}))
        text = arguments if isinstance(arguments, str) else json.dumps(arguments)
        return [CallName(self._index, call["name"]), CallArguments(self._index, text)], ""

    def _arguments(self, text: str) -> list[Piece]:
        assert self._object is not None
        inside = self._object.push(text)
        return [CallArguments(self._index, inside)] if inside else []


class _ObjectEnd:
    """Finds the end of a JSON object in pieces of text that begin with it."""

    def __init__(self) -> None:
        self._depth, self._in_string, self._is_escaped, self._is_over = 0, False, False, False

    def push(self, text: str) -> str:
        """What of the text belongs to the object."""
        if self._is_over:
            return ""
        for place, letter in enumerate(text):
            if self._in_string:
                self._take_in_string(letter)
            elif letter == '"':
                self._in_string = True
            elif letter in "{[":
                self._depth += 1
            elif letter in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self._is_over = True
                    return text[: place + 1]
        return text

    def _take_in_string(self, letter: str) -> None:
        if self._is_escaped:
            self._is_escaped = False
        elif letter == "\\":
            self._is_escaped = True
        elif letter == '"':
            self._in_string = False


class _Trimmed:
    """Text without line breaks at its beginning; those at its end wait for what follows.

    Attributes:
        is_begun: Whether line breaks belong to it already.
    """

    def __init__(self) -> None:
        self.is_begun = False
        self._held = ""

    def push(self, text: str) -> str:
        if not self.is_begun:
            text = text.lstrip("\n")
            self.is_begun = bool(text)
        text = self._held + text
        certain = text.rstrip("\n")
        self._held = text[len(certain) :]
        return certain

    def flush(self) -> str:
        rest, self._held = self._held, ""
        return rest

    def drop(self) -> None:
        self._held = ""
        self.is_begun = False


def _reasoning(text: str) -> list[Piece]:
    return [Reasoning(text)] if text else []


def _content(text: str) -> list[Piece]:
    return [Content(text)] if text else []


def _as_text(quoted: str) -> str | None:
    try:
        return str(json.loads(quoted))
    except ValueError:
        return None


@dataclass(frozen=True, slots=True)
class ToolCallText:
    """A whole call: what is called, and JSON text of its arguments."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class WholeAnswer:
    """A whole answer in its parts.

    Attributes:
        reasoning: How it was found; empty if it does not say.
        content: What it says.
        calls: What it calls.
    """

    reasoning: str
    content: str
    calls: tuple[ToolCallText, ...]


def joined(pieces: Sequence[Piece]) -> WholeAnswer:
    """A whole answer of all its pieces.

    Args:
        pieces: In their order.
    """
    reasoning, content = "", ""
    names: list[str] = []
    arguments: list[str] = []
    for piece in pieces:
        if isinstance(piece, Reasoning):
            reasoning += piece.text
        elif isinstance(piece, Content):
            content += piece.text
        elif isinstance(piece, CallName):
            names.append(piece.name)
            arguments.append("")
        else:
            arguments[piece.index] += piece.text
    calls = tuple(map(ToolCallText, names, arguments))
    return WholeAnswer(reasoning, content, calls)
