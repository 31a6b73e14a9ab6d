"""The log: JSON, nothing that was sent, and no trouble for whoever logs."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from base64 import b64encode
from pathlib import Path
from typing import Any

import pytest

from cascadevl.serving.logs import MAX_MESSAGE, JsonLines, Sink, clean, logging_to

LOG = logging.getLogger("cascadevl.serving.test")


def lines(content: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in content.splitlines()]


def record(message: str, **facts: object) -> logging.LogRecord:
    made = LOG.makeRecord(LOG.name, logging.INFO, __file__, 1, message, (), None)
    made.facts = facts
    return made


def test_a_line_is_json_with_its_facts(tmp_path: Path):
    file = tmp_path / "log"
    with logging_to(file):
        LOG.info("request", extra={"facts": {"status": 200, "path": '/a"\n'}})
        try:
            raise ValueError("wrong\nindeed")
        except ValueError:
            LOG.exception("failed")
    first, second = lines(file.read_text())
    assert (first["level"], first["message"], first["status"]) == ("info", "request", 200)
    assert first["path"] == '/a"\n'
    assert second["level"] == "error"
    assert "wrong" in second["traceback"]


def test_nothing_is_left_behind(tmp_path: Path):
    root, ours = logging.getLogger(), logging.getLogger("cascadevl")
    before = (list(root.handlers), ours.level, threading.active_count())
    with logging_to(tmp_path / "log"):
        assert len(root.handlers) == len(before[0]) + 1
    assert (list(root.handlers), ours.level, threading.active_count()) == before


def test_pictures_are_left_out():
    picture = b64encode(bytes(range(256)) * 10).decode()
    text = clean(f"no picture in data:image/png;base64,{picture} nor in {picture}, says 'data:,hi'")
    assert picture[:50] not in text
    assert text == "no picture in data:[left out] nor in [left out], says 'data:[left out]'"
    assert clean("a" * 150 + " short") == "a" * 150 + " short"
    assert len(clean("a b " * MAX_MESSAGE)) < MAX_MESSAGE + 20


def test_a_full_disk_loses_lines_and_nothing_else():
    descriptor = os.open("/dev/full", os.O_WRONLY)
    sink = Sink(descriptor)
    sink.setFormatter(JsonLines())
    for _ in range(50):
        sink.handle(record("request"))
    sink.close()
    os.close(descriptor)
    assert sink.num_lost == 50


def test_lost_lines_are_counted_once_there_is_room_again():
    reading, writing = os.pipe()
    sink = Sink(writing, max_lines=3)
    sink.setFormatter(JsonLines())
    big = "x " * 1900
    start = time.monotonic()
    for _ in range(60):  # a pipe takes 64 KiB, then the thread waits, then the queue is full
        sink.handle(record(big))
    assert time.monotonic() - start < 5
    found = b""
    while b"were lost" not in found:
        found += os.read(reading, 2**16)
        sink.handle(record("and on"))
        time.sleep(0.01)
    closing = threading.Thread(target=sink.close)
    closing.start()
    closing.join(10)
    assert not closing.is_alive()
    os.close(writing)
    while more := os.read(reading, 2**16):
        found += more
    os.close(reading)
    messages = [line["message"] for line in lines(found.decode())]
    assert any(message.endswith("lines of the log were lost") for message in messages)


def test_a_reader_that_never_reads_does_not_hold_up_the_end():
    reading, writing = os.pipe()
    sink = Sink(writing, max_lines=2)
    sink.setFormatter(JsonLines())
    for _ in range(60):
        sink.handle(record("x " * 1900))
    start = time.monotonic()
    sink.close()
    assert time.monotonic() - start < 10
    os.close(reading)  # the thread that still writes ends with an error, which costs lines only
    sink._thread.join(10)
    os.close(writing)


def test_a_line_that_was_cut_off_does_not_spoil_the_next(monkeypatch: pytest.MonkeyPatch):
    written: list[bytes] = []

    def write(_: int, content: bytes) -> int:
        written.append(content[:10] if not written else content)
        return len(written[-1])

    monkeypatch.setattr("cascadevl.serving.logs.os.write", write)
    sink = Sink(1)
    sink.setFormatter(JsonLines())
    sink.handle(record("first"))
    sink.handle(record("second"))
    sink.close()
    torn, *whole = b"".join(written).decode().splitlines()
    assert len(torn) == 10
    assert [json.loads(line)["message"] for line in whole] == [
        "second",
        "1 lines of the log were lost",
    ]
