"""Where the tokens of a request sit: variable visual position encoding at inference.

InternVL3 report, section 2.1, eqs. 1-4. In training the positions come with the batch; here they
are worked out from the token ids of a request. The formula itself is
`cascadevl.sequence.position_ids`, shared with training. How the increment of a request is chosen
is not in the papers: design decision 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cascadevl.errors import RequestError
from cascadevl.model.configuration import CascadeVLConfig
from cascadevl.sequence import INCREMENTS, position_ids
from cascadevl.types import NO_PARENT


def choose_increment(
    num_text_tokens: int, num_visual_tokens: int, *, num_new_tokens: int, trained_context: int
) -> float:
    """The largest increment with which a request stays within the positions seen in training.

    Args:
        num_text_tokens: Text tokens of the prompt.
        num_visual_tokens: Visual tokens of the prompt.
        num_new_tokens: Tokens that are asked for.
        trained_context: Positions the model was trained for.

    Raises:
        RequestError: If the request does not fit with the smallest increment either.
    """
    text = num_text_tokens + num_new_tokens
    for increment in INCREMENTS:
        if text + increment * num_visual_tokens <= trained_context:
            return increment
    raise RequestError(
        f"the request needs {text + INCREMENTS[-1] * num_visual_tokens:.0f} positions "
        f"({num_text_tokens} text tokens, {num_new_tokens} new ones and {num_visual_tokens} visual "
        f"tokens at the smallest increment) but the model was trained for {trained_context}; "
        f"shorten the text, show fewer images or ask for fewer tokens"
    )


def prompt_positions(
    input_ids: Int[Tensor, "rows tokens"],
    attention_mask: Int[Tensor, "rows tokens"] | Bool[Tensor, "rows tokens"] | None,
    *,
    image_token_id: int,
    increments: float | Sequence[float],
    ceil_after_image: bool = False,
) -> Float[Tensor, "rows tokens"]:
    """Positions of padded prompts; 0 where a token is padding, on either side.

    Args:
        input_ids: Token ids, image slots expanded.
        attention_mask: Nonzero where a token is real; None if all are.
        image_token_id: The image-context token; an unbroken run of it is one image.
        increments: Position step of all visual tokens, or of each image, row after row.
        ceil_after_image: Round the position up after an image.

    Raises:
        RequestError: If the number of increments is not the number of images.
    """
    ids = input_ids.cpu().numpy()
    real = np.ones(ids.shape, bool) if attention_mask is None else attention_mask.cpu().numpy() != 0
    positions = np.zeros(ids.shape, dtype=np.float32)
    rows = [ids[row][real[row]] == image_token_id for row in range(len(ids))]
    steps = _steps(rows, increments)
    for row, (is_visual, step) in enumerate(zip(rows, steps, strict=True)):
        ends = np.flatnonzero(is_visual & ~np.append(is_visual[1:], False))
        segments = np.zeros(len(step), dtype=np.int64)
        image_ends = ends.tolist() if ceil_after_image else []
        positions[row, real[row]] = position_ids(
            step, segments, (NO_PARENT,), image_ends=image_ends
        )
    return torch.from_numpy(positions).to(input_ids.device)


def resolve_increments(
    config: CascadeVLConfig,
    input_ids: Int[Tensor, "rows tokens"],
    attention_mask: Int[Tensor, "rows tokens"] | Bool[Tensor, "rows tokens"] | None,
    num_new_tokens: int,
    increments: float | Sequence[float] | None = None,
) -> float | Sequence[float]:
    """The increments a request is computed with.

    Given ones are taken; else the configuration's; ``auto`` takes the largest one with which the
    most demanding row of the request fits.

    Raises:
        RequestError: If the request does not fit the trained context, with both numbers.
    """
    if increments is not None:
        return float(increments) if isinstance(increments, int | float) else increments
    if config.trained_context is None:
        return float(config.increment)
    real = (
        torch.ones_like(input_ids, dtype=torch.bool)
        if attention_mask is None
        else attention_mask != 0
    )
    visual = (real & (input_ids == config.image_token_id)).sum(1)
    text = real.sum(1) - visual
    pairs = list(zip(text.tolist(), visual.tolist(), strict=True))
    return min((increment_of(config, *pair, num_new_tokens) for pair in pairs), default=1.0)


def increment_of(
    config: CascadeVLConfig, num_text_tokens: int, num_visual_tokens: int, num_new_tokens: int
) -> float:
    """The increment of one request under a configuration.

    Raises:
        RequestError: If the request does not fit the trained context, with both numbers.
    """
    limit = config.trained_context
    if config.increment == "auto":
        assert limit is not None, "the configuration refuses auto without a trained context"
        return choose_increment(
            num_text_tokens, num_visual_tokens, num_new_tokens=num_new_tokens, trained_context=limit
        )
    increment = float(config.increment)
    needed = num_text_tokens + num_new_tokens + increment * num_visual_tokens
    if limit is not None and needed > limit:
        raise RequestError(
            f"the request needs {needed:.0f} positions ({num_text_tokens} text tokens, "
            f"{num_new_tokens} new ones and {num_visual_tokens} visual tokens at increment "
            f"{increment}) but the model was trained for {limit}; shorten it, or set the "
            f"increment to 'auto'"
        )
    return increment


def _steps(
    rows: list[Bool[np.ndarray, " _"]], increments: float | Sequence[float]
) -> list[Float[np.ndarray, " _"]]:
    """Step of every token: 1 for text, the image's increment for a visual token."""
    starts = [row & ~np.append(False, row[:-1]) for row in rows]
    num_images = sum(int(start.sum()) for start in starts)
    each = [increments] * num_images if isinstance(increments, int | float) else list(increments)
    if len(each) != num_images:
        raise RequestError(
            f"{len(each)} increments for {num_images} images in the prompts; give one number for "
            f"all, or one for each image"
        )
    steps, done = [], 0
    for row, start in zip(rows, starts, strict=True):
        image = np.cumsum(start) - 1 + done  # the image a visual token belongs to
        table = np.asarray([*each, 1.0], dtype=np.float64)
        steps.append(np.where(row, table[image], 1.0))
        done += int(start.sum())
    return steps
