"""What the web chat asks a server, over its HTTP API: it knows nothing else of it.

So the chat can run beside a server in one process or in many, on this machine or another.
"""

from __future__ import annotations

import base64
import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

from cascadevl.engine.http_json import HttpServer, Refused
from cascadevl.errors import RequestError

Wishes: TypeAlias = Mapping[str, object]
"""Further fields of a request; those that are None are left out."""

_DURATION = re.compile(r"(\w+);dur=([\d.]+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """A turn of a conversation.

    Attributes:
        text: What was said.
        files: Pictures that were shown with it.
        reasoning: What an answer was thought out by.
        is_answer: Whether the model said it.
    """

    text: str = ""
    files: tuple[Path, ...] = ()
    reasoning: str = ""
    is_answer: bool = False

    def message(self) -> dict[str, Any]:
        """The turn as the API takes it. Earlier reasoning is not sent: no model is shown it."""
        role = "assistant" if self.is_answer else "user"
        if not self.files:
            return {"role": role, "content": self.text}
        parts: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": data_url(file)}} for file in self.files
        ]
        return {"role": role, "content": [*parts, {"type": "text", "text": self.text}]}


def data_url(file: Path) -> str:
    """A file as a data URL; its type is left open, because servers look at its first bytes.

    Args:
        file: The file.
    """
    return f"data:image/*;base64,{base64.b64encode(file.read_bytes()).decode('ascii')}"


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """What is served.

    Attributes:
        name: By which it is asked for.
        abilities: See `cascadevl.serving.openai_replies.Abilities`.
    """

    name: str
    abilities: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """An answer, or what there is of it so far.

    Attributes:
        text: What was said.
        reasoning: What it was thought out by.
        finish_reason: How it ended; None while it goes on.
        usage: What it took, once it has ended.
        seconds: How long each stage took: those that the server tells, and ``answer``, the time
            from the first token to the last.
    """

    text: str = ""
    reasoning: str = ""
    finish_reason: str | None = None
    usage: Mapping[str, Any] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """One of several answers.

    Attributes:
        text: What was said.
        score: What speaks for it.
        steps: Its steps, each with its score; empty where it was not judged step by step.
    """

    text: str
    score: float
    steps: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class WebClient:
    """Asks a server.

    Attributes:
        server: Its address and key.
    """

    server: HttpServer

    def about(self) -> About:
        """What is served.

        Raises:
            RequestError: If the server cannot be reached, or is another one.
        """
        try:
            (model,) = json.loads(self.server.get("models"))["data"]
            return About(name=model["id"], abilities=model["abilities"])
        except (Refused, ValueError, KeyError, TypeError) as error:
            raise RequestError(
                f"{self.server.url} is no server of cascadevl ({error!r}); start one with "
                f"`cascadevl serve`"
            ) from error

    def stream(self, turns: Sequence[Turn], wishes: Wishes) -> Iterator[Answer]:
        """Answer the last turn; each time a little more of the answer.

        Args:
            turns: The conversation.
            wishes: How it is to be answered.

        Raises:
            RequestError: If it cannot be answered.
        """
        body = {**_body(turns, wishes), "stream": True, "stream_options": {"include_usage": True}}
        answer = Answer()
        try:
            with self.server.stream("chat/completions", body) as events:
                seconds = _seconds(events.headers.get("server-timing", ""))
                start = time.monotonic()
                for event in events:
                    answer = _more(answer, json.loads(event))
                    seconds["answer"] = time.monotonic() - start
                    yield replace(answer, seconds=dict(seconds))
        except Refused as refused:
            raise RequestError(_words(str(refused))) from refused

    def best(self, turns: Sequence[Turn], wishes: Wishes, number: int) -> list[Scored]:
        """Several answers to the last turn, the best first.

        Args:
            turns: The conversation.
            wishes: How it is to be answered, and with ``select`` by what the best is found.
            number: How many.

        Raises:
            RequestError: If it cannot be answered.
        """
        body = {**_body(turns, wishes), "best_of": number, "n": number}
        try:
            choices = json.loads(self.server.post("chat/completions", body))["choices"]
        except Refused as refused:
            raise RequestError(_words(str(refused))) from refused
        return [
            Scored(
                text=choice["message"].get("content") or "",
                score=choice["score"],
                steps=tuple(
                    (step["text"], step["score"]) for step in choice.get("step_scores") or ()
                ),
            )
            for choice in choices
        ]


def _body(turns: Sequence[Turn], wishes: Wishes) -> dict[str, Any]:
    given = {name: value for name, value in wishes.items() if value is not None}
    return {"messages": [turn.message() for turn in turns], **given}


def _seconds(header: str) -> dict[str, float]:
    """Stages of ``Server-Timing``, which are in milliseconds."""
    return {stage: float(number) / 1000 for stage, number in _DURATION.findall(header)}


def _more(answer: Answer, event: Mapping[str, Any]) -> Answer:
    """The answer with what an event of the stream brings."""
    if "error" in event:
        raise RequestError(event["error"]["message"])
    if usage := event.get("usage"):
        answer = replace(answer, usage=usage)
    for choice in event["choices"]:
        delta = choice["delta"]
        answer = replace(
            answer,
            text=answer.text + (delta.get("content") or ""),
            reasoning=answer.reasoning + (delta.get("reasoning_content") or ""),
            finish_reason=choice["finish_reason"] or answer.finish_reason,
        )
    return answer


def _words(refusal: str) -> str:
    """The message within a refusal, which holds the server's JSON."""
    found = re.search(r'"message":\s*("(?:[^"\\]|\\.)*")', refusal)
    return str(json.loads(found.group(1))) if found else refusal
