"""Vision and language servers of this machine as processes, started again when they die."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

_LOG = logging.getLogger(__name__)

_SETTLED_S = 30.0
"""A process that ran so long did not fail at its start."""

_MAX_DELAY_S = 30.0


@dataclass(slots=True, eq=False)
class Keeper:
    """Keeps a server running, which ends by itself should this process be killed.

    Attributes:
        words: Of the command, without the program.
        delay_s: Pause before it is started again; doubled while it fails at its start.
    """

    words: Sequence[str]
    delay_s: float = 0.5
    process: subprocess.Popen[bytes] | None = None
    _stopping: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the process, and a thread that watches it."""
        self._thread = threading.Thread(target=self._keep, name="keeper", daemon=True)
        self._start_process()
        self._thread.start()

    def stop(self) -> None:
        """End the process, and start it no more."""
        with self._lock:
            self._stopping.set()
            if self.process is not None:
                self.process.terminate()
        if self._thread is not None:
            self._thread.join()
        if self.process is not None:
            self.process.wait()

    def _start_process(self) -> None:
        with self._lock:
            if not self._stopping.is_set():
                # Ctrl-C in a terminal is for us: a server ends when what is in hand is answered.
                parent = ("--parent", str(os.getpid()))
                self.process = subprocess.Popen(
                    [sys.executable, "-m", "cascadevl.cli.main", *self.words, *parent],
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                )

    def _keep(self) -> None:
        delay_s = self.delay_s
        while not self._stopping.is_set():
            assert self.process is not None
            try:
                code = self.process.wait(_SETTLED_S)
            except subprocess.TimeoutExpired:
                delay_s = self.delay_s
                continue
            if self._stopping.is_set():
                return
            _LOG.warning("%s ended with %s; it is started again", " ".join(self.words), code)
            self._stopping.wait(delay_s)
            delay_s = min(2 * delay_s, _MAX_DELAY_S)
            self._start_process()


def end_with(parent: int, stop: Callable[[], None]) -> None:
    """Stop when a process is gone that was to stop us, and cannot any more.

    Args:
        parent: The process that started this one.
        stop: Called from a thread.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        stop()

    threading.Thread(target=watch, name="parent", daemon=True).start()
