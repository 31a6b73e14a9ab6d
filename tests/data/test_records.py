"""Meta files and records in the released formats, and the words of every refusal."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from cascadevl.data.meta import DatasetSpec, read_meta
from cascadevl.data.parsing import parse_record
from cascadevl.data.records import JsonlSource, read_records, repeated_length
from cascadevl.errors import DataError
from cascadevl.types import ImageRef, Message, Record, VideoRef

ROOT = Path("/pictures")


def chat(*turns, **more):
    names = {"h": "human", "g": "gpt", "s": "system", "f": "function", "p": "pretrain"}
    return {
        "conversations": [{"from": names[turn[0]], "value": turn[2:]} for turn in turns],
        **more,
    }


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


# --- JSONL ------------------------------------------------------------------------------------


def write_lines(path, lines):
    path.write_bytes(b"".join(lines))
    return DatasetSpec(name="set", annotation=path, root=ROOT)


def line(number, **more):
    return json.dumps(
        chat(f"h:question {number}", f"g:answer {number}", id=number, **more)
    ).encode()


def test_random_access_with_blank_lines_bom_crlf_and_no_final_newline(tmp_path):
    content = [b"\xef\xbb\xbf", line(0), b"\r\n", b"\n", b"  \t\r\n", line(1), b"\n", line(2)]
    source = JsonlSource(write_lines(tmp_path / "a.jsonl", content))
    assert (source.name, len(source), source.num_lines) == ("set", 3, 3)
    for index in (2, 0, 1, 0):
        assert source[index].messages[0].text == f"question {index}"
    assert [source[i].source.rpartition(":")[2] for i in range(3)] == ["1", "4", "5"]
    assert [source[i].record_id for i in range(3)] == ["1:0", "4:1", "5:2"]
    assert source[0].dataset == "set"
    assert len(list(source)) == 3
    for index in (3, -1):
        with pytest.raises(IndexError, match=r"of 3 in .*a\.jsonl"):
            source[index]


def test_source_crosses_process_borders(tmp_path):
    source = JsonlSource(write_lines(tmp_path / "a.jsonl", [line(0), b"\n", line(1)]))
    assert pickle.loads(pickle.dumps(source))[1] == source[1]


def test_a_bad_line_is_an_error_only_when_it_is_read(tmp_path):
    content = [line(0), b"\n", b'{"conversations": [1,]}\n', line(2), b"\n", b"\xff\xfe\n"]
    spec = write_lines(tmp_path / "a.jsonl", content)
    source = JsonlSource(spec)
    assert source[2].messages[0].text == "question 2"
    with pytest.raises(DataError) as caught:
        source[1]
    assert caught.value.source == f"{tmp_path / 'a.jsonl'}:2"
    kinds = [r.kind if isinstance(r, DataError) else r.record_id for r in read_records(spec)]
    assert kinds == ["1:0", "invalid_json", "3:2", "invalid_json"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"a": 1,}', "not valid JSON at column 8: a comma before the closing '}'; remove it"),
        (
            b'{"a": [1, 2 , ]}',
            "not valid JSON at column 13: a comma before the closing ']'; remove it",
        ),
        (b"{'a': 1}", "use double quotes"),
        (b'{"a": 1} {"a": 2}', "column 10: Extra data; write one object a line"),
        (b'[{"a": 1},', "write one object a line, not a list of objects"),
        (b'{"a": ', "not valid JSON at column"),
        (b'{"a": "\xff"}', "byte 7 (0xff) is not UTF-8; save the file as UTF-8"),
        (b"[" * 100_000, "the JSON cannot be read"),
        (b'{"a": ' + b"9" * 5000 + b"}", "the JSON cannot be read"),
    ],
)
def test_broken_json_is_explained(tmp_path, content, words):
    source = JsonlSource(write_lines(tmp_path / "a.jsonl", [content]))
    with pytest.raises(DataError) as caught:
        source[0]
    assert words in str(caught.value)
    assert caught.value.kind == "invalid_json"


@pytest.mark.parametrize(
    ("repeat_time", "expected"),
    [
        (1.0, "0123456789"),
        (0.29, "01"),
        (0.3, "012"),
        (2.0, "01234567890123456789"),
        (1.5, "012345678901234"),
    ],
)
def test_repeat_time(tmp_path, repeat_time, expected):
    path = tmp_path / "a.jsonl"
    write_lines(path, [line(n) + b"\n" for n in range(10)])
    spec = DatasetSpec(name="s", annotation=path, root=ROOT, repeat_time=repeat_time)
    records = list(JsonlSource(spec))
    assert "".join(record.messages[0].text[-1] for record in records) == expected
    assert len({record.record_id for record in records}) == len(records)
    if len(records) > 10:
        assert (records[0].record_id, records[10].record_id) == ("1:0", "1#2:0")


def test_a_share_of_the_lines_is_exact_in_spite_of_binary_fractions():
    assert [repeated_length(100, share) for share in (0.29, 0.57, 0.58, 0.999)] == [29, 57, 58, 99]
    assert repeated_length(7, 2.5) == 17


def test_data_set_settings_reach_the_record(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(line(0, image="x.jpg"))
    spec = DatasetSpec(
        name="s", annotation=path, root=tmp_path, data_augment=True, max_dynamic_patch=6
    )
    record = JsonlSource(spec)[0]
    assert (record.augment, record.max_tiles, record.dataset) == (True, 6, "s")
    assert record.messages[0].parts[0] == ImageRef(tmp_path / "x.jpg")


def test_empty_and_missing_files(tmp_path):
    assert len(JsonlSource(write_lines(tmp_path / "a.jsonl", [b"\n \n"]))) == 0
    assert len(JsonlSource(write_lines(tmp_path / "a.jsonl", [b""]))) == 0
    with pytest.raises(DataError) as caught:
        JsonlSource(DatasetSpec(name="s", annotation=tmp_path / "missing.jsonl", root=ROOT))
    assert caught.value.kind == "missing_file"


def test_offsets_of_many_lines_of_all_lengths(tmp_path):
    generator = np.random.default_rng(1)
    texts = ["x" * int(n) for n in generator.integers(1, 3000, 300)]
    rows = [json.dumps(chat(f"h:{text}", "g:y")).encode() + b"\n" for text in texts]
    source = JsonlSource(write_lines(tmp_path / "a.jsonl", rows))
    for index in generator.permutation(300).tolist():
        assert source[index].messages[0].text == texts[index]


# --- meta -------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "sets").mkdir()
    (tmp_path / "sets" / "images").mkdir()
    (tmp_path / "sets" / "a.jsonl").write_bytes(line(0))
    return tmp_path


def write_meta(folder, content):
    path = folder / "sets" / "meta.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_meta_with_all_keys_and_with_few(folder):
    meta = write_meta(
        folder,
        {
            "full": {
                "root": "images/", "annotation": "a.jsonl", "data_augment": True,
                "max_dynamic_patch": 6, "repeat_time": 0.5, "length": 12,
            },
            "short": {"annotation": str(folder / "sets" / "a.jsonl")},
        },
    )  # fmt: skip
    base = folder / "sets"
    assert read_meta(meta) == [
        DatasetSpec(
            name="full", annotation=base / "a.jsonl", root=base / "images", data_augment=True,
            max_dynamic_patch=6, repeat_time=0.5, length=12,
        ),
        DatasetSpec(name="short", annotation=base / "a.jsonl", root=base),
    ]  # fmt: skip


def test_meta_paths_fall_back_to_the_working_folder(folder, monkeypatch):
    (folder / "elsewhere").mkdir()
    (folder / "elsewhere" / "pictures").mkdir()
    (folder / "elsewhere" / "b.jsonl").write_bytes(line(0))
    monkeypatch.chdir(folder / "elsewhere")
    meta = write_meta(folder, {"b": {"annotation": "b.jsonl", "root": "pictures"}})
    assert read_meta(meta)[0].annotation == Path("b.jsonl")
    assert read_meta(meta)[0].root == Path("pictures")
    # Beside the meta file is looked at first.
    (folder / "sets" / "pictures").mkdir()
    assert read_meta(meta)[0].root == folder / "sets" / "pictures"


@pytest.mark.parametrize(
    ("entry", "kind", "field", "words"),
    [
        (
            {"annotation": "no.jsonl"},
            "missing_file",
            "x.annotation",
            "'no.jsonl' does not exist, neither as",
        ),
        ({"root": "images"}, "bad_meta", "x.annotation", "is None; give a path"),
        (
            {"annotation": "a.jsonl", "repeat_tmie": 1},
            "bad_meta",
            "x.repeat_tmie",
            "did you mean 'repeat_time'?",
        ),
        ({"annotation": "a.jsonl", "zzz": 1}, "bad_meta", "x.zzz", "Known are annotation, root"),
        ({"annotation": "a.jsonl", "repeat_time": 0}, "bad_meta", "x.repeat_time", "is 0"),
        ({"annotation": "a.jsonl", "repeat_time": "2"}, "bad_meta", "x.repeat_time", "is '2'"),
        (
            {"annotation": "a.jsonl", "repeat_time": float("nan")},
            "bad_meta",
            "x.repeat_time",
            "is nan",
        ),
        (
            {"annotation": "a.jsonl", "data_augment": "yes"},
            "bad_meta",
            "x.data_augment",
            "true or false",
        ),
        (
            {"annotation": "a.jsonl", "max_dynamic_patch": 0},
            "bad_meta",
            "x.max_dynamic_patch",
            "is 0",
        ),
        (
            {"annotation": "a.jsonl", "max_dynamic_patch": True},
            "bad_meta",
            "x.max_dynamic_patch",
            "is True",
        ),
        ({"annotation": "a.jsonl", "root": 5}, "bad_meta", "x.root", "is 5"),
        (
            {"annotation": "a.jsonl", "root": "s3://bucket/x"},
            "unsupported_source",
            "x.root",
            "download",
        ),
        ([], "bad_meta", "x", "not an object"),
    ],
)
def test_wrong_entries_are_named(folder, entry, kind, field, words):
    with pytest.raises(DataError) as caught:
        read_meta(write_meta(folder, {"x": entry}))
    assert (caught.value.kind, caught.value.field) == (kind, field)
    assert words in str(caught.value)


def test_trailing_comma_as_in_the_released_example(folder):
    content = '{\n  "x": {\n    "annotation": "a.jsonl",\n    "length": 3\n  },\n}\n'
    with pytest.raises(DataError) as caught:
        read_meta(write_meta(folder, content))
    assert "not valid JSON at line 5 column 4: a comma before the closing '}'; remove it" in str(
        caught.value
    )
    with pytest.raises(DataError, match="holds no data set"):
        read_meta(write_meta(folder, {}))
    with pytest.raises(DataError, match="holds no data set"):
        read_meta(write_meta(folder, [1]))
    with pytest.raises(DataError, match="the JSON is empty"):
        read_meta(write_meta(folder, " "))
    with pytest.raises(DataError, match="cannot be read") as caught:
        read_meta(folder / "no.json")
    assert caught.value.kind == "missing_file"
