"""A prompt and the answers that were drawn for it, as one example.

The prompt is the very `Example` that the engine answered, tiles and increments included, and the
answers are the very tokens that were drawn: nothing is rendered, cut or tokenised a second time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from cascadevl.data.collate import num_tokens
from cascadevl.types import NO_PARENT, Example


def group_example(
    prompt: Example, answers: Sequence[Sequence[int]], increments: Sequence[float]
) -> Example:
    """Answers that share their prompt: segment 0 is the prompt, each answer continues it.

    Args:
        prompt: What was asked.
        answers: Tokens of the answers as they were drawn, all of them trained; none is empty.
        increments: Position step with which each picture was read (`Completion.increments`).
    """
    lengths = [len(prompt.input_ids), *map(len, answers)]
    return replace(
        prompt,
        input_ids=np.concatenate([prompt.input_ids, *(np.asarray(each) for each in answers)]),
        trained=np.repeat(np.arange(len(lengths)) > 0, lengths),
        segments=np.repeat(np.arange(len(lengths)), lengths),
        parents=(NO_PARENT, *(0 for _ in answers)),
        increments=tuple(increments),
    )


def parts_within(
    prompt: Example, lengths: Sequence[int], *, max_tokens: int, tokens_per_tile: int
) -> list[list[int]]:
    """Which answers share a row, where a group is too long for one: in their order, without gaps.

    Args:
        prompt: What all of them share, once in each row.
        lengths: Tokens of each answer.
        max_tokens: Most tokens of a row; at least those of the prompt and any one answer.
        tokens_per_tile: Visual tokens of a tile.
    """
    room = max_tokens - num_tokens(prompt, tokens_per_tile)
    parts: list[list[int]] = []
    left = 0
    for number, size in enumerate(lengths):
        assert size <= room, "the limits of prompts and answers fit a row"
        if size > left:
            parts.append([])
            left = room
        parts[-1].append(number)
        left -= size
    return parts
