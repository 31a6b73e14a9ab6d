"""Losses of single tiles: those of the variants alone, each picture encoded once."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from tests.invariants import test_flash_rows
from tests.invariants.test_flash_rows import BUILDER, EXAMPLES, FULL, SMALL, collated
from tests.model.bodies import body_model
from torch import Tensor

from cascadevl.data.collate import num_tokens
from cascadevl.data.stream import CollateConfig
from cascadevl.errors import TrainingError
from cascadevl.model.modeling import CascadeVLForConditionalGeneration
from cascadevl.train.tile_losses import Losses, Measure
from cascadevl.types import Example

COLLATE = CollateConfig(image_token_id=BUILDER.image_token_id, pad_token_id=0, tokens_per_tile=FULL)
WITH_TILES = [replace(each, tokens_per_tile=()) for each in EXAMPLES if each.num_tiles]


def model_of(body: str) -> CascadeVLForConditionalGeneration:
    """A Flash model that cares for its pictures: random weights alone hardly do."""
    model = test_flash_rows.model_of(body)
    projectors = (model.model.multi_modal_projector, model.model.compressed_projector)
    with torch.no_grad():
        for part in (*projectors, model.lm_head):
            assert part is not None
            for parameter in part.parameters():
                parameter.mul_(4)
    return model


def reference_of(body: str) -> CascadeVLForConditionalGeneration:
    """A plain model with other weights."""
    return body_model(
        body,
        seed=1,
        vocab_size=len(BUILDER.tokenizer),
        image_token_id=BUILDER.image_token_id,
    )


def logits_of(model: CascadeVLForConditionalGeneration, example: Example) -> Tensor:
    """Logits of every target, in float64."""
    kept: list[Tensor] = []

    def head(logits: Tensor, place: slice) -> Tensor:
        kept.append(logits.double())
        return logits[:, 0]

    with torch.no_grad():
        model(batch=collated([[example]]), head_fn=head)
    return torch.cat(kept)


def loss_alone(
    model: CascadeVLForConditionalGeneration, wanted: Tensor, example: Example, tile: int
) -> float:
    """Mean KL over the response in a row of its own, in loops; tile -1 compresses none."""
    counts = tuple(SMALL if number == tile else FULL for number in range(example.num_tiles))
    own = logits_of(model, replace(example, tokens_per_tile=counts))
    total = 0.0
    for p, q in zip(wanted.softmax(-1).tolist(), own.softmax(-1).tolist(), strict=True):
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    return total / len(wanted)


def measured(body: str, row_tokens: int = 10_000) -> list[Losses]:
    return Measure(model_of(body), reference_of(body), COLLATE, row_tokens=row_tokens)(WITH_TILES)


@pytest.mark.parametrize("body", ["qwen3", "gpt_oss", "qwen2 windows"])
def test_losses_are_those_of_rows_of_their_own(body: str) -> None:
    """A picture, four pictures, and two answers to one picture, each with V2PE."""
    model, reference = model_of(body), reference_of(body)
    found = measured(body)
    for example, losses in zip(WITH_TILES, found, strict=True):
        wanted = logits_of(reference, example)
        assert losses.full == pytest.approx(loss_alone(model, wanted, example, -1), rel=1e-5)
        alone = [loss_alone(model, wanted, example, n) for n in range(example.num_tiles)]
        assert list(losses.compressed) == pytest.approx(alone, rel=1e-5)
        # Tiles differ by a hundred times that.
        assert max(alone) - min(alone) > 1e-3 * losses.full


@pytest.mark.parametrize("row_tokens", [1, 150])
def test_shorter_rows_and_chunks_of_logits_give_the_same(
    row_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = measured("qwen3")
    monkeypatch.setattr("cascadevl.train.tile_losses.CHUNK_BYTES", 4 * len(BUILDER.tokenizer) * 3)
    parts = measured("qwen3", row_tokens)
    for one, other in zip(whole, parts, strict=True):
        assert other.full == pytest.approx(one.full, rel=1e-4)
        assert list(other.compressed) == pytest.approx(one.compressed, rel=1e-4)
        assert other.tokens >= one.tokens


def test_each_picture_is_encoded_once_by_either_model() -> None:
    models = model_of("qwen3"), reference_of("qwen3")
    tiles = [0, 0]
    for number, model in enumerate(models):

        def count(module: object, args: object, kwargs: dict[str, Tensor], n: int = number) -> None:
            tiles[n] += len(kwargs["pixel_values"])

        model.model.vision_tower.register_forward_pre_hook(count, with_kwargs=True)
    Measure(*models, COLLATE, row_tokens=10_000)(WITH_TILES)
    assert tiles == [sum(each.num_tiles for each in WITH_TILES)] * 2


def test_fewer_tokens_are_read_than_by_every_variant_alone() -> None:
    for example, losses in zip(WITH_TILES, measured("qwen3"), strict=True):
        length = num_tokens(example, FULL)
        alone = 2 * length + example.num_tiles * (length - FULL + SMALL)
        assert losses.tokens < alone


def test_a_model_that_is_its_own_reference_loses_nothing_with_full_tiles() -> None:
    model = model_of("qwen3")
    for losses in Measure(model, model, COLLATE, row_tokens=10_000)(WITH_TILES):
        assert abs(losses.full) < 1e-6
        assert min(losses.compressed) > -1e-6
        assert max(losses.compressed) > 1e-5


def test_a_loss_that_is_no_number_names_its_sample() -> None:
    model = model_of("qwen3")
    with torch.no_grad():
        model.lm_head.weight[0] = torch.nan
    with pytest.raises(TrainingError, match=r"picture: the loss with all tiles full is nan"):
        Measure(model, reference_of("qwen3"), COLLATE, row_tokens=10_000)(WITH_TILES)
