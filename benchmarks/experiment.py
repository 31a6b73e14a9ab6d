"""What the programs here share: runs that go on, kept results, scores of seeds, made-up rows."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from cascadevl.scoring.metrics import accuracy
from cascadevl.train.pretrain import pretrain
from cascadevl.train.run import TrainResult
from cascadevl.train.sft import sft
from cascadevl.types import NO_PARENT, Batch, Example
from cascadevl.workflows import nano


def quiet() -> Console:
    """A console that shows nothing: progress of many short runs is noise."""
    return Console(quiet=True)


def finished(result: TrainResult) -> Path:
    """The model of a run; the program ends where the run was asked to stop."""
    if result.model_path is None:
        raise SystemExit("asked to stop; the same command goes on from here")
    return result.model_path


def kept(path: Path, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A result, computed if it is not in its file yet."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(compute()), "utf-8")
        partial.replace(path)
        print(f"{path.stem} is done", flush=True)
    result: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return result


def begun_with(path: Path, settings: Mapping[str, Any]) -> None:
    """Write down with what an experiment was begun; refuse to go on with anything else.

    Args:
        path: The file.
        settings: What its results depend on; what is no JSON value is written as text.
    """
    own: dict[str, Any] = json.loads(json.dumps(settings, default=str))
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(own, indent=1) + "\n", "utf-8")
    before: dict[str, Any] = json.loads(path.read_text("utf-8"))
    differing = [key for key in {**before, **own} if before.get(key) != own.get(key)]
    if differing:
        key = differing[0]
        raise SystemExit(
            f"{path.parent} was begun with {key} = {before.get(key)}, now it is {own.get(key)}; "
            "take another --out"
        )


class CoreHours:
    """Processor time of the parts of a program, all threads together, on disk as it is spent.

    Of an attempt that is killed, what came after the last note is lost. Processes that run side by
    side need a file each.
    """

    def __init__(self, path: Path) -> None:
        """Take up what earlier attempts noted.

        Args:
            path: The file.
        """
        self._path = path
        self._spent: dict[str, float] = json.loads(path.read_text("utf-8")) if path.exists() else {}

    @contextmanager
    def counted(self, part: str) -> Iterator[Callable[..., None]]:
        """Count what is done within.

        Args:
            part: Its name.

        Yields:
            What notes the time until then, whatever it is given: something to call now and then.
        """
        before, began = self._spent.get(part, 0.0), time.process_time()

        def note(*_: object) -> None:
            self._spent[part] = before + (time.process_time() - began) / 3600
            self._path.parent.mkdir(parents=True, exist_ok=True)
            partial = self._path.with_suffix(".partial")
            partial.write_text(json.dumps(self._spent, indent=1) + "\n", "utf-8")
            partial.replace(self._path)

        try:
            yield note
        finally:
            note()

    @property
    def words(self) -> str:
        """What all parts took, and each."""
        each = ", ".join(f"{name} {hours:.2f}" for name, hours in self._spent.items())
        return f"{sum(self._spent.values()):.2f} core-hours ({each})"


def pretrained(out: Path, num_steps: int) -> Path:
    """Nano after the first stage of `make nano`: it describes single pictures."""
    if (done := out / "pretrain" / "model").exists():
        return done
    config = nano.stage_config("pretrain", out / "pretrain", num_steps=num_steps, model=None)
    sources, tokenizer = nano.pretrain_sources(), nano.tokenizer()
    return finished(pretrain(config, sources=sources, tokenizer=tokenizer, console=quiet()))


def fine_tuned(out: Path, num_steps: int) -> Path:
    """Nano after both stages of `make nano`, each of so many steps: it answers about pictures."""
    if (done := out / "sft" / "model").exists():
        return done
    model = pretrained(out, num_steps)
    config = nano.stage_config("sft", out / "sft", num_steps=num_steps, model=model)
    return finished(sft(config, sources=nano.sft_sources(), console=quiet()))


def pooled(right: Sequence[Sequence[bool]]) -> dict[str, Any]:
    """Percent of right answers over all seeds with its 95 % interval, and of each seed.

    Every seed has questions of its own, so answers of different seeds are independent given the
    models; the interval does not cover what another seed of training would change.
    """
    every = accuracy([value for values in right for value in values])
    return {
        "percent": 100 * every.value,
        "low": 100 * every.low,
        "high": 100 * every.high,
        "seeds": [100 * sum(values) / len(values) for values in right],
    }


def written(score: dict[str, Any]) -> str:
    """A pooled score as it stands in tables."""
    return f"{score['percent']:.1f} ({score['low']:.0f}-{score['high']:.0f})"


def signed(score: Mapping[str, float]) -> str:
    """A difference as it stands in tables."""
    return f"{score['percent']:+.1f} ({score['low']:+.1f} to {score['high']:+.1f})"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


class Given:
    """The one batch, again and again."""

    def __init__(self, batch: Batch) -> None:
        """Keep the batch."""
        self.batch = batch

    def __next__(self) -> Batch:
        """The batch."""
        return self.batch

    def state_dict(self) -> dict[str, object]:
        """Nothing: it never moves on."""
        return {}

    def load_state_dict(self, state: dict[str, object], /) -> None:
        """Stay where it is."""
        del state


def random_example(
    name: str,
    text: int,
    tiles: int,
    targets: int,
    *,
    image_token_id: int,
    tile_px: int,
    rng: np.random.Generator,
) -> Example:
    """A sample of random tokens below 200 and random tiles, all of one image.

    Args:
        name: Its source and id.
        text: Tokens that are not visual, the image's slot counted.
        tiles: Tiles of the image; 0 for none.
        targets: The last so many tokens are to be predicted.
        image_token_id: The token of the slot.
        tile_px: Side of a tile.
        rng: Where the numbers come from.
    """
    ids = rng.integers(20, 200, text)
    if tiles:
        ids[1] = image_token_id
    return Example(
        source=name,
        record_id=name,
        input_ids=ids,
        trained=np.arange(text) >= max(2, text - targets),
        segments=np.zeros(text, np.int64),
        parents=(NO_PARENT,),
        tiles=rng.integers(0, 256, (tiles, tile_px, tile_px, 3), np.uint8),
        tiles_per_image=(tiles,) if tiles else (),
        increments=(1.0,) if tiles else (),
    )
