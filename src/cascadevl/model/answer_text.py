"""The text of an answer that is being written, and when it has ended.

Tokens are not characters: one character may take several, a stop string may begin in one and end in
another, and some families reason in a channel of their own. What is handed out early never has to
be taken back.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from cascadevl.data.processor import CascadeVLProcessor
from cascadevl.errors import RequestError
from cascadevl.model.modeling import CascadeVLForConditionalGeneration

FinishReason: TypeAlias = Literal["stop", "length"]
"""How an answer ended: by the model or a stop string, or at the limit of its length."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a model said.

    Attributes:
        text: The answer, without control tokens and without the stop string that ended it.
        token_ids: Its tokens, the end-of-turn token excluded.
        finish_reason: How it ended.
        increments: Position step with which each picture of the question was read (V2PE).
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    increments: tuple[float, ...] = ()


@dataclass(slots=True, eq=False)
class AnswerWriter:
    """Turns the tokens of one answer into text and knows when it has ended."""

    model: CascadeVLForConditionalGeneration
    processor: CascadeVLProcessor
    max_new_tokens: int
    stop: tuple[str, ...]
    increments: tuple[float, ...] = ()  # of the question's pictures
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    given: str = ""  # what new_text has handed out
    ends: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what cannot end, or would end at once."""
        if self.max_new_tokens < 1:
            raise RequestError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")
        if "" in self.stop:
            raise RequestError("a stop string is empty, it would end every answer at once")
        config = self.model.generation_config
        self.ends = self.processor.stop_token_ids(None if config is None else config.eos_token_id)

    def take(self, token: int) -> None:
        """Take the next token."""
        if token in self.ends:
            self.finish_reason = "stop"
            return
        self.token_ids.append(token)
        if self.stop and self._stop_place(self._raw()) is not None:
            self.finish_reason = "stop"
        elif len(self.token_ids) == self.max_new_tokens:
            self.finish_reason = "length"

    def answer(self) -> Answer:
        """The whole answer."""
        assert self.finish_reason is not None, "the answer has not ended"
        return Answer(
            text=self._text(),
            token_ids=tuple(self.token_ids),
            finish_reason=self.finish_reason,
            increments=self.increments,
        )

    def new_text(self) -> str:
        """What is certain by now and was not handed out before."""
        text = self._text() if self.finish_reason is not None else self._certain_text()
        if not text.startswith(self.given):
            return ""
        piece, self.given = text[len(self.given) :], text
        return piece

    def _raw(self) -> str:
        return self.processor.decode(self.token_ids)

    def _stop_place(self, text: str) -> int | None:
        places = [place for each in self.stop if (place := text.find(each)) >= 0]
        return min(places, default=None)

    def _text(self) -> str:
        text = self.processor.decode(self.token_ids, skip_special_tokens=True)
        place = self._stop_place(text)
        return text if place is None else text[:place]

    def _certain_text(self) -> str:
        """The text so far without what the next token may still change."""
        if self.processor.template.reasoning is None:
            text = self.processor.decode(self.token_ids, skip_special_tokens=True)
        else:
            text = self._certain_channels(*self.processor.template.reasoning)
        text = text.rstrip("\ufffd")  # bytes of an incomplete character
        for marker in self.stop:
            text = _without_beginning(text, marker)
        return text

    def _certain_channels(self, opening: str, closing: str) -> str:
        """The same where reasoning has a channel of its own: no part of a change of channel."""
        template, raw = self.processor.template, self._raw()
        if opening.startswith(raw) or template.answer_open.startswith(raw):
            return ""
        change = closing + template.answer_open
        if change not in raw:
            raw = _without_beginning(raw, change)
        return self.processor.builder.control.sub("", template.read_answer(raw))


def _without_beginning(text: str, marker: str) -> str:
    """The text without an end that may be the beginning of the marker."""
    for length in range(min(len(marker) - 1, len(text)), 0, -1):
        if text.endswith(marker[:length]):
            return text[:-length]
    return text
