"""How a process that computes on a CPU keeps its memory: freed, but not given back.

Tensors come and go by the gigabyte in every step. The allocator of the GNU C library maps each
large one afresh and gives it back when it is freed, and the kernel must then find and clear every
page of it again at its first touch. A program that keeps what it had is spared that:
transformers' training step of the 1B shape takes 0.86 of the time (benchmarks/RESULTS.md).
"""

from __future__ import annotations

import ctypes
import sys

# Parameters of mallopt(3).
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8

_TOP_PAD_BYTES = 64 * 2**20
"""The process grows by so much at a time."""


def keep_freed_memory() -> bool:
    """Let this process keep the memory that it frees, for its next allocation.

    For programs that compute (the commands call it when they start), not for libraries: it holds
    for the whole process, which then stays as large as it once was. A GPU has its own allocator.

    Returns:
        Whether the C library has the setting: GNU's has, others are left as they are.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    settings = (
        (_MMAP_MAX, 0),  # large blocks from the heap too, where they can be kept
        (_TRIM_THRESHOLD, -1),  # never shrink it
        (_TOP_PAD, _TOP_PAD_BYTES),
        (_ARENA_MAX, 1),  # heaps of further threads are small and given back whole
    )
    done = [mallopt(name, value) == 1 for name, value in settings]  # each, whatever the others give
    return all(done)
