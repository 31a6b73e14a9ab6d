"""The endless stream of batches a training loop takes from, and goes on from after a stop.

It ties the data path together: draw a record, build the example, find it a row, collate rows.
Bad records are counted by data set and kind, never replaced in silence, and too many of them
stop the run. The state names draws by their positions, so it is small, plain JSON, and exact:
the batches after a resume equal those of an uninterrupted run bit for bit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

from cascadevl.data import lanes
from cascadevl.data.collate import collate
from cascadevl.data.levelling import NOTHING_WAITS, Leveller
from cascadevl.data.mixture import Draw, Mixture, next_position
from cascadevl.data.packing import Fill, FixedRows, Packer, Size, size_of
from cascadevl.errors import ConfigError, DataError, TrainingError
from cascadevl.losses.next_token import Averaging
from cascadevl.types import Batch, Example, Record

BatchT = TypeVar("BatchT")
BatchT_co = TypeVar("BatchT_co", covariant=True)


@runtime_checkable
class Builder(Protocol):
    """Makes an example of a record; the same one for the same record and epoch."""

    def __call__(self, record: Record, *, epoch: int = 0) -> Example:
        """Build the example.

        Raises:
            DataError: If the record cannot be used.
        """


@runtime_checkable
class Collate(Protocol[BatchT_co]):
    """Makes a batch of rows of examples."""

    @property
    def tokens_per_tile(self) -> int:
        """Visual tokens of a tile, by which rows are measured."""

    def __call__(self, rows: list[list[Example]]) -> BatchT_co:
        """Lay the rows out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CollateConfig:
    """How rows become tensors; see `cascadevl.data.collate.collate`.

    Attributes:
        image_token_id: The image-context token.
        pad_token_id: Fills the ends of shorter rows.
        tokens_per_tile: Visual tokens of a tile.
        averaging: Weighting of the loss; the reports use ``square``.
        ceil_after_image: Round the position up after each image.
        pad_to: Tokens of every row; None for those of the longest.
    """

    image_token_id: int
    pad_token_id: int
    tokens_per_tile: int
    averaging: Averaging = "square"
    ceil_after_image: bool = False
    pad_to: int | None = None

    def __call__(self, rows: list[list[Example]]) -> Batch:
        """Collate rows of examples."""
        return collate(
            rows,
            image_token_id=self.image_token_id,
            pad_token_id=self.pad_token_id,
            tokens_per_tile=self.tokens_per_tile,
            averaging=self.averaging,
            ceil_after_image=self.ceil_after_image,
            pad_to=self.pad_to,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamConfig:
    """How much a batch holds and how many bad records are borne.

    Attributes:
        rows_per_batch: Rows of a batch.
        level_rows: Rows to choose the next from, so that tiles follow tokens (`Leveller`).
        num_draws: Draws after which the stream ends, of all ranks together; None for never.
            Open rows then leave as they are, and the last batch may be smaller.
        max_skipped_share: Largest share of bad records among the draws of this rank.
        draws_before_judging: Draws before that share is looked at.
    """

    rows_per_batch: int = 1
    level_rows: int = 1
    num_draws: int | None = None
    max_skipped_share: float = 0.5
    draws_before_judging: int = 100

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigError: If a number is out of range.
        """
        if self.rows_per_batch < 1:
            raise ConfigError(f"rows_per_batch is {self.rows_per_batch}; it must be at least 1")
        if not 0 <= self.max_skipped_share <= 1:
            raise ConfigError(f"max_skipped_share is {self.max_skipped_share}; it is a share, 0..1")


@dataclass(frozen=True, slots=True)
class Skipped:
    """Records of one data set left out for one kind of fault.

    Attributes:
        count: How many.
        first: The message of the first.
    """

    count: int
    first: str


class BatchStream(Generic[BatchT]):
    """Batches of a mixture, in an order that a state of a few numbers can resume exactly."""

    def __init__(
        self,
        mixture: Mixture,
        builder: Builder,
        rows: Packer[Example] | FixedRows[Example],
        collate: Collate[BatchT],
        config: StreamConfig | None = None,
        *,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Start at the first draw.

        Args:
            mixture: Where records come from.
            builder: Makes examples of them.
            rows: The rule by which samples share rows; this stream's own, not to be shared.
            collate: How rows become tensors.
            config: Rows a batch, length, tolerance; the defaults if None.
            rank: Which of the processes this is; each draws its own positions.
            world_size: Number of processes.
        """
        self._mixture, self._builder, self._rows, self._collate = mixture, builder, rows, collate
        self._config = config or StreamConfig()
        self._rank, self._world_size = rank, world_size
        self._cursor = rank
        self._pending: deque[int] = deque()  # positions to draw before the cursor goes on
        self._ready: Leveller[Example] = Leveller(self._config.level_rows)
        self._num_draws = 0
        self._skipped: dict[tuple[str, str], Skipped] = {}

    @property
    def skipped(self) -> dict[tuple[str, str], Skipped]:
        """What was left out so far, by data set and kind of fault."""
        return dict(self._skipped)

    @property
    def num_draws(self) -> int:
        """Records drawn so far, bad ones included."""
        return self._num_draws

    @property
    def fill(self) -> Fill:
        """Rows, tokens and tiles that have left for batches."""
        return self._rows.fill

    def __iter__(self) -> Iterator[BatchT]:
        """Itself: a stream is read once, and goes on where it stands."""
        return self

    def __next__(self) -> BatchT:
        """The next batch.

        Raises:
            StopIteration: After ``num_draws`` draws.
            DataError: If too many records are bad; the text gives the counts.
        """
        is_end = False
        while not is_end and not self._ready.has_next(self._config.rows_per_batch, is_end=False):
            position = self._next_position()
            if position is None:
                self._judge()
                self._ready.add(self._rows.flush())
                is_end = True
            else:
                self._take(position)
        if not self._ready.has_next(1, is_end=is_end):
            raise StopIteration
        num_rows = min(len(self._ready), self._config.rows_per_batch)
        return self._collate([self._ready.take().items for _ in range(num_rows)])

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands after the last batch; plain JSON."""
        rows = self._rows.state_dict()
        waiting = self._ready.positions() + [p for row in rows["rows"] for p in row]
        return {
            "mixture": self._mixture.fingerprint(),
            "places": self._mixture.places(min([self._cursor, *self._pending, *waiting])),
            "world_size": self._world_size,
            "cursor": self._cursor,
            "pending": list(self._pending),
            "ready": self._ready.state_dict(),
            "rows": rows,
            "num_draws": self._num_draws,
            "skipped": [
                [dataset, kind, skipped.count, skipped.first]
                for (dataset, kind), skipped in self._skipped.items()
            ],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a stream stood.

        Args:
            state: From `state_dict` of the same rank, or from `merge_states` if the number of
                ranks has changed.

        Raises:
            TrainingError: If the mixture or the number of ranks is another one, or a record that
                waited for its row cannot be read any more.
        """
        self._check_state(state)
        self._mixture.return_to(state["places"])
        if state["world_size"] is None:
            self._cursor = next_position(state["cursor"], self._rank, self._world_size)
            self._pending = deque(state["pending"][self._rank :: self._world_size])
        else:
            self._cursor, self._pending = state["cursor"], deque(state["pending"])
        self._rows.load_state_dict(state["rows"], self._rebuild)
        self._ready.load_state_dict(state["ready"], self._rebuild)
        # what was counted before a merge is counted once more, by rank 0 alone
        counts = state["world_size"] is not None or self._rank == 0
        self._num_draws = state["num_draws"] if counts else 0
        self._skipped = skipped_of(state) if counts else {}

    def _next_position(self) -> int | None:
        if self._pending:
            return self._pending.popleft()
        position = self._cursor
        if self._config.num_draws is not None and position >= self._config.num_draws:
            return None
        self._cursor += self._world_size
        return position

    def _take(self, position: int) -> None:
        """Draw a record and give it a row, or count why not."""
        draw = self._mixture.draw(position)
        self._num_draws += 1
        try:
            example, size = self._build(draw)
            self._ready.add(self._rows.add(example, size, position))
        except DataError as error:
            key = (draw.source_name, error.kind)
            before = self._skipped.get(key)
            message = str(error.at(f"{draw.source_name}[{draw.index}]"))
            self._skipped[key] = Skipped(
                count=before.count + 1 if before else 1, first=before.first if before else message
            )
            if self._num_draws >= self._config.draws_before_judging:
                self._judge()

    def _judge(self) -> None:
        bad = sum(skipped.count for skipped in self._skipped.values())
        if bad <= self._config.max_skipped_share * self._num_draws:
            return
        worst_first = sorted(self._skipped.items(), key=lambda item: -item[1].count)
        counts = "".join(
            f"\n  {skipped.count} x {kind} of {dataset}, first: {skipped.first}"
            for (dataset, kind), skipped in worst_first
        )
        raise DataError(
            f"{bad} of {self._num_draws} records drawn cannot be used, more than the share of "
            f"{self._config.max_skipped_share} that is allowed",
            kind="too_many_skipped",
            remedy="mend the data (`cascadevl data check` names every bad record), or raise "
            f"max_skipped_share; left out were{counts}",
        )

    def _build(self, draw: Draw) -> tuple[Example, Size]:
        example = self._builder(self._mixture.record(draw), epoch=draw.epoch)
        return example, size_of(example, self._collate.tokens_per_tile)

    def _rebuild(self, position: int) -> tuple[Example, Size]:
        draw = self._mixture.draw(position)
        try:
            return self._build(draw)
        except DataError as error:
            raise TrainingError(
                f"the run cannot be resumed: record {draw.index} of {draw.source_name!r} waited "
                f"for its row when the state was saved, and cannot be used now: {error}"
            ) from error

    def _check_state(self, state: dict[str, Any]) -> None:
        now, then = self._mixture.fingerprint(), state["mixture"]
        for name in sorted(now.keys() | then.keys()):
            if now.get(name) != then.get(name):
                what = f"source {name!r} (records, draws a block)" if name else "the seed"
                raise TrainingError(
                    f"the run cannot be resumed: {what} was {then.get(name)} when the state was "
                    f"saved and is {now.get(name)} now"
                )
        if state["world_size"] not in (None, self._world_size):
            raise TrainingError(
                f"the state is one of {state['world_size']} ranks, this run has "
                f"{self._world_size}; put the states of all ranks together with merge_states"
            )


def skipped_of(state: dict[str, Any]) -> dict[tuple[str, str], Skipped]:
    """What a stream had left out when it stood at a state, by data set and kind of fault."""
    return {
        (dataset, kind): Skipped(count=count, first=first)
        for dataset, kind, count, first in state["skipped"]
    }


def merge_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One state of the states of all ranks, from which any number of ranks can go on.

    Nothing is lost and nothing comes twice: samples that waited for a row, and positions that
    the slower ranks had not reached, are drawn first.

    Args:
        states: The state of every rank, taken after the same step. States that do not depend on
            the number of ranks (their ``world_size`` is None) are all alike: the first one is it.
    """
    if states[0]["world_size"] is None:
        return states[0]
    num_ranks = len(states)
    top = max(state["cursor"] for state in states)
    waiting = [
        position
        for state in states
        for row in [*state["ready"]["rows"], *state["rows"]["rows"]]
        for position in row
    ]
    undrawn = [position for state in states for position in state["pending"]]
    for state in states:
        undrawn += range(state["cursor"], top, num_ranks)
    skipped: dict[tuple[str, str], Skipped] = {}
    for state in states:
        for key, value in skipped_of(state).items():
            before = skipped.get(key, Skipped(count=0, first=value.first))
            skipped[key] = Skipped(count=before.count + value.count, first=before.first)
    pending = sorted(waiting + undrawn)
    return {
        **states[0],
        "places": lanes.merged([state["places"] for state in states], min([top, *pending])),
        "world_size": None,
        "cursor": top,
        "pending": pending,
        "ready": NOTHING_WAITS,
        "rows": {"rows": [], "fill": states[0]["rows"]["fill"]},
        "num_draws": sum(state["num_draws"] for state in states) - len(waiting),
        "skipped": [[*key, value.count, value.first] for key, value in skipped.items()],
    }
