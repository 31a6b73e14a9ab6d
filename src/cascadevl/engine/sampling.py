"""What a request may ask of sampling, checked where it enters."""

from __future__ import annotations

import math
from dataclasses import dataclass

from cascadevl.errors import RequestError

_SEEDS = 2**64


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How the tokens of a request are chosen, and when its answer ends.

    Attributes:
        temperature: 0 takes the most probable token; above, logits are divided by it.
        top_p: Draw from the most probable tokens that together reach this probability.
        top_k: Draw from this many most probable tokens; 0 for all.
        min_p: Draw from tokens at least this fraction as probable as the most probable one.
        repetition_penalty: Above 1, tokens of the prompt and the answer become less likely.
        seed: Of the request's random stream; the same seed gives the same draws, whatever else
            runs beside the request.
        max_tokens: Most tokens of the answer.
        min_tokens: Stop tokens are not drawn and stop strings not heeded before so many tokens.
        stop: The answer ends before the first of these strings.
        stop_token_ids: Tokens that end the answer, beside those of the model.
        ignore_eos: Go on past the model's own stop tokens, for measurements.
        logprobs: None for no log-probabilities, 0 for those of the chosen tokens, n for those of
            the n most probable tokens too.
        json_schema: Schema, as JSON text, that the answer is made to follow.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    max_tokens: int = 256
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    json_schema: str | None = None

    def __post_init__(self) -> None:
        """Check the ranges, and that no two wishes exclude each other.

        Raises:
            RequestError: If a value means nothing; says which, and what may stand there.
        """
        self._check_drawing()
        self._check_ending()

    def _check_drawing(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise RequestError(
                f"temperature is {self.temperature}; it must be a number of 0 (greedy) or more"
            )
        if not 0 < self.top_p <= 1:
            raise RequestError(f"top_p is {self.top_p}; it must be above 0 and at most 1 (off)")
        if self.top_k < 0:
            raise RequestError(f"top_k is {self.top_k}; it must be 0 (off) or more")
        if not 0 <= self.min_p <= 1:
            raise RequestError(f"min_p is {self.min_p}; it must be from 0 (off) to 1")
        if not 0 < self.repetition_penalty < math.inf:
            raise RequestError(
                f"repetition_penalty is {self.repetition_penalty}; it must be above 0, 1 is off"
            )
        if not 0 <= self.seed < _SEEDS:
            raise RequestError(f"seed is {self.seed}; it must be from 0 to 2**64 - 1")
        if self.logprobs is not None and self.logprobs < 0:
            raise RequestError(
                f"logprobs is {self.logprobs}; it must be 0 (chosen tokens only) or more, or absent"
            )

    def _check_ending(self) -> None:
        if self.max_tokens < 1:
            raise RequestError(f"max_tokens is {self.max_tokens}; it must be at least 1")
        if not 0 <= self.min_tokens <= self.max_tokens:
            raise RequestError(
                f"min_tokens is {self.min_tokens}; it must be from 0 to max_tokens, which is "
                f"{self.max_tokens}"
            )
        if "" in self.stop:
            raise RequestError(
                f"a stop string is empty, it would end every answer at once; leave it out of "
                f"{list(self.stop)}"
            )
        if min(self.stop_token_ids, default=0) < 0:
            raise RequestError(
                f"stop_token_ids holds {min(self.stop_token_ids)}; ids of tokens are 0 or more"
            )
        if self.json_schema is not None and (self.min_tokens or self.ignore_eos):
            raise RequestError(
                f"json_schema is given with min_tokens {self.min_tokens} and ignore_eos "
                f"{self.ignore_eos}, but an answer ends where its JSON does; leave both out"
            )
