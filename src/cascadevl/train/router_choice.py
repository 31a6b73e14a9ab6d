"""Which router of a run is kept: the one that knows held-out tiles best.

A router soon knows few records by heart, and is then worse with others than it was before. So the
best one of all examinations is kept in the run folder and is what the run exports
(docs/decisions/0048).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import nn

from cascadevl.errors import TrainingError

BEST = "best_router.safetensors"
"""File of the run folder with the best router so far, the step it is of, and its merit."""


def merit(found: Mapping[str, float]) -> float:
    """What examinations are compared by: the area under the ROC curve; the larger, the better.

    Where all held-out tiles have one label there is no such area, and the loss decides.

    Args:
        found: What one examination found: ``loss``, and ``auc`` where both labels occur.
    """
    return found["auc"] if "auc" in found else -found["loss"]


class BestRouter:
    """The best router of all examinations so far, in a file that is whole or not there.

    A run that was ended and goes on from a checkpoint before the best router comes to it again, bit
    for bit on as many processes. So the file may be ahead of the checkpoint.
    """

    def __init__(self, path: Path, *, step: int) -> None:
        """Take up what an earlier attempt at the run left.

        Args:
            path: The file.
            step: Steps that the run has behind it. One that begins anew knows of no other's router.

        Raises:
            TrainingError: If the file is damaged.
        """
        self._path = path
        if step == 0:
            path.unlink(missing_ok=True)
        self._step: int | None = None
        self._merit = float("-inf")
        if path.exists():
            self._step, self._merit = _noted(path)

    def offer(self, step: int, trained: nn.Module, found: Mapping[str, float]) -> None:
        """Keep a router if it is better than all before it; of equal ones the earliest stays.

        Args:
            step: Updates that it has behind it.
            trained: The router.
            found: What its examination found.
        """
        value = merit(found)
        if self._step is not None and value <= self._merit:
            return
        tensors = {name: t.detach().cpu().contiguous() for name, t in trained.state_dict().items()}
        partial = self._path.with_suffix(".partial")
        notes = {"step": str(step), "merit": repr(value)}
        safetensors.torch.save_file(tensors, partial, metadata=notes)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(self._path)
        self._step, self._merit = step, value

    def restore(self, trained: nn.Module) -> int | None:
        """Give a router the weights of the best one.

        Args:
            trained: The router, in place.

        Returns:
            The step of the best one; None where none was kept, and the router is left as it is.
        """
        if self._step is not None:
            trained.load_state_dict(safetensors.torch.load_file(self._path))
        return self._step


def _noted(path: Path) -> tuple[int, float]:
    """Step and merit of a kept router.

    Raises:
        TrainingError: If the file is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            notes = file.metadata()
    except (OSError, SafetensorError) as error:
        raise TrainingError(
            f"{path} cannot be read ({error}); delete it, and the run chooses among the routers "
            "that are still to come"
        ) from error
    return int(notes["step"]), float(notes["merit"])
