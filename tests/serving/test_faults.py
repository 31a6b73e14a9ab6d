"""What breaks on the way: a cut connection between the halves, a client that never reads."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from tests.engine.small_talk import build, model_for
from tests.serving.small_command import free_port
from tests.serving.small_dvd import (
    INVARIANT,
    QUICK,
    Cable,
    all_answers,
    joined,
    requests,
    said,
    working,
)
from tests.serving.small_server import NAME, serving, small_pair

from cascadevl.engine.engine import Engine
from cascadevl.engine.requests import Completion
from cascadevl.serving.engine_thread import EngineThread
from cascadevl.serving.language_server import LanguageServer
from cascadevl.serving.pipeline import Pipeline
from cascadevl.serving.vision_server import VisionConfig, VisionServer

PROCESSOR = build()
MODEL = model_for(PROCESSOR)


class Behind(LanguageServer):
    """Takes features by a cable."""

    through = ""

    @property
    def features_at(self) -> str:
        return self.through


@pytest.mark.timeout(200)
def test_a_cut_connection_between_the_halves_loses_no_request():
    """Features are lost on their way; they are sent again, and answers are those of one process."""
    wishes = requests(PROCESSOR, sampling={"temperature": 1.3, "seed": 5}) * 4
    expected = said(Engine(MODEL, PROCESSOR, INVARIANT).generate(wishes))
    vision = VisionConfig(max_batch_tiles=2, batch_invariant=True)

    async def ask() -> tuple[list[tuple[Completion, ...]], int]:
        pipeline = Pipeline(MODEL.config, ["tcp://127.0.0.1:0"], config=QUICK)
        await pipeline.start()
        (front,) = pipeline.addresses
        at = f"tcp://127.0.0.1:{free_port()}"
        cable = Cable(at)
        engine = EngineThread(Engine(MODEL, PROCESSOR, INVARIANT))
        mark = int(MODEL.config.image_token_id)
        language = Behind(engine, front, at, image_token_id=mark, window_bytes=2000)
        language.through = await cable.open()
        async with working(VisionServer(MODEL, front, config=vision)), working(language):
            try:
                await joined(pipeline, 2)
                asking = asyncio.create_task(all_answers(pipeline, wishes))
                while not asking.done() and cable.num_cut < 6:
                    await asyncio.sleep(0.15)
                    cable.cut()
                return await asyncio.wait_for(asking, 100), cable.num_cut
            finally:
                cable.close()
                await pipeline.stop()

    found, num_cut = asyncio.run(ask())
    assert said(found) == expected
    assert num_cut > 0


def test_a_client_that_never_reads_holds_up_nobody(tmp_path: Path):
    """Its answers are computed and wait for it; the engine and all others go on."""
    model, processor = small_pair()
    body = {
        "model": NAME,
        "messages": [{"role": "user", "content": "one"}],
        "max_tokens": 150,
        "n": 8,
        "stream": True,
        "ignore_eos": True,
        "logprobs": True,
        "top_logprobs": 20,
    }
    content = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: {len(content)}\r\n"
    with serving(model, processor, listen={"unread_s": 3.0}) as served, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        host, port = urlsplit(served.address).netloc.split(":")
        client.connect((host, int(port)))
        client.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + content)
        stats: Any = served.api.answers.stats
        end = time.monotonic() + 100
        while not stats().decoded_tokens or stats().running:
            assert time.monotonic() < end
            time.sleep(0.05)
        reply = served.client.chat.completions.create(
            model=NAME, messages=[{"role": "user", "content": "two"}], max_tokens=4
        )
        assert reply.usage is not None
        while served.api.admission.num_open:
            assert time.monotonic() < end, "what it holds is never given back"
            time.sleep(0.05)
