"""Positions of requests, the increment they get, and that they arrive where they are needed."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.model.small import IMAGE, VOCAB, small_config, small_model
from tests.reference import positions_by_hand

from cascadevl.errors import ConfigError, RequestError
from cascadevl.model.modeling import CascadeVLForConditionalGeneration
from cascadevl.model.v2pe import choose_increment, prompt_positions, resolve_increments

T = 3  # any text token


def positions(rows: list[list[int]], increments, mask=None, *, ceil=False) -> list[list[float]]:
    return prompt_positions(
        torch.tensor(rows),
        None if mask is None else torch.tensor(mask),
        image_token_id=IMAGE,
        increments=increments,
        ceil_after_image=ceil,
    ).tolist()


def test_a_visual_token_steps_by_its_images_increment() -> None:
    row = [T, T, IMAGE, IMAGE, T, IMAGE, IMAGE, IMAGE, T]
    assert positions([row], [0.5, 0.25]) == [[0, 1, 1.5, 2, 3, 3.25, 3.5, 3.75, 4.75]]
    assert positions([row], [0.5, 0.25], ceil=True) == [[0, 1, 1.5, 2, 3, 3.25, 3.5, 3.75, 5]]


def test_increments_are_counted_row_after_row_and_padding_is_not_counted() -> None:
    rows = [[T, IMAGE, T, T], [9, IMAGE, T, IMAGE]]
    mask = [[1, 1, 1, 0], [0, 1, 1, 1]]
    # A row that begins with an image begins at 0 all the same.
    assert positions(rows, [0.5, 0.25, 0.125], mask) == [[0, 0.5, 1.5, 0], [0, 0, 1, 1.125]]


@settings(max_examples=40)
@given(st.lists(st.sampled_from([T, IMAGE]), min_size=1, max_size=30), st.integers(0, 8))
def test_equals_the_formula_by_hand(row: list[int], power: int) -> None:
    increment = 2.0**-power
    tokens = [
        ("visual", Fraction(increment), 0) if t == IMAGE else ("text", Fraction(1), 0) for t in row
    ]
    assert positions([row], increment) == [positions_by_hand.positions(tokens, [-1])]


def test_increment_one_gives_whole_numbers_exactly() -> None:
    row = [T] * 5 + [IMAGE] * 3000 + [T] * 7
    assert positions([row], 1.0) == [[float(i) for i in range(len(row))]]


def test_a_wrong_number_of_increments_is_refused() -> None:
    with pytest.raises(RequestError, match="2 increments for 1 images"):
        positions([[T, IMAGE, T]], [1.0, 0.5])


@pytest.mark.parametrize(
    ("context", "expected"), [(1010, 1.0), (1009, 0.5), (510, 0.5), (509, 0.25), (14, 1 / 256)]
)
def test_auto_takes_the_largest_increment_that_fits(context: int, expected: float) -> None:
    # 6 text tokens, 4 new ones, 1000 visual ones.
    assert choose_increment(6, 1000, num_new_tokens=4, trained_context=context) == expected


def test_a_request_that_fits_with_no_increment_names_both_numbers() -> None:
    with pytest.raises(RequestError, match=r"needs 14 positions.*trained for 13"):
        choose_increment(6, 1000, num_new_tokens=4, trained_context=13)


def test_a_fixed_increment_is_held_to_the_trained_context_too() -> None:
    config = small_config(trained_context=10)
    ids = torch.tensor([[T, IMAGE, IMAGE, IMAGE, IMAGE, T]])
    assert resolve_increments(config, ids, None, 4) == 1.0
    with pytest.raises(RequestError, match=r"needs 11 positions.*trained for 10"):
        resolve_increments(config, ids, None, 5)
    assert resolve_increments(config, ids, None, 500, 0.5) == 0.5  # what is asked for is taken


def test_auto_without_a_trained_context_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs trained_context"):
        small_config(increment="auto")
    with pytest.raises(ConfigError, match=r"\(0, 1\]"):
        small_config(increment=0.0)


def image_prompt(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(8, VOCAB, (1, 14), generator=generator)
    ids[0, 4:8] = IMAGE
    return {"input_ids": ids, "pixel_values": torch.randn(1, 3, 28, 28, generator=generator)}


def recorded_positions(model: CascadeVLForConditionalGeneration) -> list[torch.Tensor]:
    """Positions that reach the rotary embedding, call after call."""
    seen: list[torch.Tensor] = []
    model.model.language_model.rotary_emb.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs.get("position_ids", args[-1])),
        with_kwargs=True,
    )
    return seen


def test_generate_carries_fractional_positions_on_by_one_a_token() -> None:
    model = small_model(increment=0.25)
    seen = recorded_positions(model)
    model.generate(**image_prompt(), max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert seen[0].tolist() == [[0, 1, 2, 3, 3.25, 3.5, 3.75, 4, 5, 6, 7, 8, 9, 10]]
    assert [each.tolist() for each in seen[1:]] == [[[11]], [[12]]]
    assert {each.dtype for each in seen} == {torch.float32}


def test_auto_fits_prompt_and_new_tokens_into_the_trained_context() -> None:
    model = small_model(increment="auto", trained_context=14)
    seen = recorded_positions(model)
    model.generate(**image_prompt(), max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert seen[0][0, 4:8].tolist() == [3.25, 3.5, 3.75, 4]  # 10 + 3 + 4 / 4 = 14
    model.generate(**image_prompt(), max_new_tokens=2, do_sample=False, eos_token_id=None)
    assert seen[3][0, 4:8].tolist() == [3.5, 4, 4.5, 5]


@pytest.mark.parametrize("how", ["bf16 weights", "autocast"])
def test_positions_and_frequencies_reach_rope_in_float32(how: str) -> None:
    model = small_model(increment=1 / 256)
    exact = model.model.language_model.rotary_emb.inv_freq.clone()
    if how == "bf16 weights":
        model.to(torch.bfloat16)
        assert model.dtype == torch.bfloat16
    seen = recorded_positions(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        model(**image_prompt())
    assert seen[0].dtype == torch.float32
    assert seen[0][0, 4].item() == 3 + 1 / 256  # bfloat16 would give 3
    rotary = model.model.language_model.rotary_emb
    assert torch.equal(rotary.inv_freq, exact)
    assert torch.equal(rotary.original_inv_freq, exact)


def test_the_increment_changes_the_answer() -> None:
    """A model that lost the positions on the way would not notice."""
    model = small_model()
    prompt = image_prompt()
    with torch.no_grad():
        whole, half = (model(**prompt, increments=i).logits for i in (1.0, 0.5))
    assert torch.equal(whole[:, :4], half[:, :4])
    assert (whole[:, 4:] - half[:, 4:]).abs().max() > 1e-3


def test_a_cache_with_fractional_positions_asks_for_the_next_position() -> None:
    model = small_model(increment=0.5)
    with torch.no_grad():
        cache = model(**image_prompt(), use_cache=True).past_key_values
        with pytest.raises(RequestError, match="position_ids are needed after 14 cached tokens"):
            model(input_ids=torch.tensor([[T]]), past_key_values=cache)


def test_every_visual_token_sees_the_text_before_it() -> None:
    """Trap 1: transformers would take steps other than 1 for borders and cut the text off."""
    for windows in (False, True):
        text = {"use_sliding_window": True, "sliding_window": 50} if windows else {}
        model = small_model(increment=0.25, **{"text": text})
        prompt = image_prompt()
        embeds = model.get_input_embeddings()(prompt["input_ids"]).detach().requires_grad_()
        where = model.prompt_positions(prompt["input_ids"], None, 0.25)
        for use_cache in (False, True):
            model.train(not use_cache)
            logits = model(inputs_embeds=embeds, position_ids=where, use_cache=use_cache).logits
            (grad,) = torch.autograd.grad(logits[0, -1].square().sum(), embeds)
            assert (grad[0].abs().sum(-1) > 0).all()
