"""Pseudo-random permutations that are computed, not stored, so that order costs no memory."""

from __future__ import annotations

import hashlib
import math

FEISTEL_ROUNDS = 4
"""Twofold rounds of the permutation."""

_MASK = 2**64 - 1


def permuted(index: int, size: int, key: int) -> int:
    """Where a pseudo-random permutation of 0 ... size - 1 takes an index, in constant time.

    A Feistel network over the index written as row and column of a nearly square table; what
    falls behind the table's last index goes through again (cycle walking).

    Args:
        index: From 0 to ``size - 1``.
        size: Number of indices.
        key: Which permutation.
    """
    rows = math.isqrt(size - 1) + 1
    columns = -(-size // rows)
    while True:
        row, column = divmod(index, columns)
        for number in range(FEISTEL_ROUNDS):
            row = (row + mix(key + 2 * number * size + column)) % rows
            column = (column + mix(key + (2 * number + 1) * size + row)) % columns
        index = row * columns + column
        if index < size:
            return index


def mix(value: int) -> int:
    """Scramble 64 bits (the finaliser of SplitMix64)."""
    value = (value * 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def named_key(seed: int, name: str) -> int:
    """A key of its own for every name under a seed."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")
