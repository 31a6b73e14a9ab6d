"""The increment of a request: chosen, given, one a row, one an image; and what RoPE can hold."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.model import make_checkpoints
from tests.model.bodies import body_model
from tests.model.packed import head, packed_batch
from tests.model.small import IMAGE, small_config
from tests.model.walked_rows import PAD, T, walked
from transformers import InternVLForConditionalGeneration

from cascadevl.errors import RequestError
from cascadevl.model.conversion import convert
from cascadevl.model.loading import load, save
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

# The formula, against a loop


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
