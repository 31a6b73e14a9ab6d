"""The allocator's settings, seen from a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
from cascadevl.host_memory import keep_freed_memory
kept = sys.argv[1] == "keep" and keep_freed_memory()
import torch
def faults():
    for _ in range(30):  # until the holes that small blocks leave are as large as needed
        torch.empty(2**24).fill_(1.0)  # 64 MiB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.empty(2**24).fill_(1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(kept, faults())
"""


def _faults(wish: str) -> tuple[bool, int]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, wish], capture_output=True, text=True, check=True
    )
    kept, faults = done.stdout.split()
    return kept == "True", int(faults)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a setting of GNU's C library")
def test_memory_is_touched_for_the_first_time_only_once() -> None:
    kept, few = _faults("keep")
    if not kept:
        pytest.skip("not GNU's C library")
    _, many = _faults("give back")
    assert many > 50  # 16,384 pages a block; of a kernel that hands out huge pages, 32
    assert few < many / 10
