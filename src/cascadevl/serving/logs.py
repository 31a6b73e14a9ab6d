"""The server's log: a line of JSON for each request and each event, and never what was sent.

Lines are written by a thread of their own. A disk that is full, a disk that is slow, or a pipe that
nobody reads costs lines of the log, which are counted, and never an answer.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MAX_MESSAGE = 4000
"""Most letters of a message or a traceback in a line."""

_DATA_URL = re.compile(r"data:[\w/+.-]{0,100}(?:;[\w=-]{0,100})*,[^\s'\"]*")
_LONG_BASE64 = re.compile(r"[A-Za-z0-9+/_-]{200,}={0,2}")
_CLOSE_S = 2.0
_STDERR = 2


def clean(text: str) -> str:
    """Text without pictures: data URLs and what looks like one is left out, and so is the rest.

    Args:
        text: A message or traceback, which may quote what a client has sent.
    """
    text = _LONG_BASE64.sub("[left out]", _DATA_URL.sub("data:[left out]", text))
    return text if len(text) <= MAX_MESSAGE else f"{text[:MAX_MESSAGE]} [and more]"


class JsonLines(logging.Formatter):
    """Writes a record as one line of JSON, with the facts that it brings."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        now = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{now}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": clean(record.getMessage()),
        }
        line |= record.__dict__.get("facts", {})
        if record.exc_info:
            line["traceback"] = clean(self.formatException(record.exc_info))
        return json.dumps(line)


class Sink(logging.Handler):
    """Hands lines to a thread that writes them: whoever logs never waits, and never fails.

    Attributes:
        num_lost: Lines that could not be written, and of which the log does not tell yet.
    """

    def __init__(self, descriptor: int, *, max_lines: int = 10_000) -> None:
        """Start the thread.

        Args:
            descriptor: Of the open file; it stays open when the sink is closed.
            max_lines: Most lines that wait for the thread; more are lost.
        """
        super().__init__()
        self.num_lost = 0
        self._descriptor = descriptor
        self._is_torn = False  # the last line was cut off where the disk was full
        self._lines: queue.Queue[str | None] = queue.Queue(max_lines)
        self._counting = threading.Lock()
        self._thread = threading.Thread(target=self._write_all, name="log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Take up a line."""
        try:
            self._lines.put_nowait(self.format(record))
        except queue.Full:
            self._lose(1)

    def close(self) -> None:
        """Write what waits, as long as that takes no more than a moment."""
        try:
            self._lines.put(None, timeout=_CLOSE_S)
            self._thread.join(_CLOSE_S)
        except queue.Full:  # nobody reads: it ends with the process
            pass
        super().close()

    def _write_all(self) -> None:
        while (line := self._lines.get()) is not None:
            if self._write(line) and self.num_lost:
                number = self.num_lost
                facts = {"level": "warning", "message": f"{number} lines of the log were lost"}
                if self._write(json.dumps(facts)):
                    self._lose(-number)

    def _write(self, line: str) -> bool:
        """Write a line; False if that was not possible."""
        content = (b"\n" if self._is_torn else b"") + line.encode() + b"\n"
        try:
            number = os.write(self._descriptor, content)
        except OSError:
            number = 0
        if number:
            self._is_torn = number < len(content)
        if number < len(content):
            self._lose(1)
        return number == len(content)

    def _lose(self, number: int) -> None:
        with self._counting:
            self.num_lost += number


@contextmanager
def logging_to(file: Path | None) -> Iterator[Sink]:
    """Log as JSON while the context lasts.

    Args:
        file: Is added to; None for the standard error output.

    Raises:
        OSError: If the file cannot be opened.
    """
    if file is None:
        descriptor = os.dup(_STDERR)
    else:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o640)
    sink = Sink(descriptor)
    sink.setFormatter(JsonLines())
    root, ours = logging.getLogger(), logging.getLogger("cascadevl")
    before = ours.level
    root.addHandler(sink)
    ours.setLevel(logging.INFO)
    try:
        yield sink
    finally:
        ours.setLevel(before)
        root.removeHandler(sink)
        sink.close()
        os.close(descriptor)
