"""Cached = uncached: token by token, in pieces, with windows and sinks, right-padded too."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from tests.model.bodies import BODIES, body_model
from tests.model.packed import sample
from tests.model.small import small_model
from transformers import DynamicCache

SAMPLE = sample([1, 2], [0.25, 0.25], seed=1)
WINDOWS = {"use_sliding_window": True, "sliding_window": 5}
TEXTS = {"full": {}, "windows": WINDOWS}


def embedded(model) -> tuple[torch.Tensor, torch.Tensor]:
    ids = SAMPLE.input_ids[None]
    features = model.encode_images(SAMPLE.pixel_values)
    place = (ids == model.config.image_token_id).flatten().nonzero().squeeze(1)
    return model.model.embed(ids, place, features.projected), SAMPLE.position_ids[None]


@pytest.mark.parametrize("pieces", [[1] * 40, [7, 1, 1, 40], [3, 5, 40]], ids=str)
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("keeps_all", [False, True])
def test_cached_equals_uncached(pieces: list[int], text: dict, keeps_all: bool) -> None:
    model = small_model(text=text)
    with torch.no_grad():
        embeds, positions = embedded(model)
        expected = model.decode(embeds, positions).logits
        cache = DynamicCache() if keeps_all else DynamicCache(config=model.config.text_config)
        logits, start = [], 0
        for length in pieces:
            piece = slice(start, min(start + length, embeds.shape[1]))
            if piece.start < piece.stop:
                out = model.decode(embeds[:, piece], positions[:, piece], past_key_values=cache)
                logits.append(out.logits)
            start = piece.stop
    torch.testing.assert_close(torch.cat(logits, 1), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_cached_generation_equals_uncached(text: dict) -> None:
    model = small_model(increment=0.25, text=text)
    inputs = {"input_ids": SAMPLE.input_ids[None], "pixel_values": SAMPLE.pixel_values}
    settings = {"max_new_tokens": 1, "do_sample": False, "eos_token_id": None}
    expected = []
    positions = SAMPLE.position_ids[None]
    ids = inputs["input_ids"]
    with torch.no_grad():
        features = model.encode_images(SAMPLE.pixel_values)
        for _ in range(8):
            logits = model(input_ids=ids, position_ids=positions, features=features).logits
            expected.append(int(logits[0, -1].argmax()))
            ids = torch.cat([ids, torch.tensor([[expected[-1]]])], 1)
            positions = torch.cat([positions, positions[:, -1:] + 1], 1)
    got = model.generate(**inputs, **settings | {"max_new_tokens": 8})
    assert got[0, SAMPLE.input_ids.shape[0] :].tolist() == expected


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("ceil", [False, True], ids=["as printed", "ceil"])
def test_every_body_reads_on_behind_a_cache_from_mixed_increments(body: str, ceil: bool) -> None:
    """Text and two pictures of their own increments, cut within a picture and behind one."""
    model = body_model(body, ceil_after_image=ceil)
    ids = SAMPLE.input_ids[None]
    with torch.no_grad():
        embeds, _ = embedded(model)
        positions = model.prompt_positions(ids, None, [1 / 16, 1 / 256])
        expected = model.decode(embeds, positions).logits
        last = int((ids[0] == model.config.image_token_id).nonzero().max())
        cache, logits = DynamicCache(), []
        for start, stop in pairwise([0, 6, last - 2, last + 1, *range(last + 2, ids.shape[1] + 1)]):
            piece = slice(start, stop)
            out = model.decode(embeds[:, piece], positions[:, piece], past_key_values=cache)
            logits.append(out.logits)
    torch.testing.assert_close(torch.cat(logits, 1), expected, rtol=0, atol=1e-5)
    steps = positions[0].diff()[last:]
    assert steps[0] == (2 - (8 / 256) if ceil else 1)  # rounded up behind 8 tokens of 1/256
    assert (steps[1:] == 1).all()  # the next position is the last one and 1


def test_windows_count_tokens_and_not_the_padding_between() -> None:
    """A right-padded prompt and then new tokens: the window reaches over the padding."""
    model = small_model(text=WINDOWS)
    ids, more = SAMPLE.input_ids[None], torch.tensor([[30, 31, 32]])
    with torch.no_grad():
        embeds, positions = embedded(model)
        new = model.get_input_embeddings()(more)
        after = positions[:, -1:] + torch.arange(1, 4)
        expected = model.decode(torch.cat([embeds, new], 1), torch.cat([positions, after], 1))
        filled = torch.nn.functional.pad(embeds, (0, 0, 0, 4))
        places = torch.nn.functional.pad(positions, (0, 4))
        mask = torch.nn.functional.pad(torch.ones_like(ids), (0, 4))
        cache = DynamicCache()
        model.decode(filled, places, attention_mask=mask, past_key_values=cache)
        mask = torch.cat([mask, torch.ones_like(more)], 1)
        got = model.decode(new, after, attention_mask=mask, past_key_values=cache)
    torch.testing.assert_close(got.logits, expected.logits[:, -3:], rtol=0, atol=1e-5)


def test_a_mask_that_does_not_cover_the_cache_is_refused() -> None:
    model = small_model()
    with torch.no_grad():
        embeds, positions = embedded(model)
        cache = DynamicCache()
        model.decode(embeds, positions, past_key_values=cache)
        with pytest.raises(ValueError, match="covers 1 tokens but the cache and the new tokens"):
            model.decode(
                embeds[:, :1],
                positions[:, :1],
                attention_mask=torch.ones(1, 1, dtype=torch.int64),
                past_key_values=cache,
            )
