"""Pairs as examples and as rows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.data.conftest import picture
from transformers import PreTrainedTokenizerFast

from cascadevl.data.example import ExampleBuilder, ExampleConfig
from cascadevl.data.pairs import PairBuilder, PairCollate, digest
from cascadevl.data.stream import CollateConfig
from cascadevl.data.tiling import TilingConfig
from cascadevl.errors import DataError, TrainingError
from cascadevl.types import ImageRef, Message, Record

TILES = 3
CHOSEN, REJECTED = "There are 3.", "There are 12 and 30 squares"


def record(*branches: tuple[Message, ...], number: int = 0, shown: bool = True) -> Record:
    image = (ImageRef(picture(60, 40, number)), "\n") if shown else ()
    return Record(
        source=f"pairs:{number}",
        record_id=str(number),
        messages=(
            Message.of("user", *image, "How many?"),
            Message.of("assistant", "What do you mean?"),
            Message.of("user", "Squares."),
        ),
        branches=branches,
        augment=True,
    )


def pair(number: int = 0, *, shown: bool = True) -> Record:
    answers = [(Message.of("assistant", text),) for text in (CHOSEN, REJECTED)]
    return record(*answers, number=number, shown=shown)


@pytest.fixture
def build(tokenizer: PreTrainedTokenizerFast) -> PairBuilder:
    config = ExampleConfig(
        system="", tiling=TilingConfig(tile_px=28, max_tiles=4), increment="random"
    )
    return PairBuilder(ExampleBuilder(tokenizer, config, 4))


@pytest.fixture
def collate(tokenizer: PreTrainedTokenizerFast) -> PairCollate:
    image = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    packed = CollateConfig(image_token_id=image, pad_token_id=0, tokens_per_tile=4)
    return PairCollate(packed=packed)


def test_prompt_and_picture_are_there_once_and_only_the_answers_are_trained(
    build: PairBuilder, tokenizer: PreTrainedTokenizerFast
) -> None:
    example = build(pair())
    assert example.parents == (-1, 0, 0)
    assert len(example.tiles_per_image) == 1
    for segment, answer in ((1, CHOSEN), (2, REJECTED)):
        trained = example.input_ids[example.trained & (example.segments == segment)]
        assert tokenizer.decode(trained) == f"{answer}<|im_end|>"
    assert not example.trained[example.segments == 0].any()  # an earlier answer is a prompt


def test_a_pair_is_the_same_in_every_epoch(build: PairBuilder) -> None:
    first, later = build(pair(), epoch=0), build(pair(), epoch=7)
    assert np.array_equal(first.tiles, later.tiles)
    assert first.increments == later.increments
    assert digest(first) == digest(later)
    again = build.builder(pair(), epoch=7)  # drawn anew, as in other stages
    assert not np.array_equal(again.tiles, first.tiles)


@pytest.mark.parametrize(
    ("branches", "words"),
    [
        ((), "0 branches"),
        (("a",), "1 branches"),
        (("a", "b", "c"), "3 branches"),
        (("a", "a"), "the same"),
    ],
)
def test_what_is_no_pair_is_refused(
    build: PairBuilder, branches: tuple[str, ...], words: str
) -> None:
    broken = record(*((Message.of("assistant", text),) for text in branches))
    with pytest.raises(DataError, match=words) as error:
        build(broken)
    assert (error.value.kind, error.value.source) == ("not_a_pair", "pairs:0")


def test_answers_are_found_in_packed_rows(build: PairBuilder, collate: PairCollate) -> None:
    examples = [build(pair(number, shown=number != 1)) for number in range(TILES)]
    batch = collate([examples[:2], examples[2:]])
    assert batch.sources == ("pairs:0", "pairs:1", "pairs:2")
    assert batch.num_tiles == examples[0].num_tiles + examples[2].num_tiles
    assert batch.num_tokens == batch.packed.num_tokens
    names = batch.packed.sources
    assert [names[n] for n in batch.chosen] == ["pairs:0#1", "pairs:1#1", "pairs:2#1"]
    assert [names[n] for n in batch.rejected] == ["pairs:0#2", "pairs:1#2", "pairs:2#2"]
    counts = torch.bincount(batch.packed.target_samples, minlength=len(names))
    lengths = [[int((e.trained & (e.segments == s)).sum()) for s in (1, 2)] for e in examples]
    assert counts[batch.chosen].tolist() == [chosen for chosen, _ in lengths]
    assert counts[batch.rejected].tolist() == [rejected for _, rejected in lengths]


def test_reference_values_go_to_their_pairs(build: PairBuilder, collate: PairCollate) -> None:
    examples = [build(pair(number)) for number in range(3)]
    known = {digest(e): (-float(n), -10.0 - n) for n, e in enumerate(examples)}
    batch = replace(collate, reference=known)([[examples[2]], [examples[0], examples[1]]])
    assert batch.reference is not None
    assert batch.reference.tolist() == [[-2.0, 0.0, -1.0], [-12.0, -10.0, -11.0]]
    assert batch.to("cpu").reference is not None
    assert collate([[examples[0]]]).reference is None


def test_a_pair_that_changed_is_named(build: PairBuilder, collate: PairCollate) -> None:
    known = {digest(build(pair())): (-1.0, -2.0)}
    with pytest.raises(TrainingError, match=r"pairs:5: .*not computed before training"):
        replace(collate, reference=known)([[build(pair()), build(pair(5))]])


def test_the_digest_sees_all_that_a_model_sees(build: PairBuilder) -> None:
    example = build(pair())
    other_tiles = example.tiles.copy()
    other_tiles[-1, 3, 3, 0] ^= 1
    other_ids = example.input_ids.copy()
    other_ids[-1] += 1
    changed = [
        replace(example, tiles=other_tiles),
        replace(example, input_ids=other_ids),
        replace(example, increments=(1 / 512,)),
        replace(example, record_id="another"),
        replace(example, trained=np.zeros_like(example.trained)),
        replace(example, segments=np.zeros_like(example.segments)),
        replace(example, parents=(-1, -1, 0)),
    ]
    assert len({digest(each) for each in [example, *changed]}) == len(changed) + 1
