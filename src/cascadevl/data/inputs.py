"""Rows of ids and tiles as the model inputs that transformers' users know.

The plain part of the processor: which pictures belong to which text, and how rows of unequal
length become one array. Nothing is ever cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias, TypedDict, cast

import numpy as np
import PIL.Image
import torch
from jaxtyping import UInt8
from transformers import PreTrainedTokenizerBase
from transformers.feature_extraction_utils import BatchFeature

from cascadevl.data.conversation import IMAGE_CONTEXT
from cascadevl.data.tiling import normalise
from cascadevl.errors import DataError, RequestError

Picture: TypeAlias = str | Path | bytes | PIL.Image.Image
"""A file, its bytes, or a picture already open."""

Pictures: TypeAlias = Picture | Sequence[Picture] | Sequence[Sequence[Picture]]
"""One picture, all pictures in order, or one list a text."""


class Filling(TypedDict, total=False):
    """How rows of unequal length become an array.

    Attributes:
        return_tensors: ``"pt"`` for tensors, None (the default) for lists.
        padding: True or ``"longest"`` fills up to the longest, ``"max_length"`` to that; False
            (the default) leaves them as they are.
        padding_side: ``"left"`` (the default) for generation, ``"right"`` for training.
        max_length: Where ``"max_length"`` fills to; longer prompts are refused in any case.
    """

    return_tensors: str | None
    padding: bool | str
    padding_side: str
    max_length: int | None


def check_filling(filling: Filling) -> None:
    """Refuse options that do not exist, above all cutting.

    Args:
        filling: Options as a caller gave them.

    Raises:
        RequestError: If one is not of `Filling`.
    """
    unknown = sorted(set(filling) - set(Filling.__annotations__))
    if unknown:
        raise RequestError(
            f"unknown options {', '.join(unknown)} (a prompt is never cut); "
            f"known are {', '.join(Filling.__annotations__)}"
        )


def pictures_of_texts(images: Pictures | None, texts: Sequence[str]) -> list[list[Picture]]:
    """Give every text the pictures of its placeholders.

    Args:
        images: The pictures.
        texts: Texts with one ``<IMG_CONTEXT>`` for each picture.

    Raises:
        DataError: Of kind ``image_count``, if the numbers differ.
    """
    wanted = [text.count(IMAGE_CONTEXT) for text in texts]
    if images is None:
        images = []
    if isinstance(images, Picture):
        images = [images]
    nested = [each for each in images if not isinstance(each, Picture)]
    if nested:
        groups = [[each] if isinstance(each, Picture) else [*each] for each in images]
        found = [len(group) for group in groups]
        if found != wanted:
            raise _count_error(f"{wanted} placeholders in the texts, but {found} pictures")
        return groups
    flat = cast(Sequence[Picture], images)
    if len(flat) != sum(wanted):
        raise _count_error(f"{sum(wanted)} placeholders in the text, but {len(flat)} pictures")
    ends = np.cumsum(wanted).tolist()
    return [list(flat[end - count : end]) for count, end in zip(wanted, ends, strict=True)]


def _count_error(problem: str) -> DataError:
    return DataError(
        problem,
        kind="image_count",
        remedy=f"write {IMAGE_CONTEXT} once for each picture",
    )


def model_inputs(
    rows: Sequence[Sequence[int]],
    tiles: Sequence[UInt8[np.ndarray, "_ px px 3"]],
    tokenizer: PreTrainedTokenizerBase,
    filling: Filling,
) -> BatchFeature:
    """Put rows and tiles into one feature.

    Args:
        rows: Token ids of each prompt, visual tokens included.
        tiles: Tiles of each picture, in the order of the prompts.
        tokenizer: Brings the padding token.
        filling: What to make of them.

    Returns:
        ``input_ids``, ``attention_mask`` and, where there are tiles, ``pixel_values``.

    Raises:
        RequestError: If a prompt is longer than ``max_length``, rows of unequal length are to be
            a tensor without padding, or an option is unknown or has no such value.
    """
    check_filling(filling)
    return_tensors = filling.get("return_tensors")
    width = _width([len(row) for row in rows], filling)
    filled = [_filled(row, width, tokenizer, filling.get("padding_side", "left")) for row in rows]
    data: dict[str, object] = {
        "input_ids": [ids for ids, _ in filled],
        "attention_mask": [mask for _, mask in filled],
    }
    if tiles:
        pixel_values = torch.cat([normalise(each) for each in tiles])
        data["pixel_values"] = pixel_values if return_tensors == "pt" else pixel_values.numpy()
    return BatchFeature(data, tensor_type=return_tensors)


def _width(lengths: Sequence[int], filling: Filling) -> int:
    """Length to fill rows up to; 0 leaves them as they are."""
    padding, max_length = filling.get("padding", False), filling.get("max_length")
    longest = max(lengths, default=0)
    if max_length is not None and longest > max_length:
        raise RequestError(
            f"a prompt has {longest} tokens, but max_length is {max_length}; a prompt is never "
            "cut: raise max_length, or lower the number of tiles"
        )
    if padding == "max_length":
        if max_length is None:
            raise RequestError("padding='max_length' needs max_length")
        return max_length
    if padding in (True, "longest"):
        return longest
    if padding not in (False, "do_not_pad"):
        raise RequestError(f"padding is {padding!r}; use True, False, 'longest' or 'max_length'")
    if filling.get("return_tensors") is not None and len(set(lengths)) > 1:
        raise RequestError(
            f"prompts of {lengths} tokens make no tensor; pass padding=True to fill them up"
        )
    return 0


def _filled(
    row: Sequence[int], width: int, tokenizer: PreTrainedTokenizerBase, side: str
) -> tuple[list[int], list[int]]:
    """Ids and mask of one row."""
    missing, ones = max(0, width - len(row)), [1] * len(row)
    if missing and tokenizer.pad_token_id is None:
        raise RequestError("the tokenizer has no padding token; set tokenizer.pad_token")
    ids, mask = [tokenizer.pad_token_id] * missing, [0] * missing
    if side == "left":
        return [*ids, *row], [*mask, *ones]
    if side == "right":
        return [*row, *ids], [*ones, *mask]
    raise RequestError(f"padding_side is {side!r}; use 'left' or 'right'")
