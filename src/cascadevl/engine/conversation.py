"""Answers to conversations: many at once for evaluation, or one that goes on turn by turn."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from cascadevl.data.processor import CascadeVLProcessor, Conversation
from cascadevl.engine.boxes import TokenStream
from cascadevl.engine.draws import stream_of
from cascadevl.engine.engine import Engine
from cascadevl.engine.requests import Completion, EngineConfig, FinishReason, Request
from cascadevl.engine.sampling import SamplingParams
from cascadevl.errors import RequestError
from cascadevl.model.modeling import CascadeVLForConditionalGeneration
from cascadevl.model.routing import VisualBudget, budget_for, most_tokens
from cascadevl.model.v2pe import Increments, increment_of
from cascadevl.sequence import tokens_per_image
from cascadevl.types import Example


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a model said.

    Attributes:
        text: The answer, without control tokens and without the stop string that ended it.
        token_ids: Its tokens, the end-of-turn token excluded.
        finish_reason: How it ended: by itself or at a stop string, or at its limit of tokens.
        increments: Position step with which each picture of the question was read (V2PE).
        tokens_per_tile: Visual tokens of each tile of its pictures, as the router decided.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: Literal["stop", "length"]
    increments: tuple[float, ...] = ()
    tokens_per_tile: tuple[int, ...] = ()


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
    visual_budget: VisualBudget | None = None,
    config: EngineConfig | None = None,
) -> list[Answer]:
    """Answer prompts with an engine that is made for them; pictures are encoded once.

    Args:
        model: The model.
        processor: Its processor.
        prompts: Conversations, or examples of them from the processor.
        max_new_tokens: Longest answer.
        temperature: See `SamplingParams`, as for ``top_p`` and ``top_k``.
        top_p: See `SamplingParams`.
        top_k: See `SamplingParams`.
        seed: Of drawn tokens; None for another one each time. The stream of a prompt depends on
            this and its place alone.
        stop: Strings that end an answer, besides the template's and the checkpoint's ends.
        increments: Position step of visual tokens: one for all, or an entry for each prompt, with
            one for all its pictures or one for each. Where none is given, an example's own, or
            the configuration's: ``auto`` gives each prompt the largest that fits, so that it is
            answered in a batch as it is alone.
        visual_budget: Which tiles of each prompt are compressed, if the model has a router; the
            configuration's thresholds where none is given.
        config: How much may be held and done at once.

    Raises:
        DataError: If a conversation or a picture cannot be used.
        RequestError: If a prompt does not fit the trained context, or increments are not as many
            as prompts.
    """
    each = _for_prompts(increments, len(prompts))
    first = secrets.randbits(64) if seed is None else seed

    def request(place: int, prompt: Example | Conversation) -> Request:
        example = prompt if isinstance(prompt, Example) else processor.prompt(prompt)
        sampling = SamplingParams(
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=stream_of(first, place),
            max_tokens=max_new_tokens,
            stop=tuple(stop),
        )
        return Request(
            prompt=example,
            sampling=sampling,
            increments=each[place],
            visual_budget=visual_budget,
        )

    engine = Engine(model, processor, config)
    found = engine.generate(request(place, prompt) for place, prompt in enumerate(prompts))
    return [_answer(said) for (said,) in found]


def _answer(said: Completion) -> Answer:
    assert said.finish_reason != "cancelled", "nobody else holds this engine"
    return Answer(
        text=said.text,
        token_ids=said.token_ids,
        finish_reason=said.finish_reason,
        increments=said.increments,
        tokens_per_tile=said.tokens_per_tile,
    )


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


class AnswerStream(Iterator[str]):
    """One answer as it comes, piece by piece; when it has ended, it says how.

    A piece never ends within a character: bytes of an incomplete one wait for the next token.
    Text that may be the beginning of a stop string waits as well.

    Attributes:
        finish_reason: How the answer ended; None while it has not.
    """

    def __init__(self, tokens: TokenStream) -> None:
        """Bind the tokens of a request for one answer."""
        self.finish_reason: FinishReason | None = None
        self._tokens = tokens

    @property
    def increments(self) -> tuple[float, ...]:
        """Position step with which each picture was read (V2PE); waits for the router."""
        return self._tokens.prompt.increments

    @property
    def num_tiles(self) -> int:
        """Tiles of the conversation's pictures."""
        return len(self._tokens.prompt.tiles)

    @property
    def num_compressed(self) -> int:
        """Of them, those with fewer visual tokens than a full one; waits for the router."""
        return self._tokens.prompt.num_compressed

    @property
    def note(self) -> str:
        """Nothing: the answer stands for itself."""
        return ""

    def __next__(self) -> str:
        """The next piece; tokens that make no text certain give none."""
        for token in self._tokens:
            self.finish_reason = token.finish_reason
            if token.text:
                return token.text
        raise StopIteration

    def close(self) -> None:
        """Give the answer up; nothing more comes."""
        self._tokens.close()

    def answer(self) -> Answer:
        """Run to the end and give the answer as a whole.

        Raises:
            RequestError: If the answer was given up.
        """
        for _ in self:
            pass
        if not self._tokens.completions:
            raise RequestError("the answer was given up before its end; ask again")
        return _answer(self._tokens.completions[0])


@dataclass(kw_only=True, eq=False)
class Session:
    """One conversation that goes on turn by turn; a turn computes only what is new.

    The increment of its pictures is chosen when the first picture is shown and stays, so that what
    was read before can be used again. Where a turn no longer fits the trained context with it, the
    next smaller one that fits is taken and everything is read again; pictures are not encoded
    again. It never grows back before `reset`.

    Attributes:
        engine: Answers; it needs a processor, and may answer others too.
        sampling: How tokens are chosen and when an answer ends.
        increments: Position step of all pictures, or of each; the configuration's where not given.
        system: System message instead of the processor's.
        thinking: Whether to reason first; see `CascadeVLProcessor.prompt`.
        force_thinking: Whether the answer is begun so that it does, or does not.
        thinking_budget: Most tokens of reasoning; see `Request`.
        visual_budget: Which tiles are compressed, if the model has a router. It decides anew in
            every turn, for all tiles there are; where it decides otherwise, a turn is read anew.
    """

    engine: Engine
    sampling: SamplingParams = field(default_factory=SamplingParams)
    increments: Increments | None = None
    system: str | None = None
    thinking: bool | None = None
    force_thinking: bool = False
    thinking_budget: int | None = None
    visual_budget: VisualBudget | None = None

    def __post_init__(self) -> None:
        """Begin with nothing read."""
        self._answering: AnswerStream | None = None
        self.reset()

    def reset(self) -> None:
        """Forget the conversation, and the increment chosen for it."""
        self._chosen: float | None = None
        if self._answering is not None:
            self._answering.close()

    def ask(self, prompt: Example | Conversation) -> AnswerStream:
        """Answer the last turn of a conversation; an answer that still goes on is given up.

        What it has in common with earlier turns is found in the engine's pages.

        Args:
            prompt: The whole conversation so far, or an example of it from the processor.

        Raises:
            DataError: If a message or picture cannot be used.
            RequestError: If the conversation does not fit the trained context.
        """
        if self._answering is not None:
            self._answering.close()
        self._answering = AnswerStream(self.engine.stream(self.request(prompt)))
        return self._answering

    def request(self, prompt: Example | Conversation) -> Request:
        """What the engine is asked about the last turn of a conversation.

        Args:
            prompt: As for `ask`.

        Raises:
            DataError: If a message or picture cannot be used.
            RequestError: If the conversation does not fit the trained context.
        """
        example = prompt
        if not isinstance(example, Example):
            assert self.engine.processor is not None, "a session needs an engine with a processor"
            example = self.engine.processor.prompt(
                example,
                system=self.system,
                thinking=self.thinking,
                force_thinking=self.force_thinking,
            )
        return Request(
            prompt=example,
            sampling=self.sampling,
            increments=self._increments_for(example),
            visual_budget=self.visual_budget,
            thinking_budget=self.thinking_budget,
        )

    def _increments_for(self, example: Example) -> Increments | None:
        """Given ones, None for the example's own, or the one chosen for this conversation."""
        config, number = self.engine.model.config, len(example.tiles_per_image)
        if self.increments is not None or example.increments or not number:
            return self.increments
        budget = budget_for(config, self.visual_budget)
        most = most_tokens(config, example.num_tiles, budget)  # the router has not decided yet
        tokens = tokens_per_image(example.tiles_per_image, most)
        num_text = len(example.input_ids) - number
        largest = increment_of(config, num_text, tokens, self.sampling.max_tokens)
        self._chosen = largest if self._chosen is None else min(self._chosen, largest)
        return self._chosen
