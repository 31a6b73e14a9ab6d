"""What one request may bring and ask, found before anything is opened."""

from __future__ import annotations

import io
from base64 import b64encode
from pathlib import Path
from typing import Any

import av
import numpy as np
import PIL.Image
import pytest
from tests.engine.small_talk import build, model_for, picture
from tests.serving.small_server import NAME, shown

from cascadevl.data.video import read_frames, video_extent
from cascadevl.errors import CascadeVLError, ConfigError, DataError
from cascadevl.serving.limits import Limits, check_form
from cascadevl.serving.openai_prompts import Asked, Asker
from cascadevl.serving.openai_schema import ChatRequest, CompletionRequest
from cascadevl.types import VideoRef

PROCESSOR = build()  # 28 px a tile, at most 4 of them
CONFIG = model_for(PROCESSOR).config


def ask(parts: list[dict[str, Any]], *, limits: Limits, **fields: Any) -> Asked:
    """Ask about some parts, as the server does."""
    turns = {"messages": [{"role": "user", "content": parts}]}
    body = ChatRequest(model=NAME, **{"max_tokens": 4, **turns, **fields})
    check_form(body, limits)
    return Asker(processor=PROCESSOR, config=CONFIG, limits=limits).chat(body)


def text(content: str) -> dict[str, Any]:
    return {"type": "text", "text": content}


def video_of(content: bytes) -> dict[str, Any]:
    url = f"data:video/mp4;base64,{b64encode(content).decode()}"
    return {"type": "video_url", "video_url": {"url": url}}


def video(num_frames: int, size: tuple[int, int] = (32, 32)) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        for number in range(num_frames):
            pixels = np.full((*size[::-1], 3), number % 256, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


PICTURE = picture(0, (100, 50))  # 5,000 pixels, 2 tiles and a thumbnail

CASES: dict[str, tuple[dict[str, int], list[dict[str, Any]], dict[str, Any], str]] = {
    "turns": (
        {"max_turns": 1},
        [text("one")],
        {"messages": [{"role": "user", "content": "a"}] * 2},
        "2 turns",
    ),
    "pictures": ({"max_images": 2}, [shown(picture(n)) for n in range(3)], {}, "shows 3 pictures"),
    "pixels": ({"max_pixels": 4999}, [shown(PICTURE)], {}, "5000 pixels, the limit is 4999"),
    "pixels together": ({"max_pixels": 9999}, [shown(PICTURE)] * 2, {}, "10000 pixels together"),
    "tiles": ({"max_tiles": 2}, [shown(PICTURE)], {}, "become 3 tiles, the limit is 2"),
    "frames": ({"max_tiles": 31}, [video_of(video(3))], {}, "become 32 tiles"),
    "pixels of frames": ({"max_pixels": 3000}, [video_of(video(3))], {}, "3072 pixels"),
    "a long video": ({"max_video_pixels": 100_000}, [video_of(video(99))], {}, "99 frames"),
    "letters": ({"max_text": 9}, [text("one two"), text("one")], {}, "10 letters"),
    "tools": (
        {"max_text": 50},
        [text("one")],
        {"tools": [{"type": "function", "function": {"name": "f", "description": "a" * 50}}]},
        "letters of text, the limit is 50",
    ),
    "tokens of the prompt": ({"max_prompt_tokens": 12}, [shown(PICTURE)], {}, "limit is 12"),
    "tokens of answers": ({"max_answer_tokens": 11}, [text("one")], {"n": 3}, "3 answers of up to"),
}


@pytest.mark.parametrize(("limits", "parts", "fields", "message"), CASES.values(), ids=CASES)
def test_a_request_at_its_limit_and_one_beyond(
    limits: dict[str, int], parts: list[dict[str, Any]], fields: dict[str, Any], message: str
):
    with pytest.raises(CascadeVLError, match=message):
        ask(parts, limits=Limits(**limits), **fields)
    ask(parts, limits=Limits(**{name: 10 * value for name, value in limits.items()}), **fields)


def test_what_is_too_large_is_not_decoded(monkeypatch: pytest.MonkeyPatch):
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("it was decoded")

    monkeypatch.setattr("cascadevl.data.pictures.open_image", never)
    for limits in ({"max_pixels": 4999}, {"max_tiles": 2}):
        with pytest.raises(CascadeVLError, match="limit"):
            ask([shown(PICTURE)], limits=Limits(**limits))


def test_pictures_in_earlier_turns_and_words_of_earlier_answers_count():
    turns = [
        {"role": "user", "content": [shown(PICTURE)]},
        {"role": "assistant", "content": "one", "reasoning_content": "two"},
        {"role": "user", "content": [shown(PICTURE), text("three")]},
    ]
    body = ChatRequest(model=NAME, messages=turns)
    check_form(body, Limits(max_images=2, max_text=11))
    with pytest.raises(CascadeVLError, match="11 letters"):
        check_form(body, Limits(max_text=10))
    with pytest.raises(CascadeVLError, match="2 pictures"):
        check_form(body, Limits(max_images=1))


@pytest.mark.parametrize(
    ("prompt", "fields", "limits", "message"),
    [
        (["one", "two"], {}, {"max_text": 5}, "6 letters"),
        ([5] * 30, {}, {"max_prompt_tokens": 29}, "30 tokens"),
        ([[5] * 10, [6] * 10], {}, {"max_prompt_tokens": 19}, "20 tokens"),
        (["one", "two"], {"n": 3}, {"max_answer_tokens": 95}, "6 answers of up to 16"),
    ],
)
def test_continuations(prompt: Any, fields: Any, limits: dict[str, int], message: str):
    body = CompletionRequest(model=NAME, prompt=prompt, **fields)
    strict = Asker(processor=PROCESSOR, config=CONFIG, limits=Limits(**limits))
    with pytest.raises(CascadeVLError, match=message):
        strict.completions(body)
    wider = Limits(**{name: value + 1 for name, value in limits.items()})
    assert Asker(processor=PROCESSOR, config=CONFIG, limits=wider).completions(body)


def test_a_limit_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="max_tiles is 0"):
        Limits(max_tiles=0)


def test_the_extent_of_a_video(tmp_path: Path):
    file = tmp_path / "video.mp4"
    file.write_bytes(video(7, (48, 32)))
    assert video_extent(VideoRef(source=file), source="here") == (48 * 32, 7)


def test_a_frame_that_is_larger_than_the_header_says_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Two streams of different sizes one after the other, as a hostile file has them."""
    file = tmp_path / "grows.ts"
    parts = []
    for size in ((32, 32), (320, 320)):
        part = io.BytesIO()
        with av.open(part, "w", format="mpegts") as container:
            stream = container.add_stream("mpeg2video", rate=10)
            stream.width, stream.height = size
            stream.pix_fmt = "yuv420p"
            for _ in range(6):
                pixels = np.zeros((*size[::-1], 3), dtype=np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode())
        parts.append(part.getvalue())
    file.write_bytes(b"".join(parts))
    with pytest.raises(DataError, match="320 x 320, larger than the header says"):
        read_frames(VideoRef(source=file), num_frames=12, source="here")


def test_a_picture_of_few_bytes_and_many_pixels():
    """A bomb: compressed well, so that only its header tells what it becomes."""
    buffer = io.BytesIO()
    PIL.Image.new("1", (30_000, 10_000)).save(buffer, "png", optimize=True)
    assert buffer.tell() < 50_000
    url = f"data:image/png;base64,{b64encode(buffer.getvalue()).decode()}"
    with pytest.raises(DataError, match="300000000 pixels") as caught:
        ask([{"type": "image_url", "image_url": {"url": url}}], limits=Limits())
    assert caught.value.kind == "oversized_image"
