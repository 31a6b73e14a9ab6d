"""A Hugging Face data set gives the same records as the JSONL file with the same content."""

from __future__ import annotations

import io
import json
import sys

import datasets
import numpy as np
import PIL.Image
import pytest

from cascadevl.data.hub import HuggingFaceSource, load_rows, open_source
from cascadevl.data.image import open_image
from cascadevl.data.meta import DatasetSpec
from cascadevl.data.records import JsonlSource
from cascadevl.errors import ConfigError, DataError
from cascadevl.types import ImageRef


def picture(shade, size=(6, 4)):
    return PIL.Image.new("RGB", size, (shade, 0, 0))


def png(shade):
    file = io.BytesIO()
    picture(shade).save(file, format="PNG")
    return file.getvalue()


def conversation(number, num_images=1):
    question = "<image>" * num_images + f"question {number}"
    return [{"from": "human", "value": question}, {"from": "gpt", "value": f"answer {number}"}]


@pytest.fixture(autouse=True)
def cache_in_tmp(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


@pytest.fixture
def rows():
    return datasets.Dataset.from_dict(
        {
            "id": ["a", "b", "c"],
            "image": [{"bytes": png(shade), "path": None} for shade in (10, 20, 30)],
            "conversations": [conversation(number) for number in range(3)],
        }
    ).cast_column("image", datasets.Image())


def shown(record):
    images = [part for part in record.messages[0].parts if isinstance(part, ImageRef)]
    return [open_image(image, source="s").getpixel((1, 1))[0] for image in images]


def test_rows_in_memory(rows):
    source = HuggingFaceSource(rows, name="set", max_tiles=4, augment=True)
    assert (source.name, len(source)) == ("set", 3)
    record = source[1]
    assert record.messages[0].text == "question 1"
    assert record.messages[1].text == "answer 1"
    assert shown(record) == [20]
    assert (record.source, record.record_id, record.dataset) == ("set:1", "1:b", "set")
    assert (record.max_tiles, record.augment) == (4, True)
    for index in (3, -1):
        with pytest.raises(IndexError):
            source[index]


@pytest.mark.parametrize("form", ["parquet", "folder"])
def test_local_files_through_a_meta_entry(rows, tmp_path, form):
    path = tmp_path / ("set.parquet" if form == "parquet" else "set")
    if form == "parquet":
        rows.to_parquet(path)
    else:
        rows.save_to_disk(path)
    spec = DatasetSpec(
        name="s", annotation=path, root=tmp_path, repeat_time=2.5, max_dynamic_patch=3
    )
    source = open_source(spec)
    assert isinstance(source, HuggingFaceSource)
    assert [shown(source[index]) for index in range(len(source))] == [[10], [20], [30]] * 2 + [[10]]
    identities = [source[index].record_id for index in range(len(source))]
    assert identities == ["0:a", "1:b", "2:c", "0#2:a", "1#2:b", "2#2:c", "0#3:a"]
    assert source[0].max_tiles == 3


def test_several_pictures_a_row_and_the_newer_spelling(tmp_path):
    turns = [{"role": "user", "content": "<image><image>?"}, {"role": "assistant", "content": "x"}]
    rows = datasets.Dataset.from_dict(
        {
            "images": [[png(1), png(2)], []],
            "messages": [turns, [{"role": "user", "content": "?"}, turns[1]]],
        },
        features=datasets.Features(
            {
                "images": datasets.List(datasets.Image()),
                "messages": datasets.List(
                    {"role": datasets.Value("string"), "content": datasets.Value("string")}
                ),
            }
        ),
    )
    source = HuggingFaceSource(rows, name="set")
    assert shown(source[0]) == [1, 2]
    assert shown(source[1]) == []


def test_a_broken_picture_is_met_only_when_it_is_opened():
    rows = datasets.Dataset.from_dict(
        {"image": [{"bytes": png(9)[:45], "path": None}], "conversations": [conversation(0)]}
    ).cast_column("image", datasets.Image())
    record = HuggingFaceSource(rows, name="set")[0]
    with pytest.raises(DataError) as caught:
        shown(record)
    assert caught.value.kind == "corrupt_image"


def test_paths_start_from_the_root_and_equal_the_jsonl_source(tmp_path):
    picture(77).save(tmp_path / "a.png")
    fields = {"id": 5, "image": "a.png", "conversations": conversation(0)}
    rows = datasets.Dataset.from_list([fields])
    (tmp_path / "a.jsonl").write_text(json.dumps(fields))
    theirs = HuggingFaceSource(rows, name="set", root=tmp_path)[0]
    ours = JsonlSource(DatasetSpec(name="set", annotation=tmp_path / "a.jsonl", root=tmp_path))[0]
    assert theirs.messages == ours.messages
    assert shown(theirs) == [77]


def test_bad_rows_are_data_errors():
    rows = datasets.Dataset.from_dict({"conversations": [[{"from": "human", "value": "?"}]]})
    with pytest.raises(DataError, match=r"set:0: field 'conversations\[0\]'") as caught:
        HuggingFaceSource(rows, name="set")[0]
    assert caught.value.kind == "bad_turns"
    with pytest.raises(DataError, match="has the columns text"):
        HuggingFaceSource(datasets.Dataset.from_dict({"text": ["x"]}), name="set")


def test_files_that_cannot_be_opened(tmp_path, rows):
    with pytest.raises(DataError) as caught:
        load_rows(tmp_path / "missing.parquet")
    assert caught.value.kind == "missing_file"
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(DataError) as caught:
        load_rows(tmp_path / "broken.parquet")
    assert caught.value.kind == "corrupt_dataset"
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError) as caught:
        load_rows(tmp_path / "empty")
    assert caught.value.kind == "corrupt_dataset"
    (tmp_path / "set.csv").write_text("a,b\n")
    with pytest.raises(ConfigError, match=r"'\.csv'"):
        load_rows(tmp_path / "set.csv")
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "splits")
    with pytest.raises(DataError, match="several splits: train, test"):
        load_rows(tmp_path / "splits")


def test_without_datasets_the_remedy_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"pip install 'cascadevl\[data\]'"):
        load_rows(tmp_path)


def test_jsonl_needs_no_datasets(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"conversations": conversation(0, num_images=0)}))
    source = open_source(DatasetSpec(name="s", annotation=path, root=tmp_path))
    assert source[0].messages[0].text == "question 0"


def test_order_of_access_does_not_matter(rows):
    source = HuggingFaceSource(rows, name="set")
    order = np.random.default_rng(0).integers(0, 3, 12).tolist()
    assert [source[index].record_id[0] for index in order] == [str(index) for index in order]
