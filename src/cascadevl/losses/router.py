"""What the router learns from, and how: labels of tiles, and the cross-entropy.

InternVL3.5 report, section on visual consistency learning (ViCO), stage 2. With everything but the
router frozen, ``r_i = L(y | tile i compressed) / L(y | all tiles full)``, where L is the mean
KL(reference || model) over the response (`cascadevl.losses.vico.whole_kl`). A tile is to be kept
where ``r_i >= tau``, a percentile of the latest ratios, so that both labels are equally frequent.
The denominator is the same for all tiles of a sample and may be next to nothing: what is done about
that is ours (docs/decisions/0030).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

LabelForm: TypeAlias = Literal["ratio", "difference"]
"""What is compared with the threshold: the report's ratio of losses, or their difference."""

COMPRESS, KEEP = 0, 1
"""The labels, and the places of their logits."""

_CELLS = 2**22
"""Values of all windows that are sorted at once."""


def sliding_quantile(
    values: Float[Tensor, " values"], quantile: float, window: int
) -> Float[Tensor, " values"]:
    """For each value a quantile of the latest ones, itself included.

    The first values have too few before them, so all of the first window are compared with that
    whole window: a quantile of three values would label by chance.

    Args:
        values: In the order in which they were measured.
        quantile: 0 to 1, interpolated linearly.
        window: How many values are the latest ones.
    """
    if not len(values):
        return values
    width = min(window, len(values))
    windows = values.unfold(0, width, 1)
    found = [
        torch.quantile(part, quantile, dim=1) for part in windows.split(max(1, _CELLS // width))
    ]
    filled = torch.cat(found)
    return torch.cat([filled[:1].expand(width - 1), filled])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TileLabels:
    """What became of measured losses.

    Attributes:
        keep: Whether a tile is to keep all its visual tokens (the report's label 1).
        measure: What was compared: ``r_i``, or the difference.
        threshold: With what it was compared, tile by tile.
        floored: Of each sample, whether its full loss is below the floor, which stands instead.
    """

    keep: Bool[Tensor, " tiles"]
    measure: Float[Tensor, " tiles"]
    threshold: Float[Tensor, " tiles"]
    floored: Bool[Tensor, " samples"]


def tile_labels(
    compressed: Float[Tensor, " tiles"],
    full: Float[Tensor, " samples"],
    sample: Int64[Tensor, " tiles"],
    *,
    form: LabelForm,
    percentile: float,
    window: int,
    floor: float,
) -> TileLabels:
    """Labels of tiles, from the losses with and without each of them compressed.

    Args:
        compressed: Loss of the tile's sample where this tile alone is compressed.
        full: Loss of each sample where no tile is.
        sample: The sample of each tile.
        form: What is compared with the threshold.
        percentile: Of the latest tiles; so large a part of them is to be compressed.
        window: How many tiles, and for the floor how many samples, are the latest ones.
        floor: Least denominator of a ratio, as a share of the median of the latest full losses.
    """
    least = floor * sliding_quantile(full, 0.5, window)
    if form == "ratio":
        measure = compressed / torch.maximum(full, least)[sample]
    else:
        measure = compressed - full[sample]
    threshold = sliding_quantile(measure, percentile / 100, window)
    return TileLabels(
        keep=measure >= threshold, measure=measure, threshold=threshold, floored=full < least
    )


def variance_between(
    values: Float[Tensor, " tiles"], sample: Int64[Tensor, " tiles"]
) -> Float[Tensor, ""]:
    """Share of the variance of some values that lies between samples; the rest lies within them.

    Labels whose variance lies between samples say which samples are hard, not which tiles matter.

    Args:
        values: One a tile: labels as 0 and 1, or what they were made of.
        sample: The sample of each tile, from 0 upwards.

    Returns:
        0 to 1; 0 where the values do not vary.
    """
    count = torch.bincount(sample)
    sums = values.new_zeros(len(count)).index_add(0, sample, values)
    means = (sums / count.clamp(min=1))[sample]
    centre = values.mean()
    whole = (values - centre).square().sum()
    between = (means - centre).square().sum()
    return torch.where(whole > 0, between / whole.clamp(min=torch.finfo(whole.dtype).tiny), 0.0)


def balanced_weights(keep: Bool[Tensor, " tiles"]) -> Float[Tensor, " tiles"]:
    """Weights with which both labels count alike, 1 on average; 1 each where there is but one.

    Args:
        keep: The labels.
    """
    number, kept = len(keep), int(keep.sum())
    if kept in (0, number):
        return torch.ones(number)
    return torch.where(keep, number / (2 * kept), number / (2 * (number - kept)))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RouterTerms:
    """One batch's shares of what a step of training comes to; the shares of its batches add up.

    Attributes:
        loss: Weighted mean cross-entropy, the only one with a gradient.
        accuracy: Weighted share of tiles whose label has at least half of the probability.
        kept: Weighted share of tiles that the router would keep at one half.
    """

    loss: Float[Tensor, ""]
    accuracy: Float[Tensor, ""]
    kept: Float[Tensor, ""]


def router_loss(
    logits: Float[Tensor, "tiles 2"],
    keep: Bool[Tensor, " tiles"],
    weights: Float[Tensor, " tiles"],
    weight_sum: float | Float[Tensor, ""],
) -> RouterTerms:
    """This batch's share of the step's loss: ``sum_i w_i CE_i / sum_j w_j``.

    Args:
        logits: The gate of each tile: to compress it, to keep it.
        keep: The labels.
        weights: Of the tiles (`balanced_weights`).
        weight_sum: Sum of the weights of the whole step of training, over all micro-batches and
            all ranks.
    """
    logprobs = logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    nll = -torch.where(keep, logprobs[:, KEEP], logprobs[:, COMPRESS])
    shares = weights.to(nll.dtype) / weight_sum
    says_keep = logprobs[:, KEEP] >= logprobs[:, COMPRESS]
    return RouterTerms(
        loss=torch.dot(nll, shares),
        accuracy=(shares * (says_keep == keep)).sum(),
        kept=(shares * says_keep).sum(),
    )
