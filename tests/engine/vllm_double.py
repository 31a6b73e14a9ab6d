"""A stand-in for a vLLM server: a real HTTP server in front of plain transformers' text model.

It takes what vLLM takes (``prompt_embeds``, unpickled with ``weights_only``), refuses what vLLM
refuses, and answers in vLLM's form, so that the tests need no vLLM. The slow test holds the same
backend against the real one.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tests.eval.chat_server import Answered, Body, ChatServer, chat_server
from torch import Tensor
from transformers import AutoModelForCausalLM

from cascadevl.model.language_export import export_language

Choices = list[dict[str, Any]]


def refused(problem: str) -> Answered:
    return Answered({"error": {"message": problem, "code": 400}}, status=400)


class TextModel:
    """The language half alone, behind vLLM's completions."""

    def __init__(self, checkpoint: Path, folder: Path, *, max_model_len: int = 400) -> None:
        export_language(checkpoint, folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
        self.max_model_len = max_model_len

    def __call__(self, body: Body) -> Answered:
        if "prompt_embeds" not in body or "prompt" in body:
            return refused("Either prompt or prompt_embeds must be provided")
        embeds = torch.load(io.BytesIO(base64.b64decode(body["prompt_embeds"])), weights_only=True)
        if embeds.shape[1] != self.model.config.hidden_size:
            return refused(f"`prompt_embeds` hidden_size {embeds.shape[1]} does not match")
        if len(embeds) + body["max_tokens"] > self.max_model_len:
            return refused(f"maximum context length is {self.max_model_len} tokens")
        if body["temperature"] == 0 and body["n"] > 1:
            return refused("n must be 1 when using greedy sampling")
        choices = [self.choice(body, embeds, index) for index in range(body["n"])]
        usage = {"prompt_tokens": len(embeds), "prompt_tokens_details": {"cached_tokens": 16}}
        if body.get("stream"):
            return Answered(b"".join(event(each) for each in pieces(choices)) + DONE)
        return Answered({"object": "text_completion", "choices": choices, "usage": usage})

    @torch.inference_mode()
    def choice(self, body: Body, embeds: Tensor, index: int) -> dict[str, Any]:
        """One answer; drawn ones from torch's generator, seeded as vLLM seeds several samples."""
        generator = torch.Generator().manual_seed(body["seed"] + index)
        tokens: list[int] = []
        logprobs: dict[str, list[Any]] = {"token_logprobs": [], "top_logprobs": []}
        row, cache, finish = embeds[None], None, "length"
        while len(tokens) < body["max_tokens"]:
            made = self.model(inputs_embeds=row, past_key_values=cache, use_cache=True)
            cache, scores = made.past_key_values, made.logits[0, -1].float()
            token = int(scores.argmax())
            if body["temperature"] > 0:
                weights = (scores / body["temperature"]).softmax(-1)
                token = int(torch.multinomial(weights, 1, generator=generator))
            tokens.append(token)
            if body.get("logprobs") is not None:
                assert body["return_tokens_as_token_ids"]
                note(logprobs, scores.log_softmax(-1), token, body["logprobs"])
            if token in body["stop_token_ids"]:
                finish = "stop"
                break
            row = self.model.get_input_embeddings()(torch.tensor([[token]]))
        return {
            "index": index,
            "text": "decoded by somebody else",
            "token_ids": tokens,
            "finish_reason": finish,
            "stop_reason": None,
            "logprobs": logprobs if body.get("logprobs") is not None else None,
        }


DONE = b"data: [DONE]\n\n"


def event(values: object) -> bytes:
    return b"data: " + json.dumps(values).encode() + b"\n\n"


def note(logprobs: dict[str, list[Any]], scores: Tensor, token: int, count: int) -> None:
    top = scores.topk(count).indices.tolist()
    logprobs["token_logprobs"].append(float(scores[token]))
    logprobs["top_logprobs"].append(
        {f"token_id:{each}": float(scores[each]) for each in {token, *top}}
    )


def pieces(choices: Choices) -> Iterator[dict[str, Any]]:
    """A stream: the answers grow in turn, two tokens an event; the last says how it ended."""
    longest = max(len(choice["token_ids"]) for choice in choices)
    for start in range(0, longest, 2):
        for choice in choices:
            tokens = choice["token_ids"][start : start + 2]
            ends = start + 2 >= len(choice["token_ids"])
            thoughts = choice["logprobs"] and {
                name: values[start : start + 2] for name, values in choice["logprobs"].items()
            }
            if tokens:
                finish = choice["finish_reason"] if ends else None
                piece = {"token_ids": tokens, "finish_reason": finish, "logprobs": thoughts}
                yield {"choices": [{**choice, **piece}]}
    yield {"choices": [], "usage": {"prompt_tokens": 1}}


@contextmanager
def vllm_double(
    answer: Callable[[Body], Answered],
    models: tuple[str, ...] = ("text",),
    max_model_len: int | None = None,
) -> Iterator[ChatServer]:
    """Run the server while the context lasts."""
    listed = [{"id": name, "object": "model"} for name in models]
    for each in listed if max_model_len is not None else ():
        each["max_model_len"] = max_model_len
    with chat_server(answer, listed) as server:
        yield server
