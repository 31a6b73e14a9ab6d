"""Generation of Flash models, as released: the tiles of a prompt are routed together.

Held against `tests.reference.router_by_hand`, which computes in loops over floats.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.model import make_flash
from tests.model.flash_tiles import FULL, SMALL, TENSORS, chances_of, patches_of, pixels
from tests.reference import router_by_hand as by_hand
from torch import Tensor

from cascadevl.errors import RequestError
from cascadevl.model.loading import load
from cascadevl.model.modeling import CascadeVLForConditionalGeneration
from cascadevl.model.routing import KeepShare


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> CascadeVLForConditionalGeneration:
    return load(make_flash.write_flash(tmp_path_factory.mktemp("flash") / "github"))[0]


def answer_by_hand(
    model: CascadeVLForConditionalGeneration, ids: list[int], tiles: Tensor, number: int
) -> list[int]:
    """Greedy tokens as released code gets them, with the loops above and no cache."""
    patches = patches_of(model, tiles)
    chances = [by_hand.probability(TENSORS, each, heads=16) for each in patches]
    flags = by_hand.compressed(chances, 0.7, 0.4)
    above = [chance >= 0.4 for chance in chances]
    assert 0 < sum(flags) < sum(above) < len(chances)  # both thresholds matter
    visual = [
        token
        for each, flag in zip(patches, flags, strict=True)
        for token in by_hand.visual_tokens(TENSORS, each, compress=flag)
    ]
    image = model.config.image_token_id
    kept, tile, within = [], 0, 0
    for token in ids:  # a compressed tile keeps the first of its places
        if token != image:
            kept.append(token)
            continue
        if within < (SMALL if flags[tile] else FULL):
            kept.append(token)
        within += 1
        if within == FULL:
            tile, within = tile + 1, 0
    made: list[int] = []
    for _ in range(number):
        embeds = model.get_input_embeddings()(torch.tensor([[*kept, *made]]))
        place = torch.tensor([n for n, token in enumerate(kept) if token == image])
        embeds[0, place] = torch.tensor(visual)
        positions = torch.arange(embeds.shape[1]).float()[None]
        made.append(int(model.decode(embeds, positions).logits[0, -1].argmax()))
    return made


def test_generation_is_that_of_released_code(model: CascadeVLForConditionalGeneration) -> None:
    image = model.config.image_token_id
    tiles = pixels()
    pictures = [[image] * (FULL * number) for number in (4, 3)]
    ids = [100, 101, *pictures[0], 107, 109, *pictures[1], 120, 105]
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    made = model.generate(torch.tensor([ids]), pixel_values=tiles, **settings)
    assert made[0, : len(ids)].tolist() == ids  # the prompt comes back as it was given
    with torch.no_grad():
        assert made[0, len(ids) :].tolist() == answer_by_hand(model, ids, tiles, 6)


def test_a_lone_tile_is_never_compressed(model: CascadeVLForConditionalGeneration) -> None:
    """Its probability is the quantile itself; released code compresses above it only."""
    tile = next(t[None] for t in pixels() if chances_of(model, t[None])[0] > 0.4)
    ids = torch.tensor([[100, *[model.config.image_token_id] * FULL, 107]])
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    routed = model.generate(ids, pixel_values=tile, **settings)
    assert torch.equal(
        routed, model.generate(ids, pixel_values=tile, visual_budget="full", **settings)
    )


@pytest.mark.parametrize("budget", [None, "full", "compressed", KeepShare(0.4)], ids=str)
def test_rows_of_a_batch_are_answered_as_they_are_alone(
    model: CascadeVLForConditionalGeneration, budget: Any
) -> None:
    image = model.config.image_token_id
    rows = [[100, *[image] * (FULL * 3), 107], [*[image] * FULL, 109, *[image] * (FULL * 3)], [101]]
    tiles = pixels()
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    settings |= {"visual_budget": budget, "return_dict_in_generate": True, "output_logits": True}
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    together = model.generate(ids, attention_mask=mask, pixel_values=tiles, **settings)
    assert torch.equal(together.sequences[:, :width], ids)
    for number, (row, own) in enumerate(zip(rows, (tiles[:3], tiles[3:], None), strict=True)):
        alone = model.generate(torch.tensor([row]), pixel_values=own, **settings)
        for one, other in zip(together.logits, alone.logits, strict=True):
            torch.testing.assert_close(one[number], other[0], rtol=0, atol=1e-4)


def test_several_samples_come_behind_the_prompt_as_it_was_given(
    model: CascadeVLForConditionalGeneration,
) -> None:
    image = model.config.image_token_id
    ids = torch.tensor([[100, *[image] * (FULL * 3), 107]])
    made = model.generate(
        ids, pixel_values=pixels(3), num_return_sequences=2, do_sample=True, max_new_tokens=3
    )
    assert torch.equal(made[:, : ids.shape[1]], ids.expand(2, -1))
    assert made.shape[1] <= ids.shape[1] + 3


def test_places_for_other_tiles_are_refused(model: CascadeVLForConditionalGeneration) -> None:
    image = model.config.image_token_id
    ids = torch.tensor([[100, *[image] * (FULL * 2 + 1), 107]])
    with pytest.raises(RequestError, match=r"\[9\] places .* 3 tiles of 4"):
        model.generate(ids, pixel_values=pixels(3), max_new_tokens=2)
