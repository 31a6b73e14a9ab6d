"""What one request may bring and ask: checked before anything that is large is opened or computed.

The body of a request is bounded by its bytes. These limits are about what a few bytes can become: a
picture of a kilobyte with a thousand million pixels, ten thousand pictures of one pixel, an answer
without an end.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import cast

from cascadevl.data.example import ExampleConfig
from cascadevl.data.image import image_size
from cascadevl.data.tiling import limit_for, num_tiles_of
from cascadevl.data.video import video_extent
from cascadevl.errors import ConfigError, DataError, RequestError
from cascadevl.serving.openai_schema import (
    AssistantMessage,
    ChatRequest,
    ImagePart,
    TextPart,
    VideoPart,
)
from cascadevl.types import ImageRef, VideoRef


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Most that one request may bring and ask.

    Attributes:
        max_turns: Turns of a conversation.
        max_images: Pictures and videos.
        max_pixels: Of all pictures and all shown frames of videos together, once decoded.
        max_video_pixels: Of all frames of a video, shown or not: most have to be decoded.
        max_tiles: Of all pictures and frames together.
        max_text: Letters, tools and earlier turns included.
        max_prompt_tokens: Of a prompt, visual ones included.
        max_answer_tokens: Of all answers together, if each becomes as long as it may.
    """

    max_turns: int = 1024
    max_images: int = 64
    max_pixels: int = 100_000_000
    max_video_pixels: int = 20_000_000_000
    max_tiles: int = 256
    max_text: int = 2**20
    max_prompt_tokens: int = 2**18
    max_answer_tokens: int = 2**20

    def __post_init__(self) -> None:
        """Refuse limits under which nothing could be asked.

        Raises:
            ConfigError: If one is not positive.
        """
        for field in fields(self):
            if getattr(self, field.name) < 1:
                raise ConfigError(f"{field.name} is {getattr(self, field.name)}; give at least 1")


def check_form(body: ChatRequest, limits: Limits) -> None:
    """Check what can be counted before anything is decoded.

    Args:
        body: The request.
        limits: Most that it may bring.

    Raises:
        RequestError: If it brings more.
    """
    if len(body.messages) > limits.max_turns:
        raise RequestError(
            f"the conversation has {len(body.messages)} turns, the limit is {limits.max_turns}; "
            f"leave out the first ones"
        )
    num_shown = num_letters = 0
    for message in body.messages:
        if isinstance(message, AssistantMessage):
            num_letters += len(message.reasoning_content or "")
            num_letters += sum(len(call.function.arguments) for call in message.tool_calls or ())
        content = message.content
        if isinstance(content, str):
            num_letters += len(content)
            continue
        for part in content or ():
            num_shown += isinstance(part, ImagePart | VideoPart)
            num_letters += len(part.text) if isinstance(part, TextPart) else 0
    num_letters += sum(len(json.dumps(tool.model_dump())) for tool in body.tools or ())
    if num_shown > limits.max_images:
        raise RequestError(
            f"the request shows {num_shown} pictures and videos, the limit is {limits.max_images}; "
            f"show fewer"
        )
    check_text(num_letters, limits)


def check_text(num_letters: int, limits: Limits) -> None:
    """Check the length of texts before they become tokens.

    Args:
        num_letters: Of all of them.
        limits: Most that a request may bring.

    Raises:
        RequestError: If there are more.
    """
    if num_letters > limits.max_text:
        raise RequestError(
            f"the request has {num_letters} letters of text, the limit is {limits.max_text}; "
            f"shorten it"
        )


def check_pictures(
    turns: Sequence[Mapping[str, object]], config: ExampleConfig, limits: Limits
) -> None:
    """Check pictures and videos by their headers, before any is decoded.

    Args:
        turns: The conversation; pictures are bytes, videos are files.
        config: How they are cut into tiles.
        limits: Most that a request may bring.

    Raises:
        DataError: If one has no header, or all have too many pixels.
        RequestError: If they become too many tiles.
    """
    parts = [
        cast(Mapping[str, object], part)
        for turn in turns
        if isinstance(turn["content"], list)
        for part in turn["content"]
    ]
    images = [cast(bytes, part["image"]) for part in parts if part["type"] == "image"]
    videos = [cast(Path, part["path"]) for part in parts if part["type"] == "video"]
    tiling = limit_for(len(images), config.tiling) if config.share_tiles else config.tiling
    num_tiles = len(videos) * config.max_frames
    num_pixels = sum(_pixels_of_video(file, config.max_frames, limits) for file in videos)
    for content in images:
        width, height = image_size(
            ImageRef(content), source="the request", max_pixels=limits.max_pixels
        )
        num_pixels += width * height
        num_tiles += num_tiles_of(width, height, tiling)
    if num_pixels > limits.max_pixels:
        raise _too_large(f"the pictures have {num_pixels} pixels together", limits.max_pixels)
    if num_tiles > limits.max_tiles:
        raise RequestError(
            f"the pictures become {num_tiles} tiles, the limit is {limits.max_tiles}; show fewer "
            f"of them, or smaller ones"
        )


def _pixels_of_video(file: Path, max_frames: int, limits: Limits) -> int:
    """Pixels of the frames that are shown."""
    frame_pixels, num_frames = video_extent(VideoRef(source=file), source="the request")
    if frame_pixels * num_frames > limits.max_video_pixels:
        raise _too_large(
            f"{num_frames} frames of {frame_pixels} pixels have {frame_pixels * num_frames}",
            limits.max_video_pixels,
        )
    return frame_pixels * min(num_frames, max_frames)


def _too_large(what: str, limit: int) -> DataError:
    return DataError(
        f"{what}, the limit is {limit}",
        kind="oversized_image",
        remedy="send them smaller, or fewer of them",
    )


def check_tokens(num_prompt: int, num_answers: int, max_tokens: int, limits: Limits) -> None:
    """Check how long prompt and answers may become.

    Args:
        num_prompt: Tokens of the prompt, all tiles counted in full.
        num_answers: Answers that are asked for.
        max_tokens: Of each.
        limits: Most that a request may ask.

    Raises:
        RequestError: If they may become longer.
    """
    if num_prompt > limits.max_prompt_tokens:
        raise RequestError(
            f"the prompt has up to {num_prompt} tokens, the limit is {limits.max_prompt_tokens}; "
            f"shorten it, or show fewer pictures"
        )
    if num_answers * max_tokens > limits.max_answer_tokens:
        raise RequestError(
            f"{num_answers} answers of up to {max_tokens} tokens are asked for, the limit is "
            f"{limits.max_answer_tokens} together; ask for fewer, or shorter ones"
        )
