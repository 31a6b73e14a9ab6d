"""What a run leaves for people: a progress bar, metrics as JSONL and TensorBoard, its facts.

The run folder holds ``config.yaml`` (the resolved configuration), ``run.json`` (versions, seed,
commit), ``metrics.jsonl`` (one line each logged step) and ``tensorboard/``. Only the main process
writes.
"""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    track,
)

from cascadevl.version import __version__

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter

PartT = TypeVar("PartT")

TOLD = 10
"""How often the progress of a pass is told where there is no terminal."""

PACKAGES = ("torch", "transformers", "accelerate", "numpy", "tokenizers", "safetensors", "pillow")


class RunLog:
    """Writes one run's records; a context manager, silent in all but the main process."""

    def __init__(
        self,
        out: Path | None,
        *,
        title: str,
        num_steps: int,
        first_step: int = 0,
        console: Console | None = None,
        is_main: bool = True,
    ) -> None:
        """Prepare the log; files are opened on entry.

        Args:
            out: The run folder; None writes no files.
            title: Name before the progress bar.
            num_steps: Steps of the whole run.
            first_step: Steps already done; later lines of an older attempt are dropped.
            console: Where people look; standard error by default.
            is_main: Whether this process is the one that writes.
        """
        self.console = console or Console(stderr=True)
        self._out = out if is_main else None
        self._title, self._num_steps, self._first_step = title, num_steps, first_step
        self._progress: Progress | None = None
        self._writer: SummaryWriter | None = None
        self._is_main = is_main
        self._task = TaskID(0)

    def __enter__(self) -> RunLog:
        """Open the files and start the progress bar."""
        if self._out is not None:
            from torch.utils.tensorboard.writer import SummaryWriter  # slow to import

            self._out.mkdir(parents=True, exist_ok=True)
            _drop_after(self._out / "metrics.jsonl", self._first_step)
            self._writer = SummaryWriter(
                str(self._out / "tensorboard"), purge_step=self._first_step + 1
            )
        if self._is_main and self.console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("loss {task.fields[loss]} · {task.fields[speed]} · ETA"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self._task = self._progress.add_task(
                self._title,
                total=self._num_steps,
                completed=self._first_step,
                loss="-",
                speed="-",
            )
            self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close everything, whatever happened."""
        if self._progress is not None:
            self._progress.stop()
        if self._writer is not None:
            self._writer.close()

    def advance(self, step: int) -> None:
        """Move the progress bar."""
        if self._progress is not None:
            self._progress.update(self._task, completed=step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Record the values of a step, as one JSON line, in TensorBoard and beside the bar."""
        if self._out is not None:
            with (self._out / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)
        loss = f"{values.get('loss', float('nan')):.4f}"
        unit = "tokens" if values.get("tokens_per_s") else "tiles"  # a router reads no tokens
        speed = f"{values.get(f'{unit}_per_s', 0):,.0f} {unit}/s"
        if self._progress is not None:
            self._progress.update(self._task, completed=step, loss=loss, speed=speed)
        elif self._is_main and "loss" in values:
            self.console.print(
                f"{self._title} {step}/{self._num_steps} loss {loss} {speed}",
                highlight=False,
            )

    def message(self, text: str) -> None:
        """Tell people something that is not a metric."""
        if self._is_main:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)


def counted(
    parts: Sequence[PartT], title: str, console: Console | None, *, is_main: bool
) -> Iterator[PartT]:
    """The parts of a pass before the first step, one by one, while people see how far it is.

    A terminal shows one bar; otherwise there are at most ten lines, whatever the number of parts.

    Args:
        parts: The parts of this process.
        title: What is computed.
        console: Where people look; standard error if None.
        is_main: Whether this process is the one that shows anything.
    """
    shown = console or Console(stderr=True)
    if not (is_main and parts):
        yield from parts
    elif shown.is_terminal:
        yield from track(parts, title, console=shown)
    else:
        for number, part in enumerate(parts, start=1):
            yield part
            if number * TOLD // len(parts) > (number - 1) * TOLD // len(parts):
                shown.print(f"{title}: {number} of {len(parts)}", highlight=False)


def write_facts(out: Path, config_yaml: str, *, seed: int) -> None:
    """Write ``config.yaml`` and ``run.json`` into the run folder.

    Args:
        out: The run folder.
        config_yaml: The resolved configuration.
        seed: The run's seed.
    """
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.yaml").write_text(config_yaml, encoding="utf-8")
    facts = {
        "cascadevl": __version__,
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
        "seed": seed,
        "commit": git_commit(Path(__file__).parent),
    }
    (out / "run.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def git_commit(folder: Path) -> str | None:
    """The commit checked out at ``folder``, or None outside a repository or without git."""
    try:
        answer = subprocess.run(
            ["git", "-C", str(folder), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()


def _drop_after(path: Path, step: int) -> None:
    """Keep the lines up to ``step``: those behind it belong to an attempt that was cut off."""
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    path.write_text("".join(kept), encoding="utf-8")
