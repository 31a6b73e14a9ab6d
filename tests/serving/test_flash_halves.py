"""A Flash checkpoint opened in halves: each server reads only its own, and routes stay the same."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from tests.engine.small_talk import picture
from tests.model import make_flash
from tests.serving.small_dvd import QUICK, all_answers, joined, language_server, working

import cascadevl
from cascadevl.engine.engine import Engine
from cascadevl.engine.requests import Completion, EngineConfig, Request
from cascadevl.engine.sampling import SamplingParams
from cascadevl.model.language_half import load_language_half
from cascadevl.model.routing import KeepShare, VisualBudget
from cascadevl.model.vision_half import load_vision_half
from cascadevl.serving.pipeline import Pipeline
from cascadevl.serving.vision_server import VisionConfig, VisionServer
from cascadevl.types import ImageRef, Message

INVARIANT = EngineConfig(num_pages=400, page_tokens=16, batch_invariant=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_flash.write_flash(
        tmp_path_factory.mktemp("flash") / "model",
        max_dynamic_patch=4,
        flash_absolute_threshold=0.2,
    )


def facts(answers: list[tuple[Completion, ...]]) -> list[tuple[object, ...]]:
    return [(a.token_ids, a.logprobs, a.tokens_per_tile, a.increments) for (a,) in answers]


def test_halves_route_as_the_whole_does(checkpoint: Path, tmp_path: Path):
    model, processor = cascadevl.load(checkpoint)
    budgets: tuple[VisualBudget | None, ...] = (None, "full", "compressed", KeepShare(0.5))
    talks = [
        [Message.of("user", ImageRef(picture(seed, size)), "\nWhat is it?")]
        for seed, size in ((0, (90, 30)), (1, (30, 90)))
    ]
    wishes = [
        Request(
            prompt=processor.prompt(talk),
            sampling=SamplingParams(max_tokens=6, ignore_eos=True, logprobs=1),
            visual_budget=budget,
        )
        for talk in talks
        for budget in budgets
    ]
    expected = facts(Engine(model, processor, INVARIANT).generate(wishes))
    assert any(len(set(counts)) == 2 for _, _, counts, _ in expected)  # mixed within a picture

    async def ask() -> list[tuple[Completion, ...]]:
        pipeline = Pipeline(model.config, [f"ipc://{tmp_path}/front"], config=QUICK)
        await pipeline.start()
        (front,) = pipeline.addresses
        half, _ = load_vision_half(checkpoint, embedding=False)
        text, own = load_language_half(checkpoint)
        vision = VisionServer(half, front, config=VisionConfig(batch_invariant=True))
        engine = Engine(text, own, INVARIANT)
        language = language_server(engine, front, f"ipc://{tmp_path}/features")
        async with working(vision), working(language):
            try:
                await joined(pipeline, 2)
                return await asyncio.wait_for(all_answers(pipeline, wishes), 120)
            finally:
                await pipeline.stop()

    assert facts(asyncio.run(ask())) == expected
