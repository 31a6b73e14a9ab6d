"""The increment of a request: chosen, given, one a row, one an image; and what RoPE can hold."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.data.conftest import TEXTS, picture
from tests.model import make_checkpoints
from tests.model.bodies import body_model
from tests.model.packed import head, packed_batch, sample
from tests.model.small import IMAGE, PX, TOKENS_PER_TILE, small_config, small_model
from torch import Tensor
from transformers import InternVLForConditionalGeneration

from cascadevl.data.processor import CascadeVLProcessor
from cascadevl.data.tiling import TilingConfig
from cascadevl.data.tokenizer import build_tokenizer
from cascadevl.engine.conversation import Session, answer
from cascadevl.engine.engine import Engine
from cascadevl.engine.sampling import SamplingParams
from cascadevl.errors import RequestError
from cascadevl.model.conversion import convert
from cascadevl.model.loading import load, save
from cascadevl.model.modeling import CascadeVLForConditionalGeneration
from cascadevl.model.v2pe import (
    check_dynamic,
    choose_increment,
    dynamic_limit,
    increments_of,
    num_positions,
    prompt_positions,
    resolve_increments,
)
from cascadevl.sequence import INCREMENTS
from cascadevl.types import ImageRef, Message

T, PAD = 3, 1


# The formula, against a loop


def walked(row: list[int], real: list[bool], increments: list[float], ceil: bool) -> list[float]:
    """Positions of one padded row, one token after the other, in Python floats."""
    positions, last, image = [], -1.0, -1
    for place, (token, is_real) in enumerate(zip(row, real, strict=True)):
        if not is_real:
            positions.append(0.0)
            continue
        before = [t for t, r in zip(row[:place], real[:place], strict=True) if r]
        if token == IMAGE and (not before or before[-1] != IMAGE):
            image += 1
        if token != IMAGE and before and before[-1] == IMAGE and ceil:
            last = float(math.ceil(last))
        last = last + (increments[image] if token == IMAGE else 1.0) if before else 0.0
        positions.append(last)
    return positions


@st.composite
def padded_rows(
    draw: st.DrawFn,
) -> tuple[list[list[int]], list[list[bool]], list[list[float]]]:
    rows, masks, increments = [], [], []
    width = draw(st.integers(1, 40))
    for _ in range(draw(st.integers(1, 3))):
        length = draw(st.integers(1, width))
        ids = draw(st.lists(st.sampled_from([T, T, IMAGE]), min_size=length, max_size=length))
        left = draw(st.booleans())
        filling = [draw(st.sampled_from([PAD, IMAGE])) for _ in range(width - length)]
        rows.append(filling + ids if left else ids + filling)
        mask = [False] * len(filling)
        masks.append(mask + [True] * length if left else [True] * length + mask)
        images = sum(t == IMAGE and (i == 0 or ids[i - 1] != IMAGE) for i, t in enumerate(ids))
        increments.append([draw(st.sampled_from(INCREMENTS)) for _ in range(images)])
    return rows, masks, increments


@settings(max_examples=150)
@given(padded_rows(), st.booleans())
def test_positions_of_padded_rows_equal_the_loop(
    drawn: tuple[list[list[int]], list[list[bool]], list[list[float]]], ceil: bool
) -> None:
    rows, masks, increments = drawn
    found = prompt_positions(
        torch.tensor(rows),
        torch.tensor(masks),
        image_token_id=IMAGE,
        increments=[value for each in increments for value in each],
        ceil_after_image=ceil,
    )
    assert found.dtype == torch.float32
    expected = [
        walked(row, mask, each, ceil)
        for row, mask, each in zip(rows, masks, increments, strict=True)
    ]
    assert found.tolist() == expected


@settings(max_examples=150)
@given(
    st.integers(1, 40),
    st.lists(st.tuples(st.integers(1, 600), st.sampled_from(INCREMENTS)), max_size=4),
    st.booleans(),
)
def test_the_number_of_positions_is_where_the_next_token_would_sit(
    num_text: int, images: list[tuple[int, float]], ceil: bool
) -> None:
    ids = [T] * num_text
    for tokens, _ in images:
        ids += [IMAGE] * tokens + [T]
    increments = [increment for _, increment in images]
    walk = walked([*ids, T], [True] * (len(ids) + 1), increments, ceil)
    counted = num_positions(
        num_text + len(images), [tokens for tokens, _ in images], increments, ceil_after_image=ceil
    )
    assert counted == walk[-1]


# Which increment


@settings(max_examples=150)
@given(
    st.integers(0, 50),
    st.lists(st.integers(1, 300), min_size=1, max_size=4),
    st.integers(0, 20),
    st.integers(60, 400),
    st.booleans(),
)
def test_auto_is_the_largest_that_fits_and_the_next_larger_does_not(
    num_text: int, images: list[int], num_new: int, context: int, ceil: bool
) -> None:
    def fits(increment: float) -> bool:
        lengths = [increment * tokens for tokens in images]
        taken = sum(map(math.ceil, lengths)) if ceil else sum(lengths)
        return num_text + num_new + taken <= context

    arguments: dict[str, Any] = {"num_new_tokens": num_new, "trained_context": context}
    try:
        chosen = choose_increment(num_text, images, **arguments, ceil_after_image=ceil)
    except RequestError:
        assert not fits(1 / 256)
        return
    assert fits(chosen)
    assert chosen == 1 or not fits(chosen * 2)


def test_rounding_up_after_many_pictures_counts() -> None:
    # 8 pictures of 4 tokens at 1/8 take 4 positions as printed, and 8 rounded up.
    assert num_positions(10, [4] * 8, 0.125) == 14
    assert num_positions(10, [4] * 8, 0.125, ceil_after_image=True) == 18
    arguments: dict[str, Any] = {"num_new_tokens": 0, "trained_context": 17}
    assert choose_increment(10, [4] * 8, **arguments) == 0.125
    with pytest.raises(RequestError, match=r"needs 18 positions.*trained for 17"):
        choose_increment(10, [4] * 8, **arguments, ceil_after_image=True)


def test_every_row_gets_the_increment_it_would_get_alone() -> None:
    config = small_config(increment="auto", trained_context=12)
    long, short = [T] * 6 + [IMAGE] * 8 + [T], [PAD] * 9 + [T, IMAGE, IMAGE, IMAGE, IMAGE, T]
    ids, mask = torch.tensor([long, short]), torch.tensor([[1] * 15, [0] * 9 + [1] * 6])
    assert resolve_increments(config, ids[:1], None, 1) == 0.5
    assert resolve_increments(config, ids[1:], mask[1:], 1) == 1.0
    assert resolve_increments(config, ids, mask, 1) == [0.5, 1.0]


def test_increments_out_of_range_are_refused() -> None:
    config = small_config()
    with pytest.raises(RequestError, match=r"an increment is 2\.0; it must be above 0"):
        increments_of(config, 3, [4, 4], 1, [0.5, 2.0])
    with pytest.raises(RequestError, match="1 increments for 2 images"):
        increments_of(config, 3, [4, 4], 1, [0.5])
    assert increments_of(config, 3, [4, 4], 1, 0.5) == (0.5, 0.5)


def test_tokens_right_behind_a_picture_are_refused_where_rounding_must_come_first() -> None:
    ids = torch.tensor([[T, IMAGE, IMAGE]])
    assert resolve_increments(small_config(), ids, None, 5, 0.25) == 0.25
    with pytest.raises(RequestError, match="ends within a picture"):
        resolve_increments(small_config(ceil_after_image=True), ids, None, 5, 0.25)


# Dynamic RoPE


def test_dynamic_rope_holds_what_it_was_trained_with_and_names_both_numbers() -> None:
    config = body_model("internlm3").config
    assert dynamic_limit(config) == 512
    assert dynamic_limit(small_config()) is None
    tokens = [4] * 120  # 480 visual tokens
    assert increments_of(config, 30, tokens, 2) == (1.0,) * 120
    with pytest.raises(RequestError, match=r"needs 513 positions but beyond 512"):
        increments_of(config, 30, tokens, 3)
    with pytest.raises(RequestError, match=r"needs 513 positions but beyond 512"):
        increments_of(config, 30, tokens, 3, 1.0)  # asked for, but it would change other rows
    assert increments_of(config, 30, tokens, 3, 0.5) == (0.5,) * 120
    config.increment, config.trained_context = "auto", 4096
    assert increments_of(config, 30, tokens, 3) == (0.5,) * 120
    check_dynamic(small_config(), 1e9)


def test_no_row_is_computed_beyond_dynamic_rope_by_any_way() -> None:
    model = body_model("qwen2")
    dynamic = body_model("internlm2")
    batch = packed_batch([[1], []])
    far = replace(batch, position_ids=batch.position_ids + 505)
    model(batch=far, head_fn=head(far))
    dynamic(batch=batch, head_fn=head(batch))
    with pytest.raises(RequestError, match=r"needs 5\d\d positions but beyond 512"):
        dynamic(batch=far, head_fn=head(far))
    ids = torch.full((1, 20), T)
    with pytest.raises(RequestError, match=r"needs 513 positions but beyond 512"):
        dynamic(input_ids=ids, position_ids=torch.arange(493.0, 513.0)[None])
    with pytest.raises(RequestError, match=r"needs 530 positions"):
        dynamic.generate(ids, max_new_tokens=510, eos_token_id=None)
    kept = dynamic.model.language_model.rotary_emb
    assert torch.equal(kept.inv_freq, kept.original_inv_freq)


# From a conversation to its positions


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


# What a checkpoint keeps


@pytest.mark.parametrize("layout", ["hf", "hf_old", "github"])
def test_increment_context_and_rounding_come_back_from_every_layout(
    tmp_path: Path, layout: Any
) -> None:
    model, processor = load(make_checkpoints.write_github(tmp_path / "source", "qwen3"))
    config = model.config
    config.increment, config.trained_context, config.ceil_after_image = "auto", 4096, True
    save(model, processor, tmp_path / "saved", layout=layout)
    again = load(tmp_path / "saved")[0].config
    assert (again.increment, again.trained_context, again.ceil_after_image) == ("auto", 4096, True)
    convert(tmp_path / "saved", tmp_path / "back", layout="hf")
    again = load(tmp_path / "back")[0].config
    assert (again.increment, again.trained_context, again.ceil_after_image) == ("auto", 4096, True)


@torch.no_grad()
def test_plain_transformers_computes_the_same_where_the_increment_is_one_and_only_there(
    tmp_path: Path,
) -> None:
    model, processor = load(make_checkpoints.write_github(tmp_path / "source", "qwen3"))
    model.config.trained_context, model.config.ceil_after_image = 4096, True
    image = model.config.image_token_id
    ids = torch.tensor([[100, 101, *[image] * 4, 107, 109, 120]])
    pixels = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    for increment, reason in ((1.0, None), ("auto", "step by auto"), (0.25, "step by 0.25")):
        model.config.increment = increment
        folder = tmp_path / str(increment)
        save(model, processor, folder)
        says = json.loads((folder / "config.json").read_text()).get("cascadevl_requires")
        assert (says is None) if reason is None else (reason in says)
    plain = InternVLForConditionalGeneration.from_pretrained(
        tmp_path / "1.0", dtype=torch.float32
    ).eval()
    theirs = plain(input_ids=ids, pixel_values=pixels).logits
    ours = model(input_ids=ids, pixel_values=pixels, increments=1.0).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    others = model(input_ids=ids, pixel_values=pixels).logits  # 0.25: what plain would get wrong
    assert (others - theirs).abs().max() > 1e-3
