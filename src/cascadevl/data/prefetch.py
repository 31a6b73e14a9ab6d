"""Making batches in the background, so that decoding pictures overlaps with training.

Apart from the stream because it adds a thread and nothing else: the batches, their order, the
errors and the saved state are those of the stream alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic

from cascadevl.data.stream import BatchStream, BatchT, Skipped, skipped_of
from cascadevl.errors import ConfigError


class Prefetcher(Generic[BatchT]):
    """Makes the next batches of a stream in a thread while the model works on this one.

    Its state is that of the stream after the last batch handed out, not of those made ahead.
    Use it as a context manager, or call `close`. An error of the stream is raised where the
    batch it prevented would have come.
    """

    def __init__(self, stream: BatchStream[BatchT], num_batches: int) -> None:
        """Wrap a stream; nothing is made before the first batch is asked for.

        Args:
            stream: The stream, which must not be used directly any more.
            num_batches: Batches made ahead at most.

        Raises:
            ConfigError: If ``num_batches`` is less than 1.
        """
        if num_batches < 1:
            raise ConfigError(f"{num_batches} batches cannot be made ahead; use the stream itself")
        self._stream, self._num_batches = stream, num_batches
        self._state = stream.state_dict()
        self._executor: ThreadPoolExecutor | None = None
        self._futures: deque[Future[tuple[BatchT, dict[str, Any]]]] = deque()
        self._ahead = False  # whether the stream stands further than the last batch handed out

    @property
    def skipped(self) -> dict[tuple[str, str], Skipped]:
        """What was left out up to the last batch handed out."""
        return skipped_of(self._state)

    def __iter__(self) -> Iterator[BatchT]:
        """Itself."""
        return self

    def __next__(self) -> BatchT:
        """The next batch of the stream, with the stream's errors."""
        if self._executor is None:
            if self._ahead:
                self._stream.load_state_dict(self._state)
            self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self._submit(self._executor)
        try:
            batch, self._state = self._futures.popleft().result()
        except BaseException:
            self.close()
            raise
        self._submit(self._executor)
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stood after the last batch handed out; plain JSON."""
        return self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Throw away what was made ahead and go on from a state, as the stream does."""
        self.close()
        self._stream.load_state_dict(state)
        self._state, self._ahead = self._stream.state_dict(), False

    def close(self) -> None:
        """End the thread, after the batch it is at. A later batch starts a new one."""
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)
            self._executor = None
        self._futures.clear()

    def __enter__(self) -> Prefetcher[BatchT]:
        """Nothing to open."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()

    def _submit(self, executor: ThreadPoolExecutor) -> None:
        self._ahead = True
        while len(self._futures) < self._num_batches:
            self._futures.append(executor.submit(self._make))

    def _make(self) -> tuple[BatchT, dict[str, Any]]:
        return next(self._stream), self._stream.state_dict()
