"""How often each key may ask: so many requests in any minute, wherever the minute begins."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

MINUTE_S = 60.0


class Rates:
    """Counts the requests of each key.

    Attributes:
        per_minute: Requests of each in any minute.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        """Begin with none.

        Args:
            per_minute: Requests of each key in any minute, at least 1.
            clock: Seconds that only grow.
        """
        self.per_minute = per_minute
        self._clock = clock
        self._latest: dict[str, deque[float]] = {}  # when each asked, as far back as it matters

    def wait_s(self, owner: str) -> float:
        """Count a request, unless there were too many.

        One that has to wait is not counted: whoever asks again too early does not wait longer.

        Args:
            owner: Of the key.

        Returns:
            Seconds until there is room for one; 0 where it was counted.
        """
        now = self._clock()
        latest = self._latest.setdefault(owner, deque(maxlen=self.per_minute))
        if len(latest) == self.per_minute and (wait_s := latest[0] + MINUTE_S - now) > 0:
            return wait_s
        latest.append(now)  # the oldest one, which is more than a minute old, is forgotten
        return 0.0
