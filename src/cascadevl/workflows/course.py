"""What is noted while a demo trains, on disk as it comes, so that an interruption loses nothing.

The large examinations before and after each stage are not kept here: the models they were about
are, and the same questions give the same answers again. The small ones in between are, since
nobody can go back to the weights of that step.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Course:
    """Learning curves and durations of a run of several stages, kept in one JSON file.

    Attributes:
        points: By stage and step, the share of right answers of every row.
        seconds: How long each thing took, all attempts together.
    """

    def __init__(self, path: Path) -> None:
        """Read what an earlier attempt left, if there was one.

        Args:
            path: The file; written by `save`.
        """
        self._path = path
        noted: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.is_file() else {}
        self._num_steps: dict[str, int] = noted.get("num_steps", {})
        self.seconds: dict[str, float] = noted.get("seconds", {})
        self.points: dict[str, dict[int, dict[str, float]]] = {
            stage: {int(step): values for step, values in points.items()}
            for stage, points in noted.get("points", {}).items()
        }
        self._clocks: dict[str, tuple[float, float]] = {}

    def begin_stage(self, stage: str, num_steps: int) -> None:
        """Go on with a stage; what was noted of one of another length is forgotten."""
        if self._num_steps.get(stage) != num_steps:
            self.points.pop(stage, None)
            self.seconds.pop(stage, None)
        self._num_steps[stage] = num_steps
        self.points.setdefault(stage, {})
        self.start(stage)

    def note(self, stage: str, step: int, shares: Mapping[str, float]) -> None:
        """Note a small examination and save; one of the same step takes the place of the older."""
        self.points[stage][step] = dict(shares)
        self.save()

    def curves(self) -> dict[str, list[tuple[int, float]]]:
        """Of every row, steps counted through all stages and shares."""
        curves: dict[str, list[tuple[int, float]]] = {}
        first = 0
        for stage, num_steps in self._num_steps.items():
            for step, shares in sorted(self.points[stage].items()):
                for row, share in shares.items():
                    curves.setdefault(row, []).append((first + step, share))
            first += num_steps
        return curves

    def start(self, what: str) -> None:
        """Start a clock, which goes on from earlier attempts."""
        self._clocks[what] = (self.seconds.get(what, 0.0), time.perf_counter())

    def stop(self, what: str) -> None:
        """Stop a clock and save."""
        self.save()
        del self._clocks[what]

    def save(self) -> None:
        """Write everything, with the clocks as they stand; never half a file."""
        now = time.perf_counter()
        for what, (before, began) in self._clocks.items():
            self.seconds[what] = before + now - began
        noted = {"num_steps": self._num_steps, "seconds": self.seconds, "points": self.points}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        partial = self._path.with_suffix(".partial")
        partial.write_text(json.dumps(noted, indent=1) + "\n", "utf-8")
        partial.replace(self._path)
