"""The client of bench_serving.py: requests that do not wait for each other, timed token by token.

Every event of a token is seen, also where its text is not certain yet, because log-probabilities
are asked for. Bodies are made before anything is timed; each has a picture of its own, so that no
feature is found in a cache.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import PIL.Image

NAME = "bench"
"""What servers call the model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What a request asks.

    Attributes:
        resolution_px: Side of its picture; 0 for none.
        new_tokens: Tokens of the answer.
        seed: Of its picture and its words.
        visual_budget: Of a model with a router; None for one without.
        temperature: 0 for greedy.
    """

    resolution_px: int
    new_tokens: int
    seed: int
    visual_budget: float | str | None = None
    temperature: float = 0.0

    def body(self) -> bytes:
        """The body of the request."""
        words = random.Random(self.seed).sample(_WORDS, len(_WORDS))
        content: list[dict[str, Any]] = [{"type": "text", "text": " ".join(words)}]
        if self.resolution_px:
            content.insert(0, {"type": "image_url", "image_url": {"url": self._picture()}})
        values: dict[str, Any] = {
            "model": NAME,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": self.new_tokens,
            "temperature": self.temperature,
            "seed": self.seed,
            "stream": True,
            "stream_options": {"include_usage": True},
            "logprobs": True,
            "ignore_eos": True,
        }
        if self.visual_budget is not None:
            values["visual_budget"] = self.visual_budget
        return json.dumps(values).encode()

    def _picture(self) -> str:
        """A picture of soft colours, about as large as a photo when compressed."""
        noise = np.random.default_rng(self.seed).integers(0, 255, (24, 24, 3), dtype=np.uint8)
        side = (self.resolution_px, self.resolution_px)
        buffer = io.BytesIO()
        PIL.Image.fromarray(noise).resize(side, PIL.Image.Resampling.BICUBIC).save(buffer, "jpeg")
        return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


_WORDS = (
    "what",
    "does",
    "this",
    "picture",
    "show",
    "and",
    "where",
    "is",
    "the",
    "small",
    "red",
    "one",
)


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of a request.

    Attributes:
        sent_s: When it was sent.
        token_s: When each token came.
        ends: Events that said that the answer has ended.
        text: Of the answer.
        usage: As the server says it.
        problem: Why there is no answer.
    """

    sent_s: float
    token_s: tuple[float, ...] = ()
    ends: int = 0
    text: str = ""
    usage: dict[str, Any] | None = None
    problem: str | None = None


async def ask(address: str, body: bytes, *, leave_after: int | None = None) -> Answer:
    """Ask one server once.

    Args:
        address: Of the server, as ``http://127.0.0.1:8000/v1``.
        body: Of the request.
        leave_after: Close the connection after so many tokens.
    """
    parts = urlsplit(address)
    sent = time.perf_counter()
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port, limit=2**22)
    try:
        head = f"POST {parts.path}/chat/completions HTTP/1.1\r\nHost: {parts.netloc}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        writer.write(f"{head}Connection: close\r\n\r\n".encode() + body)
        await writer.drain()
        status = (await reader.readline()).decode()
        if " 200 " not in status:
            rest = (await reader.read()).decode("utf-8", "replace")
            return Answer(sent, problem=f"{status.strip()}: {rest[-300:]}")
        return await _read(reader, sent, leave_after)
    except (OSError, ValueError) as error:
        return Answer(sent, problem=repr(error))
    finally:
        writer.close()


async def _read(reader: asyncio.StreamReader, sent: float, leave_after: int | None) -> Answer:
    times: list[float] = []
    text, ends, usage = "", 0, None
    async for line in reader:
        if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
            continue
        event = json.loads(line[6:])
        if "error" in event:
            return Answer(sent, tuple(times), ends, text, problem=str(event["error"]))
        usage = event.get("usage") or usage
        for choice in event["choices"]:
            if choice.get("logprobs"):
                times.append(time.perf_counter())
            text += choice["delta"].get("content") or ""
            ends += choice.get("finish_reason") is not None
        if leave_after is not None and len(times) >= leave_after:
            break
    return Answer(sent, tuple(times), ends, text, usage)


async def open_loop(address: str, bodies: Sequence[bytes], rate: float, seed: int) -> list[Answer]:
    """Send requests at random times (Poisson), whatever has been answered.

    Args:
        address: Of the server.
        bodies: Of the requests.
        rate: Requests a second; 0 for all at once.
        seed: Of the times.
    """
    chance = random.Random(seed)
    due = time.perf_counter()
    asked = []
    for body in bodies:
        due += chance.expovariate(1.0) / rate if rate else 0.0
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        asked.append(asyncio.create_task(ask(address, body)))
    return list(await asyncio.gather(*asked))


@dataclass(frozen=True, slots=True)
class Summary:
    """What a run of requests was like.

    Attributes:
        requests_per_s: Requests over the time from the first one sent to the last end.
        first_s: 50, 95 and 99 % of the times to the first token.
        next_s: The same of the times from token to token.
        compressed_share: Share of tiles that were compressed.
    """

    requests_per_s: float
    first_s: tuple[float, float, float]
    next_s: tuple[float, float, float]
    compressed_share: float


def summary(answers: Sequence[Answer], new_tokens: int) -> Summary:
    """Put answers together; every one must be whole.

    Args:
        answers: Of a run.
        new_tokens: That each was to have.
    """
    for answer in answers:
        assert answer.problem is None, answer.problem
        assert len(answer.token_s) == new_tokens, (len(answer.token_s), new_tokens)
        assert answer.ends == 1
    taken = max(a.token_s[-1] for a in answers) - min(a.sent_s for a in answers)
    gaps = [after - before for a in answers for before, after in pairwise(a.token_s)]
    details = [(answer.usage or {}).get("prompt_tokens_details", {}) for answer in answers]
    tiles = sum(each.get("tiles", 0) for each in details)
    compressed = sum(each.get("compressed_tiles", 0) for each in details)
    return Summary(
        len(answers) / taken,
        _quantiles([a.token_s[0] - a.sent_s for a in answers]),
        _quantiles(gaps),
        compressed / tiles if tiles else 0.0,
    )


def _quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    low, middle, high = np.quantile(values, (0.5, 0.95, 0.99)).tolist()
    return low, middle, high
