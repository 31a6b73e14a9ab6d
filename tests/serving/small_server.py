"""A small model behind the real HTTP server, on a loopback port, in a thread of the test."""

from __future__ import annotations

import base64
import io
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import PIL.Image
import torch
from openai import OpenAI
from tests.engine.small_talk import build, model_for

from cascadevl.data.processor import CascadeVLProcessor
from cascadevl.engine.critics import Critics
from cascadevl.engine.engine import Engine
from cascadevl.engine.guard import Guard
from cascadevl.engine.requests import EngineConfig
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
