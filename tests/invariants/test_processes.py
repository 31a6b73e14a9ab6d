"""A real run of two processes goes on as three: every draw is trained on once.

Files, a task and a stream are mixed in the report's ratio, which the first process estimates for
all. Nothing here is simulated but the stop.
"""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest
from tests.processes import shared_by
from tests.train.small_run import QUIET, small_config, tokenizer

from cascadevl.data.mixture import Mixture
from cascadevl.data.stream import merge_states
from cascadevl.train import loop, mixing
from cascadevl.train.checkpoint import latest, load_streams
from cascadevl.train.config import TrainConfig
from cascadevl.train.loop import TrainState
from cascadevl.train.mixing import mixed
from cascadevl.train.pretrain import pretrain
from cascadevl.train.sources import example_builder, sources_of_meta
from cascadevl.train.start import from_scratch
from cascadevl.types import Batch

NUM_STEPS, STOP = 5, 2


def talk(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def write_data(folder: Path) -> None:
    lines = [json.dumps({"conversations": talk(f"{n}?", f"{n} it is")}) for n in range(50)]
    (folder / "numbers.jsonl").write_text("\n".join(lines))
    (folder / "streamed").mkdir()
    datasets.disable_progress_bars()
    for part in range(6):
        rows = [{"conversations": talk(f"{part}-{n}?", f"{n}")} for n in range(12)]
        datasets.Dataset.from_list(rows).to_parquet(folder / "streamed" / f"{part}.parquet")
    shapes = {"annotation": "task:shapes", "length": 60, "task": {"settings": {"px": 112}}}
    streamed = {"annotation": "streamed", "stream": {"lanes": 6, "buffer": 4}, "length": 72}
    meta = {"numbers": {"annotation": "numbers.jsonl"}, "shapes": shapes, "streamed": streamed}
    (folder / "meta.json").write_text(json.dumps(meta))


def config(folder: Path, **values: Any) -> TrainConfig:
    return small_config(
        folder / "run",
        data__meta=(folder / "meta.json",),
        data__mixture="internvl3",
        data__prefetch=2,
        batch__row_tokens=300,
        run__num_steps=NUM_STEPS,
        run__eval_interval=1,
        run__checkpoint_interval=0,
        **values,
    )


def attempt(folder: Path) -> None:
    """One process of a run; notes the samples of every update it makes."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    update, estimate = loop.update, mixing.profile_sources

    def noting(state: Any, batches: Any, objective: Any) -> None:
        with (folder / f"seen-{world_size}-{rank}.txt").open("a") as file:
            file.writelines(f"{source}\n" for batch in batches for source in batch.sources)
        update(state, batches, objective)

    def by_the_first(*args: Any, **more: Any) -> Any:
        assert (rank, world_size) == (0, 2), "the first process of the first attempt estimates"
        return estimate(*args, **more)

    def stop(state: TrainState[Batch]) -> None:
        if world_size == 2 and rank == 1 and state.step == STOP:
            os.kill(os.getpid(), signal.SIGTERM)

    loop.update, mixing.profile_sources = noting, by_the_first
    result = pretrain(
        config(folder, run__resume=True), tokenizer=tokenizer(), on_step=stop, console=QUIET
    )
    assert result.steps == (STOP if world_size == 2 else NUM_STEPS)


@pytest.mark.slow
def test_a_run_of_two_processes_goes_on_as_three(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write_data(tmp_path)
    for number in (2, 3):
        shared_by(number, attempt, tmp_path, HF_DATASETS_CACHE=str(tmp_path / "cache"))
    seen: Counter[str] = Counter()
    for file in tmp_path.glob("seen-*.txt"):
        names_and_branches = (line.partition("#") for line in file.read_text().splitlines())
        seen.update(name for name, _, branch in names_and_branches if branch in ("", "0"))

    # What the checkpoint at the end still holds back, and the draws up to there, one by one.
    checkpoint = latest(config(tmp_path).run.out / "checkpoints")
    assert checkpoint is not None
    state = merge_states(load_streams(checkpoint))
    waiting = set(state["pending"])
    _, processor = from_scratch(config(tmp_path).model, tokenizer(), seed=42)
    resumed = config(tmp_path, run__resume=True)
    builder = example_builder(resumed.data, processor, resumed.run.seed)
    mixture = Mixture(mixed(sources_of_meta(resumed.data.meta), builder, resumed), resumed.run.seed)
    assert state["mixture"] == mixture.fingerprint()
    wanted: Counter[str] = Counter()
    names: Counter[str] = Counter()
    for position in range(state["cursor"]):
        if position not in waiting:
            draw = mixture.draw(position)
            wanted[mixture.record(draw).source] += 1
            names[draw.source_name] += 1
    assert seen == wanted
    assert set(names) == {"numbers", "shapes", "streamed"}
