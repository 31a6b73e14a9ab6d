"""A router in the vision servers: tiles are routed where they are encoded, as one process does."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engine.small_talk import build, model_for
from tests.serving.small_dvd import (
    DRAWN,
    INVARIANT,
    all_answers,
    all_of,
    answers_of,
    asked,
    by_engine,
    decoupled,
    facts,
    requests,
    working,
)

from cascadevl.engine.engine import Engine
from cascadevl.engine.requests import Completion
from cascadevl.errors import RequestError
from cascadevl.model.modeling import CascadeVLForConditionalGeneration
from cascadevl.model.routing import KeepShare, Thresholds
from cascadevl.serving.coupled import Coupled
from cascadevl.serving.vision_server import VisionServer

PROCESSOR = build()

BUDGETS = {
    "own thresholds": None,
    "full": "full",
    "compressed": "compressed",
    "half": KeepShare(0.5),
    "threshold": Thresholds(absolute=0.5),
    "quantile": Thresholds(absolute=0.0, relative=0.5),
}


def flash_model(**config: Any) -> CascadeVLForConditionalGeneration:
    """Auto increments, so that what the router leaves decides where tokens sit, too."""
    model = model_for(
        PROCESSOR,
        flash_mode=True,
        flash_heads=3,
        increment="auto",
        trained_context=140,
        **config,
    )
    with torch.no_grad():  # random weights differ too little in what they think of tiles
        for tensor in model.model.router.parameters():
            tensor.mul_(4)
    return model


def routes(answers: list[tuple[Completion, ...]]) -> list[tuple[int, ...]]:
    return [answer.tokens_per_tile for (answer,) in answers]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiles_are_routed_where_they_are_encoded_and_answers_stay_to_the_bit(
    dtype: Any, tmp_path: Path
):
    model = flash_model(flash_absolute_threshold=0.5).to(dtype)
    wishes = [
        wish
        for budget in BUDGETS.values()
        for wish in requests(PROCESSOR, visual_budget=budget, sampling=DRAWN)
    ]
    expected = by_engine(model, PROCESSOR, wishes)
    assert any(len(set(each)) == 2 for each in routes(expected))  # mixed within a request
    coupled = Coupled(Engine(model, PROCESSOR, INVARIANT))

    async def ask() -> list[tuple[Completion, ...]]:
        async with decoupled(
            *(model, PROCESSOR, tmp_path),
            num_vision=2,
            num_language=2,
            engine=INVARIANT,
            address="tcp://127.0.0.1:0",
        ) as pipeline:
            return await all_answers(pipeline, wishes)

    for found in (asyncio.run(asked(coupled, wishes)), asyncio.run(ask())):
        assert facts(found) == facts(expected)
        assert routes(found) == routes(expected)
        usages = [answer.usage for (answer,) in found]
        assert [each.compressed_tiles for each in usages] == [
            answer.usage.compressed_tiles for (answer,) in expected
        ]
        assert [each.visual_tokens for each in usages] == [sum(each) for each in routes(expected)]


def test_only_the_visual_tokens_that_are_left_travel(tmp_path: Path):
    """Compressed tiles are a quarter of the bytes, and are encoded once for all budgets."""
    model = flash_model()
    sent: dict[str, int] = {}

    class Weighed(VisionServer):
        """Notes the bytes of features."""

        def _encoded(self, jobs: Any) -> Any:
            made = super()._encoded(jobs)
            sent[name] = sum(len(bits) for _, bits in made)
            return made

    async def ask() -> int:
        nonlocal name
        async with (
            decoupled(model, PROCESSOR, tmp_path, num_vision=0) as pipeline,
            working(Weighed(model, pipeline.addresses[0])),
        ):
            for name in ("full", "compressed"):
                (wish, *_) = requests(PROCESSOR, visual_budget=name)
                await answers_of(pipeline, wish)
            for _ in range(200):
                await asyncio.sleep(0.05)
                if pipeline.stats().cached_tiles:
                    break
            return pipeline.stats().encoded_tiles

    name = ""
    num_encoded = asyncio.run(ask())
    assert sent["full"] == 4 * sent["compressed"]
    assert num_encoded == len(requests(PROCESSOR)[0].prompt.tiles)


def test_a_plain_model_refuses_a_budget(tmp_path: Path):
    async def ask() -> None:
        async with decoupled(model_for(PROCESSOR), PROCESSOR, tmp_path) as pipeline:
            with pytest.raises(RequestError, match="no router"):
                await all_of(pipeline, requests(PROCESSOR, visual_budget="compressed")[0])

    asyncio.run(ask())
