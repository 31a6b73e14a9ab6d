from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from tests.data.conftest import picture

from cascadevl.data.questions import Line, parse_question, read_lines, record_id
from cascadevl.errors import DataError
from cascadevl.types import ImageRef, Message, VideoRef

FILE = Path("some") / "q.jsonl"


def parsed(fields: object, root: Path | None = None) -> tuple[str | int, tuple[Message, ...]]:
    return parse_question(Line(7, json.dumps(fields).encode()), file=FILE, root=root)


def human(text: str) -> dict[str, str]:
    return {"from": "human", "value": text}


def gpt(text: str) -> dict[str, str]:
    return {"from": "gpt", "value": text}


def test_training_data_are_questions_when_their_answer_is_left_out(tmp_path: Path) -> None:
    fields = {"id": "a", "image": "x.png", "conversations": [human("<image>\nWhat?"), gpt("A cat")]}
    name, messages = parsed(fields, tmp_path)
    assert name == "a"
    assert messages == (Message.of("user", ImageRef(tmp_path / "x.png"), "\nWhat?"),)


def test_a_conversation_that_waits_for_its_answer_is_one_too() -> None:
    turns = [{"from": "system", "value": "Be brief."}, human("1?"), gpt("one"), human("2?")]
    _, messages = parsed({"conversations": turns})
    assert [message.role for message in messages] == ["system", "user", "assistant", "user"]
    assert parsed({"conversations": [*turns, gpt("")]})[1] == messages  # an empty answer is none


@pytest.mark.parametrize(
    "content",
    [
        [{"type": "text", "text": "What?"}, {"type": "image", "image": "x.png"}],
        [{"type": "text", "text": "What?"}, {"type": "image_url", "image_url": {"url": "x.png"}}],
        [{"type": "text", "text": "What?"}, {"type": "image_url", "image_url": "x.png"}],
    ],
)
def test_openais_messages_with_pictures_in_them(tmp_path: Path, content: Any) -> None:
    _, messages = parsed({"messages": [{"role": "user", "content": content}]}, tmp_path)
    assert messages == (Message.of("user", "What?", ImageRef(tmp_path / "x.png"), "\n"),)


def test_a_picture_may_be_in_the_line(tmp_path: Path) -> None:
    picture(4, 3).save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    url = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    part = {"type": "image_url", "image_url": {"url": url, "detail": "high"}}
    _, messages = parsed({"messages": [{"role": "user", "content": [part]}]}, tmp_path)
    assert messages[0].parts[0] == ImageRef(content)


def test_messages_with_pictures_beside_them_are_read_as_released(tmp_path: Path) -> None:
    fields = {"messages": [{"role": "user", "content": "<image>What?"}], "images": ["x.png"]}
    _, messages = parsed(fields, tmp_path)
    assert messages == (Message.of("user", ImageRef(tmp_path / "x.png"), "What?"),)


def test_an_answer_at_the_end_of_messages_is_left_out() -> None:
    asked = {"role": "user", "content": "Hi?"}
    _, messages = parsed({"messages": [asked, {"role": "assistant", "content": "Hi."}]})
    assert messages == (Message.of("user", "Hi?"),)


def test_files_start_at_the_root_and_absolute_paths_stay(tmp_path: Path) -> None:
    parts = [{"type": "video", "video": "v.mp4"}, {"type": "image", "path": "/abs/x.png"}]
    fields = {"messages": [{"role": "user", "content": parts}]}
    shown = [part for part in parsed(fields, tmp_path)[1][0].parts if part != "\n"]
    assert shown == [VideoRef(source=tmp_path / "v.mp4"), ImageRef(Path("/abs/x.png"))]
    shown = [part for part in parsed(fields)[1][0].parts if part != "\n"]
    assert shown[0] == VideoRef(source=Path("v.mp4"))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [({"id": "x"}, "x"), ({"id": 0}, 0), ({"id": None}, 7), ({"id": [1]}, 7), ({}, 7), (3, 7)],
)
def test_ids(fields: object, expected: str | int) -> None:
    assert record_id(fields, Line(7, b"")) == expected


@pytest.mark.parametrize(
    ("fields", "kind", "message"),
    [
        ([1], "bad_field", "the line is no object"),
        ({"id": 1}, "bad_field", "no conversation"),
        ({"conversations": [gpt("I speak first")]}, "bad_field", "no conversation"),
        ({"conversations": [{"from": "system", "value": "x"}]}, "bad_turns", "turn of human"),
        ({"conversations": [human("a"), human("b")]}, "bad_turns", "where gpt is expected"),
        ({"conversations": [{"from": "pretrain", "value": "x"}]}, "bad_turns", "pretrain"),
        ({"conversations": [human("<image>?")]}, "image_count", "1 <image> mark"),
        ({"messages": []}, "bad_turns", "is empty"),
        ({"messages": "Hi"}, "bad_field", "a list of turns"),
        ({"messages": [{"role": "system", "content": "x"}]}, "bad_turns", "turn of system"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "bad_turns", "is empty"),
        ({"messages": [{"role": "boss", "content": "x"}]}, "message", "the role 'boss'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "message",
            "image_url without url",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "url": "http://a/b"}]}]},
            "unsupported_source",
            "only files can be read",
        ),
    ],
)
def test_what_cannot_be_asked_is_named_with_its_line(
    fields: object, kind: str, message: str
) -> None:
    with pytest.raises(DataError, match=message) as raised:
        parsed(fields, Path("root"))
    assert raised.value.kind == kind
    assert raised.value.source == "some/q.jsonl:7"


def test_lines_that_are_blank_are_left_out_and_still_count(tmp_path: Path) -> None:
    file = tmp_path / "q.jsonl"
    file.write_bytes(b'\n{"id": 1}\r\n   \n{"id": 2}')
    assert list(read_lines(file)) == [Line(2, b'{"id": 1}'), Line(4, b'{"id": 2}')]
    with pytest.raises(DataError, match="cannot be read"):
        list(read_lines(tmp_path / "none.jsonl"))
