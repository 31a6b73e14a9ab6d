"""Which jobs begin with the same pages, so that attention to those is computed for all at once.

A job attends to its pages in two parts that are merged: those it shares with a group, and the rest.
Groups are chosen so that the most reading is saved; little is not worth the merging.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int


@dataclass(frozen=True, slots=True)
class Group:
    """Jobs that share their first pages.

    Attributes:
        members: Their numbers, ascending.
        num_pages: How many pages they share.
    """

    members: tuple[int, ...]
    num_pages: int

    @property
    def saved(self) -> int:
        """Pages that need not be read again."""
        return (len(self.members) - 1) * self.num_pages


def shared_beginnings(
    table: Int[np.ndarray, "jobs pages"], num_pages: Sequence[int], *, least: int = 1
) -> tuple[Group, ...]:
    """Groups of at least two jobs; a job is in at most one.

    Equal pages at one place mean equal pages before it, because a page is found only by all that
    leads up to it.

    Args:
        table: The pages of every job.
        num_pages: How many of them may be shared: all that hold no token still to be computed.
        least: Pages that all groups together must save; none are given if they save fewer.
    """
    groups = _best(table, np.asarray(num_pages), np.arange(len(table)), 0)
    return tuple(groups) if sum(group.saved for group in groups) >= least else ()


def _best(
    table: Int[np.ndarray, "jobs pages"],
    num_pages: Int[np.ndarray, " jobs"],
    jobs: Int[np.ndarray, " some"],
    depth: int,
) -> list[Group]:
    """Groups among jobs that share their first ``depth`` pages."""
    if len(jobs) < 2:
        return []
    most = int(num_pages[jobs].min())
    rows = table[jobs, depth:most]
    same = (rows == rows[0]).all(axis=0)
    depth += len(same) if same.all() else int(same.argmin())
    longer = jobs[num_pages[jobs] > depth]
    ends = table[longer, depth] if depth < table.shape[1] else longer[:0]
    parts = [longer[ends == page] for page in np.unique(ends)] if len(longer) > 1 else []
    inside = [group for part in parts for group in _best(table, num_pages, part, depth)]
    together = Group(tuple(jobs.tolist()), depth)
    if depth and together.saved >= sum(group.saved for group in inside):
        return [together]
    return inside
