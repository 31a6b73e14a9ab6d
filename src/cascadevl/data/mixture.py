"""Which record comes when: several sources mixed by weight, every draw a function of its number.

The order of training is not stored anywhere: draw i is computed from (seed, i) alone, so a run
resumes from one integer, on any number of ranks, and any draw can be looked at again. Draws
come in blocks. A block holds an exact number of draws of every source, shuffled; so the ratios
hold exactly, and the k-th draw of a source is known without replay: k tells its epoch, and a
permutation of the epoch tells the record, each record once an epoch. The permutation is
computed, not stored (a Feistel network over the index), so a source of any size costs nothing.
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate

from cascadevl.data.source import Source
from cascadevl.errors import ConfigError
from cascadevl.types import Record

FEISTEL_ROUNDS = 4
"""Twofold rounds of the permutation."""

LEAST_DRAWS_PER_BLOCK = 1000
"""Draws of the rarest source in a block whose ratios must be rounded: wrong by 0.1 % at most."""

LEAST_WEIGHT = 1e-6
"""Smallest weight and repeat factor; both are taken as fractions with denominators up to 1e6."""

_MASK = 2**64 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightedSource:
    """A source and how often it is drawn from.

    Attributes:
        source: The records.
        weight: Draws relative to those of the other sources; None for the number of records, so
            that the sources' epochs last equally long.
        repeat: Factor on the weight, the meta file's ``repeat_time``. Below 1, each round of the
            others sees another part of the source, not always the first one.
    """

    source: Source
    weight: float | None = None
    repeat: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """One draw from a mixture.

    Attributes:
        position: Number of the draw in the mixture.
        source_name: The source drawn from.
        index: The record within its source.
        epoch: How often all of the source had been drawn before.
    """

    position: int
    source_name: str
    index: int
    epoch: int


class Mixture:
    """An endless, reproducible sequence of draws from several sources.

    Attributes:
        seed: The seed all draws depend on.
        block_size: Draws after which the ratios are exact.
    """

    def __init__(self, sources: Sequence[WeightedSource], seed: int) -> None:
        """Fix the ratios and the order.

        Args:
            sources: What to draw from; names must differ.
            seed: Another seed gives another order.

        Raises:
            ConfigError: If there is no source, one is empty, a weight is not positive and
                finite, or two have one name.
        """
        _check(sources)
        self.seed = seed
        self._sources = {weighted.source.name: weighted.source for weighted in sources}
        self._names = list(self._sources)
        self._lengths = [len(source) for source in self._sources.values()]
        self._counts = _block_counts([_weight(weighted) for weighted in sources])
        self._ends = list(accumulate(self._counts))
        self.block_size = self._ends[-1]
        self._keys = [_key(seed, name) for name in self._names]
        self._block_key = _key(seed, "")

    @property
    def shares(self) -> dict[str, float]:
        """Share of each source among the draws."""
        return {
            name: count / self.block_size
            for name, count in zip(self._names, self._counts, strict=True)
        }

    def draw(self, position: int) -> Draw:
        """The draw of this number, from 0 upwards."""
        block, offset = divmod(position, self.block_size)
        slot = permuted(offset, self.block_size, _mix(self._block_key + block))
        number = bisect_right(self._ends, slot)
        count = self._counts[number]
        rank = block * count + slot - (self._ends[number] - count)  # rank within the source
        epoch, within = divmod(rank, self._lengths[number])
        index = permuted(within, self._lengths[number], _mix(self._keys[number] + epoch))
        return Draw(position=position, source_name=self._names[number], index=index, epoch=epoch)

    def draws(self, start: int = 0, *, rank: int = 0, world_size: int = 1) -> Iterator[Draw]:
        """The draws from a position on, endlessly; of several ranks, those of one.

        Args:
            start: The first position of any rank.
            rank: Which of the ranks; it draws the positions equal to it modulo ``world_size``.
            world_size: Number of ranks. Together they draw the same sequence whatever their
                number, so a run may go on with another one.
        """
        position = next_position(start, rank, world_size)
        while True:
            yield self.draw(position)
            position += world_size

    def record(self, draw: Draw) -> Record:
        """The record drawn.

        Raises:
            DataError: If the record cannot be used.
        """
        return self._sources[draw.source_name][draw.index]

    def fingerprint(self) -> dict[str, list[int]]:
        """Length and draws a block of each source, and the seed: what a resumed run must match."""
        counts = zip(self._names, self._lengths, self._counts, strict=True)
        return {"": [self.seed]} | {name: [length, count] for name, length, count in counts}


def next_position(start: int, rank: int, world_size: int) -> int:
    """The first position from ``start`` on that belongs to a rank."""
    return start + (rank - start) % world_size


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
            row = (row + _mix(key + 2 * number * size + column)) % rows
            column = (column + _mix(key + (2 * number + 1) * size + row)) % columns
        index = row * columns + column
        if index < size:
            return index


def _mix(value: int) -> int:
    """Scramble 64 bits (the finaliser of SplitMix64)."""
    value = (value * 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def _key(seed: int, name: str) -> int:
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _weight(weighted: WeightedSource) -> Fraction:
    weight = len(weighted.source) if weighted.weight is None else weighted.weight
    factors = (
        Fraction(factor).limit_denominator(round(1 / LEAST_WEIGHT))
        for factor in (weight, weighted.repeat)
    )
    return math.prod(factors, start=Fraction(1))


def _check(sources: Sequence[WeightedSource]) -> None:
    if not sources:
        raise ConfigError("a mixture needs at least one source")
    names = [weighted.source.name for weighted in sources]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"two sources of a mixture are named {twice[0]!r}; names must differ")
    for name, weighted in zip(names, sources, strict=True):
        if len(weighted.source) == 0:
            raise ConfigError(f"source {name!r} has no records; leave it out")
        given = (1.0 if weighted.weight is None else weighted.weight, weighted.repeat)
        if not all(math.isfinite(value) and value >= LEAST_WEIGHT for value in given):
            raise ConfigError(
                f"source {name!r} has weight {weighted.weight} and repeat {weighted.repeat}; "
                f"both must be {LEAST_WEIGHT} or more (leave a source out rather than giving it 0)"
            )


def _block_counts(weights: Sequence[Fraction]) -> list[int]:
    """Draws of each source in the smallest block that holds the ratios, exactly if it can."""
    total = sum(weights)
    shares = [weight / total for weight in weights]
    exact = math.lcm(*(share.denominator for share in shares))
    size = min(exact, math.ceil(LEAST_DRAWS_PER_BLOCK / min(shares)))
    counts = [math.floor(share * size) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda n: counts[n] - shares[n] * size)
    for number in by_remainder[: size - sum(counts)]:
        counts[number] += 1
    return counts
