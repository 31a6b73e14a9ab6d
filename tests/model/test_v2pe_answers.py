"""From a conversation to the positions of every token of its answer, however it is computed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tests.data.conftest import TEXTS, picture
from tests.model.packed import sample
from tests.model.small import IMAGE, PX, TOKENS_PER_TILE, small_model
from tests.model.walked_rows import PAD, T, walked
from torch import Tensor

from cascadevl.data.processor import CascadeVLProcessor
from cascadevl.data.tiling import TilingConfig
from cascadevl.data.tokenizer import build_tokenizer
from cascadevl.engine.conversation import Session, answer
from cascadevl.engine.engine import Engine
from cascadevl.engine.sampling import SamplingParams
from cascadevl.errors import RequestError
from cascadevl.model.modeling import CascadeVLForConditionalGeneration
from cascadevl.types import ImageRef, Message


@pytest.fixture(scope="module")
def processor() -> CascadeVLProcessor:
    return CascadeVLProcessor(
        build_tokenizer(TEXTS, 400),
        system_message="",
        tiling=TilingConfig(tile_px=PX, max_tiles=4),
        tokens_per_tile=TOKENS_PER_TILE,
    )


def model_for(
    processor: CascadeVLProcessor, text: dict[str, Any] | None = None, **config: Any
) -> CascadeVLForConditionalGeneration:
    text = {"vocab_size": len(processor.tokenizer)} | (text or {})
    model = small_model(text=text, image_token_id=processor.image_token_id, **config)
    model.generation_config.eos_token_id = None
    return model


def shown(*parts: str | ImageRef) -> list[Message]:
    return [Message.of("user", *parts)]


WIDE, SMALL = ImageRef(picture(60, 28)), ImageRef(picture(28, 28, seed=1))  # 3 tiles, 1 tile
TALKS = [
    shown(WIDE, "\nHow many?"),
    shown("Add 12 and 30."),
    shown("Image-1: ", SMALL, "\nImage-2: ", WIDE, "\nSame?"),
]


def recorded(model: CascadeVLForConditionalGeneration) -> list[Tensor]:
    """Positions that reach the rotary embedding, call after call."""
    seen: list[Tensor] = []
    model.model.language_model.rotary_emb.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs.get("position_ids", args[-1])),
        with_kwargs=True,
    )
    return seen


def greedy_alone(
    model: CascadeVLForConditionalGeneration,
    processor: CascadeVLProcessor,
    talk: list[Message],
    increments: list[float],
    num: int,
) -> list[int]:
    """Greedy tokens, every one from a full pass over positions walked by the loop."""
    example = processor.prompt(talk)
    inputs = processor.batch([example], return_tensors="pt")
    ids = inputs["input_ids"][0].tolist()
    features = None
    if example.num_tiles:
        features = model.encode_images(inputs["pixel_values"])
    image, ceil = processor.image_token_id, model.config.ceil_after_image
    said: list[int] = []
    for _ in range(num):
        row = [IMAGE if token == image else T for token in ids] + [T] * len(said)
        where = torch.tensor([walked(row, [True] * len(row), increments, ceil)])
        with torch.no_grad():
            tokens = torch.tensor([ids + said])
            logits = model(input_ids=tokens, position_ids=where, features=features).logits
        said.append(int(logits[0, -1].argmax()))
    return said


@pytest.mark.parametrize("ceil", [False, True], ids=["as printed", "ceil"])
@pytest.mark.parametrize("text", [{}, {"use_sliding_window": True, "sliding_window": 6}], ids=str)
def test_answers_come_from_the_positions_by_hand(
    processor: CascadeVLProcessor, ceil: bool, text: dict[str, Any]
) -> None:
    """Batched, packed, cached and stepped by 1: equal to whole passes over positions by hand."""
    model = model_for(processor, text, ceil_after_image=ceil)
    each = [[0.125], [], [1 / 16, 0.5]]
    answers = answer(model, processor, TALKS, max_new_tokens=6, increments=each)
    for talk, increments, got in zip(TALKS, each, answers, strict=True):
        assert got.increments == tuple(increments)
        expected = greedy_alone(model, processor, talk, increments, 6)
        ends = [n for n, t in enumerate(expected) if t in processor.stop_token_ids()]
        assert list(got.token_ids) == expected[: ends[0] if ends else None]


@pytest.mark.parametrize("ceil", [False, True], ids=["as printed", "ceil"])
def test_a_new_token_sits_one_behind_the_last_whatever_the_increments(
    processor: CascadeVLProcessor, ceil: bool
) -> None:
    model = model_for(processor, ceil_after_image=ceil)
    seen = recorded(model)
    each = [[0.125], [], [1 / 16, 1 / 256]]
    answer(model, processor, TALKS, max_new_tokens=4, increments=each, seed=0, temperature=9.0)
    ends = []
    for talk, increments in zip(TALKS, each, strict=True):
        ids = processor.batch([processor.prompt(talk)])["input_ids"][0]
        tokens = [IMAGE if token == processor.image_token_id else T for token in ids]
        ends.append(walked(tokens, [True] * len(tokens), increments, ceil)[-1])
    steps = [each[0].tolist() for each in seen[1:]]
    assert len(steps) == 3
    for number, step in enumerate(steps, start=1):
        assert sorted(step) == sorted(end + number for end in ends)


def test_a_batch_gives_each_prompt_its_own_auto(processor: CascadeVLProcessor) -> None:
    model = model_for(processor, increment="auto", trained_context=34)
    chosen = [each.increments for each in answer(model, processor, TALKS, max_new_tokens=5)]
    assert len({value for each in chosen for value in each}) > 1
    for talk, increments in zip(TALKS, chosen, strict=True):
        (alone,) = answer(model, processor, [talk], max_new_tokens=5)
        assert alone.increments == increments
    inputs = processor.batch(
        [processor.prompt(talk) for talk in TALKS], return_tensors="pt", padding=True
    )
    seen = recorded(model)
    model.generate(**inputs, max_new_tokens=5, do_sample=False, pad_token_id=0)
    for row, increments in enumerate(chosen):
        real = inputs["attention_mask"][row].bool()
        ids = inputs["input_ids"][row][real].tolist()
        tokens = [IMAGE if t == processor.image_token_id else T for t in ids]
        expected = walked(tokens, [True] * len(tokens), list(increments), False)
        assert seen[0][row][real].tolist() == expected


def test_an_examples_own_increments_are_answered_with(processor: CascadeVLProcessor) -> None:
    model = model_for(processor, increment="auto", trained_context=4096)
    open_one = processor.prompt(TALKS[2])
    assert open_one.increments == ()
    drawn = replace(open_one, increments=(0.25, 1 / 256))
    first, second, third = answer(
        model, processor, [open_one, drawn, drawn], max_new_tokens=3, increments=[None, None, 0.5]
    )
    assert first.increments == (1.0, 1.0)
    assert second.increments == (0.25, 1 / 256)
    assert third.increments == (0.5, 0.5)
    seen = recorded(model)
    engine = Engine(model, processor)
    streamed = Session(engine=engine, sampling=SamplingParams(max_tokens=3)).ask(drawn)
    assert streamed.answer().token_ids == second.token_ids
    assert streamed.increments == (0.25, 1 / 256)
    steps = np.diff(seen[0][0].numpy())
    assert sorted(set(steps.tolist())) == [1 / 256, 0.25, 1.0]


def test_one_number_is_for_all_and_a_wrong_number_of_entries_is_refused(
    processor: CascadeVLProcessor,
) -> None:
    model = model_for(processor)
    answers = answer(model, processor, TALKS, max_new_tokens=2, increments=0.5)
    assert [each.increments for each in answers] == [(0.5,), (), (0.5, 0.5)]
    with pytest.raises(RequestError, match="increments are given for 2 prompts, but 3 are asked"):
        answer(model, processor, TALKS, max_new_tokens=2, increments=[0.5, 0.5])
    with pytest.raises(RequestError, match="1 increments for 2 images"):
        answer(model, processor, TALKS[2:], max_new_tokens=2, increments=[[0.5]])


def test_an_example_with_branches_is_not_answered(processor: CascadeVLProcessor) -> None:
    example = replace(processor.prompt(TALKS[1]), parents=(-1, 0))
    with pytest.raises(RequestError, match="has 2 segments"):
        answer(model_for(processor), processor, [example], max_new_tokens=2)


def test_the_most_demanding_sample_never_changes_another() -> None:
    """generate with one increment an image, rows padded on the left: each row as it is alone."""
    model = small_model(ceil_after_image=True)
    samples = [sample([1], seed=1), sample([2, 1], seed=2), sample([], seed=3)]
    increments = [[0.125], [1 / 16, 0.5], []]
    width = max(len(each.input_ids) for each in samples)
    lengths = [len(each.input_ids) for each in samples]
    ids = torch.stack(
        [torch.nn.functional.pad(s.input_ids, (width - n, 0), value=PAD)
         for s, n in zip(samples, lengths, strict=True)]
    )  # fmt: skip
    mask = torch.stack([torch.arange(width) >= width - n for n in lengths]).long()
    pixels = torch.cat([s.pixel_values for s in samples if s.pixel_values is not None])
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    flat = [value for each in increments for value in each]
    together = model.generate(
        input_ids=ids, attention_mask=mask, pixel_values=pixels, increments=flat, **settings
    )[:, width:]
    for row, (each, values) in enumerate(zip(samples, increments, strict=True)):
        images = {} if each.pixel_values is None else {"pixel_values": each.pixel_values}
        alone = model.generate(
            input_ids=each.input_ids[None], increments=values, **images, **settings
        )
        assert alone[0, lengths[row] :].tolist() == together[row].tolist()
