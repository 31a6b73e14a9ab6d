"""The nouns of the engine: what is asked, what comes back, and how much of it there may be.

Everything a caller of `cascadevl.engine.engine.Engine` sees is here. What a request asks of the
choice of tokens is in `cascadevl.engine.sampling.SamplingParams`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np
from jaxtyping import UInt8

from cascadevl.engine.sampling import SamplingParams
from cascadevl.errors import ConfigError, RequestError
from cascadevl.model.routing import VisualBudget
from cascadevl.model.v2pe import Increments
from cascadevl.types import Example, VisualFeatures

FinishReason: TypeAlias = Literal["stop", "length", "cancelled"]
"""How an answer ended: by a stop token or string, at its limit of tokens, or because it was called
off."""


@dataclass(frozen=True, slots=True)
class TextIds:
    """A stretch of text, as token ids; it holds no image-context token.

    The brackets ``<img>`` and ``</img>`` around a picture belong to the text.
    """

    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class ImageTiles:
    """One picture, cut into RGB tiles; the engine encodes it, or knows it already."""

    tiles: UInt8[np.ndarray, "tiles px px 3"]


@dataclass(frozen=True, slots=True, eq=False)
class ImageFeatures:
    """One picture whose visual tokens are made already.

    Attributes:
        groups: Its tiles in their order. Each group is a run of tiles, either as visual tokens,
            equally many each (a picture with full and compressed tiles has several groups), or as
            patch features with what the router thinks of them, to be routed by the budget.
    """

    groups: tuple[VisualFeatures, ...]


PromptPart: TypeAlias = TextIds | ImageTiles | ImageFeatures
"""A stretch of text, or a picture."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Request:
    """One prompt to be answered once or several times.

    Attributes:
        prompt: An example from the processor, or parts in their order.
        sampling: How tokens are chosen and when an answer ends.
        num_samples: Answers wanted. They share the prompt's pages; each has a random stream of
            its own, which depends on the seed and the number of the sample alone.
        increments: Position step of visual tokens (V2PE), one for all pictures or one for each;
            None for the example's own, or the one the model's configuration chooses.
        visual_budget: Which tiles are compressed, if the model has a router (InternVL3.5-Flash);
            None for the thresholds of its configuration.
        thinking_budget: Most tokens of reasoning: then its end is put in the model's mouth, and the
            answer goes on; None for no limit but that of the answer. An answer that does not reason
            is as without.
        stream: Whether `Engine.step` reports every token, or only how answers ended.
    """

    prompt: Example | tuple[PromptPart, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    num_samples: int = 1
    increments: Increments | None = None
    visual_budget: VisualBudget | None = None
    thinking_budget: int | None = None
    stream: bool = False

    def __post_init__(self) -> None:
        """Check what needs no model.

        Raises:
            RequestError: If no answer is wanted, the prompt is empty, or the budget of reasoning
                leaves no answer.
        """
        if self.num_samples < 1:
            raise RequestError(f"num_samples is {self.num_samples}; it must be at least 1")
        parts = self.prompt.input_ids if isinstance(self.prompt, Example) else self.prompt
        if len(parts) == 0:
            raise RequestError("the prompt is empty; an answer needs at least one token before it")
        if self.thinking_budget is not None:
            self._check_thinking(self.thinking_budget)

    def _check_thinking(self, budget: int) -> None:
        if budget < 0:
            raise RequestError(f"thinking_budget is {budget}; it must be 0 or more")
        if self.sampling.json_schema is not None:
            raise RequestError(
                "thinking_budget is given together with json_schema, but an answer in JSON does "
                "not reason; leave one of them out"
            )
        if budget >= self.sampling.max_tokens:
            raise RequestError(
                f"thinking_budget is {budget}, but the whole answer has at most "
                f"{self.sampling.max_tokens} tokens, which leaves none to say what it comes to; "
                f"ask for more tokens, or for less thinking"
            )

    @property
    def source(self) -> str:
        """Where the prompt comes from, for errors."""
        return self.prompt.source if isinstance(self.prompt, Example) else "the prompt"


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """What the model thought of one token.

    Attributes:
        chosen: Log-probability of the token that was taken, before temperature and filters.
        top: The most probable tokens and their log-probabilities, as many as were asked for.
    """

    chosen: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What an answer took.

    Attributes:
        prompt_tokens: Tokens of the prompt, visual ones included.
        visual_tokens: Visual tokens among them.
        cached_tokens: Tokens of the prompt whose keys and values were there already.
        completion_tokens: Tokens of the answer, a stop token included.
        tiles: Tiles of the prompt's pictures.
        compressed_tiles: Of them, those with fewer visual tokens than a full one.
    """

    prompt_tokens: int
    visual_tokens: int
    cached_tokens: int
    completion_tokens: int
    tiles: int = 0
    compressed_tiles: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenOutput:
    """One more token of a streamed answer.

    Attributes:
        request_id: Which request.
        sample: Which of its answers.
        token_id: The token; None where an answer ends without another one (cancelled).
        text: Text that has become certain with it: never a part of a character, of a stop string
            or of a control token.
        logprobs: What the model thought of the token, if the request asked.
        finish_reason: How the answer ended, or None while it goes on.
    """

    request_id: int
    sample: int
    token_id: int | None
    text: str
    logprobs: TokenLogprobs | None = None
    finish_reason: FinishReason | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One answer, complete.

    Attributes:
        request_id: Which request.
        sample: Which of its answers.
        text: The answer without control tokens and without the stop string that ended it; empty
            where the engine has no processor.
        token_ids: Its tokens, without the stop token that ended it.
        finish_reason: How it ended.
        usage: What it took.
        logprobs: What the model thought of each of ``token_ids``, if the request asked.
        increments: Position step with which each picture of the prompt was read (V2PE).
        end_token: The stop token that ended it, if one did.
        end_logprobs: What the model thought of that, if the request asked and the backend knows.
        tokens_per_tile: Visual tokens of each tile of the prompt, as the router decided.
    """

    request_id: int
    sample: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    logprobs: tuple[TokenLogprobs, ...] | None = None
    increments: tuple[float, ...] = ()
    end_token: int | None = None
    end_logprobs: TokenLogprobs | None = None
    tokens_per_tile: tuple[int, ...] = ()

    @property
    def drawn(self) -> tuple[int, ...]:
        """Every token that was drawn: ``token_ids``, and the stop token that ended them."""
        return self.token_ids if self.end_token is None else (*self.token_ids, self.end_token)


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step of the engine brought.

    Attributes:
        tokens: New tokens of streamed requests, in the order of arrival.
        completions: Answers that ended in this step, of all requests.
    """

    tokens: tuple[TokenOutput, ...]
    completions: tuple[Completion, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How much the engine may hold and do at once.

    Attributes:
        page_tokens: Tokens whose keys and values one page holds.
        cache_bytes: Memory for keys and values of all pages together; on a CPU it is taken as pages
            are first used.
        num_pages: Number of pages instead, whatever they weigh.
        max_running: Most answers computed at once; more wait.
        max_step_tokens: Most tokens of one step, decoded ones included; longer prompts are read in
            chunks, so that running answers go on meanwhile.
        max_step_tiles: Most tiles encoded in one step, for the same reason.
        feature_bytes: Memory for visual tokens that are kept for a next question; of a model with
            a router, for patch features.
        prefix_cache: Whether pages of ended requests are kept until their place is needed.
        batch_invariant: Compute every answer with the same operations whatever else runs, so that
            it is equal bit for bit; slower.
    """

    page_tokens: int = 16
    cache_bytes: int = 2**32
    num_pages: int | None = None
    max_running: int = 1024
    max_step_tokens: int = 2048
    max_step_tiles: int = 16
    feature_bytes: int = 2**28
    prefix_cache: bool = True
    batch_invariant: bool = False

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: If a limit is not positive.
        """
        for name in ("page_tokens", "cache_bytes", "max_running", "max_step_tokens"):
            self._at_least(name, 1)
        self._at_least("max_step_tiles", 1)
        self._at_least("feature_bytes", 0)
        if self.num_pages is not None:
            self._at_least("num_pages", 1)

    def _at_least(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if value < least:
            raise ConfigError(f"{name} is {value}; it must be at least {least}")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """What the engine holds, and has done since it was made.

    Attributes:
        waiting: Answers that wait for their turn, preempted ones included.
        running: Answers that are being computed.
        pages: Pages there are.
        free_pages: Pages that nobody uses, those kept for a next turn included.
        steps: Steps taken.
        prompt_tokens: Tokens of prompts that were computed.
        cached_tokens: Tokens of prompts that were found in the cache.
        decoded_tokens: Tokens of answers.
        preemptions: Answers that lost their pages and were computed again.
        encoded_tiles: Tiles that went through the vision tower.
        cached_tiles: Tiles whose visual tokens were found in the cache.
    """

    waiting: int
    running: int
    pages: int
    free_pages: int
    steps: int
    prompt_tokens: int
    cached_tokens: int
    decoded_tokens: int
    preemptions: int
    encoded_tiles: int
    cached_tiles: int
