"""Budgets: by which rule the tiles of a request are compressed, and how many tokens that leaves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.model.small import small_config
from tests.reference import router_by_hand as by_hand

from cascadevl.errors import RequestError
from cascadevl.model.routing import (
    NEVER,
    KeepShare,
    Thresholds,
    budget_for,
    calibrated,
    compressed_tiles,
    most_tokens,
    parse_budget,
    settled,
    tokens_of,
)

CONFIG = small_config(flash_mode=True, flash_heads=3)
CHANCES = st.lists(st.sampled_from([n / 16 for n in range(17)]), min_size=1, max_size=14)
SHARE = st.sampled_from([0.0, 0.1, 0.25, 0.3, 0.5, 0.75, 1.0])


@given(CHANCES, SHARE, SHARE)
def test_thresholds_decide_as_released_code(
    chances: list[float], relative: float, absolute: float
) -> None:
    budget = Thresholds(absolute=absolute, relative=relative)
    found = compressed_tiles(torch.tensor(chances), budget)
    assert found.tolist() == by_hand.compressed(chances, relative, absolute)


def test_a_tile_of_an_absolute_threshold_alone_depends_on_itself_alone() -> None:
    budget = Thresholds(absolute=0.5)
    assert compressed_tiles(torch.tensor([0.5, 0.49, 0.9]), budget).tolist() == [True, False, True]
    assert compressed_tiles(torch.tensor([0.5]), budget).tolist() == [True]


def test_the_quantile_is_compared_in_the_type_of_the_probabilities() -> None:
    """Released models run in bfloat16, in which a quantile between two neighbours is rounded."""
    chances = torch.tensor([0.5, 0.50390625])  # neighbours in bfloat16
    budget = Thresholds(absolute=0.0, relative=0.75)
    assert compressed_tiles(chances, budget).tolist() == [False, True]
    assert compressed_tiles(chances.bfloat16(), budget).tolist() == [False, False]


@given(CHANCES, SHARE)
def test_a_share_keeps_so_many_of_the_least_probable(chances: list[float], share: float) -> None:
    budget = KeepShare(share)
    flags = compressed_tiles(torch.tensor(chances), budget).tolist()
    kept = [chance for chance, flag in zip(chances, flags, strict=True) if not flag]
    assert len(kept) == budget.num_kept(len(chances))
    assert len(kept) - 1 < share * len(chances) <= len(kept) + 1e-9
    others = [chance for chance, flag in zip(chances, flags, strict=True) if flag]
    assert max(kept, default=0.0) <= min(others, default=1.0)


def test_of_equal_tiles_a_share_keeps_the_first() -> None:
    flags = compressed_tiles(torch.full((4,), 0.3), KeepShare(0.5))
    assert flags.tolist() == [False, False, True, True]


@pytest.mark.parametrize(
    ("budget", "number", "whole", "most"),
    [
        ("full", 3, "full", [4, 4, 4]),
        ("compressed", 2, "compressed", [1, 1]),
        (KeepShare(0.5), 3, None, [4, 4, 1]),
        (KeepShare(0.5), 1, "full", [4]),
        (KeepShare(0.0), 2, "compressed", [1, 1]),
        (KeepShare(1.0), 2, "full", [4, 4]),
        (Thresholds(absolute=0.5), 2, None, [4, 4]),
        (Thresholds(absolute=0.5), 0, "full", []),
    ],
)
def test_what_is_known_before_the_router_is_asked(
    budget: Any, number: int, whole: str | None, most: list[int]
) -> None:
    assert settled(budget, number) == whole
    assert list(most_tokens(CONFIG, number, budget)) == most
    generator = torch.Generator().manual_seed(number)
    for _ in range(5):
        flags = compressed_tiles(torch.rand(number, generator=generator), budget)
        counts = tokens_of(CONFIG, flags)
        assert sum(counts) <= sum(most)
        if whole is not None:
            assert list(counts) == most
        if isinstance(budget, KeepShare):
            assert sum(counts) == sum(most)


def test_tokens_of_a_released_tile() -> None:
    vision = small_config().vision_config
    vision.image_size, vision.patch_size = [448, 448], [14, 14]
    config = small_config(flash_mode=True, flash_heads=3)
    config.vision_config = vision
    assert (config.tokens_per_tile, config.compressed_tokens) == (256, 64)
    vision.image_size = [112, 112]
    assert (config.tokens_per_tile, config.compressed_tokens) == (16, 4)
    vision.image_size = [224, 224]
    assert (config.tokens_per_tile, config.compressed_tokens) == (64, 16)


def test_the_budget_of_a_model() -> None:
    assert budget_for(small_config(), None) == budget_for(small_config(), "full") == "full"
    with pytest.raises(RequestError, match="this model has no router"):
        budget_for(small_config(), "compressed")
    assert budget_for(CONFIG, None) == "full"  # not calibrated
    assert budget_for(CONFIG, KeepShare(0.5)) == KeepShare(0.5)
    own = small_config(flash_mode=True, flash_heads=3, flash_absolute_threshold=0.25)
    assert budget_for(own, None) == Thresholds(absolute=0.25)


@given(CHANCES, SHARE)
def test_a_calibrated_threshold_keeps_the_share_as_nearly_as_it_can(
    chances: list[float], share: float
) -> None:
    budget = calibrated(chances, share)
    kept = int((~compressed_tiles(torch.tensor(chances), budget)).sum())
    possible = {sum(chance < border for chance in chances) for border in [*chances, NEVER]}
    assert abs(kept - share * len(chances)) == min(abs(n - share * len(chances)) for n in possible)


def test_a_calibrated_threshold_by_hand() -> None:
    chances = [0.9, 0.1, 0.5, 0.7]
    assert calibrated(chances, 0.5) == Thresholds(absolute=0.6)
    assert calibrated(chances, 0.0) == Thresholds(absolute=0.0)
    assert calibrated(chances, 1.0) == Thresholds(absolute=NEVER)
    with pytest.raises(RequestError, match="no tiles to calibrate"):
        calibrated([], 0.5)
    with pytest.raises(RequestError, match="must lie in 0 to 1"):
        calibrated(chances, 1.5)


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("full", "full"),
        ("compressed", "compressed"),
        ("0.5", KeepShare(0.5)),
        ("50%", KeepShare(0.5)),
        ("0", KeepShare(0.0)),
        ("threshold=0.4", Thresholds(absolute=0.4)),
        ("threshold=0.4,quantile=0.25", Thresholds(absolute=0.4, relative=0.25)),
    ],
)
def test_budgets_as_people_write_them(text: str, budget: Any) -> None:
    assert parse_budget(text) == budget


@pytest.mark.parametrize("text", ["", "half", "quantile=0.5", "threshold=a", "0.5,0.6", "full=1"])
def test_what_is_no_budget_is_answered_with_what_is_one(text: str) -> None:
    with pytest.raises(RequestError, match="is no visual budget; give full, compressed"):
        parse_budget(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [("1.5", "must lie in 0 to 1"), ("-1", "0 to 1"), ("threshold=-1", "at least 0")],
)
def test_numbers_out_of_range_say_so(text: str, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        parse_budget(text)
