"""Prompts for a small model, and its answers by transformers' generate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tests.model.small import PX, TOKENS_PER_TILE

from cascadevl.data.tiling import normalise
from cascadevl.engine.engine import Engine
from cascadevl.engine.requests import (
    Completion,
    EngineConfig,
    ImageTiles,
    Request,
    TextIds,
)
from cascadevl.engine.sampling import SamplingParams
from cascadevl.model.modeling import CascadeVLForConditionalGeneration

START, END = 3, 4  # stand for <img> and </img>


def tiles(seed: int, number: int) -> ImageTiles:
    rng = np.random.default_rng(seed)
    return ImageTiles(rng.integers(0, 255, (number, PX, PX, 3), dtype=np.uint8))


def text(seed: int, length: int) -> TextIds:
    rng = np.random.default_rng(1000 + seed)
    return TextIds(tuple(rng.integers(8, 97, length).tolist()))


def prompts() -> list[tuple[Any, ...]]:
    image, other = tiles(0, 3), tiles(1, 1)
    return [
        (text(0, 5), TextIds((START,)), image, TextIds((END,)), text(1, 7)),
        (text(2, 4),),
        (text(0, 5), TextIds((START,)), image, TextIds((END,)), text(3, 2)),
        (text(4, 30),),
        (other, text(5, 1), image, text(6, 12)),
        (text(0, 5), TextIds((START,)), image, TextIds((END,)), text(1, 7)),
    ]


def engine_for(model: CascadeVLForConditionalGeneration, **config: Any) -> Engine:
    values = {"num_pages": 200, "page_tokens": 4, "max_step_tokens": 64} | config
    return Engine(model, config=EngineConfig(**values))


def ids_of(answers: Sequence[Sequence[Completion]]) -> list[list[tuple[int, ...]]]:
    return [[each.token_ids for each in answer] for answer in answers]


def by_transformers(
    model: CascadeVLForConditionalGeneration, prompt: tuple[Any, ...], number: int, **more: Any
) -> tuple[int, ...]:
    ids: list[int] = []
    pixels = []
    for part in prompt:
        if isinstance(part, TextIds):
            ids += part.ids
        else:
            ids += [model.config.image_token_id] * TOKENS_PER_TILE * len(part.tiles)
            pixels.append(part.tiles)
    if pixels:
        more["pixel_values"] = normalise(np.concatenate(pixels))
    output = model.generate(
        torch.tensor([ids]), max_new_tokens=number, do_sample=False, eos_token_id=None, **more
    )
    return tuple(output[0, len(ids) :].tolist())


GREEDY = SamplingParams(max_tokens=8, ignore_eos=True)


def requests(sampling: SamplingParams = GREEDY, **more: Any) -> list[Request]:
    return [Request(prompt=prompt, sampling=sampling, **more) for prompt in prompts()]
