"""Rows with compressed tiles, beside the same rows with full ones and what is known of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.data.conftest import picture
from transformers import PreTrainedTokenizerFast

from cascadevl.data.consistency import (
    VIEWS,
    ConsistencyBatch,
    ConsistencyCollate,
    targets_of,
    view_of,
    with_full_tiles,
)
from cascadevl.data.example import ExampleBuilder, ExampleConfig
from cascadevl.data.stream import CollateConfig
from cascadevl.data.tiling import TilingConfig
from cascadevl.errors import TrainingError
from cascadevl.losses.vico import TopTokens
from cascadevl.types import Example, ImageRef, Message, Record

FULL, SMALL, K = 4, 1, 3


def said(text: str) -> Message:
    return Message.of("assistant", text)


def record(number: int, *pictures: ImageRef, branches: bool = False) -> Record:
    asked = (*pictures, "\n12?") if pictures else ("12?",)
    answers = ((said("3"),), (said("30 and 42"),)) if branches else ()
    return Record(
        source=f"some:{number}",
        record_id=str(number),
        messages=(Message.of("user", *asked), *(() if branches else (said("There are 3"),))),
        branches=answers,
    )


@pytest.fixture
def examples(tokenizer: PreTrainedTokenizerFast) -> list[Example]:
    """Of every view one: text, full, compressed with branches, one picture of each kind."""
    config = ExampleConfig(system="", tiling=TilingConfig(tile_px=28, max_tiles=4))
    build = ExampleBuilder(tokenizer, config, FULL)
    wide, square = ImageRef(picture(60, 28)), ImageRef(picture(28, 28, 1))
    text, full, small = (
        build(record(0)),
        build(record(1, square)),
        build(record(2, wide, branches=True)),
    )
    mixed = build(record(3, square, square))
    assert small.num_tiles == 3
    return [
        text,
        replace(full, tokens_per_tile=(FULL,)),
        replace(small, tokens_per_tile=(SMALL,) * 3),
        replace(mixed, tokens_per_tile=(SMALL, FULL)),
    ]


@pytest.fixture
def collate(tokenizer: PreTrainedTokenizerFast) -> ConsistencyCollate:
    image = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    packed = CollateConfig(
        image_token_id=image, pad_token_id=0, tokens_per_tile=FULL, averaging="sample", pad_to=160
    )
    return ConsistencyCollate(packed=packed)


def test_every_view_is_known(examples: list[Example]) -> None:
    assert [view_of(example, FULL) for example in examples] == list(VIEWS)
    assert view_of(with_full_tiles(examples[2]), FULL) == "full"


def test_full_and_compressed_rows_have_the_same_targets(
    examples: list[Example], collate: ConsistencyCollate
) -> None:
    batch = collate([examples[:3], examples[3:]])
    assert batch.full is not None
    assert torch.equal(batch.full.target_ids, batch.packed.target_ids)
    assert torch.equal(batch.full.target_samples, batch.packed.target_samples)
    assert torch.equal(batch.full.target_weights, batch.packed.target_weights)
    assert batch.full.tokens_per_tile.tolist() == [FULL] * 6
    assert batch.packed.tokens_per_tile.tolist() == [FULL, SMALL, SMALL, SMALL, SMALL, FULL]
    assert batch.full.num_tokens - batch.packed.num_tokens == 4 * (FULL - SMALL)
    assert batch.full.tiles is batch.packed.tiles  # not there twice
    moved = batch.to("cpu")
    assert moved.full is not None
    assert moved.full.tiles is moved.packed.tiles
    assert (batch.num_tiles, batch.num_tokens) == (6, batch.packed.num_tokens)
    assert batch.sources == ("some:0", "some:1", "some:2", "some:3")


def test_each_target_has_the_view_of_its_sample(
    examples: list[Example], collate: ConsistencyCollate
) -> None:
    """Kills: views of segments instead of samples, which differ once there are branches."""
    batch = collate([[examples[2], examples[0]], [examples[3], examples[1]]])
    order = [examples[number] for number in (2, 0, 3, 1)]
    numbers = targets_of(order, batch.packed)
    alone = [len(collate([[example]]).views) for example in order]
    assert numbers == alone
    wanted = zip((2, 0, 3, 1), numbers, strict=True)
    assert batch.views.tolist() == [view for view, number in wanted for _ in range(number)]


class Known:
    """Numbers that tell samples and targets apart."""

    def __init__(self, collate: ConsistencyCollate) -> None:
        self.collate = collate

    def __call__(self, example: Example) -> TopTokens | None:
        if example.record_id == "9":
            return None
        number = len(self.collate([[example]]).views) + (example.record_id == "8")
        values = torch.full((number, K), float(example.record_id))
        place = torch.arange(number)
        return TopTokens(
            ids=place[:, None].expand(number, K), logprobs=-values, rest=-place.float()
        )


def test_what_is_known_stands_beside_its_target(
    examples: list[Example], collate: ConsistencyCollate
) -> None:
    batch: ConsistencyBatch = replace(collate, known=Known(collate))([examples[::-1]])
    assert batch.full is None
    assert batch.reference is not None
    numbers = targets_of(examples[::-1], batch.packed)
    named = zip((3.0, 2.0, 1.0, 0.0), numbers, strict=True)
    wanted = [name for name, count in named for _ in range(count)]
    assert batch.reference.logprobs[:, 0].neg().tolist() == wanted
    assert batch.reference.rest.neg().tolist() == [n for count in numbers for n in range(count)]
    moved = batch.to("cpu")
    assert moved.reference is not None
    assert torch.equal(moved.reference.ids, batch.reference.ids)


@pytest.mark.parametrize("name", ["9", "8"])
def test_what_is_not_known_or_of_another_length_stops_the_run(
    examples: list[Example], collate: ConsistencyCollate, name: str
) -> None:
    lost = replace(examples[1], record_id=name, source="some:lost")
    with pytest.raises(TrainingError, match=r"some:lost: .*the data have changed"):
        replace(collate, known=Known(collate))([[examples[0], lost]])
