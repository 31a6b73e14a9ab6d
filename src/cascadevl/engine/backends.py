"""Whatever answers requests: our engine, transformers' `generate`, or a server of another program.

Callers (offline inference, rollouts, servers) know backends only through this Protocol. What a
backend cannot do it says beforehand, and refuses with a word on what to do; it never does
something else instead.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias, runtime_checkable

from torch import Tensor

from cascadevl.data.processor import CascadeVLProcessor
from cascadevl.engine.prompts import Prompt
from cascadevl.engine.requests import Completion, Request, TokenLogprobs, TokenOutput, Usage
from cascadevl.engine.stops import AnswerText, end_ids
from cascadevl.errors import RequestError
from cascadevl.model.modeling import CascadeVLForConditionalGeneration

Outcome: TypeAlias = "tuple[int, tuple[Completion, ...] | RequestError]"
"""Number of a request, and all its answers, or why it alone cannot be answered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What a backend can do beyond answering.

    Attributes:
        increments: Visual tokens may step by less than one position (V2PE).
        logprobs: Log-probabilities come with the tokens.
        constrained: Answers can be made to follow a JSON schema.
        weight_refresh: New weights are taken in without starting again.
        thinking_budget: Reasoning can be ended after so many tokens.
    """

    increments: bool
    logprobs: bool
    constrained: bool
    weight_refresh: bool
    thinking_budget: bool = False


@runtime_checkable
class Backend(Protocol):
    """Requests in, completions out."""

    @property
    def capabilities(self) -> Capabilities:
        """What it can do beyond answering."""
        ...

    def answer(self, requests: Iterable[Request]) -> Iterator[Outcome]:
        """Answer requests, in the order in which they are done.

        Requests are taken as there is room for them, so that a long row of them never stands in
        memory as a whole.

        Args:
            requests: What is asked; numbered from 0 in this order.

        Raises:
            RequestError: If nothing can be answered any more, as when a server is gone. What is
                wrong with one request comes as its outcome instead.
        """
        ...

    def stream(self, request: Request) -> AsyncIterator[TokenOutput]:
        """Answer one request token by token; closing the iterator calls the request off.

        Args:
            request: What is asked.

        Raises:
            RequestError: If it cannot be answered.
        """
        ...

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take in new weights.

        Args:
            state: Tensors by the names of `CascadeVLForConditionalGeneration.state_dict`.

        Raises:
            CheckpointError: If names or shapes differ from the model's; then nothing has changed.
            RequestError: If this backend cannot (`Capabilities.weight_refresh`).
        """
        ...


def check_wishes(request: Request, capabilities: Capabilities, backend: str) -> None:
    """Refuse what a backend cannot do.

    Args:
        request: What is asked.
        capabilities: What the backend can do.
        backend: Its name, for the error.

    Raises:
        RequestError: If the request asks for something else.
    """
    sampling = request.sampling
    if sampling.logprobs is not None and not capabilities.logprobs:
        raise RequestError(f"logprobs are asked for, but {backend} gives none")
    if sampling.json_schema is not None and not capabilities.constrained:
        raise RequestError(
            f"json_schema is given, but {backend} cannot constrain answers; use the engine"
        )
    if request.thinking_budget is not None and not capabilities.thinking_budget:
        raise RequestError(
            f"thinking_budget is given, but {backend} cannot end reasoning; use the engine"
        )


def generate(backend: Backend, requests: Sequence[Request]) -> list[tuple[Completion, ...]]:
    """All answers of all requests, in order.

    Args:
        backend: Who answers.
        requests: What is asked.

    Raises:
        RequestError: If one of them cannot be answered.
    """
    found: dict[int, tuple[Completion, ...]] = {}
    for number, outcome in backend.answer(requests):
        if isinstance(outcome, RequestError):
            raise outcome
        found[number] = outcome
    return [found[number] for number in range(len(requests))]


def ends_of(
    model: CascadeVLForConditionalGeneration, processor: CascadeVLProcessor, request: Request
) -> tuple[int, ...]:
    """Tokens that end the answers to a request.

    Args:
        model: Its generation settings name some.
        processor: Its template names others.
        request: May name more, or ask to ignore those.
    """
    config = model.generation_config
    eos = None if config is None else config.eos_token_id
    return end_ids(processor, request.sampling, eos)


def completion(
    text: AnswerText,
    request: Request,
    prompt: Prompt,
    number: int,
    sample: int,
    *,
    cached_tokens: int = 0,
    logprobs: tuple[TokenLogprobs, ...] | None = None,
) -> Completion:
    """One answer, from its text.

    Args:
        text: Has come to an end.
        request: What was asked.
        prompt: Its prompt.
        number: Of the request.
        sample: Of the answer.
        cached_tokens: Tokens of the prompt that were known already.
        logprobs: What the model thought of each token.
    """
    assert text.finish_reason is not None, "the answer has not ended"
    return Completion(
        request_id=number,
        sample=sample,
        text=text.text,
        token_ids=tuple(text.token_ids),
        finish_reason=text.finish_reason,
        usage=Usage(
            prompt_tokens=len(prompt.tokens),
            visual_tokens=prompt.num_visual,
            cached_tokens=cached_tokens,
            completion_tokens=len(text.token_ids) + isinstance(text.ended_by, int),
            tiles=len(prompt.tiles),
            compressed_tiles=prompt.num_compressed,
        ),
        logprobs=logprobs if request.sampling.logprobs is not None else None,
        increments=prompt.increments,
        end_token=text.ended_by if isinstance(text.ended_by, int) else None,
        tokens_per_tile=prompt.tokens_per_tile,
    )
