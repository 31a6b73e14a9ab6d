"""An example with each of its tiles compressed in turn, as one row that computes nothing twice.

The labels of the router need the loss with tile i compressed and all others full, for every i
(docs/decisions/0030). What stands before a tile is the same with and without its compression, so it
is computed once: the example with all tiles full is the trunk of a tree, and each variant branches
off where its tile begins. Tokens and positions are those that `cascadevl.sequence.expand` gives
the variant alone, so its numbers are those of a row of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from jaxtyping import Bool, Float, Int64

from cascadevl.sequence import Expanded, expand, tokens_per_image
from cascadevl.types import NO_PARENT, Example


@dataclass(frozen=True, slots=True, kw_only=True)
class VariantConfig:
    """What the model makes of tiles and places.

    Attributes:
        image_token_id: The image-context token.
        full_tokens: Visual tokens of a full tile.
        compressed_tokens: Visual tokens of a compressed one.
        ceil_after_image: Round the position up after each image.
    """

    image_token_id: int
    full_tokens: int
    compressed_tokens: int
    ceil_after_image: bool = False


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class VariantRow:
    """A row of examples with variants. Numbers of tiles and targets count through the row.

    Attributes:
        input_ids: Token ids.
        position_ids: Where each token sits.
        segments: Segment of each token.
        parents: The parent of each token's segment, or ``NO_PARENT``.
        visual_index: Place of every visual token.
        visual_tile: The tile it is of.
        visual_number: Which of the tile's visual tokens it is.
        visual_compressed: Whether the tile is compressed there.
        predictor: Place of the hidden state whose distribution is wanted.
        target: The target that it predicts: a token of the example, the same in all variants.
        variant: The tile that is compressed; -1 where none is.
        num_tiles: Tiles of each example.
        num_targets: Targets of each example.
    """

    input_ids: Int64[np.ndarray, " tokens"]
    position_ids: Float[np.ndarray, " tokens"]
    segments: Int64[np.ndarray, " tokens"]
    parents: Int64[np.ndarray, " tokens"]
    visual_index: Int64[np.ndarray, " visual"]
    visual_tile: Int64[np.ndarray, " visual"]
    visual_number: Int64[np.ndarray, " visual"]
    visual_compressed: Bool[np.ndarray, " visual"]
    predictor: Int64[np.ndarray, " scores"]
    target: Int64[np.ndarray, " scores"]
    variant: Int64[np.ndarray, " scores"]
    num_tiles: tuple[int, ...]
    num_targets: tuple[int, ...]

    def __len__(self) -> int:
        """Tokens of the row."""
        return len(self.input_ids)


ALL_FULL = -1
"""The variant in which no tile is compressed."""


def variant_row(example: Example, tiles: Sequence[int], config: VariantConfig) -> VariantRow:
    """The trunk of an example, and a branch for each of some tiles.

    Targets that do not see a tile, in another branch of the example, have no score of its variant:
    theirs is that of the trunk.

    Args:
        example: The example; the tokens of its tiles are not said.
        tiles: Which tiles are compressed in turn.
        config: What the model makes of it.
    """
    trunk = _Trunk.of(example, config)
    pieces = [trunk.piece()]
    segments, tokens = trunk.num_segments, len(trunk.expanded.input_ids)
    for tile in tiles:
        piece = trunk.branch(tile, first_segment=segments, first_token=tokens)
        segments, tokens = int(piece.segments.max()) + 1, tokens + len(piece)
        pieces.append(piece)
    return _concatenated(pieces, (example.num_tiles,), (len(trunk.targets),))


def variant_rows(example: Example, config: VariantConfig, *, max_tokens: int) -> list[VariantRow]:
    """All variants of an example, in as few rows as their lengths allow; each begins anew.

    Args:
        example: The example, with at least one tile.
        config: What the model makes of it.
        max_tokens: Most tokens of a row, unless the trunk and one branch have more.
    """
    trunk = _Trunk.of(example, config)
    length = len(trunk.expanded.input_ids)
    rows: list[list[int]] = []
    left = 0
    for tile in range(example.num_tiles):
        size = trunk.branch_length(tile)
        if not rows or size > left:
            rows.append([])
            left = max_tokens - length
        rows[-1].append(tile)
        left -= size
    return [variant_row(example, tiles, config) for tiles in rows]


def joined(rows: Sequence[VariantRow]) -> VariantRow:
    """Rows of several examples, or several of one, side by side as one row.

    Args:
        rows: At least one. Each brings the tiles and targets of its example along.
    """
    moved = []
    tokens = segments = tiles = targets = 0
    for row in rows:
        parents = np.where(row.parents == NO_PARENT, NO_PARENT, row.parents + segments)
        moved.append(
            VariantRow(
                input_ids=row.input_ids,
                position_ids=row.position_ids,
                segments=row.segments + segments,
                parents=parents,
                visual_index=row.visual_index + tokens,
                visual_tile=row.visual_tile + tiles,
                visual_number=row.visual_number,
                visual_compressed=row.visual_compressed,
                predictor=row.predictor + tokens,
                target=row.target + targets,
                variant=np.where(row.variant == ALL_FULL, ALL_FULL, row.variant + tiles),
                num_tiles=row.num_tiles,
                num_targets=row.num_targets,
            )
        )
        tokens += len(row)
        segments += int(row.segments.max()) + 1
        tiles += sum(row.num_tiles)
        targets += sum(row.num_targets)
    return _concatenated(
        moved,
        tuple(number for row in rows for number in row.num_tiles),
        tuple(number for row in rows for number in row.num_targets),
    )


def _concatenated(
    pieces: Sequence[VariantRow], num_tiles: tuple[int, ...], num_targets: tuple[int, ...]
) -> VariantRow:
    names = [field.name for field in fields(VariantRow) if not field.name.startswith("num_")]
    arrays = {name: np.concatenate([getattr(piece, name) for piece in pieces]) for name in names}
    return VariantRow(**arrays, num_tiles=num_tiles, num_targets=num_targets)


@dataclass(frozen=True, slots=True)
class _Trunk:
    """An example with all tiles full, its segments cut where tiles begin.

    Attributes:
        example: The example.
        config: What the model makes of it.
        expanded: Its tokens.
        segments: Segment of each token, cut.
        parents: The parent of each of these.
        tile_starts: Where each tile begins.
        predictor: The token that predicts each token; -1 for the first of a conversation.
        targets: The tokens that are to be predicted.
    """

    example: Example
    config: VariantConfig
    expanded: Expanded
    segments: Int64[np.ndarray, " tokens"]
    parents: Int64[np.ndarray, " segments"]
    tile_starts: Int64[np.ndarray, " tiles"]
    predictor: Int64[np.ndarray, " tokens"]
    targets: Int64[np.ndarray, " targets"]

    @classmethod
    def of(cls, example: Example, config: VariantConfig) -> _Trunk:
        expanded = _expanded(example, config, None)
        whole, own = expanded.segments, np.asarray(example.parents)
        tile_starts = np.flatnonzero(expanded.is_visual)[:: config.full_tokens]
        starts, ends = _borders(whole)
        cuts = np.union1d(starts, tile_starts)
        segments = np.searchsorted(cuts, np.arange(len(whole)), side="right") - 1
        parents = np.arange(len(cuts)) - 1  # a cut segment continues the one before it
        parents[segments[starts]] = np.where(own == NO_PARENT, NO_PARENT, segments[ends[own]])
        predictor = _predictors(whole, own)
        targets = np.flatnonzero(expanded.trained & (predictor >= 0))
        return cls(example, config, expanded, segments, parents, tile_starts, predictor, targets)

    @property
    def num_segments(self) -> int:
        return len(self.parents)

    def piece(self) -> VariantRow:
        """The trunk itself."""
        visual = np.flatnonzero(self.expanded.is_visual)
        tile, number = np.divmod(np.arange(len(visual)), self.config.full_tokens)
        return VariantRow(
            input_ids=self.expanded.input_ids,
            position_ids=self.expanded.position_ids,
            segments=self.segments,
            parents=self.parents[self.segments],
            visual_index=visual,
            visual_tile=tile,
            visual_number=number,
            visual_compressed=np.zeros(len(visual), dtype=np.bool_),
            predictor=self.predictor[self.targets],
            target=np.arange(len(self.targets)),
            variant=np.full(len(self.targets), ALL_FULL),
            num_tiles=(),
            num_targets=(),
        )

    def branch_length(self, tile: int) -> int:
        """Tokens of `branch`."""
        saved = self.config.full_tokens - self.config.compressed_tokens
        return int(self._changed(self.expanded, int(self.tile_starts[tile])).sum()) - saved

    def branch(self, tile: int, *, first_segment: int, first_token: int) -> VariantRow:
        """What is another where a tile is compressed: the tile, and all that sees it.

        Args:
            tile: The tile.
            first_segment: Number of the branch's first segment.
            first_token: Place of its first token in the row.
        """
        start, small = int(self.tile_starts[tile]), self.config.compressed_tokens
        saved = self.config.full_tokens - small
        expanded = _expanded(self.example, self.config, tile)
        changed = self._changed(expanded, start)
        own = np.flatnonzero(changed)
        in_trunk = np.arange(len(changed))  # the trunk's token for each token of the variant
        in_trunk[start + small :] += saved
        place = in_trunk.copy()  # of each token of the variant in the row
        place[own] = first_token + np.arange(len(own))
        predictor = _predictors(expanded.segments, np.asarray(self.example.parents))
        targets = own[expanded.trained[own] & (predictor[own] >= 0)]
        counts = np.full(len(self.tile_starts), self.config.full_tokens)
        counts[tile] = small
        tiles = np.repeat(np.arange(len(counts)), counts)
        numbers = np.arange(len(tiles)) - np.repeat(np.cumsum(counts) - counts, counts)
        visual = np.flatnonzero(expanded.is_visual)
        seen = changed[visual]
        segments, parents = self._branch_segments(expanded.segments[own], start, first_segment)
        return VariantRow(
            input_ids=expanded.input_ids[own],
            position_ids=expanded.position_ids[own],
            segments=segments,
            parents=parents,
            visual_index=place[visual[seen]],
            visual_tile=tiles[seen],
            visual_number=numbers[seen],
            visual_compressed=tiles[seen] == tile,
            predictor=place[predictor[targets]],
            target=np.searchsorted(self.targets, in_trunk[targets]),
            variant=np.full(len(targets), tile),
            num_tiles=(),
            num_targets=(),
        )

    def _changed(self, expanded: Expanded, start: int) -> Bool[np.ndarray, " tokens"]:
        """Which tokens see a tile that begins at ``start``, its own included."""
        reached = np.zeros(len(self.example.parents), dtype=np.bool_)
        reached[expanded.segments[start]] = True
        for number, parent in enumerate(self.example.parents):  # parents stand before children
            reached[number] |= parent != NO_PARENT and bool(reached[parent])
        seen: Bool[np.ndarray, " tokens"] = reached[expanded.segments]
        return seen & (np.arange(len(seen)) >= start)

    def _branch_segments(
        self, whole: Int64[np.ndarray, " own"], start: int, first_segment: int
    ) -> tuple[Int64[np.ndarray, " own"], Int64[np.ndarray, " own"]]:
        """Segments and parents of a branch's tokens, given their segments of the example."""
        names, local = np.unique(whole, return_inverse=True)
        above = np.asarray(self.example.parents)[names]
        parents = np.searchsorted(names, above) + first_segment
        parents[0] = self.parents[self.segments[start]]  # what the tile itself continues
        return local + first_segment, parents[local]


def _borders(
    segments: Int64[np.ndarray, " tokens"],
) -> tuple[Int64[np.ndarray, " segments"], Int64[np.ndarray, " segments"]]:
    """First and last token of each segment."""
    starts = np.flatnonzero(np.diff(segments, prepend=-1))
    return starts, np.append(starts[1:], len(segments)) - 1


def _predictors(
    segments: Int64[np.ndarray, " tokens"], parents: Int64[np.ndarray, " segments"]
) -> Int64[np.ndarray, " tokens"]:
    """The token that predicts each token; -1 for the first one of a conversation."""
    starts, ends = _borders(segments)
    predictor = np.arange(len(segments)) - 1
    predictor[starts] = np.where(parents == NO_PARENT, -1, ends[parents])
    return predictor


def _expanded(example: Example, config: VariantConfig, compressed: int | None) -> Expanded:
    """The tokens of an example with all tiles full, or one of them compressed."""
    counts = [config.full_tokens] * example.num_tiles
    if compressed is not None:
        counts[compressed] = config.compressed_tokens
    return expand(
        example.input_ids,
        example.trained,
        example.segments,
        example.parents,
        image_token_id=config.image_token_id,
        tokens_per_image=tokens_per_image(example.tiles_per_image, counts),
        increments=example.increments,
        ceil_after_image=config.ceil_after_image,
        source=example.source,
    )
