"""Answers of a model: many at once for evaluation, or one as a stream for a conversation.

The engine that serves many users is elsewhere; this is the simple way, exact and for one process.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from cascadevl.data.processor import CascadeVLProcessor, Conversation
from cascadevl.errors import RequestError
from cascadevl.model.answer_text import Answer, AnswerWriter, FinishReason
from cascadevl.model.conversation_cache import ConversationCache
from cascadevl.model.decoding import Decoder, Prompt, prepare, tokens_per_image
from cascadevl.model.modeling import CascadeVLForConditionalGeneration
from cascadevl.model.sampling import Sampling
from cascadevl.model.v2pe import Increments, increment_of
from cascadevl.types import Example

_WINDOW = 4  # batches whose prompts are prepared and sorted together


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
    increments: float | Sequence[Increments | None] | None = None,
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
        increments: Position step of visual tokens: one for all, or an entry for each prompt, with
            one for all its pictures or one for each. Where none is given, an example's own, or
            the configuration's: ``auto`` gives each prompt the largest that fits, so that it is
            answered in a batch as it is alone.
        max_rows: Most prompts answered together.
        max_batch_tokens: Most tokens, prompts and answers, computed together; a longer prompt is
            answered alone.

    Raises:
        DataError: If a conversation or a picture cannot be used.
        RequestError: If a prompt does not fit the trained context, or increments are not as many
            as prompts.
    """
    each = _for_prompts(increments, len(prompts))
    sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
    decoder = Decoder(model, sampling)
    answers: list[Answer] = []
    window = _WINDOW * max_rows  # examples hold their pixels: make a bounded number of them
    with _evaluating(model):
        for start in range(0, len(prompts), window):
            prepared = [
                prepare(model, _example(processor, prompt), number, max_new_tokens, each[number])
                for number, prompt in enumerate(prompts[start : start + window], start)
            ]
            writers = {
                prompt.number: AnswerWriter(
                    model, processor, max_new_tokens, tuple(stop), prompt.increments
                )
                for prompt in prepared
            }
            for batch in _batches(prepared, max_new_tokens, max_rows, max_batch_tokens):
                _answer_batch(decoder, batch, writers)
            answers += [writer.answer() for writer in writers.values()]
    return answers


def _for_prompts(
    increments: float | Sequence[Increments | None] | None, num_prompts: int
) -> Sequence[Increments | None]:
    """The increments given for each prompt."""
    if increments is None or isinstance(increments, int | float):
        return [increments] * num_prompts
    if len(increments) != num_prompts:
        raise RequestError(
            f"increments are given for {len(increments)} prompts, but {num_prompts} are asked; "
            f"give one number for all, or an entry for each prompt"
        )
    return increments


def _answer_batch(decoder: Decoder, batch: list[Prompt], writers: dict[int, AnswerWriter]) -> None:
    ended: set[int] = set()
    for number, token in decoder.tokens(batch, ended):
        writers[number].take(token)
        if writers[number].finish_reason is not None:
            ended.add(number)


class AnswerStream(Iterator[str]):
    """One answer as it comes, piece by piece; when it has ended, it says how.

    A piece never ends within a character: bytes of an incomplete one wait for the next token.
    Text that may be the beginning of a stop string waits as well.
    """

    def __init__(self, pieces: Iterator[str], writer: AnswerWriter) -> None:
        """Bind the pieces and what writes them."""
        self._pieces, self._writer = pieces, writer

    def __next__(self) -> str:
        """The next piece."""
        return next(self._pieces)

    @property
    def finish_reason(self) -> FinishReason | None:
        """How the answer ended; None while it has not."""
        return self._writer.finish_reason

    @property
    def increments(self) -> tuple[float, ...]:
        """Position step with which each picture was read (V2PE)."""
        return self._writer.increments

    def answer(self) -> Answer:
        """Run to the end and give the answer as a whole."""
        for _ in self._pieces:
            pass
        return self._writer.answer()


@dataclass(kw_only=True, eq=False)
class Session:
    """One conversation that goes on turn by turn; a turn computes only what is new.

    The increment of its pictures is chosen when the first picture is shown and stays, so that what
    was read before can be used again. Where a turn no longer fits the trained context with it, the
    next smaller one that fits is taken and everything is read again; pictures are not encoded
    again. It never grows back before `reset`.

    Attributes:
        model: The model; its weights must not change within a conversation.
        processor: Its processor.
        max_new_tokens: Longest answer.
        sampling: How tokens are drawn.
        stop: Strings that end an answer, besides the template's and the checkpoint's ends.
        increments: Position step of all pictures, or of each; the configuration's where not given.
        system: System message instead of the processor's.
        thinking: Whether to reason first; see `CascadeVLProcessor.prompt`.
    """

    model: CascadeVLForConditionalGeneration
    processor: CascadeVLProcessor
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop: Sequence[str] = ()
    increments: Increments | None = None
    system: str | None = None
    thinking: bool | None = None

    def __post_init__(self) -> None:
        """Begin with nothing read."""
        self.reset()

    def reset(self) -> None:
        """Forget the conversation, and the increment chosen for it."""
        self._chosen: float | None = None
        self._answering: Generator[str] | None = None
        self._cache = ConversationCache()
        self._decoder = Decoder(self.model, self.sampling)

    def ask(self, prompt: Example | Conversation) -> AnswerStream:
        """Answer the last turn of a conversation; an answer that still goes on is given up.

        What it has in common with the conversation of the last call is not computed again; a turn
        that was taken back or changed is.

        Args:
            prompt: The whole conversation so far, or an example of it from the processor.

        Raises:
            DataError: If a message or picture cannot be used.
            RequestError: If the conversation does not fit the trained context.
        """
        if self._answering is not None:
            self._answering.close()
        example = prompt
        if not isinstance(example, Example):
            example = self.processor.prompt(example, system=self.system, thinking=self.thinking)
        increments = self._increments_for(example)
        ready = prepare(self.model, example, 0, self.max_new_tokens, increments)
        writer = AnswerWriter(
            self.model, self.processor, self.max_new_tokens, tuple(self.stop), ready.increments
        )
        self._answering = self._pieces(ready, writer)
        return AnswerStream(self._answering, writer)

    def _increments_for(self, example: Example) -> Increments | None:
        """Given ones, None for the example's own, or the one chosen for this conversation."""
        tokens = tokens_per_image(self.model, example)
        if self.increments is not None or example.increments or not tokens:
            return self.increments
        num_text = len(example.input_ids) - len(tokens)
        largest = increment_of(self.model.config, num_text, tokens, self.max_new_tokens)
        self._chosen = largest if self._chosen is None else min(self._chosen, largest)
        return self._chosen

    def _pieces(self, prompt: Prompt, writer: AnswerWriter) -> Generator[str]:
        ended: set[int] = set()
        with _evaluating(self.model):
            rows = self._cache.read(prompt, self._decoder)
            for _, token in self._decoder.follow(rows, ended):
                self._cache.add(token)
                writer.take(token)
                if writer.finish_reason is not None:
                    ended.add(0)
                if piece := writer.new_text():
                    yield piece


def stream(
    model: CascadeVLForConditionalGeneration,
    processor: CascadeVLProcessor,
    prompt: Example | Conversation,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int | None = None,
    stop: Sequence[str] = (),
    increments: Increments | None = None,
    system: str | None = None,
    thinking: bool | None = None,
) -> AnswerStream:
    """Answer one conversation, giving the text as it comes; `Session` is for several turns.

    Args:
        model: The model.
        processor: Its processor.
        prompt: The conversation, or an example of it from the processor.
        max_new_tokens: Longest answer.
        temperature: See `Sampling`, as for ``top_p`` and ``top_k``.
        top_p: See `Sampling`.
        top_k: See `Sampling`.
        seed: Of drawn tokens.
        stop: Strings that end the answer, besides the template's and the checkpoint's ends.
        increments: Position step of all pictures, or of each; the example's own or the
            configuration's where not given.
        system: System message instead of the processor's; an example has its own.
        thinking: Whether to reason first; see `CascadeVLProcessor.prompt`.

    Raises:
        DataError: If a message or picture cannot be used.
        RequestError: If the conversation does not fit the trained context.
    """
    session = Session(
        model=model,
        processor=processor,
        max_new_tokens=max_new_tokens,
        sampling=Sampling(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed),
        stop=stop,
        increments=increments,
        system=system,
        thinking=thinking,
    )
    return session.ask(prompt)


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
    order = sorted(
        prompts, key=lambda p: (sum(map(len, p.tiles)), p.pictures, p.num_tokens, p.number)
    )
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
