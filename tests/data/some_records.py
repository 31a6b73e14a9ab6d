"""Small records, and builders of examples at a tiny size."""

from __future__ import annotations

from tests.data.conftest import picture
from transformers import PreTrainedTokenizerFast

from cascadevl.data.example import ExampleBuilder, ExampleConfig
from cascadevl.data.tiling import TilingConfig
from cascadevl.types import Example, ImageRef, Message, Record, VideoRef

TILING = TilingConfig(tile_px=28, max_tiles=6)
WIDE, SQUARE = ImageRef(picture(60, 28)), ImageRef(picture(30, 30, seed=1))  # 2 + 1 tiles, 1 tile


def builder_of(tokenizer: PreTrainedTokenizerFast, **values: object) -> ExampleBuilder:
    config = ExampleConfig(**{"system": "", "tiling": TILING, **values})  # type: ignore[arg-type]
    return ExampleBuilder(tokenizer, config, tokens_per_tile=4)


def record(*messages: Message, record_id: str = "7", **values: object) -> Record:
    return Record(source="set.jsonl:8", record_id=record_id, messages=messages, **values)  # type: ignore[arg-type]


def user(*parts: str | ImageRef | VideoRef) -> Message:
    return Message.of("user", *parts)


def answer(text: str) -> Message:
    return Message.of("assistant", text)


def segment(example: Example, number: int) -> tuple[list[int], list[bool]]:
    chosen = example.segments == number
    return example.input_ids[chosen].tolist(), example.trained[chosen].tolist()


MESSAGES = [
    user("Image-1: ", WIDE, "\nImage-2: ", SQUARE, "\nHow many red squares?"),
    answer("There are 3."),
    user("And <ref>dog</ref>?"),
    answer("No."),
]
