"""Choosing the next token: greedy, or drawn, each request with a random stream of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from cascadevl.errors import RequestError


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        temperature: 0 takes the most probable token; above, logits are divided by it.
        top_p: Draw from the fewest tokens whose probabilities reach this sum.
        top_k: Draw from this many most probable tokens; 0 for all.
        seed: Of the requests' random streams; None for another one each time.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            RequestError: If a value means nothing.
        """
        if self.temperature < 0:
            raise RequestError(f"temperature is {self.temperature}; it must be 0 or more")
        if not 0 < self.top_p <= 1:
            raise RequestError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if self.top_k < 0:
            raise RequestError(f"top_k is {self.top_k}; it must be 0 (all) or more")

    def generator(self, request: int, device: torch.device) -> torch.Generator | None:
        """The random stream of one request, independent of all others; None if greedy."""
        if self.temperature == 0:
            return None
        generator = torch.Generator(device)
        if self.seed is None:
            generator.seed()
        else:
            words = np.random.SeedSequence([self.seed, request]).generate_state(2, np.uint32)
            generator.manual_seed(int(words[0]) << 32 | int(words[1]))
        return generator


def next_tokens(
    logits: Float[Tensor, "rows vocab"],
    sampling: Sampling,
    generators: Sequence[torch.Generator | None],
) -> Int64[Tensor, " rows"]:
    """The next token of every row.

    Args:
        logits: Logits of the next token.
        sampling: How to draw.
        generators: The random stream of every row.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    probabilities = filtered(logits, sampling)
    drawn = [
        torch.multinomial(row, 1, generator=generator)
        for row, generator in zip(probabilities, generators, strict=True)
    ]
    return torch.cat(drawn)


def filtered(
    logits: Float[Tensor, "rows vocab"], sampling: Sampling
) -> Float[Tensor, "rows vocab"]:
    """Probabilities after temperature, top-k, then top-p, as transformers orders them."""
    scores = logits.float() / sampling.temperature
    if 0 < sampling.top_k < scores.shape[-1]:
        least = scores.topk(sampling.top_k).values[:, -1:]
        scores = scores.masked_fill(scores < least, float("-inf"))
    probabilities = scores.softmax(-1)
    if sampling.top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True)
        surplus = ordered.cumsum(-1) - ordered >= sampling.top_p  # the sum was reached before
        dropped = torch.zeros_like(surplus).scatter(-1, order, surplus)
        probabilities = probabilities.masked_fill(dropped, 0.0)
    return probabilities / probabilities.sum(-1, keepdim=True)
