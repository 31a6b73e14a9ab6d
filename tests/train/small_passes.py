"""What tests of a pass over all records before training (MPO, ViCO) have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class FailsOnce:
    """Computes as another does, but for one call, at which no memory is left; counts the calls."""

    def __init__(self, compute: Callable[..., Any], *, at: int) -> None:
        self.compute, self.at, self.calls = compute, at, 0

    def __call__(self, *args: Any) -> Any:
        self.calls += 1
        if self.calls == self.at:
            raise MemoryError
        return self.compute(*args)


class Streamed:
    """A data set without an end, which is not to be opened."""

    name, num_lanes = "river", 1

    def open(self, key: int) -> Any:
        raise AssertionError(key)

    def head(self, count: int) -> Any:
        raise AssertionError(count)

    def identity(self) -> list[int]:
        return [1]
