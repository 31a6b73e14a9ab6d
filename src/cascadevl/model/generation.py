"""Answers of a model: many at once for evaluation, or one as a stream for a conversation.

The engine that serves many users is elsewhere; this is the simple way, exact and without state.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from cascadevl.data.processor import CascadeVLProcessor, Conversation
from cascadevl.errors import RequestError
from cascadevl.model.decoding import Decoder, Prompt, prepare
from cascadevl.model.modeling import CascadeVLForConditionalGeneration
from cascadevl.model.sampling import Sampling
from cascadevl.types import Example

_WINDOW = 4  # batches whose prompts are prepared and sorted together

FinishReason: TypeAlias = Literal["stop", "length"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a model said.

    Attributes:
        text: The answer, without control tokens and without the stop string that ended it.
        token_ids: Its tokens, the end-of-turn token excluded.
        finish_reason: ``"stop"`` if the model or a stop string ended it, ``"length"`` if it
            reached the limit.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason


def answer(
    model: CascadeVLForConditionalGeneration,
    processor: CascadeVLProcessor,
    prompts: Sequence[Example | Conversation],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int | None = None,
    stop: Sequence[str] = (),
    increment: float | None = None,
    max_rows: int = 64,
    max_batch_tokens: int = 16384,
) -> list[Answer]:
    """Answer prompts in batches; pictures that several prompts show are encoded once a batch.

    Args:
        model: The model.
        processor: Its processor.
        prompts: Conversations, or examples of them from the processor.
        max_new_tokens: Longest answer.
        temperature: See `Sampling`, as for ``top_p`` and ``top_k``.
        top_p: See `Sampling`.
        top_k: See `Sampling`.
        seed: Of drawn tokens. The stream of a prompt depends on this and its place alone.
        stop: Strings that end an answer, besides the template's and the checkpoint's ends.
        increment: Position step of visual tokens; the configuration's where not given.
        max_rows: Most prompts answered together.
        max_batch_tokens: Most tokens, prompts and answers, computed together; a longer prompt is
            answered alone.

    Raises:
        DataError: If a conversation or a picture cannot be used.
        RequestError: If a prompt does not fit the trained context.
    """
    sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
    decoder = Decoder(model, sampling)
    answers: list[Answer] = []
    window = _WINDOW * max_rows  # examples hold their pixels: make a bounded number of them
    with _evaluating(model):
        for start in range(0, len(prompts), window):
            prepared = [
                prepare(model, _example(processor, prompt), number, max_new_tokens, increment)
                for number, prompt in enumerate(prompts[start : start + window], start)
            ]
            writers = {
                prompt.number: _Writer(model, processor, max_new_tokens, tuple(stop))
                for prompt in prepared
            }
            for batch in _batches(prepared, max_new_tokens, max_rows, max_batch_tokens):
                _answer_batch(decoder, batch, writers)
            answers += [writer.answer() for writer in writers.values()]
    return answers


def _answer_batch(decoder: Decoder, batch: list[Prompt], writers: dict[int, _Writer]) -> None:
    ended: set[int] = set()
    for number, token in decoder.tokens(batch, ended):
        writers[number].take(token)
        if writers[number].finish_reason is not None:
            ended.add(number)


def stream(
    model: CascadeVLForConditionalGeneration,
    processor: CascadeVLProcessor,
    messages: Conversation,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int | None = None,
    stop: Sequence[str] = (),
    increment: float | None = None,
    system: str | None = None,
    thinking: bool | None = None,
) -> Iterator[str]:
    """Answer one conversation, giving the text as it comes.

    A piece never ends within a character: bytes of an incomplete one wait for the next token.
    Text that may be the beginning of a stop string waits as well.

    Args:
        model: The model.
        processor: Its processor.
        messages: The conversation.
        max_new_tokens: Longest answer.
        temperature: See `Sampling`, as for ``top_p`` and ``top_k``.
        top_p: See `Sampling`.
        top_k: See `Sampling`.
        seed: Of drawn tokens.
        stop: Strings that end the answer, besides the template's and the checkpoint's ends.
        increment: Position step of visual tokens; the configuration's where not given.
        system: System message instead of the processor's.
        thinking: Whether to reason first; see `CascadeVLProcessor.prompt`.

    Raises:
        DataError: If a message or picture cannot be used.
        RequestError: If the conversation does not fit the trained context.
    """
    sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
    example = processor.prompt(messages, system=system, thinking=thinking)
    prompt = prepare(model, example, 0, max_new_tokens, increment)
    writer = _Writer(model, processor, max_new_tokens, tuple(stop))
    ended: set[int] = set()
    with _evaluating(model):
        for _, token in Decoder(model, sampling).tokens([prompt], ended):
            writer.take(token)
            if writer.finish_reason is not None:
                ended.add(0)
            if piece := writer.new_text():
                yield piece


def _example(processor: CascadeVLProcessor, prompt: Example | Conversation) -> Example:
    return prompt if isinstance(prompt, Example) else processor.prompt(prompt)


@contextmanager
def _evaluating(model: CascadeVLForConditionalGeneration) -> Iterator[None]:
    """Evaluation mode inside, the mode it had afterwards."""
    was_training = model.training
    model.train(False)
    try:
        yield
    finally:
        model.train(was_training)


def _batches(
    prompts: Sequence[Prompt], max_new_tokens: int, max_rows: int, max_tokens: int
) -> Iterator[list[Prompt]]:
    """Prompts of similar length together, and those about the same pictures side by side."""
    order = sorted(prompts, key=lambda p: (len(p.tiles), p.images, p.num_tokens, p.number))
    batch: list[Prompt] = []
    for prompt in order:
        longest = max([p.num_tokens for p in batch], default=0)
        tokens = (max(longest, prompt.num_tokens) + max_new_tokens) * (len(batch) + 1)
        if batch and (len(batch) == max_rows or tokens > max_tokens):
            yield batch
            batch = []
        batch.append(prompt)
    if batch:
        yield batch


@dataclass(slots=True, eq=False)
class _Writer:
    """Turns the tokens of one answer into text and knows when it has ended."""

    model: CascadeVLForConditionalGeneration
    processor: CascadeVLProcessor
    max_new_tokens: int
    stop: tuple[str, ...]
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    given: str = ""  # what new_text has handed out
    ends: tuple[int, ...] = ()

    def __post_init__(self) -> None:
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
