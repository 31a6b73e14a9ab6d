"""Where the tokens of a request sit: variable visual position encoding at inference.

InternVL3 report, section 2.1, eqs. 1-4. In training the positions come with the batch; here they
are worked out from the token ids of a request. The formula itself is
`cascadevl.sequence.position_ids`, shared with training. How the increment of a request is chosen
is not in the papers: design decision 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cascadevl.errors import RequestError
from cascadevl.model.configuration import CascadeVLConfig
from cascadevl.sequence import INCREMENTS, position_ids
from cascadevl.types import NO_PARENT

Increments: TypeAlias = float | Sequence[float]
"""Position step of visual tokens: one number for all images, or one for each."""


def num_positions(
    num_text_tokens: int,
    tokens_per_image: Sequence[int],
    increments: Increments,
    *,
    ceil_after_image: bool = False,
) -> float:
    """Positions that so many tokens take: the place where the next token would sit.

    Args:
        num_text_tokens: Text tokens, those to come included.
        tokens_per_image: Visual tokens of each image.
        increments: Their position step.
        ceil_after_image: Round the position up after an image. Text moves by whole numbers, so
            each image adds its own length rounded up.
    """
    steps = each_increment(increments, len(tokens_per_image))
    lengths = [step * tokens for step, tokens in zip(steps, tokens_per_image, strict=True)]
    if ceil_after_image:
        lengths = [math.ceil(round(length, 6)) for length in lengths]
    return float(num_text_tokens + sum(lengths))


def choose_increment(
    num_text_tokens: int,
    tokens_per_image: int | Sequence[int],
    *,
    num_new_tokens: int,
    trained_context: int,
    ceil_after_image: bool = False,
) -> float:
    """The largest increment with which a request stays within the positions seen in training.

    Args:
        num_text_tokens: Text tokens of the prompt.
        tokens_per_image: Visual tokens of each image, or of all of them together.
        num_new_tokens: Tokens that are asked for.
        trained_context: Positions the model was trained for.
        ceil_after_image: Whether positions are rounded up after each image.

    Raises:
        RequestError: If the request does not fit with the smallest increment either.
    """
    images = [tokens_per_image] if isinstance(tokens_per_image, int) else tokens_per_image
    for increment in INCREMENTS:
        needed = num_positions(
            num_text_tokens + num_new_tokens, images, increment, ceil_after_image=ceil_after_image
        )
        if needed <= trained_context:
            return increment
    raise RequestError(
        f"the request needs {needed:.0f} positions "
        f"({num_text_tokens} text tokens, {num_new_tokens} new ones and {sum(images)} visual "
        f"tokens at the smallest increment) but the model was trained for {trained_context}; "
        f"shorten the text, show fewer images or ask for fewer tokens"
    )


def dynamic_limit(config: CascadeVLConfig) -> int | None:
    """Positions that dynamic RoPE leaves as they are; None under any other RoPE.

    Dynamic RoPE (``rope_type: dynamic``, as in InternVL3) stretches its frequencies with the
    largest position of a whole forward pass: one row beyond ``max_position_embeddings`` changes
    the answers of every other row, and the keys in a cache no longer fit those to come.
    """
    text = config.text_config
    rope = getattr(text, "rope_parameters", None) or {}
    return int(text.max_position_embeddings) if rope.get("rope_type") == "dynamic" else None


def check_dynamic(config: CascadeVLConfig, num_needed: float) -> None:
    """Refuse positions with which dynamic RoPE would change its frequencies.

    Args:
        config: The model's.
        num_needed: Positions of the longest row, the tokens asked for included.

    Raises:
        RequestError: If there are more than that, with both numbers.
    """
    limit = dynamic_limit(config)
    if limit is not None and num_needed > limit:
        raise RequestError(
            f"the request needs {num_needed:.0f} positions but beyond {limit} the dynamic RoPE of "
            f"this model changes the frequencies of every row it is computed with; give smaller "
            f"increments, down to {INCREMENTS[-1]}, or shorten the request"
        )


def increment_of(
    config: CascadeVLConfig,
    num_text_tokens: int,
    tokens_per_image: Sequence[int],
    num_new_tokens: int,
) -> float:
    """The increment that a configuration gives one request.

    Args:
        config: Its number, or ``auto`` and what to fit into.
        num_text_tokens: Text tokens of the prompt.
        tokens_per_image: Visual tokens of each image.
        num_new_tokens: Tokens that are asked for.

    Raises:
        RequestError: If the request does not fit the trained context, with both numbers.
    """
    bound = dynamic_limit(config)
    limits = [limit for limit in (config.trained_context, bound) if limit is not None]
    ceil = bool(config.ceil_after_image)
    if config.increment == "auto":
        assert limits, "the configuration refuses auto without a trained context"
        return choose_increment(
            num_text_tokens,
            tokens_per_image,
            num_new_tokens=num_new_tokens,
            trained_context=min(limits),
            ceil_after_image=ceil,
        )
    increment = float(config.increment)
    needed = num_positions(
        num_text_tokens + num_new_tokens, tokens_per_image, increment, ceil_after_image=ceil
    )
    if config.trained_context is not None and needed > config.trained_context:
        raise RequestError(
            f"the request needs {needed:.0f} positions ({num_text_tokens} text tokens, "
            f"{num_new_tokens} new ones and {sum(tokens_per_image)} visual tokens at increment "
            f"{increment}) but the model was trained for {config.trained_context}; shorten it, or "
            f"set the increment to 'auto'"
        )
    check_dynamic(config, needed)
    return increment


def increments_of(
    config: CascadeVLConfig,
    num_text_tokens: int,
    tokens_per_image: Sequence[int],
    num_new_tokens: int,
    given: Increments | None = None,
) -> tuple[float, ...]:
    """The increment of every image of one request.

    Args:
        config: Decides where none are given.
        num_text_tokens: Text tokens of the prompt.
        tokens_per_image: Visual tokens of each image.
        num_new_tokens: Tokens that are asked for.
        given: What is asked for is taken, also beyond the trained context.

    Raises:
        RequestError: If given increments are not as many as images or out of range; or the
            request does not fit the trained context, with both numbers.
    """
    if given is None:
        given = increment_of(config, num_text_tokens, tokens_per_image, num_new_tokens)
    each = each_increment(given, len(tokens_per_image))
    needed = num_positions(
        num_text_tokens + num_new_tokens,
        tokens_per_image,
        each,
        ceil_after_image=bool(config.ceil_after_image),
    )
    check_dynamic(config, needed)
    return each


def each_increment(increments: Increments, num_images: int) -> tuple[float, ...]:
    """One increment for each image.

    Raises:
        RequestError: If there are not as many as images, or one is not above 0 and at most 1.
    """
    if isinstance(increments, int | float):
        each = (float(increments),) * num_images
    else:
        each = tuple(map(float, increments))
    if len(each) != num_images:
        raise RequestError(
            f"{len(each)} increments for {num_images} images in the prompts; give one number for "
            f"all, or one for each image"
        )
    wrong = [value for value in each if not 0 < value <= 1]
    if wrong:
        raise RequestError(f"an increment is {wrong[0]}; it must be above 0 and at most 1")
    return each


def resolve_increments(
    config: CascadeVLConfig,
    input_ids: Int[Tensor, "rows tokens"],
    attention_mask: Int[Tensor, "rows tokens"] | Bool[Tensor, "rows tokens"] | None,
    num_new_tokens: int,
    increments: Increments | None = None,
) -> Increments:
    """The increments that the rows of a request are computed with.

    Given ones are taken; else the configuration's. Under ``auto`` each row gets the largest one
    with which that row fits, so that a row is answered in a batch as it is alone.

    Args:
        config: The model's.
        input_ids: Token ids, image slots expanded.
        attention_mask: Nonzero where a token is real; None if all are.
        num_new_tokens: Tokens that are asked for.
        increments: One for all images, or one an image, row after row.

    Returns:
        One number for all images, or one an image, row after row.

    Raises:
        RequestError: If a row does not fit the trained context, with both numbers; or if tokens
            are asked for right behind the last visual token, where rounding must come first.
    """
    rows = _visual_rows(config.image_token_id, input_ids, attention_mask)
    images = [_run_lengths(row) for row in rows]
    texts = [len(row) - sum(runs) for row, runs in zip(rows, images, strict=True)]
    if num_new_tokens and config.ceil_after_image and any(row[-1:].any() for row in rows):
        raise RequestError(
            "a prompt ends within a picture, and positions are rounded up after one; close it "
            "with </img>"
        )
    given: list[Increments | None] = [None] * len(rows)
    if increments is not None:
        each = each_increment(increments, sum(map(len, images)))
        ends = np.cumsum(list(map(len, images))).tolist()
        given = [each[end - len(runs) : end] for runs, end in zip(images, ends, strict=True)]
    of_rows = [
        increments_of(config, text, runs, num_new_tokens, mine)
        for text, runs, mine in zip(texts, images, given, strict=True)
    ]
    flat = [value for row in of_rows for value in row]
    return flat[0] if len(set(flat)) == 1 else flat


def prompt_positions(
    input_ids: Int[Tensor, "rows tokens"],
    attention_mask: Int[Tensor, "rows tokens"] | Bool[Tensor, "rows tokens"] | None,
    *,
    image_token_id: int,
    increments: Increments,
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
    real = _real(input_ids, attention_mask)
    rows = _visual_rows(image_token_id, input_ids, attention_mask)
    images = [_run_lengths(row) for row in rows]
    each = each_increment(increments, sum(map(len, images)))
    positions = np.zeros(real.shape, dtype=np.float32)
    done = 0
    for number, (is_visual, runs) in enumerate(zip(rows, images, strict=True)):
        steps = np.ones(len(is_visual))
        steps[is_visual] = np.repeat(each[done : done + len(runs)], np.asarray(runs, np.int64))
        done += len(runs)
        ends = np.flatnonzero(is_visual & ~np.append(is_visual[1:], False)).tolist()
        positions[number, real[number]] = position_ids(
            steps,
            np.zeros(len(steps), dtype=np.int64),
            (NO_PARENT,),
            image_ends=ends if ceil_after_image else (),
        )
    return torch.from_numpy(positions).to(input_ids.device)


def _real(
    input_ids: Int[Tensor, "rows tokens"],
    attention_mask: Int[Tensor, "rows tokens"] | Bool[Tensor, "rows tokens"] | None,
) -> Bool[np.ndarray, "rows tokens"]:
    """Which tokens are no padding."""
    if attention_mask is None:
        return np.ones(input_ids.shape, dtype=np.bool_)
    real: np.ndarray = attention_mask.cpu().numpy() != 0
    return real


def _visual_rows(
    image_token_id: int | None,
    input_ids: Int[Tensor, "rows tokens"],
    attention_mask: Int[Tensor, "rows tokens"] | Bool[Tensor, "rows tokens"] | None,
) -> list[Bool[np.ndarray, " _"]]:
    """For the real tokens of each row, whether they are visual."""
    ids, real = input_ids.cpu().numpy(), _real(input_ids, attention_mask)
    return [row[chosen] == image_token_id for row, chosen in zip(ids, real, strict=True)]


def _run_lengths(is_visual: Bool[np.ndarray, " tokens"]) -> list[int]:
    """Lengths of the unbroken runs of visual tokens: the images of a row."""
    edges = np.flatnonzero(np.diff(is_visual.astype(np.int8), prepend=0, append=0))
    lengths: list[int] = (edges[1::2] - edges[::2]).tolist()
    return lengths
