"""Files that grow by chunks: whatever a crash leaves, the next attempt makes up for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cascadevl.data.journal import JOURNAL, Journal
from cascadevl.errors import ConfigError, DataError

NAMES = ("a.jsonl", "b.jsonl")
SETTINGS = {"seed": 1, "rules": {"ngram": 10}}


def chunk(number: int) -> dict[str, list[dict[str, object]]]:
    """Two records in one file, one or none in the other."""
    some = [{"n": number}] if number % 2 else []
    return {"a.jsonl": [{"n": number, "text": "größer\n"}, {"n": -number}], "b.jsonl": some}


def write(folder: Path, first: int, last: int, *, resume: bool = False) -> None:
    journal = Journal(folder, NAMES, SETTINGS, resume=resume)
    assert journal.num_chunks == first
    assert journal.state == ({"total": first} if first else {})
    for number in range(first, last):
        journal.commit(chunk(number), {"total": number + 1})


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in (*NAMES, JOURNAL)}


@pytest.fixture
def whole(tmp_path: Path) -> dict[str, bytes]:
    write(tmp_path / "whole", 0, 6)
    return contents(tmp_path / "whole")


def test_records_are_there_once_and_in_order(whole: dict[str, bytes]) -> None:
    lines = [json.loads(line) for line in whole["a.jsonl"].splitlines()]
    assert [line["n"] for line in lines] == [0, 0, 1, -1, 2, -2, 3, -3, 4, -4, 5, -5]
    assert lines[2]["text"] == "größer\n"
    assert [json.loads(line)["n"] for line in whole["b.jsonl"].splitlines()] == [1, 3, 5]


def test_an_interruption_between_chunks(tmp_path: Path, whole: dict[str, bytes]) -> None:
    write(tmp_path / "x", 0, 3)
    write(tmp_path / "x", 3, 6, resume=True)
    assert contents(tmp_path / "x") == whole


def test_a_crash_at_any_byte(tmp_path: Path, whole: dict[str, bytes]) -> None:
    """The fourth chunk is partly written: any part of its records, and of its line."""
    for name, cut in [("a.jsonl", 1), ("a.jsonl", 20), ("b.jsonl", 3), (JOURNAL, 1), (JOURNAL, 30)]:
        folder = tmp_path / f"{name}-{cut}"
        write(folder, 0, 4)
        lines = contents(folder)[JOURNAL].splitlines(keepends=True)
        if name == JOURNAL:  # both files are complete, the note is not
            (folder / name).write_bytes(b"".join(lines[:-1]) + lines[-1][:cut])
        else:
            (folder / JOURNAL).write_bytes(b"".join(lines[:-1]))
            before = json.loads(lines[-2])["sizes"][name]
            content = (folder / name).read_bytes()
            (folder / name).write_bytes(content[: before + cut])
        write(folder, 3, 6, resume=True)
        assert contents(folder) == whole


def test_a_crash_before_the_first_chunk(tmp_path: Path, whole: dict[str, bytes]) -> None:
    write(tmp_path / "x", 0, 0)
    (tmp_path / "x" / "a.jsonl").write_text('{"n": 0')
    write(tmp_path / "x", 0, 6, resume=True)
    assert contents(tmp_path / "x") == whole


def test_a_new_folder_may_be_asked_to_resume(tmp_path: Path, whole: dict[str, bytes]) -> None:
    write(tmp_path / "x", 0, 6, resume=True)
    assert contents(tmp_path / "x") == whole


def test_other_settings_are_refused(tmp_path: Path) -> None:
    write(tmp_path, 0, 1)
    with pytest.raises(ConfigError, match=r"seed = 1 and cannot go on with 2"):
        Journal(tmp_path, NAMES, {**SETTINGS, "seed": 2}, resume=True)
    with pytest.raises(ConfigError, match="rules"):
        Journal(tmp_path, NAMES, {"seed": 1}, resume=True)


def test_what_is_there_is_not_overwritten(tmp_path: Path) -> None:
    write(tmp_path, 0, 1)
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match="resume"):
        Journal(tmp_path, NAMES, SETTINGS, resume=False)
    assert contents(tmp_path) == before
    (tmp_path / JOURNAL).unlink()
    for resume in (False, True):
        with pytest.raises(ConfigError, match="choose another folder"):
            Journal(tmp_path, NAMES, SETTINGS, resume=resume)
    assert (tmp_path / "a.jsonl").read_bytes() == before["a.jsonl"]


def test_a_file_that_lost_records_is_not_filled_up(tmp_path: Path) -> None:
    write(tmp_path, 0, 2)
    size = (tmp_path / "a.jsonl").stat().st_size
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(ConfigError, match=f"0 bytes, but {size}"):
        Journal(tmp_path, NAMES, SETTINGS, resume=True)


def test_a_damaged_journal_is_named(tmp_path: Path) -> None:
    write(tmp_path, 0, 2)
    with (tmp_path / JOURNAL).open("a") as file:
        file.write("no json\n")
    with pytest.raises(DataError, match=f"{JOURNAL}:4"):
        Journal(tmp_path, NAMES, SETTINGS, resume=True)
