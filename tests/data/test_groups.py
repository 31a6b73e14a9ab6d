from __future__ import annotations

import pytest
from tests.engine.small_talk import build, picture

from cascadevl.data.collate import collate, num_tokens
from cascadevl.data.example import ExampleBuilder
from cascadevl.data.groups import group_example, parts_within
from cascadevl.data.processor import CascadeVLProcessor
from cascadevl.types import NO_PARENT, Batch, Example, ImageRef, Message

ANSWERS = [(35, 36, 37), (38,), (39, 40)]


@pytest.fixture(scope="module")
def processor() -> CascadeVLProcessor:
    return build()


def prompt_of(processor: CascadeVLProcessor) -> Example:
    builder: ExampleBuilder = processor.builder
    return builder.prompt([Message.of("user", ImageRef(picture(0)), "what is this?")])


def test_the_prompt_is_shared_and_every_token_of_the_answers_is_trained(processor):
    prompt = prompt_of(processor)
    group = group_example(prompt, ANSWERS, (0.5,))
    size = len(prompt.input_ids)
    assert group.tiles is prompt.tiles
    assert group.parents == (NO_PARENT, 0, 0, 0)
    assert group.increments == (0.5,)
    assert group.input_ids[:size].tolist() == prompt.input_ids.tolist()
    assert group.input_ids[size:].tolist() == [35, 36, 37, 38, 39, 40]
    assert group.segments[size:].tolist() == [1, 1, 1, 2, 3, 3]
    assert group.trained.tolist() == [False] * size + [True] * 6


def packed(processor: CascadeVLProcessor, rows: list[list[Example]]) -> Batch:
    return collate(
        rows,
        image_token_id=processor.image_token_id,
        pad_token_id=0,
        tokens_per_tile=processor.tokens_per_tile,
        averaging="token",
    )


def test_every_answer_goes_on_where_the_prompt_ends(processor):
    prompt = prompt_of(processor)
    batch = packed(processor, [[group_example(prompt, ANSWERS, (1.0,))]])
    size = num_tokens(prompt, processor.tokens_per_tile)
    assert batch.position_ids[0, size:].tolist() == [
        *(size, size + 1, size + 2),
        size,
        *(size, size + 1),
    ]
    assert batch.target_ids.tolist() == [35, 36, 37, 38, 39, 40]
    assert batch.target_index.tolist() == [size - 1, size, size + 1, size - 1, size - 1, size + 4]


def test_a_long_group_is_parted_in_order_with_the_prompt_in_each_row(processor):
    prompt = prompt_of(processor)
    room = num_tokens(prompt, processor.tokens_per_tile)
    lengths = [3, 4, 2, 5, 1]
    parts = parts_within(
        prompt, lengths, max_tokens=room + 7, tokens_per_tile=processor.tokens_per_tile
    )
    assert parts == [[0, 1], [2, 3], [4]]
    assert [number for part in parts for number in part] == list(range(5))
    for part in parts:
        answers = [tuple(range(35, 35 + lengths[number])) for number in part]
        assert num_tokens(group_example(prompt, answers, (1.0,)), processor.tokens_per_tile) <= (
            room + 7
        )


def test_no_answer_needs_no_row(processor):
    assert parts_within(prompt_of(processor), [], max_tokens=9, tokens_per_tile=1) == []
