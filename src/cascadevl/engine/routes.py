"""Requests that wait for the router: it must see all their tiles before they have a length.

They stand before the scheduler, which plans by length. Their tiles are encoded a few in each step,
beside answers that go on, and only when it is a request's turn: what is encoded long before it is
read would have to be kept, or encoded again.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cascadevl.engine.answers import OpenRequest
from cascadevl.engine.contents import Content
from cascadevl.engine.prompts import routed
from cascadevl.engine.vision import VisionCache


@dataclass(slots=True, eq=False)
class _Waiting:
    """A request, and what the router has said of its first tiles."""

    asked: OpenRequest
    open_tiles: list[Content]
    found: list[Tensor] = field(default_factory=list)


class Routes:
    """The queue of requests before the router."""

    def __init__(self, vision: VisionCache) -> None:
        """Begin with nobody.

        Args:
            vision: Encodes tiles, and keeps what it has encoded.
        """
        self._vision = vision
        self._queue: deque[_Waiting] = deque()

    def __len__(self) -> int:
        """Requests that wait."""
        return len(self._queue)

    def add(self, asked: OpenRequest) -> None:
        """Queue a request that is not routed."""
        assert asked.prompt.unrouted is not None, "there is nothing to decide"
        self._queue.append(_Waiting(asked, asked.prompt.unrouted.undecided))

    def drop(self, asked: OpenRequest) -> bool:
        """Forget a request; whether it was there."""
        left = [each for each in self._queue if each.asked is not asked]
        was_there = len(left) < len(self._queue)
        self._queue = deque(left)
        return was_there

    def forget(self) -> None:
        """Ask the router anew, for new weights."""
        for each in self._queue:
            each.found.clear()

    def advance(self, most: int, *, before: int | None) -> tuple[list[OpenRequest], int]:
        """Encode the next tiles and route the requests that are complete.

        Args:
            most: Tiles that may be encoded in this step.
            before: Only requests that came before this one; None for all.

        Returns:
            The requests whose prompts are decided now, and how many tiles were encoded.
        """
        parts = self._next_tiles(most, before)
        if not parts:
            return [], 0
        encoded = self._vision.num_encoded
        chances = self._vision.probabilities([tile for _, tiles in parts for tile in tiles])
        sizes = [len(tiles) for _, tiles in parts]
        for (waiting, _), mine in zip(parts, chances.split(sizes), strict=True):
            waiting.found += mine.unbind()
        ready = []
        while self._queue and len(self._queue[0].found) == len(self._queue[0].open_tiles):
            done = self._queue.popleft()
            unrouted = done.asked.prompt.unrouted
            assert unrouted is not None, "it was when it came"
            done.asked.prompt = routed(unrouted, torch.stack(done.found))
            ready.append(done.asked)
        return ready, self._vision.num_encoded - encoded

    def _next_tiles(self, most: int, before: int | None) -> list[tuple[_Waiting, list[Content]]]:
        """The next tiles of the requests whose turn it is, few enough of them unknown."""
        parts: list[tuple[_Waiting, list[Content]]] = []
        planned: set[bytes] = set()
        for waiting in self._queue:
            if before is not None and waiting.asked.number > before:
                break
            tiles: list[Content] = []
            for content in waiting.open_tiles[len(waiting.found) :]:
                if not self._vision.knows(content):
                    planned.add(content.key)
                if len(planned) > most:
                    break
                tiles.append(content)
            if tiles:
                parts.append((waiting, tiles))
            if len(planned) > most:
                break
        return parts
