"""Meta files as released, and the words of every refusal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.data.some_lines import line

from cascadevl.data.meta import DatasetSpec, read_meta
from cascadevl.errors import DataError


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
