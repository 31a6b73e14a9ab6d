"""Padded = unpadded, on either side, and a batch = its rows one by one."""

from __future__ import annotations

import pytest
import torch
from tests.model.bodies import BODIES, body_model
from tests.model.packed import sample
from tests.model.small import small_model

SAMPLES = [sample([1], seed=1), sample([2, 1], seed=2), sample([], seed=3)]
WINDOWS = {"use_sliding_window": True, "sliding_window": 4}


def padded(side: str) -> dict[str, torch.Tensor]:
    width = max(len(each.input_ids) for each in SAMPLES) + 3
    ids = torch.ones(len(SAMPLES), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, each in enumerate(SAMPLES):
        length = len(each.input_ids)
        place = slice(0, length) if side == "right" else slice(width - length, width)
        ids[row, place] = each.input_ids
        mask[row, place] = 1
    pixels = [each.pixel_values for each in SAMPLES if each.pixel_values is not None]
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.cat(pixels)}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("increment", [1.0, 0.25])
@pytest.mark.parametrize("text", [{}, WINDOWS], ids=["full", "windows"])
@pytest.mark.parametrize("use_cache", [False, True])
def test_padded_equals_alone(side: str, increment: float, text: dict, use_cache: bool) -> None:
    model = small_model(increment=increment, text=text)
    inputs = padded(side)
    with torch.no_grad():
        together = model(**inputs, use_cache=use_cache).logits
        for row, each in enumerate(SAMPLES):
            alone = model(input_ids=each.input_ids[None], pixel_values=each.pixel_values).logits[0]
            real = inputs["attention_mask"][row].bool()
            torch.testing.assert_close(together[row, real], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("ceil", [False, True], ids=["as printed", "ceil"])
def test_padded_equals_alone_with_an_increment_for_each_picture(
    body: str, side: str, ceil: bool
) -> None:
    model = body_model(body, ceil_after_image=ceil)
    inputs = padded(side)
    increments = [[1 / 8], [1 / 256, 0.5], []]
    flat = [value for each in increments for value in each]
    with torch.no_grad():
        together = model(**inputs, increments=flat).logits
        for row, (each, values) in enumerate(zip(SAMPLES, increments, strict=True)):
            alone = model(
                input_ids=each.input_ids[None], pixel_values=each.pixel_values, increments=values
            ).logits[0]
            real = inputs["attention_mask"][row].bool()
            torch.testing.assert_close(together[row, real], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("text", [{}, WINDOWS], ids=["full", "windows"])
def test_generated_tokens_do_not_depend_on_padding(text: dict) -> None:
    model = small_model(increment=0.25, text=text)
    inputs = padded("left")
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    width = inputs["input_ids"].shape[1]
    together = model.generate(**inputs, **settings)[:, width:]
    for row, each in enumerate(SAMPLES):
        images = {} if each.pixel_values is None else {"pixel_values": each.pixel_values}
        alone = model.generate(input_ids=each.input_ids[None], **images, **settings)
        assert alone[0, len(each.input_ids) :].tolist() == together[row].tolist()


def test_the_padding_token_does_not_matter() -> None:
    model = small_model()
    inputs = padded("left")
    with torch.no_grad():
        first = model(**inputs).logits
        real = inputs["attention_mask"].bool()
        other = inputs | {"input_ids": torch.where(real, inputs["input_ids"], 60)}
        assert torch.equal(model(**other).logits[real], first[real])
