"""A small model behind the real HTTP server, on a loopback port, in a thread of the test."""

from __future__ import annotations

import base64
import http.client
import io
import json
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any
from urllib.parse import urlsplit

import PIL.Image
import torch
from openai import OpenAI
from tests.engine.small_talk import build, model_for, picture

from cascadevl.data.chat import to_messages
from cascadevl.data.processor import CascadeVLProcessor
from cascadevl.engine.critics import Critics
from cascadevl.engine.engine import Engine
from cascadevl.engine.guard import Guard
from cascadevl.engine.requests import Completion, EngineConfig, Request
from cascadevl.engine.sampling import SamplingParams
from cascadevl.model.modeling import CascadeVLForConditionalGeneration
from cascadevl.serving.admission import ApiConfig
from cascadevl.serving.api import Api
from cascadevl.serving.engine_thread import Answers, EngineThread
from cascadevl.serving.limits import Limits
from cascadevl.serving.openai_prompts import Asker
from cascadevl.serving.remote import Fetcher
from cascadevl.serving.run_server import ApiServer, ListenConfig

NAME = "small"
SMALL = EngineConfig(num_pages=400, page_tokens=4)


@dataclass(frozen=True, kw_only=True)
class Served:
    """A running server.

    Attributes:
        address: Of the server, without a path.
        api: What its routes share.
        client: OpenAI's client for it.
    """

    address: str
    api: Api
    client: OpenAI


@contextmanager
def listening(api: Api, **listen: Any) -> Iterator[Served]:
    """Serve an API while the context lasts."""
    server = ApiServer(api, ListenConfig(port=0, **{"drain_s": 5, **listen}))
    ready, found = threading.Event(), []

    def on_ready(address: str) -> None:
        found.append(address)
        ready.set()

    server.on_ready = on_ready
    thread = threading.Thread(target=server.run, name="http")
    thread.start()
    try:
        assert ready.wait(20), "the server did not start"
        url = f"{found[0]}/v1"
        with OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60) as client:
            yield Served(address=found[0], api=api, client=client)
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


@contextmanager
def answering(
    answers: Answers,
    processor: CascadeVLProcessor,
    model: CascadeVLForConditionalGeneration,
    listen: Mapping[str, Any] = MappingProxyType({}),
    limits: Limits | None = None,
    fetcher: Fetcher | None = None,
    critics: Critics | None = None,
    guard: Guard | None = None,
    **api: Any,
) -> Iterator[Served]:
    """Serve whoever answers."""
    asker = Asker(
        processor=processor,
        config=model.config,
        max_tokens=24,
        limits=limits or Limits(),
        critics=critics or Critics(),
    )
    config = ApiConfig(model_name=NAME, **api)
    with listening(Api(answers, asker, config, fetcher, guard), **listen) as served:
        yield served


@contextmanager
def serving(
    model: CascadeVLForConditionalGeneration,
    processor: CascadeVLProcessor,
    config: EngineConfig = SMALL,
    **settings: Any,
) -> Iterator[Served]:
    """Serve a model by an engine of this process."""
    engine = Engine(model, processor, config)
    thread = EngineThread(engine)
    try:
        with answering(thread, processor, model, **settings) as served:
            yield served
        engine.check()
    finally:
        thread.close()


def small_pair(
    template: str = "internvl2_5",
) -> tuple[CascadeVLForConditionalGeneration, CascadeVLProcessor]:
    """A small model with random weights that says no control tokens, and its processor."""
    processor = build(template)
    model = model_for(processor)
    with torch.no_grad():
        model.lm_head.weight[list(processor.tokenizer.added_tokens_decoder)] = 0
    return model, processor


def data_url(picture: PIL.Image.Image) -> str:
    """A picture as clients send it."""
    buffer = io.BytesIO()
    picture.save(buffer, format="png")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def shown(picture: PIL.Image.Image) -> dict[str, Any]:
    """A picture as a part of a message."""
    return {"type": "image_url", "image_url": {"url": data_url(picture)}}


def until(true: Any, seconds: float = 20) -> None:
    """Wait for something to come true."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.01)


CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": [shown(picture(0)), {"type": "text", "text": "what is this?"}]}],
    [{"role": "user", "content": "one two"}],
    [
        {"role": "system", "content": "quick"},
        {
            "role": "user",
            "content": [
                shown(picture(0)),
                shown(picture(1, (20, 70))),
                {"type": "text", "text": "two"},
            ],
        },
        {"role": "assistant", "content": "three"},
        {"role": "user", "content": "four"},
    ],
]
"""With a picture, without, and of several turns."""

GREEDY: dict[str, Any] = {
    "model": NAME,
    "temperature": 0,
    "max_tokens": 12,
    "extra_body": {"ignore_eos": True},
}


def engine_says(
    model: CascadeVLForConditionalGeneration,
    processor: CascadeVLProcessor,
    conversation: list[dict[str, Any]],
    num_samples: int = 1,
    **wishes: Any,
) -> tuple[Completion, ...]:
    """What the engine says in the test's own thread."""
    prompt = processor.prompt(to_messages(conversation))
    sampling = SamplingParams(**{"max_tokens": 12, "ignore_eos": True} | wishes)
    engine = Engine(model, processor, EngineConfig(num_pages=300, page_tokens=4))
    request = Request(prompt=prompt, sampling=sampling, num_samples=num_samples)
    return engine.generate([request])[0]


def text_of(events: Iterable[Any]) -> str:
    """The text that a stream said."""
    return "".join(event.choices[0].delta.content or "" for event in events if event.choices)


CHAT = "/v1/chat/completions"
JSON = {"Content-Type": "application/json"}
MOST_S = 20.0
"""A request is answered within this time, and the state of the server is told meanwhile."""


@contextmanager
def besieged(
    model: CascadeVLForConditionalGeneration, processor: CascadeVLProcessor
) -> Iterator[Served]:
    """Serve a model to those who mean harm: the state is told all the time, and nothing is left."""
    with serving(model, processor, max_body_bytes=3_000_000) as served, watched(served):
        yield served
        assert served.api.admission.num_open == served.api.admission.num_held_bytes == 0


@contextmanager
def watched(served: Served) -> Iterator[None]:
    """Ask for the state all the time: it must be told at once, whatever else comes."""
    done, latencies = threading.Event(), [0.0]

    def watch() -> None:
        while not done.wait(0.05):
            start = time.monotonic()
            assert send(served, "GET", "/health")[0] == 200
            latencies.append(time.monotonic() - start)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
    assert len(latencies) > 1, "the state was not told"
    assert max(latencies) < MOST_S


def send(
    served: Served, method: str, path: str, body: bytes | None = None, **headers: str
) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(urlsplit(served.address).netloc, timeout=MOST_S)
    try:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, body, named)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def check_reply(status: int, content: bytes, *also: int) -> None:
    """An answer, or a refusal in OpenAI's form."""
    assert status in (200, *range(400, 500), *also), content
    if status != 200:
        assert set(json.loads(content)["error"]) == {"message", "type", "param", "code"}


def send_chat(served: Served, **fields: Any) -> tuple[int, bytes]:
    turns = [{"role": "user", "content": "one"}]
    body = {"model": NAME, "messages": turns, "max_tokens": 2, **fields}
    return send(served, "POST", CHAT, json.dumps(body).encode(), **JSON)


def send_media(served: Served, content: bytes, kind: str = "image") -> tuple[int, bytes]:
    url = f"data:{kind}/x;base64,{base64.b64encode(content).decode()}"
    part = {"type": f"{kind}_url", f"{kind}_url": {"url": url}}
    return send_chat(served, messages=[{"role": "user", "content": [part]}])
