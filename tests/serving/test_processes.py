"""Servers as real processes, one of which is killed in the middle, or cannot write its log."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.engine.small_talk import picture
from tests.serving.small_dvd import all_answers, joined, said

import cascadevl
from cascadevl.engine.engine import Engine
from cascadevl.engine.requests import EngineConfig, Request
from cascadevl.engine.sampling import SamplingParams
from cascadevl.model.loading import find
from cascadevl.serving.member import fingerprint
from cascadevl.serving.pipeline import Pipeline, PipelineConfig
from cascadevl.serving.processes import Keeper
from cascadevl.serving.wire import Role
from cascadevl.types import ImageRef, Message

INVARIANT = EngineConfig(cache_bytes=2**26, batch_invariant=True)


@contextmanager
def kept(front: str, folder: Path) -> Iterator[list[Keeper]]:
    """Two vision servers and a language server."""
    common = ["serve", "micro", "--join", front, "--batch-invariant", "--role"]
    language = ["language", "--features", f"ipc://{folder}/language", "--cache-bytes", "64MB"]
    words = [[*common, "vision"], [*common, "vision"], [*common, *language]]
    keepers = [Keeper(each) for each in words]
    try:
        for keeper in keepers:
            keeper.start()
        yield keepers
    finally:
        for keeper in keepers:
            keeper.stop()


def wishes_about(processor: cascadevl.CascadeVLProcessor, seeds: range) -> list[Request]:
    return [
        Request(
            prompt=processor.prompt(
                [Message.of("user", ImageRef(picture(seed, (200, 150))), "\nWhat is it?")]
            ),
            sampling=SamplingParams(max_tokens=8, seed=seed, temperature=1.0),
        )
        for seed in seeds
    ]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("half", ["vision", pytest.param("language", marks=pytest.mark.slow)])
def test_killing_a_server_loses_no_request_and_changes_no_answer(half: Role, tmp_path: Path):
    model, processor = cascadevl.load("micro")
    wishes = wishes_about(processor, range(24))
    expected = Engine(model, processor, INVARIANT).generate(wishes)

    async def ask() -> list[object]:
        pipeline = Pipeline(
            model.config,
            [f"ipc://{tmp_path}/front"],
            weights=fingerprint(find("micro")),
            config=PipelineConfig(silence_s=3.0, patience_s=120.0),
        )
        await pipeline.start()
        with kept(pipeline.addresses[0], tmp_path) as keepers:
            try:
                await asyncio.wait_for(joined(pipeline, 3), 180)
                asking = asyncio.create_task(all_answers(pipeline, wishes))
                victim = keepers[0 if half == "vision" else 2].process
                assert victim is not None
                num_servers = len(pipeline._fleet.of(half))
                while sum(server.load > 0 for server in pipeline._fleet.of(half)) < num_servers:
                    await asyncio.sleep(0.001)
                victim.send_signal(signal.SIGKILL)
                found = await asyncio.wait_for(asking, 120)
                until = time.monotonic() + 60
                while len(pipeline._fleet.of(half)) < num_servers:  # it comes back by itself
                    assert time.monotonic() < until
                    await asyncio.sleep(0.1)
                return said(found)
            finally:
                await pipeline.stop()

    assert asyncio.run(ask()) == said(expected)
