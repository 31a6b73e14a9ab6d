"""Records as they are written: letter by letter, and read back."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from tests.data.conftest import picture

from cascadevl.data.hub import open_source
from cascadevl.data.meta import read_meta
from cascadevl.data.writing import conversation_fields, save_picture, write_meta
from cascadevl.errors import DataError
from cascadevl.types import ImageRef, Message, VideoRef

IMAGE = ImageRef(PIL.Image.new("RGB", (2, 2)))
ANSWER = Message.of("assistant", "Three.")


def test_a_record_letter_by_letter() -> None:
    messages = [Message.of("system", "Think."), Message.of("user", IMAGE, "\nHow many?"), ANSWER]
    assert conversation_fields(messages, record_id="a:1", images=["images/a.png"]) == {
        "id": "a:1",
        "image": "images/a.png",
        "conversations": [
            {"from": "system", "value": "Think."},
            {"from": "human", "value": "<image>\nHow many?"},
            {"from": "gpt", "value": "Three."},
        ],
    }


def test_several_pictures_keep_their_places_and_text_has_none() -> None:
    two = [Message.of("user", "A: ", IMAGE, " B: ", IMAGE, "?"), ANSWER]
    fields = conversation_fields(two, record_id="x", images=["a.png", "b.png"])
    assert fields["image"] == ["a.png", "b.png"]
    assert fields["conversations"][0]["value"] == "A: <image> B: <image>?"
    assert "image" not in conversation_fields([Message.of("user", "?"), ANSWER], record_id="x")


@pytest.mark.parametrize(
    ("question", "images", "kind"),
    [
        (("What is <image>?",), (), "image_count"),
        ((IMAGE, "\nWhat is <image>?"), ("a.png",), "image_count"),
        (("What?",), ("a.png",), "image_count"),
        ((IMAGE, IMAGE), ("a.png",), "image_count"),
        (("What is <video>?",), (), "video_count"),
        ((VideoRef(source=Path("a.mp4")),), (), "bad_field"),
    ],
)
def test_what_could_not_be_read_back_is_refused(
    question: tuple[object, ...], images: tuple[str, ...], kind: str
) -> None:
    with pytest.raises(DataError) as caught:
        conversation_fields(
            [Message("user", question), ANSWER],  # type: ignore[arg-type]
            record_id="x",
            images=images,
        )
    assert caught.value.kind == kind


def test_turns_in_a_wrong_order_are_refused() -> None:
    with pytest.raises(DataError) as caught:
        conversation_fields([ANSWER, Message.of("user", "?")], record_id="x")
    assert caught.value.kind == "bad_turns"


def test_a_data_set_is_read_as_it_was_written(tmp_path: Path) -> None:
    drawn = picture(20, 10)
    name = save_picture(drawn, tmp_path, "shapes/easy/0:1 ä")
    assert name == "images/shapes_easy_0_1_ä.png"
    messages = [Message.of("user", ImageRef(drawn), "\nWie groß?"), ANSWER]
    fields = conversation_fields(messages, record_id="a", images=[name])
    (tmp_path / "some.jsonl").write_text(json.dumps(fields) + "\n", "utf-8")
    write_meta(tmp_path / "meta.json", {"some": {"annotation": "some.jsonl", "repeat_time": 2.0}})
    (spec,) = read_meta(tmp_path / "meta.json")
    source = open_source(spec)
    assert len(source) == 2  # type: ignore[arg-type]
    record = source[0]  # type: ignore[index]
    user, answer = record.messages
    assert (user.parts[1], answer) == ("\nWie groß?", ANSWER)
    assert isinstance(user.parts[0], ImageRef)
    seen = PIL.Image.open(user.parts[0].source)  # type: ignore[arg-type]
    np.testing.assert_array_equal(np.asarray(seen), np.asarray(drawn))
