"""Full and compressed tiles in packed rows: packed = alone, cached = uncached, encoded once = anew.

Rows are made as in training, with a compression drawn for each picture, V2PE and branches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from tests.data.conftest import TEXTS, picture
from tests.model.bodies import body_model
from tests.model.small import PX
from torch import Tensor
from transformers import DynamicCache

from cascadevl.data.collate import collate
from cascadevl.data.example import ExampleBuilder, ExampleConfig
from cascadevl.data.packing import size_of
from cascadevl.data.tiling import TilingConfig, normalise
from cascadevl.data.tokenizer import build_tokenizer
from cascadevl.model.modeling import CascadeVLForConditionalGeneration
from cascadevl.types import Batch, Example, ImageRef, Message, Record, VisualFeatures

FULL, SMALL = 4, 1
TOKENIZER = build_tokenizer(TEXTS, 400)
BUILDER = ExampleBuilder(
    TOKENIZER,
    ExampleConfig(
        system="",
        tiling=TilingConfig(tile_px=PX, max_tiles=4),
        increment="random",
        compress=0.5,
        share_tiles=False,
        seed=4,
    ),
    FULL,
    compressed_tokens=SMALL,
)
BODIES = ("qwen3", "gpt_oss", "qwen2 windows")


def user(*parts: str | ImageRef) -> Message:
    return Message.of("user", *parts)


def said(text: str) -> Message:
    return Message.of("assistant", text)


def shot(width: int, height: int, seed: int) -> ImageRef:
    return ImageRef(picture(width, height, seed))


def examples() -> list[Example]:
    """A picture, a text, four pictures with draws of their own, and branches behind a picture."""
    pictures = (shot(60, 28, seed) for seed in range(4))
    records = [
        Record(
            source="picture",
            record_id="1",
            messages=(user(shot(60, 28, 0), "\nHow many?"), said("There are 3.")),
        ),
        Record(source="text", record_id="2", messages=(user("12?"), said("It is 42."))),
        Record(
            source="pictures",
            record_id="3",
            messages=(user(*pictures, "\nSame?"), said("No.")),
        ),
        Record(
            source="branches",
            record_id="4",
            messages=(user(shot(90, 28, 5), "\nWhat?"),),
            branches=((said("A dog."),), (said("A small green dog."),)),
        ),
    ]
    made = [BUILDER(record) for record in records]
    tile_by_tile = [SMALL if number % 2 else FULL for number in range(made[3].num_tiles)]
    made[3] = replace(made[3], tokens_per_tile=tuple(tile_by_tile))
    return made


EXAMPLES = examples()


def collated(rows: Sequence[Sequence[Example]]) -> Batch:
    return collate(
        rows,
        image_token_id=BUILDER.image_token_id,
        pad_token_id=0,
        tokens_per_tile=FULL,
        averaging="square",
    )


def model_of(body: str) -> CascadeVLForConditionalGeneration:
    return body_model(
        body,
        vocab_size=len(TOKENIZER),
        image_token_id=BUILDER.image_token_id,
        flash_mode=True,
        flash_heads=3,
    )


def scored(
    model: CascadeVLForConditionalGeneration,
    batch: Batch,
    features: VisualFeatures | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits of every target, and the gradients of the weighted loss."""
    chunks = []

    def head(logits: Tensor, place: slice) -> Tensor:
        chunks.append(logits.detach().float())
        logprobs = logits.float().log_softmax(-1)
        return -logprobs.gather(-1, batch.target_ids[place, None]).squeeze(-1)

    model.zero_grad()
    nll = model(batch=batch, head_fn=head, features=features)
    (nll * batch.target_weights).sum().backward()
    grads = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
    }
    return torch.cat(chunks), grads


def test_the_row_mixes_tiles_within_a_picture_and_between_pictures() -> None:
    batch = collated([EXAMPLES])
    drawn = EXAMPLES[2].tokens_per_tile
    per_image = np.split(np.array(drawn), np.cumsum(EXAMPLES[2].tiles_per_image)[:-1])
    assert all(len(set(counts.tolist())) == 1 for counts in per_image)
    assert len({int(counts[0]) for counts in per_image}) == 2  # drawn for each picture
    assert set(EXAMPLES[3].tokens_per_tile) == {FULL, SMALL}  # and within one, where it is said so
    assert batch.tokens_per_tile.tolist() == [
        n for example in EXAMPLES for n in example.tokens_per_tile
    ]
    assert len(batch.visual_index) == int(batch.tokens_per_tile.sum())
    assert batch.num_tokens == sum(size_of(example, FULL).tokens for example in EXAMPLES)


@pytest.mark.parametrize("body", BODIES)
def test_logits_and_gradients_of_a_packed_row_are_those_of_its_samples(body: str) -> None:
    model = model_of(body)
    logits, grads = scored(model, collated([EXAMPLES]))
    alone = [scored(model, collated([[each]])) for each in EXAMPLES]
    torch.testing.assert_close(logits, torch.cat([each for each, _ in alone]), rtol=0, atol=1e-5)
    for name, together in grads.items():
        apart = sum(each[name] for _, each in alone)
        torch.testing.assert_close(
            together, apart, rtol=1e-5, atol=1e-5, msg=lambda t, n=name: f"{n}: {t}"
        )
    for part in ("multi_modal_projector", "compressed_projector"):
        assert any(grads[name].any() for name in grads if part in name)
    assert not any(grads[name].any() for name in grads if name.startswith("model.router."))


def test_tiles_encoded_before_give_the_same_and_can_be_shared() -> None:
    """One encoding serves rows that compress one tile each, as the router's labels need."""
    model = model_of("qwen3")
    example = EXAMPLES[0]
    number = example.num_tiles
    assert number == 3
    variants = [
        replace(
            example,
            tokens_per_tile=tuple(SMALL if n == chosen else FULL for n in range(number)),
        )
        for chosen in range(number)
    ]
    batch = collated([variants])
    with torch.no_grad():
        patches = model.model.patch_features(normalise(example.tiles))
    shared = VisualFeatures(patches=patches.repeat(number, 1, 1))
    expected, _ = scored(model, batch)
    found, grads = scored(model, replace(batch, tiles=None), shared)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert not any(grads[name].any() for name in grads if "vision_tower" in name)


def test_all_tiles_kept_is_the_plain_model_to_the_last_bit() -> None:
    flash = model_of("qwen3")
    plain = body_model("qwen3", vocab_size=len(TOKENIZER), image_token_id=BUILDER.image_token_id)
    state = plain.state_dict()
    plain.load_state_dict({name: flash.state_dict()[name] for name in state})
    full = [replace(each, tokens_per_tile=()) for each in EXAMPLES]
    logits, grads = scored(flash, collated([full]))
    expected, plain_grads = scored(plain, collated([full]))
    assert torch.equal(logits, expected)
    assert all(torch.equal(grads[name], value) for name, value in plain_grads.items())


@pytest.mark.parametrize("pieces", [[5, 6, 9, 10], [1] * 60], ids=["few", "each"])
@pytest.mark.parametrize("body", BODIES)
def test_cached_equals_uncached_with_mixed_tiles(body: str, pieces: list[int]) -> None:
    model = model_of(body)
    batch = collated([[replace(EXAMPLES[2], tokens_per_tile=(FULL, SMALL, SMALL, FULL) * 3)]])
    with torch.no_grad():
        visual = model.model.encode(batch.tiles, batch.tokens_per_tile)
        embeds = model.model.embed(batch.input_ids, batch.visual_index, visual)
        expected = model.decode(embeds, batch.position_ids).logits
        cache, logits = DynamicCache(), []
        borders = [0, *np.cumsum(pieces).tolist(), embeds.shape[1]]
        for start, stop in pairwise(min(border, embeds.shape[1]) for border in borders):
            if start < stop:
                piece = slice(start, stop)
                out = model.decode(
                    embeds[:, piece], batch.position_ids[:, piece], past_key_values=cache
                )
                logits.append(out.logits)
    torch.testing.assert_close(torch.cat(logits, 1), expected, rtol=0, atol=1e-5)


def test_a_batch_with_places_for_other_tiles_is_refused() -> None:
    model = model_of("qwen3")
    batch = collated([[EXAMPLES[0]]])
    wrong = replace(batch, tokens_per_tile=batch.tokens_per_tile.flip(0) * 0 + 2)
    with pytest.raises(ValueError, match="announces 6 visual tokens for 3 tiles"):
        scored(model, wrong)
