"""Attention of packed rows token by token, in Python floats: slow, and with nothing to go wrong.

Shares no code with the package. A token sees the tokens of its segment's ancestors and those of its
own segment up to itself; of these, with a window, only the last ``window``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

Vector = Sequence[float]


def seen_by(
    token: int, segments: Sequence[int], parents: Sequence[int], window: int | None
) -> list[int]:
    """The tokens of one row that a token sees, oldest first."""
    if segments[token] == -1:
        return []
    own = [t for t in range(token + 1) if segments[t] == segments[token]]
    chain: list[int] = []
    segment = parents[token]
    while segment != -1:
        members = [t for t in range(len(segments)) if segments[t] == segment]
        chain = members + chain
        segment = parents[members[0]]
    seen = chain + own
    return seen if window is None else seen[-window:]


def attend(
    query: Vector,
    keys: Sequence[Vector],
    values: Sequence[Vector],
    scaling: float,
    sink: float | None,
) -> list[float]:
    """One query of one head: softmax of scaled products (and a sink without value) over values."""
    scores = [scaling * sum(q * k for q, k in zip(query, key, strict=True)) for key in keys]
    top = max(scores)
    weights = [math.exp(score - top) for score in scores]
    total = sum(weights) + (0.0 if sink is None else math.exp(sink - top))
    return [
        sum(weight * value[channel] for weight, value in zip(weights, values, strict=True)) / total
        for channel in range(len(values[0]))
    ]


def packed(
    query: Sequence,  # [heads][tokens][dim]
    key: Sequence,  # [kv heads][tokens][dim]
    value: Sequence,
    segments: Sequence[int],
    parents: Sequence[int],
    *,
    scaling: float,
    window: int | None = None,
    sinks: Sequence[float] | None = None,
) -> list[list[list[float]]]:
    """One packed row: [tokens][heads][dim], zeros for padding."""
    group = len(query) // len(key)
    rows = []
    for token in range(len(segments)):
        seen = seen_by(token, segments, parents, window)
        heads = []
        for head in range(len(query)):
            shared = head // group
            if not seen:
                heads.append([0.0] * len(query[0][0]))
                continue
            heads.append(
                attend(
                    query[head][token],
                    [key[shared][t] for t in seen],
                    [value[shared][t] for t in seen],
                    scaling,
                    None if sinks is None else sinks[head],
                )
            )
        rows.append(heads)
    return rows
