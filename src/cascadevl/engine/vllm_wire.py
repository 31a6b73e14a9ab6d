"""What goes to a vLLM server and what comes back, as JSON: requests, choices, streamed choices."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from cascadevl.engine.requests import FinishReason, Request, TokenLogprobs

_SEEDS = 2**62  # vLLM's seeds are signed 64-bit numbers, and it adds the number of the sample

_ID = "token_id:"  # how vLLM writes a token where its number is asked for


class UnknownAnswer(Exception):
    """A server answered, but not as vLLM does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One answer, or a stretch of one that is streamed.

    Attributes:
        index: Which of the answers of a request.
        token_ids: Its tokens, a stop token included.
        finish_reason: How it ended; None while it goes on.
        logprobs: What the model thought of each token; empty if that was not asked for.
    """

    index: int
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    logprobs: tuple[TokenLogprobs, ...]


def payload(embeds: Float[Tensor, "tokens hidden"]) -> str:
    """Embeddings as vLLM takes them: base64 of what ``torch.save`` writes."""
    file = io.BytesIO()
    torch.save(embeds.detach().cpu().clone(), file)  # a view would be saved with all it views
    return base64.b64encode(file.getvalue()).decode()


def request_body(
    request: Request,
    embeds: Float[Tensor, "tokens hidden"],
    *,
    served_model: str,
    stop_token_ids: Sequence[int],
) -> dict[str, Any]:
    """A request for the completions API; several samples send the prompt once.

    Args:
        request: What is asked.
        embeds: Its prompt.
        served_model: The model's name as the server knows it.
        stop_token_ids: All tokens that end an answer.
    """
    sampling = request.sampling
    body: dict[str, Any] = {
        "model": served_model,
        "prompt_embeds": payload(embeds),
        # vLLM refuses several greedy samples; they are all the same.
        "n": request.num_samples if sampling.temperature > 0 else 1,
        "max_tokens": sampling.max_tokens,
        "min_tokens": sampling.min_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "seed": sampling.seed % _SEEDS,
        "stop": list(sampling.stop),
        "stop_token_ids": list(stop_token_ids),
        "ignore_eos": sampling.ignore_eos,
        "return_token_ids": True,
    }
    if sampling.logprobs is not None:
        body |= {"logprobs": sampling.logprobs, "return_tokens_as_token_ids": True}
    if sampling.json_schema is not None:
        body["structured_outputs"] = {"json": json.loads(sampling.json_schema)}
    return body


def read_choices(content: str | bytes, *, num_top: int) -> tuple[tuple[Choice, ...], int]:
    """The choices of an answer or of an event of a stream, and the cached tokens of the prompt.

    Args:
        content: JSON.
        num_top: How many most probable tokens were asked for; vLLM adds the chosen one to them.

    Raises:
        UnknownAnswer: If the server did not answer as vLLM does.
    """
    try:
        values = json.loads(content)
        if "error" in values:
            raise UnknownAnswer(f"it says {json.dumps(values['error'])[:300]}")
        usage = values.get("usage") or {}
        details = usage.get("prompt_tokens_details") or {}
        choices = tuple(_choice(each, num_top) for each in values["choices"])
        return choices, int(details.get("cached_tokens") or 0)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise UnknownAnswer(f"{error!r} in {content[:200]!r}") from error


def _choice(values: dict[str, Any], num_top: int) -> Choice:
    finish = values["finish_reason"]
    if finish not in (None, "stop", "length"):
        raise UnknownAnswer(f"an answer ended with {finish!r}")
    return Choice(
        index=int(values["index"]),
        token_ids=tuple(map(int, values["token_ids"] or ())),
        finish_reason=finish,
        logprobs=_logprobs(values.get("logprobs"), num_top),
    )


def _logprobs(values: dict[str, Any] | None, num_top: int) -> tuple[TokenLogprobs, ...]:
    if values is None:
        return ()
    chosen, top = values["token_logprobs"], values["top_logprobs"]
    return tuple(
        TokenLogprobs(float(each), _most_probable(others or {})[:num_top])
        for each, others in zip(chosen, top, strict=True)
    )


def _most_probable(others: dict[str, float]) -> tuple[tuple[int, float], ...]:
    pairs = [(int(name.removeprefix(_ID)), float(value)) for name, value in others.items()]
    return tuple(sorted(pairs, key=lambda pair: -pair[1]))
