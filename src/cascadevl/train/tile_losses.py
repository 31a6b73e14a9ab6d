"""How much it matters that a tile is compressed: the losses that the router's labels are made of.

For each tile of a record the model is asked with this tile compressed and all others full, and
compared with the reference, the model before ViCO with all tiles full (InternVL3.5 report, ViCO,
stage 2; docs/decisions/0030). Packed rows share what stands before a tile
(`cascadevl.data.tile_variants`), and each picture is encoded once by either model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from cascadevl.data.collate import num_tokens
from cascadevl.data.stream import CollateConfig
from cascadevl.data.tile_variants import (
    ALL_FULL,
    VariantConfig,
    VariantRow,
    joined,
    variant_rows,
)
from cascadevl.data.tiling import normalise
from cascadevl.errors import TrainingError
from cascadevl.losses.vico import whole_kl
from cascadevl.model.head import CHUNK_BYTES
from cascadevl.model.modeling import CascadeVLForConditionalGeneration
from cascadevl.types import Example


@dataclass(frozen=True, slots=True, kw_only=True)
class Losses:
    """What was measured of an example: means of KL(reference || model) over its response.

    Attributes:
        full: With all tiles full.
        compressed: With one tile compressed, for each tile.
        tokens: Tokens that either model read for it.
    """

    full: float
    compressed: tuple[float, ...]
    tokens: int


class Measure:
    """Measures examples with the model and the reference."""

    def __init__(
        self,
        model: CascadeVLForConditionalGeneration,
        reference: CascadeVLForConditionalGeneration,
        collate: CollateConfig,
        *,
        row_tokens: int,
    ) -> None:
        """Bind both models.

        Args:
            model: The model after ViCO, with a projector of compressed tiles.
            reference: The model before it; the same one where there is none.
            collate: How rows become tensors for either.
            row_tokens: Tokens of a row of variants, where one example does not need more.
        """
        self._model, self._reference, self._collate = model, reference, collate
        self._variants = VariantConfig(
            image_token_id=collate.image_token_id,
            full_tokens=collate.tokens_per_tile,
            compressed_tokens=model.config.compressed_tokens,
            ceil_after_image=collate.ceil_after_image,
        )
        self._row_tokens = row_tokens

    @torch.no_grad()
    def __call__(self, examples: Sequence[Example]) -> list[Losses]:
        """The losses of some examples.

        Args:
            examples: Each with at least one tile.

        Raises:
            TrainingError: If a loss is not finite.
        """
        made = [_Encoded.of(example, self._model, self._states_of) for example in examples]
        full = [0.0] * len(examples)
        more = [torch.zeros(example.num_tiles, dtype=torch.float64) for example in examples]
        tokens = [num_tokens(example, self._variants.full_tokens) for example in examples]
        for rows in self._packed(examples):
            numbers = [number for number, _ in rows]
            row = joined([each for _, each in rows])
            kl = self._divergences(row, [made[number] for number in numbers])
            for (number, own), mean, excess in zip(rows, *_means(row, kl), strict=True):
                full[number] = mean
                more[number] += excess
                tokens[number] += len(own)
        found = zip(examples, full, more, tokens, strict=True)
        return [_checked(example, mean, excess, count) for example, mean, excess, count in found]

    def _packed(self, examples: Sequence[Example]) -> Iterator[list[tuple[int, VariantRow]]]:
        """Rows of variants with the numbers of their examples, as many as share a long row."""
        ready: list[tuple[int, VariantRow]] = []
        room = self._row_tokens
        for number, example in enumerate(examples):
            for row in variant_rows(example, self._variants, max_tokens=self._row_tokens):
                if ready and len(row) > room:
                    yield ready
                    ready, room = [], self._row_tokens
                ready.append((number, row))
                room -= len(row)
        if ready:
            yield ready

    def _states_of(self, example: Example) -> Float[Tensor, "targets hidden"]:
        """What the reference's head reads where the targets are predicted, all tiles full."""
        body = self._reference.model
        batch = self._collate([[example]]).to(self._reference.device)
        assert batch.tiles is not None, "the example has tiles"
        visual = body.encode(batch.tiles, batch.tokens_per_tile)
        embeds = body.embed(batch.input_ids, batch.visual_index, visual)
        layout = body.layout(batch.segments, batch.parents)
        hidden = body.run_text(embeds, batch.position_ids, layout)
        return hidden.flatten(0, 1)[batch.target_index]

    def _divergences(self, row: VariantRow, made: Sequence[_Encoded]) -> Float[Tensor, " scores"]:
        """KL(reference || model) at each score of a row."""
        device = self._model.device
        states = self._hidden(row, made)
        wanted = torch.cat([each.states for each in made])
        target = _tensor(row.target, device)
        size = max(1, CHUNK_BYTES // (4 * self._model.config.text_config.vocab_size))
        found = states.new_empty(len(target), dtype=torch.float32)
        # All variants of a target side by side: the reference's logits are computed once for them.
        for part in target.argsort(stable=True).split(size):
            own, place = target[part].unique(return_inverse=True)
            reference = self._reference.lm_head(wanted[own])[place]
            found[part] = whole_kl(self._model.lm_head(states[part]), reference)
        return found

    def _hidden(self, row: VariantRow, made: Sequence[_Encoded]) -> Float[Tensor, "scores hidden"]:
        """What the model's head reads at each score of a row."""
        body, device = self._model.model, self._model.device
        full = torch.cat([each.full for each in made])
        small = torch.cat([each.compressed for each in made])
        tile, number = _tensor(row.visual_tile, device), _tensor(row.visual_number, device)
        is_small = torch.from_numpy(row.visual_compressed).to(device)
        visual = full.new_empty(len(tile), full.shape[-1])
        visual[~is_small] = full[tile[~is_small], number[~is_small]]
        visual[is_small] = small[tile[is_small], number[is_small]]
        ids, positions, segments, parents = (
            torch.from_numpy(values)[None].to(device)
            for values in (row.input_ids, row.position_ids, row.segments, row.parents)
        )
        embeds = body.embed(ids, _tensor(row.visual_index, device), visual)
        hidden = body.run_text(embeds, positions, body.layout(segments, parents))
        return hidden[0, _tensor(row.predictor, device)]


@dataclass(frozen=True, slots=True, eq=False)
class _Encoded:
    """An example as either model has seen it.

    Attributes:
        full: Visual tokens of every tile, full.
        compressed: The same, compressed.
        states: What the reference's head reads where the targets are predicted.
    """

    full: Float[Tensor, "tiles full hidden"]
    compressed: Float[Tensor, "tiles compressed hidden"]
    states: Float[Tensor, "targets reference_hidden"]

    @classmethod
    def of(
        cls,
        example: Example,
        model: CascadeVLForConditionalGeneration,
        states: Callable[[Example], Tensor],
    ) -> _Encoded:
        body = model.model
        assert body.compressed_projector is not None, "the recipe has looked"
        patches = body.patch_features(normalise(example.tiles, model.device))
        return cls(
            full=body.multi_modal_projector(patches),
            compressed=body.compressed_projector(patches),
            states=states(example),
        )


def _checked(example: Example, full: float, excess: Float[Tensor, " tiles"], tokens: int) -> Losses:
    """The losses of an example, if they are numbers.

    Raises:
        TrainingError: If they are not.
    """
    losses = Losses(full=full, compressed=tuple((full + excess).tolist()), tokens=tokens)
    if not all(map(math.isfinite, (full, *losses.compressed))):
        raise TrainingError(
            f"{example.source}: the loss with all tiles full is {full}, with one compressed "
            f"{losses.compressed}; look at the model, at router.reference and at this sample"
        )
    return losses


def _means(
    row: VariantRow, kl: Float[Tensor, " scores"]
) -> tuple[list[float], tuple[Float[Tensor, " tiles"], ...]]:
    """Of each example, the mean of the trunk, and what compressing each tile adds to it."""
    target, variant = torch.from_numpy(row.target), torch.from_numpy(row.variant)
    values, is_trunk = kl.double().cpu(), variant == ALL_FULL
    trunk = torch.zeros(sum(row.num_targets), dtype=torch.float64)
    trunk[target[is_trunk]] = values[is_trunk]
    added = torch.zeros(sum(row.num_tiles), dtype=torch.float64)
    added.index_add_(0, variant[~is_trunk], (values - trunk[target])[~is_trunk])
    means = [float(part.mean()) for part in trunk.split(row.num_targets)]
    excess = zip(added.split(row.num_tiles), row.num_targets, strict=True)
    return means, tuple(part / number for part, number in excess)


def _tensor(values: Int64[np.ndarray, " values"], device: torch.device) -> Tensor:
    return torch.from_numpy(values).to(device)
