"""The router of a released Flash checkpoint with loops over floats, layer by layer.

Written from the description of the released code: every query, key and value is computed, and the
second layer of attention runs three times. Tensors come as nested lists under the names of the
released files. Shares no code with the package.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from tests.reference import pixel_shuffle_by_hand

Vector = list[float]
Tensors = Mapping[str, list]

RELEASED = (1, 2, 2, 2)
AS_MEANT = (1, 2, 3, 4)


def linear(tensors: Tensors, name: str, x: Vector) -> Vector:
    rows, bias = tensors[f"{name}.weight"], tensors[f"{name}.bias"]
    return [dot(row, x) + b for row, b in zip(rows, bias, strict=True)]


def dot(one: Sequence[float], other: Sequence[float]) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True))


def layer_norm(tensors: Tensors, name: str, x: Vector) -> Vector:
    mean = sum(x) / len(x)
    variance = sum((value - mean) ** 2 for value in x) / len(x)
    weight, bias = tensors[f"{name}.weight"], tensors[f"{name}.bias"]
    scale = 1 / math.sqrt(variance + 1e-5)
    return [(v - mean) * scale * w + b for v, w, b in zip(x, weight, bias, strict=True)]


def gelu(x: Vector) -> Vector:
    return [0.5 * value * (1 + math.erf(value / math.sqrt(2))) for value in x]


def softmax(x: Vector) -> Vector:
    powers = [math.exp(value - max(x)) for value in x]
    return [power / sum(powers) for power in powers]


def attention(
    tensors: Tensors, number: int, query: Vector, patches: list[Vector], heads: int
) -> Vector:
    """Attention of one query; in_proj holds queries, keys and values one below another."""
    name, width = f"pooling_before_gating.attn{number}", len(query)
    weight, bias = tensors[f"{name}.in_proj_weight"], tensors[f"{name}.in_proj_bias"]

    def projected(x: Vector, part: int) -> Vector:
        rows = range(part * width, (part + 1) * width)
        return [dot(weight[row], x) + bias[row] for row in rows]

    q = projected(query, 0)
    keys = [projected(patch, 1) for patch in patches]
    values = [projected(patch, 2) for patch in patches]
    size = width // heads
    found: Vector = []
    for head in range(heads):
        own = slice(head * size, (head + 1) * size)
        weights = softmax([dot(q[own], key[own]) / math.sqrt(size) for key in keys])
        for channel in range(head * size, (head + 1) * size):
            found.append(dot(weights, [value[channel] for value in values]))
    return linear(tensors, f"{name}.out_proj", found)


def probability(
    tensors: Tensors, patches: list[Vector], *, heads: int, layers: Sequence[int] = RELEASED
) -> float:
    """Probability of compressing a tile with these patch features."""
    x = list(tensors["pooling_before_gating.query_token"][0])
    for number in layers:
        found = attention(tensors, number, x, patches, heads)
        x = layer_norm(tensors, f"pooling_before_gating.norm{number}", found)
    for number in range(1, 5):
        block = f"gating.block{number}"
        inner = linear(tensors, f"{block}.3", gelu(linear(tensors, f"{block}.0", x)))
        normed = layer_norm(tensors, f"{block}.5", inner)
        x = [a + b for a, b in zip(x, normed, strict=True)]
    return softmax(linear(tensors, "gating.gate.1", layer_norm(tensors, "gating.gate.0", x)))[0]


def quantile(values: Sequence[float], share: float) -> float:
    """Linear interpolation between the two nearest of the sorted values."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def compressed(chances: Sequence[float], relative: float, absolute: float) -> list[bool]:
    """Which tiles of a request are compressed."""
    border = quantile(chances, relative)
    return [chance > border and chance >= absolute for chance in chances]


def visual_tokens(tensors: Tensors, patches: list[Vector], *, compress: bool) -> list[Vector]:
    """Visual tokens of a tile: mlp1 of squares of 2 x 2 patches, or mlp2 of squares of 4 x 4."""
    side = math.isqrt(len(patches))
    grid = [patches[row * side : (row + 1) * side] for row in range(side)]
    squares = pixel_shuffle_by_hand.shuffle(grid, 4 if compress else 2, "v2")
    made = []
    for token in (token for row in squares for token in row):
        if compress:
            x = layer_norm(tensors, "mlp2.0", token)
            x = gelu(linear(tensors, "mlp2.1", x))
            x = gelu(linear(tensors, "mlp2.4", x))
            made.append(linear(tensors, "mlp2.7", x))
        else:
            x = gelu(linear(tensors, "mlp1.1", layer_norm(tensors, "mlp1.0", token)))
            made.append(linear(tensors, "mlp1.3", x))
    return made
