"""Meta files and records in the released formats, and the words of every refusal."""

from __future__ import annotations

from pathlib import Path

import PIL.Image
import pytest
from tests.data.some_lines import ROOT, chat

from cascadevl.data.meta import read_meta
from cascadevl.data.parsing import parse_record
from cascadevl.errors import DataError
from cascadevl.types import ImageRef, Message, Record, VideoRef


def parse(fields, **more) -> Record:
    return parse_record(fields, source="a.jsonl:3", root=ROOT, position="3", **more)


def refused(fields, kind, field=None):
    with pytest.raises(DataError) as caught:
        parse(fields)
    error = caught.value
    assert (error.kind, error.source) == (kind, "a.jsonl:3")
    assert error.remedy
    if field is not None:
        assert error.field == field
    return error


def image(name):
    return ImageRef(ROOT / name)


# --- what is read -----------------------------------------------------------------------------


def test_text():
    record = parse(chat("s:be kind", "h:hi", "g:hello", "h:and?", "g:so", id=7))
    assert record.messages == (
        Message.of("system", "be kind"),
        Message.of("user", "hi"),
        Message.of("assistant", "hello"),
        Message.of("user", "and?"),
        Message.of("assistant", "so"),
    )
    assert (record.source, record.record_id) == ("a.jsonl:3", "3:7")


def test_one_image_and_grounding_text_kept():
    answer = "<ref>the cat</ref><box>[[10, 20, 300, 999]]</box>"
    fields = chat("h:<image>\nWhere?", f"g:{answer}", image="a/b.jpg", width=1, height=1)
    assert parse(fields).messages == (
        Message.of("user", image("a/b.jpg"), "\nWhere?"),
        Message.of("assistant", answer),
    )


def test_several_images_in_their_order_over_several_turns():
    fields = chat(
        "h:Image-1: <image>\nImage-2: <image>\nDiffer?", "g:Yes.", "h:And <image>?", "g:No.",
        image=["a.jpg", "b.jpg", "c.jpg"],
    )  # fmt: skip
    assert parse(fields).messages == (
        Message.of("user", "Image-1: ", image("a.jpg"), "\nImage-2: ", image("b.jpg"), "\nDiffer?"),
        Message.of("assistant", "Yes."),
        Message.of("user", "And ", image("c.jpg"), "?"),
        Message.of("assistant", "No."),
    )


def test_without_marks_pictures_go_in_front_of_the_human_not_into_the_system_turn():
    fields = chat("s:be kind", "h:What?", "g:That.", image=["a.jpg", "b.jpg"])
    assert parse(fields).messages[:2] == (
        Message.of("system", "be kind"),
        Message.of("user", image("a.jpg"), "\n", image("b.jpg"), "\nWhat?"),
    )
    later = chat("h:Hello", "g:Hi", "h:<image> what?", "g:That.", image="a.jpg")
    assert parse(later).messages[0] == Message.of("user", "Hello")
    assert parse(later).messages[2] == Message.of("user", image("a.jpg"), " what?")


def test_marks_in_answers_and_system_turns_are_text():
    fields = chat("s:An <image> is <video>.", "h:<image>?", "g:It is an <image>.", image="a.jpg")
    record = parse(fields)
    assert record.messages[0] == Message.of("system", "An <image> is <video>.")
    assert record.messages[2] == Message.of("assistant", "It is an <image>.")


def test_video_with_clip_and_without():
    record = parse(chat("h:<video>\nWhat happens?", "g:x", video="v.mp4", clip=[1, 2.5]))
    video = VideoRef(source=ROOT / "v.mp4", clip_s=(1.0, 2.5))
    assert record.messages[0] == Message.of("user", video, "\nWhat happens?")
    record = parse(chat("h:What happens?", "g:x", video="folder/", image=[], clip=None))
    assert record.messages[0] == Message.of(
        "user", VideoRef(source=ROOT / "folder"), "\nWhat happens?"
    )


def test_pretraining_sample():
    record = parse(chat("p:one <image> two <image>", image=["a.jpg", "b.jpg"]))
    assert record.messages == (
        Message.of("pretrain", "one ", image("a.jpg"), " two ", image("b.jpg")),
    )
    assert parse(chat("p:only text")).messages == (Message.of("pretrain", "only text"),)
    assert parse(chat("p:text", image="a.jpg")).messages[0].parts == (image("a.jpg"), "\ntext")


def test_function_turns_are_tools():
    record = parse(chat("h:time?", "g:call", "f:12", "f:pm", "g:noon", "h:thanks", "g:ok"))
    assert [m.role for m in record.messages] == [
        "user", "assistant", "tool", "tool", "assistant", "user", "assistant",
    ]  # fmt: skip


def test_newer_spelling_gives_the_same_messages():
    old = chat("s:be kind", "h:<image>\nWhat?", "g:That.", image="a.jpg")
    new = {
        "messages": [
            {"role": "system", "content": "be kind"},
            {"role": "user", "content": "<image>\nWhat?"},
            {"role": "assistant", "content": "That."},
        ],
        "images": ["a.jpg"],
    }
    listed = {**new, "images": [{"bytes": None, "path": "a.jpg"}]}
    listed["messages"] = [
        {"role": "system", "content": [{"type": "text", "text": "be kind"}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "\nWhat?"}]},
        {"role": "assistant", "content": "That."},
    ]
    assert parse(new).messages == parse(old).messages == parse(listed).messages


def test_pictures_as_bytes_and_in_memory():
    picture = PIL.Image.new("RGB", (2, 2))
    record = parse(
        chat("h:<image><image>", "g:x", images=[{"bytes": b"abc", "path": "a"}, picture])
    )
    assert record.messages[0].parts == (ImageRef(b"abc"), ImageRef(picture))


def test_paths_without_root_are_taken_as_they_are():
    record = parse_record(chat("h:x", "g:y", image="a/b.jpg"), source="s")
    assert record.messages[0].parts[0] == ImageRef(Path("a/b.jpg"))
    assert record.record_id == "s"
    assert parse(chat("h:x", "g:y", image="/else/b.jpg")).messages[0].parts[0] == ImageRef(
        Path("/else/b.jpg")
    )


# --- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("marks", "images", "words"),
    [
        ("<image>", ["a", "b"], "1 <image> mark in the human turns but 2 images"),
        ("<image><image><image>", "a", "3 <image> marks in the human turns but 1 image in"),
        ("<image>", None, "1 <image> mark in the human turns but 0 images"),
    ],
)
def test_counts_that_differ_are_named_with_both_numbers(marks, images, words):
    assert words in str(refused(chat(f"h:{marks} x", "g:y", image=images), "image_count"))
    assert words in str(refused(chat(f"p:{marks} x", image=images), "image_count"))


def test_a_file_of_records_is_not_taken_for_a_meta_file(tmp_path: Path):
    path = tmp_path / "some.jsonl"
    path.write_text('{"id": 1}\n{"id": 2}\n')
    with pytest.raises(DataError, match="a file of records, not a meta file") as caught:
        read_meta(path)
    assert caught.value.kind == "bad_meta"


def test_video_counts():
    error = refused(chat("h:<video> <video>", "g:y", video="v.mp4"), "video_count")
    assert "2 <video> marks in the human turns but 1 video in" in str(error)
    refused(chat("h:<video>", "g:y"), "video_count")
    refused(chat("h:<image> <video>", "g:y", image="a"), "video_count")
    refused(chat("h:x", "g:y", videos=["a.mp4", "b.mp4"]), "video_count", "videos[1]")
    assert "1 image and a video" in str(
        refused(chat("h:x", "g:y", image="a", video="b"), "bad_field", "video")
    )


@pytest.mark.parametrize(
    ("turns", "place", "words"),
    [
        (("h:a", "h:b", "g:c"), 1, "a turn of human stands where gpt is expected"),
        (("g:a", "h:b", "g:c"), 0, "a turn of gpt stands where system or human is expected"),
        (("h:a", "g:b", "g:c"), 2, "a turn of gpt stands where human or function is expected"),
        (("h:a", "s:b", "g:c"), 1, "a turn of system stands where gpt"),
        (("s:a", "g:b"), 1, "a turn of gpt stands where human"),
        (("h:a", "g:b", "h:c"), 2, "ends with a turn of human"),
        (("h:a",), 0, "ends with a turn of human"),
        (("s:a",), 0, "ends with a turn of system"),
        (("p:a", "p:b"), 0, "a turn of pretrain stands where"),
        (("h:a", "p:b"), 1, "a turn of pretrain stands where gpt"),
    ],
)
def test_order_of_turns(turns, place, words):
    assert words in refused(chat(*turns), "bad_turns", f"conversations[{place}]").problem


def turns_with(**second):
    return {"conversations": [{"from": "human", "value": "a"}, second]}


@pytest.mark.parametrize(
    ("fields", "kind", "field", "words"),
    [
        ([], "bad_field", None, "the record is a list, not an object"),
        (None, "bad_field", None, "the record is null"),
        ({}, "bad_field", "conversations", "no conversation"),
        ({"conversations": []}, "bad_field", "conversations", "no conversation"),
        ({"conversations": "hello"}, "bad_field", "conversations", "is text; give a list of turns"),
        ({"conversations": {"a": 1}}, "bad_field", "conversations", "is an object"),
        ({"conversations": [5]}, "bad_field", "conversations[0]", "is a value of type int"),
        ({"conversations": [{}], "messages": [{}]}, "bad_field", "conversations", "has both"),
        (turns_with(value="b"), "bad_role", "conversations[1].from", "the role is missing"),
        (
            turns_with(**{"from": "robot", "value": "b"}),
            "bad_role",
            "conversations[1].from",
            "'robot'; use one of human, gpt",
        ),
        (
            turns_with(**{"from": ["gpt"], "value": "b"}),
            "bad_role",
            "conversations[1].from",
            "['gpt']",
        ),
        (turns_with(**{"from": "gpt"}), "bad_field", "conversations[1].value", "is missing"),
        (
            turns_with(**{"from": "gpt", "value": 5}),
            "bad_field",
            "conversations[1].value",
            "type int",
        ),
        (
            turns_with(**{"from": "gpt", "value": True}),
            "bad_field",
            "conversations[1].value",
            "true or false",
        ),
        (
            turns_with(**{"from": "gpt", "value": ["b"]}),
            "bad_field",
            "conversations[1].value",
            "is a list",
        ),
        (
            turns_with(**{"from": "gpt", "value": " \n"}),
            "bad_field",
            "conversations[1].value",
            "the turn of 'gpt' is empty",
        ),
        (
            turns_with(**{"from": "gpt", "value": "\ud83d"}),
            "bad_field",
            "conversations[1].value",
            "surrogate",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "sound"}]}]},
            "bad_field",
            "messages[0].content[0].type",
            "'sound'",
        ),
        (
            {"messages": [{"role": "user", "content": ["x"]}]},
            "bad_field",
            "messages[0].content[0]",
            "is text",
        ),
        (chat("h:x", "g:y", image=5), "bad_field", "image", "type int"),
        (chat("h:x", "g:y", image=["a", None]), "bad_field", "image[1]", "is missing"),
        (chat("h:x", "g:y", image=" "), "bad_field", "image", "the path is empty"),
        (
            chat("h:x", "g:y", image={"bytes": b"", "path": None}),
            "bad_field",
            "image",
            "is missing",
        ),
        (
            chat("h:x", "g:y", image="a", images=["b"]),
            "bad_field",
            "images",
            "both 'image' and 'images'",
        ),
        (chat("h:x", "g:y", image="s3://bucket/a"), "unsupported_source", "image", "(s3)"),
        (chat("h:x", "g:y", video="http://host/a"), "unsupported_source", "video", "(http)"),
        (chat("h:x", "g:y", video="a", clip=[3, 2]), "bad_clip", "clip", "[3, 2]"),
        (chat("h:x", "g:y", video="a", clip=[0, float("nan")]), "bad_clip", "clip", "nan"),
        (chat("h:x", "g:y", video="a", clip=[True, 2]), "bad_clip", "clip", "True"),
        (chat("h:x", "g:y", video="a", clip="12"), "bad_clip", "clip", "'12'"),
    ],
)
def test_wrong_fields_are_named(fields, kind, field, words):
    error = refused(fields, kind, field)
    assert words in str(error)
    if field is not None:
        assert str(error).startswith(f"a.jsonl:3: field '{field}': ")
