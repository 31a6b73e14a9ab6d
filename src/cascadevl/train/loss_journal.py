"""The losses of single tiles, kept: measured once for all routers that are trained on them.

By far the most expensive part of training a router is to ask the model with every tile compressed
in turn. So what was found is appended to a journal, draw by draw of the mixture, and a process that
is killed loses one chunk. Labels of any kind are made of the losses afterwards
(docs/decisions/0030).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from rich.console import Console

from cascadevl.data.journal import Journal, alone, check_settings, noted_sizes
from cascadevl.data.json_text import decode_json
from cascadevl.data.mixture import Mixture
from cascadevl.data.stream import Builder
from cascadevl.errors import DataError
from cascadevl.train.log import counted
from cascadevl.train.tile_losses import Losses
from cascadevl.types import Example

NO_TILES = "no_tiles"
"""What stands instead of losses where a record is text alone: no fault, but nothing to route."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TileLosses:
    """What was measured of one draw.

    Attributes:
        position: Number of the draw in the mixture.
        dataset: The data set it was drawn from.
        record_id: Identity of the record; empty where it could not be used.
        full: Mean KL(reference || model) over the response, all tiles full.
        compressed: The same with one tile compressed, for each tile.
        tokens: Tokens that were read for it.
        fault: Why there are no losses; empty where there are.
        message: The fault in words.
    """

    position: int
    dataset: str
    record_id: str = ""
    full: float = 0.0
    compressed: tuple[float, ...] = ()
    tokens: int = 0
    fault: str = ""
    message: str = ""


@runtime_checkable
class Processes(Protocol):
    """What is asked of those who measure together; accelerate's `Accelerator` has it."""

    @property
    def process_index(self) -> int:
        """Which of them this is."""

    @property
    def num_processes(self) -> int:
        """How many they are."""

    def wait_for_everyone(self) -> None:
        """Go on when all have come this far."""


class Drawn:
    """The examples of a mixture by the number of their draw."""

    def __init__(self, mixture: Mixture, builder: Builder) -> None:
        """Bind both.

        Args:
            mixture: Sources that are read by number.
            builder: Makes the examples, with all tiles full.
        """
        self._mixture, self._builder = mixture, builder

    def dataset(self, position: int) -> str:
        """The data set that a draw is from."""
        return self._mixture.draw(position).source_name

    def __call__(self, position: int) -> Example:
        """The example of a draw.

        Raises:
            DataError: If its record cannot be used.
        """
        draw = self._mixture.draw(position)
        try:
            return self._builder(self._mixture.record(draw), epoch=draw.epoch)
        except DataError as error:
            raise error.at(f"{draw.source_name}[{draw.index}]") from error


def measured_losses(
    drawn: Drawn,
    measure: Callable[[Sequence[Example]], Sequence[Losses]],
    processes: Processes,
    *,
    folder: Path,
    settings: Mapping[str, Any],
    num_draws: int,
    chunk: int,
    console: Console | None = None,
) -> list[TileLosses]:
    """The losses of the first draws of a mixture; those in the folder are not measured again.

    Every process appends to a journal of its own, chunk by chunk, and all of them are read: so the
    work goes on after any end, on any number of processes.

    Args:
        drawn: The examples.
        measure: Of examples, their losses.
        processes: They share the chunks.
        folder: Where the journals are.
        settings: JSON values that the losses depend on.
        num_draws: How many draws.
        chunk: Draws that are measured and written together.
        console: Where progress is shown; standard error if None.

    Returns:
        One entry a draw, in their order.

    Raises:
        ConfigError: If the folder holds losses of other settings, or another run is writing them.
        TrainingError: If a loss is not finite.
    """
    known = {each.position for each in stored_losses(folder, settings)}
    processes.wait_for_everyone()  # all have looked before anyone writes
    every = [range(start, min(start + chunk, num_draws)) for start in range(0, num_draws, chunk)]
    missing = [[number for number in part if number not in known] for part in every]
    own = [part for part in missing if part]
    own = own[processes.process_index :: processes.num_processes]
    file = f"losses-{processes.process_index:03d}.jsonl"
    if own:
        with alone(folder / file):
            journal = Journal(folder, [file], settings, resume=True, journal=_journal_of(file))
            is_main = processes.process_index == 0
            for positions in counted(own, "losses of single tiles", console, is_main=is_main):
                found = _found(positions, drawn, measure)
                journal.commit({file: [asdict(each) for each in found]}, {})
    processes.wait_for_everyone()
    found_by = {each.position: each for each in stored_losses(folder, settings)}
    return [found_by[position] for position in range(num_draws)]


def stored_losses(folder: Path, settings: Mapping[str, Any]) -> list[TileLosses]:
    """What the journals of a folder hold, of all processes that ever wrote there.

    Args:
        folder: It may be missing.
        settings: What they must have been measured with.

    Raises:
        ConfigError: If they were measured with other settings.
        DataError: If a journal is damaged.
    """
    found: list[TileLosses] = []
    for file in sorted(folder.glob("losses-*.jsonl")):
        journal = folder / _journal_of(file.name)
        if not journal.exists():
            continue  # whoever began it was ended before the first line
        check_settings(journal, settings)
        size = noted_sizes(journal).get(file.name, 0)
        lines = file.read_bytes()[:size].splitlines()
        for number, line in enumerate(lines, start=1):
            values: Any = decode_json(line, source=f"{file}:{number}")
            found.append(TileLosses(**values | {"compressed": tuple(values["compressed"])}))
    return found


def _journal_of(file: str) -> str:
    """Name of the journal that notes how far a file is complete."""
    return f"journal-{Path(file).stem}.jsonl"


def _found(
    positions: Sequence[int],
    drawn: Drawn,
    measure: Callable[[Sequence[Example]], Sequence[Losses]],
) -> list[TileLosses]:
    """The losses of some draws, faults included."""
    entries: list[TileLosses] = []
    examples: list[Example] = []
    for position in positions:
        entry = TileLosses(position=position, dataset=drawn.dataset(position))
        try:
            example = drawn(position)
        except DataError as error:
            entries.append(replace(entry, fault=error.kind, message=str(error)))
            continue
        entry = replace(entry, record_id=example.record_id)
        if not example.num_tiles:
            entries.append(replace(entry, fault=NO_TILES))
            continue
        entries.append(entry)
        examples.append(example)
    measured = iter(measure(examples) if examples else ())
    for number, entry in enumerate(entries):
        if not entry.fault:
            entries[number] = replace(entry, **asdict(next(measured)))
    return entries
