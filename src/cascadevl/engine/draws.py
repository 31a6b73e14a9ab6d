"""From scores to a drawn token: filters, a counter-based random stream, the inverse distribution.

Every function treats each row by itself, down to the order in which its numbers are added up. So a
row gives the same bits whatever stands beside it; sums over whole rows, which torch may split among
threads when there is one row only, are avoided.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Float64, Int64, UInt64
from torch import Tensor
from torch.nn import functional as F

BLOCK = 128
"""Rows of scores are this many tokens wide, or a multiple; see `draw`."""

_GOLDEN = 0x9E3779B97F4A7C15  # splitmix64's step: odd, so that multiples of it are all different
_WORD = 2**64 - 1
_FIRST_WIDTH, _WIDER = 128, 16  # how many of the most probable tokens are looked at for top-p


def stream_of(seed: int, sample: int) -> int:
    """The random stream of one sample of a request.

    Args:
        seed: Of the request, 0 to 2**64 - 1.
        sample: Number of the sample among those of the request.

    Returns:
        A 64-bit number for `uniforms`; those of one seed are all different.
    """
    mixed = _mix(np.array([seed], dtype=np.uint64) + np.uint64(_GOLDEN))
    step = np.uint64((sample + 1) * _GOLDEN & _WORD)
    return int(_mix(mixed + step)[0])


def uniforms(
    streams: UInt64[np.ndarray, " rows"], counters: Int64[np.ndarray, " rows"]
) -> Float64[np.ndarray, " rows"]:
    """One number in [0, 1) for each row: a pure function of its stream and counter.

    There is no state to keep: a sample that was interrupted, or runs beside others, draws what it
    would have drawn alone. The numbers are those of splitmix64 (Steele, Lea and Flood, 2014) in
    random access, with the stream as the seed.

    Args:
        streams: From `stream_of`.
        counters: Number of the token in its answer.
    """
    steps = (counters.astype(np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN)
    top_bits = _mix(streams + steps) >> np.uint64(11)
    return top_bits.astype(np.float64) / 2.0**53


def _mix(words: UInt64[np.ndarray, " rows"]) -> UInt64[np.ndarray, " rows"]:
    """The finaliser of splitmix64: a bijection in which every bit depends on every other."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = words ^ (words >> np.uint64(31))
    return mixed


def scores_of(logits: Float[Tensor, "rows vocab"]) -> Float32[Tensor, "rows width"]:
    """A float32 copy of logits, as wide as the next multiple of `BLOCK`, filled with -inf."""
    return F.pad(logits.float(), (0, -logits.shape[1] % BLOCK), value=float("-inf"))


def widened(mask: Bool[Tensor, "rows vocab"]) -> Bool[Tensor, "rows width"]:
    """A mask as wide as scores are."""
    return F.pad(mask, (0, -mask.shape[1] % BLOCK))


def penalised(
    scores: Float32[Tensor, "rows width"],
    seen: Bool[Tensor, "rows width"],
    penalty: Float32[Tensor, " rows"],
) -> Float32[Tensor, "rows width"]:
    """Make tokens that were seen less likely, as CTRL does (Keskar et al., 2019).

    Args:
        scores: Logits.
        seen: Tokens of the prompt and the answer so far.
        penalty: Positive scores are divided by it, others multiplied.
    """
    factor = penalty[:, None]
    return torch.where(seen, torch.where(scores > 0, scores / factor, scores * factor), scores)


def weights_of(
    scores: Float32[Tensor, "rows width"], temperature: Float64[Tensor, " rows"]
) -> Float32[Tensor, "rows width"]:
    """Probabilities at a temperature above 0.

    The largest score becomes 0 before it is divided, so that no temperature, however small, makes
    infinities meet: all other scores go to -inf, and the most probable tokens share the row.

    Args:
        scores: Logits, at least one of them finite.
        temperature: What they are divided by.
    """
    below = scores - scores.amax(-1, keepdim=True)
    limits = torch.finfo(torch.float32)
    divisor = temperature[:, None].clamp(limits.tiny, limits.max).float()
    return torch.softmax(below.div_(divisor), dim=-1)


def filtered(
    weights: Float32[Tensor, "rows width"],
    top_k: Int64[Tensor, " rows"],
    top_p: Float64[Tensor, " rows"],
    min_p: Float64[Tensor, " rows"],
) -> Float32[Tensor, "rows width"]:
    """Weights with 0 for what is not to be drawn: by top-k, then top-p of the rest, then min-p.

    What weighs as much as the last token of the k, or of the nucleus, stays beside it: no token is
    preferred for its number.

    Args:
        weights: Probabilities after temperature.
        top_k: How many of the most probable; 0 for all.
        top_p: The fewest of the most probable that reach this share of what top-k left; 1 for all.
        min_p: At least this fraction of the largest weight.
    """
    least = (min_p * weights.amax(-1).double()).float()
    some = ((top_k > 0) & (top_k < weights.shape[1])).nonzero()[:, 0]
    kth = torch.zeros_like(least)
    if len(some):
        largest = weights[some].topk(int(top_k[some].max())).values
        kth[some] = largest.gather(1, top_k[some, None] - 1)[:, 0]
    some = (top_p < 1).nonzero()[:, 0]
    if len(some):
        rest = _without_less(weights[some], kth[some])
        least[some] = torch.maximum(least[some], _nucleus_end(rest, top_p[some]))
    return _without_less(weights, torch.maximum(least, kth))


def _without_less(
    weights: Float32[Tensor, "rows width"], least: Float32[Tensor, " rows"]
) -> Float32[Tensor, "rows width"]:
    return weights.masked_fill(weights < least[:, None], 0.0)


def _nucleus_end(
    weights: Float32[Tensor, "rows width"], share: Float64[Tensor, " rows"]
) -> Float32[Tensor, " rows"]:
    """The weight of the token with which the most probable ones reach a share of the sum.

    Sorting a large vocabulary is slow and nearly always needless, as a few tokens hold nearly
    everything: so the largest weights are looked at, and more only where they do not suffice.
    """
    target = share * _block_ends(weights)[:, -1]
    ends = torch.empty_like(weights[:, 0])
    left = torch.arange(len(weights), device=weights.device)
    width = _FIRST_WIDTH
    while len(left):
        width = min(width, weights.shape[1])
        largest = weights[left].topk(width).values
        sums = largest.cumsum(-1, dtype=torch.float64)
        place = torch.searchsorted(sums, target[left, None])
        # In a whole row, rounding may leave the sum below a target close to all of it.
        found = (place[:, 0] < width) | (width == weights.shape[1])
        ends[left[found]] = largest.gather(1, place.clamp(max=width - 1))[found, 0]
        left, width = left[~found], width * _WIDER
    return ends


def draw(
    weights: Float32[Tensor, "rows width"], uniform: Float64[Tensor, " rows"]
) -> Int64[Tensor, " rows"]:
    """The first token, in order of ids, with which the sum of weights exceeds its share.

    The sum of a whole vocabulary in float64 is the slow part. So blocks of tokens are summed up
    first, and only the block in which the token lies is gone through.

    Args:
        weights: Probabilities; they need not sum to 1.
        uniform: From `uniforms`.
    """
    ends = _block_ends(weights)
    target = uniform[:, None] * ends[:, -1:]  # below the last end, as uniform < 1
    block = torch.searchsorted(ends, target, right=True)
    before = F.pad(ends, (1, 0)).gather(1, block)
    places = block * BLOCK + torch.arange(BLOCK, device=weights.device)
    inside = weights.gather(1, places)
    passed = before + inside.cumsum(-1, dtype=torch.float64) <= target
    # The block's sum and its running sum may round differently: never past its last token.
    last = BLOCK - 1 - (inside > 0).flip(1).to(torch.uint8).argmax(1, keepdim=True)
    place = torch.minimum(passed.sum(1, keepdim=True), last)
    return (block * BLOCK + place)[:, 0]


def _block_ends(weights: Float32[Tensor, "rows width"]) -> Float64[Tensor, "rows blocks"]:
    """The running sum of a row at the end of each block."""
    blocks = weights.view(len(weights), -1, BLOCK)
    return blocks.sum(-1, dtype=torch.float64).cumsum(-1)
