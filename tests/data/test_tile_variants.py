"""Variants of an example in one row: their tokens are those of each alone, none of them twice."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tests.invariants.test_flash_rows import BUILDER, EXAMPLES, FULL, SMALL

from cascadevl.data.tile_variants import (
    ALL_FULL,
    VariantConfig,
    VariantRow,
    joined,
    variant_row,
    variant_rows,
)
from cascadevl.sequence import Expanded, expand, tokens_per_image
from cascadevl.types import NO_PARENT, Example

CONFIG = VariantConfig(
    image_token_id=BUILDER.image_token_id, full_tokens=FULL, compressed_tokens=SMALL
)
WITH_TILES = [example for example in EXAMPLES if example.num_tiles]


def alone(example: Example, tile: int, config: VariantConfig = CONFIG) -> Expanded:
    """The tokens of a variant by itself; ``ALL_FULL`` for that without compression."""
    counts = [SMALL if number == tile else FULL for number in range(example.num_tiles)]
    return expand(
        example.input_ids,
        example.trained,
        example.segments,
        example.parents,
        image_token_id=BUILDER.image_token_id,
        tokens_per_image=tokens_per_image(example.tiles_per_image, counts),
        increments=example.increments,
        ceil_after_image=config.ceil_after_image,
    )


def seen(row: VariantRow, place: int) -> list[int]:
    """Places of the tokens that a token sees, itself the last: its chain of segments."""
    chain = [int(row.segments[place])]
    while (parent := row.parents[np.flatnonzero(row.segments == chain[0])[0]]) != NO_PARENT:
        chain.insert(0, int(parent))
    places = [p for segment in chain for p in np.flatnonzero(row.segments == segment).tolist()]
    return places[: places.index(place) + 1]


def seen_alone(expanded: Expanded, parents: tuple[int, ...], place: int) -> list[int]:
    chain = [int(expanded.segments[place])]
    while parents[chain[0]] != NO_PARENT:
        chain.insert(0, parents[chain[0]])
    places = [p for s in chain for p in np.flatnonzero(expanded.segments == s).tolist()]
    return places[: places.index(place) + 1]


@pytest.mark.parametrize("ceil", [False, True])
@pytest.mark.parametrize("example", WITH_TILES, ids=lambda each: each.source)
def test_what_predicts_a_target_sees_what_it_would_see_alone(example: Example, ceil: bool) -> None:
    """Ids, positions, tiles and which of their tokens, in order: the whole input of each score."""
    config = replace(CONFIG, ceil_after_image=ceil)
    row = variant_row(example, range(example.num_tiles), config)
    visual = {
        int(place): (int(tile), int(number), bool(compressed))
        for place, tile, number, compressed in zip(
            row.visual_index,
            row.visual_tile,
            row.visual_number,
            row.visual_compressed,
            strict=True,
        )
    }
    scores = list(zip(row.predictor, row.target, row.variant, strict=True))
    assert {variant for *_, variant in scores} == {ALL_FULL, *range(example.num_tiles)}
    for place, target, variant in scores:
        found = alone(example, int(variant), config)
        starts = np.flatnonzero(np.diff(found.segments, prepend=-1))
        targets = np.flatnonzero(found.trained)
        wanted = int(targets[target])
        segment = int(found.segments[wanted])
        before = wanted - 1
        if wanted in starts:
            before = np.flatnonzero(found.segments == example.parents[segment])[-1]
        expected = seen_alone(found, example.parents, int(before))
        places = seen(row, int(place))
        assert row.input_ids[places].tolist() == found.input_ids[expected].tolist()
        assert row.position_ids[places].tolist() == found.position_ids[expected].tolist()
        counts = [SMALL if n == variant else FULL for n in range(example.num_tiles)]
        tokens = [
            (tile, number, tile == variant)
            for tile, count in enumerate(counts)
            for number in range(count)
        ]
        shown = np.flatnonzero(found.is_visual).tolist()
        assert [visual[p] for p in places if p in visual] == [
            tokens[shown.index(p)] for p in expected if found.is_visual[p]
        ]


def test_every_target_has_a_score_of_every_tile_it_sees() -> None:
    """In branches, the tile before them is seen by all; each target once, each tile once."""
    for example in WITH_TILES:
        row = variant_row(example, range(example.num_tiles), CONFIG)
        (targets,) = row.num_targets
        assert targets == example.trained.sum()
        pairs = list(zip(row.target.tolist(), row.variant.tolist(), strict=True))
        variants = [ALL_FULL, *range(example.num_tiles)]
        assert sorted(pairs) == [(t, variant) for t in range(targets) for variant in variants]


def test_a_branch_without_the_tile_has_no_score_of_it() -> None:
    """Two branches, a picture in the first alone: the second does not see it."""
    picture = WITH_TILES[0]
    question = np.array([211, 345, 358])
    inside = picture.input_ids
    both = replace(
        picture,
        input_ids=np.concatenate([question, inside, question]),
        trained=np.concatenate([np.zeros(3, bool), picture.trained, np.ones(3, bool)]),
        segments=np.repeat([0, 1, 2], [3, len(inside), 3]),
        parents=(NO_PARENT, 0, 0),
    )
    row = variant_row(both, range(both.num_tiles), CONFIG)
    (targets,) = row.num_targets
    second = set(range(targets - 3, targets))
    assert second & set(row.target[row.variant == ALL_FULL].tolist()) == second
    assert not second & set(row.target[row.variant != ALL_FULL].tolist())


def test_nothing_before_a_tile_is_there_twice() -> None:
    example = WITH_TILES[0]
    row = variant_row(example, range(example.num_tiles), CONFIG)
    trunk = alone(example, ALL_FULL)
    starts = np.flatnonzero(trunk.is_visual)[::FULL]
    length = len(trunk.input_ids)
    assert len(row) == length + sum(length - start - (FULL - SMALL) for start in starts)
    assert len(row) < (example.num_tiles + 1) * (length - FULL + SMALL)


def test_long_rows_are_parted_between_tiles() -> None:
    example = WITH_TILES[1]
    whole = variant_row(example, range(example.num_tiles), CONFIG)
    parts = variant_rows(example, CONFIG, max_tokens=len(whole) // 2)
    assert len(parts) > 2
    assert all(len(part) <= len(whole) // 2 for part in parts)
    tiles = [sorted({*part.variant.tolist()} - {ALL_FULL}) for part in parts]
    assert [tile for part in tiles for tile in part] == list(range(example.num_tiles))
    assert len(variant_rows(example, CONFIG, max_tokens=len(whole))) == 1
    # A tile that fits nowhere still gets a row: the trunk with one branch.
    assert len(variant_rows(example, CONFIG, max_tokens=1)) == example.num_tiles


def test_rows_side_by_side_keep_their_numbers_apart() -> None:
    rows = [variant_row(each, range(each.num_tiles), CONFIG) for each in WITH_TILES]
    row = joined(rows)
    assert len(row) == sum(map(len, rows))
    tokens = segments = tiles = targets = scores = visual = 0
    for each in rows:
        part = slice(tokens, tokens + len(each))
        assert (row.input_ids[part] == each.input_ids).all()
        assert (row.segments[part] - segments == each.segments).all()
        chained = each.parents != NO_PARENT
        assert (row.parents[part][chained] - segments == each.parents[chained]).all()
        assert (row.parents[part][~chained] == NO_PARENT).all()
        part = slice(scores, scores + len(each.target))
        assert (row.predictor[part] - tokens == each.predictor).all()
        assert (row.target[part] - targets == each.target).all()
        full = each.variant == ALL_FULL
        assert (row.variant[part][full] == ALL_FULL).all()
        assert (row.variant[part][~full] - tiles == each.variant[~full]).all()
        part = slice(visual, visual + len(each.visual_tile))
        assert (row.visual_index[part] - tokens == each.visual_index).all()
        assert (row.visual_tile[part] - tiles == each.visual_tile).all()
        tokens, segments = tokens + len(each), segments + int(each.segments.max()) + 1
        tiles, targets = tiles + each.num_tiles[0], targets + each.num_targets[0]
        scores, visual = scores + len(each.target), visual + len(each.visual_tile)
