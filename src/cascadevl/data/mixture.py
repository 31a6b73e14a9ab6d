"""Which record comes when: several sources mixed by weight, every draw a function of its number.

The order of training is not stored anywhere: draw i is computed from (seed, i) alone, so a run
resumes from one integer, on any number of ranks, and any draw can be looked at again. Draws
come in blocks. A block holds an exact number of draws of every source, shuffled; so the ratios
hold exactly, and the k-th draw of a source is known without replay: k tells its epoch, and a
permutation of the epoch tells the record, each record once an epoch. The permutation is
computed, not stored (a Feistel network over the index), so a source of any size costs nothing.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate

from cascadevl.data.lanes import Lanes, LanesState
from cascadevl.data.modality import Modality
from cascadevl.data.permutation import mix, named_key, permuted
from cascadevl.data.source import Source, StreamedSource
from cascadevl.errors import ConfigError
from cascadevl.types import Record

LEAST_DRAWS_PER_BLOCK = 1000
"""Draws of the rarest source in a block whose ratios must be rounded: wrong by 0.1 % at most."""

LEAST_WEIGHT = 1e-6
"""Smallest weight and repeat factor; both are taken as fractions with denominators up to 1e6."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightedSource:
    """A source and how often it is drawn from.

    Attributes:
        source: The records.
        weight: Draws relative to those of the other sources; None for the number of records, so
            that the sources' epochs last equally long. A stream has no such number.
        repeat: Factor on the weight, the meta file's ``repeat_time``. Below 1, each round of the
            others sees another part of the source, not always the first one.
        modality: Whether the records are text alone; None if nobody has said so.
    """

    source: Source | StreamedSource
    weight: float | None = None
    repeat: float = 1.0
    modality: Modality | None = None

    @property
    def draws(self) -> Fraction:
        """How often it is drawn relative to the others, repeats included."""
        weight = _size(self.source) if self.weight is None else self.weight
        factors = (
            Fraction(factor).limit_denominator(round(1 / LEAST_WEIGHT))
            for factor in (weight, self.repeat)
        )
        return math.prod(factors, start=Fraction(1))


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """One draw from a mixture.

    Attributes:
        position: Number of the draw in the mixture.
        source_name: The source drawn from.
        index: The record within its source; of a stream, how many of its draws came before.
        epoch: How often all of the source had been drawn before; 0 for a stream, whose records
            have another identity in every epoch.
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
                finite or a stream has none, or two have one name.
        """
        _check(sources)
        self.seed = seed
        every = [weighted.source for weighted in sources]
        self._names = [source.name for source in every]
        self._sources = {source.name: source for source in every if isinstance(source, Source)}
        self._lengths = [len(source) if isinstance(source, Source) else 0 for source in every]
        self._counts = _block_counts([weighted.draws for weighted in sources])
        self._ends = list(accumulate(self._counts))
        self.block_size = self._ends[-1]
        self._keys = [named_key(seed, name) for name in self._names]
        self._block_key = named_key(seed, "")
        self._identities = {
            source.name: [len(source)] if isinstance(source, Source) else source.identity()
            for source in every
        }
        self._lanes = {
            source.name: Lanes(source, key, number, self._drawn_from)
            for number, (source, key) in enumerate(zip(every, self._keys, strict=True))
            if not isinstance(source, Source)
        }

    @property
    def shares(self) -> dict[str, float]:
        """Share of each source among the draws."""
        return {
            name: count / self.block_size
            for name, count in zip(self._names, self._counts, strict=True)
        }

    def draw(self, position: int) -> Draw:
        """The draw of this number, from 0 upwards."""
        number, rank = self._drawn(position)
        name, length = self._names[number], self._lengths[number]
        if name in self._lanes:
            return Draw(position=position, source_name=name, index=rank, epoch=0)
        epoch, within = divmod(rank, length)
        index = permuted(within, length, mix(self._keys[number] + epoch))
        return Draw(position=position, source_name=name, index=index, epoch=epoch)

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
            TrainingError: If it comes from a stream that cannot be read on.
        """
        if draw.source_name in self._lanes:
            return self._lanes[draw.source_name].record(draw.position)
        return self._sources[draw.source_name][draw.index]

    def fingerprint(self) -> dict[str, list[int]]:
        """Length and draws a block of each source, and the seed: what a resumed run must match.

        Of a stream, its lanes, buffer and parts take the place of the length.
        """
        counts = zip(self._names, self._counts, strict=True)
        return {"": [self.seed]} | {name: [*self._identities[name], n] for name, n in counts}

    def places(self, oldest: int) -> dict[str, LanesState]:
        """Where the streams stand, as plain JSON.

        Draws are the same without it; with it a resumed run need not read its streams again from
        their beginning.

        Args:
            oldest: No draw before this position will be asked for again.
        """
        return {name: lanes.state(oldest) for name, lanes in self._lanes.items()}

    def return_to(self, places: dict[str, LanesState]) -> None:
        """Let the streams go on from what `places` gave."""
        for name, lanes in self._lanes.items():
            lanes.return_to(places.get(name, []))

    def _drawn(self, position: int) -> tuple[int, int]:
        """Number of the source of a draw, and how many of its draws came before."""
        block, offset = divmod(position, self.block_size)
        slot = permuted(offset, self.block_size, mix(self._block_key + block))
        number = bisect_right(self._ends, slot)
        count = self._counts[number]
        return number, block * count + slot - (self._ends[number] - count)

    def _drawn_from(self, position: int) -> int:
        return self._drawn(position)[0]


def next_position(start: int, rank: int, world_size: int) -> int:
    """The first position from ``start`` on that belongs to a rank."""
    return start + (rank - start) % world_size


def _size(source: Source | StreamedSource) -> int:
    """Number of records; of a stream it is not known, which `_check` has refused."""
    return len(source) if isinstance(source, Source) else 0


def _check(sources: Sequence[WeightedSource]) -> None:
    if not sources:
        raise ConfigError("a mixture needs at least one source")
    names = [weighted.source.name for weighted in sources]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"two sources of a mixture are named {twice[0]!r}; names must differ")
    for name, weighted in zip(names, sources, strict=True):
        streamed = not isinstance(weighted.source, Source)
        if streamed and weighted.weight is None:
            raise ConfigError(
                f"source {name!r} is a stream, so its number of records is unknown; give it a "
                'weight, or "length" in the meta file'
            )
        if not streamed and _size(weighted.source) == 0:
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
