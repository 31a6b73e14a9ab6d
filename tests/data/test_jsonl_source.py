"""Lines of JSONL files read anywhere in the file, and the words of every refusal."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
from tests.data.some_lines import ROOT, chat, line

from cascadevl.data.meta import DatasetSpec
from cascadevl.data.records import JsonlSource, read_records, repeated_length
from cascadevl.errors import DataError
from cascadevl.types import ImageRef


def write_lines(path, lines):
    path.write_bytes(b"".join(lines))
    return DatasetSpec(name="set", annotation=path, root=ROOT)


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
