"""How full packed rows are, how evenly processes are loaded, and what padding costs a step.

Counts first, which do not depend on the machine: three mixtures of lengths, packed by the rule of
the released code (written from its description: rows sorted by tiles, the first that fits, the one
with most tiles leaves), by ours, and by ours with levelling; and padded, sorted by length or not.
Processes of a step wait for the slowest: the idle share is theirs, at the costs of three model
sizes. Then time: a step of nano on the same samples, packed or padded, interleaved, equal losses
proven first. The last line is one JSON document.
Run: ``python benchmarks/bench_packing.py --repeats 20 --threads 2``.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from experiment import Given

from cascadevl.data.collate import collate, num_tokens
from cascadevl.data.levelling import Leveller
from cascadevl.data.mixture import Mixture, WeightedSource
from cascadevl.data.packing import Packer, Row, Size, size_of
from cascadevl.tasks.base import Stage, Task, TaskSource
from cascadevl.tasks.easy_vqa import EasyVQA
from cascadevl.tasks.handwriting import Handwriting
from cascadevl.tasks.needle import Needle
from cascadevl.tasks.shapes import Shapes
from cascadevl.tasks.text import Text
from cascadevl.train.config import DataConfig, ModelConfig
from cascadevl.train.loop import TrainState, update
from cascadevl.train.objective import NEXT_TOKEN
from cascadevl.train.optim import OptimConfig, Optimiser
from cascadevl.train.sources import example_builder
from cascadevl.train.start import from_scratch, make_trainable
from cascadevl.types import Batch, Example
from cascadevl.workflows import nano

ROW = Size(tokens=32768, tiles=96)  # InternVL3.5 SFT scripts
OPEN_ROWS = 20
LEVEL_ROWS = 8
TOKENS_PER_TILE = 256
MIXTURES = ("text", "images", "mixed")
TILE_COSTS = {"1B": 512, "8B": 38, "38B": 176}
"""A tile's pass through the vision tower in tokens of the language model: parameters x 1,025
patches over parameters (0.3 G to 0.6 G, 0.3 G to 8 G, 5.5 G to 32 G)."""


class RowRule(Protocol):
    """What packs samples into rows."""

    def add(self, item: None, size: Size, position: int) -> list[Row[None]]:
        """Take a sample in; the rows that leave."""


class ReleasedRule:
    """The rule of the released code."""

    def __init__(self) -> None:
        """Start with no open row."""
        self._open: list[Row[None]] = []

    def add(self, item: None, size: Size, position: int) -> list[Row[None]]:
        """First fit in the order of tiles; a row leaves at a limit, or the one with most tiles."""
        self._open.sort(key=lambda row: -row.tiles)
        for row in self._open:
            if row.tiles + size.tiles <= ROW.tiles and row.tokens + size.tokens <= ROW.tokens:
                break
        else:
            row = Row()
            self._open.append(row)
        row.add(item, size, position)
        leaving = []
        if row.tokens == ROW.tokens or row.tiles == ROW.tiles:
            leaving.append(row)
        elif len(self._open) > OPEN_ROWS:
            leaving.append(max(self._open, key=lambda each: each.tiles))
        self._open = [each for each in self._open if each not in leaving]
        return leaving


class Levelled:
    """Our packer with the leveller behind it."""

    def __init__(self) -> None:
        """Start with no open row."""
        self._packer: Packer[None] = Packer(*ROW, OPEN_ROWS)
        self._leveller: Leveller[None] = Leveller(LEVEL_ROWS)

    def add(self, item: None, size: Size, position: int) -> list[Row[None]]:
        """The rows whose turn it is."""
        self._leveller.add(self._packer.add(item, size, position))
        leaving = []
        while self._leveller.has_next(1, is_end=False):
            leaving.append(self._leveller.take())
        return leaving


RULES: dict[str, Callable[[], RowRule]] = {
    "released rule": ReleasedRule,
    "best fit (ours)": lambda: Packer(*ROW, OPEN_ROWS),
    "best fit, levelled (ours)": Levelled,
}


def sizes(mixture: str, seed: int) -> Iterator[Size]:
    """Endless sample sizes: log-normal texts, images of up to 12 tiles and a thumbnail.

    ``mixed`` is a quarter texts (median 800 tokens), 55 % one image, 12 % several, 8 % video.
    """
    rng = np.random.default_rng([seed, MIXTURES.index(mixture)])
    while True:
        kind, words = rng.random(), 20 + int(rng.lognormal(math.log(300), 1.2))
        if mixture == "text" or (mixture == "mixed" and kind < 0.25):
            size = Size(20 + int(rng.lognormal(math.log(800), 1.3)), 0)
        else:
            if mixture == "images" or kind < 0.80:
                tiles = int(rng.integers(1, 13))
                tiles += tiles > 1  # the thumbnail
            elif kind < 0.92:
                pictures = int(rng.integers(2, 7))
                tiles = int(rng.integers(1, max(2, 12 // pictures + 1), pictures).sum())
            else:
                tiles = int(rng.integers(8, 33))  # frames
            size = Size(words + TOKENS_PER_TILE * tiles, tiles)
        if size.tokens <= ROW.tokens and size.tiles <= ROW.tiles:
            yield size


def packed_rows(rule: str, mixture: str, process: int, num_rows: int) -> np.ndarray:
    """(rows, 2): tokens and tiles of the rows that one process trains on."""
    packer, rows = RULES[rule](), []
    for position, size in enumerate(sizes(mixture, process)):
        rows += packer.add(None, size, position)
        if len(rows) >= num_rows:
            break
    return np.array([(row.tokens, row.tiles) for row in rows[:num_rows]])


def fills(num_processes: int, num_rows: int, accumulation: int) -> list[dict[str, Any]]:
    """Of every mixture and rule: how full rows are, and how long processes wait."""
    found = []
    for mixture in MIXTURES:
        for rule in RULES:
            rows = np.stack(
                [packed_rows(rule, mixture, each, num_rows) for each in range(num_processes)]
            )
            tokens, tiles = rows[..., 0], rows[..., 1]
            idle = {}
            for size, cost in TILE_COSTS.items():
                work = tokens + cost * tiles
                of_step = work.reshape(num_processes, -1, accumulation).sum(-1)
                idle[size] = 1 - float(of_step.mean() / of_step.max(0).mean())
            found.append(
                {
                    "mixture": mixture,
                    "rule": rule,
                    "fill": float(tokens.mean() / ROW.tokens),
                    "fill_p5": float(np.percentile(tokens, 5) / ROW.tokens),
                    "tiles": float(tiles.mean()),
                    "idle": idle,
                }
            )
    return found


def padding(mixture: str, batch: int, num_samples: int, *, by_length: bool) -> float:
    """Share of useful tokens where each sample is a row, padded to the longest of its batch."""
    lengths = np.array([size.tokens for size in islice(sizes(mixture, 0), num_samples)])
    # The usual grouping: sorted within a large random part, here 50 batches.
    parts = np.split(lengths, range(50 * batch, num_samples, 50 * batch))
    ordered = np.concatenate([np.sort(part) if by_length else part for part in parts])
    rows = ordered[: num_samples // batch * batch].reshape(-1, batch)
    return float(rows.sum() / (rows.max(1) * batch).sum())


def examples(num_samples: int) -> tuple[list[Example], Any, Any]:
    """Samples of 20 to several hundred tokens with no, one or many pictures; model, processor."""
    config = ModelConfig(preset="nano")
    model, processor = from_scratch(config, nano.tokenizer(), seed=0)
    make_trainable(model, config, Accelerator(cpu=True))
    builder = example_builder(DataConfig(max_tokens=2048), processor, 0)
    families: list[tuple[Task, Stage, float]] = [
        (Text(difficulty="easy", num_questions=1), "sft", 0.25),
        (Handwriting(difficulty="two", num_questions=1), "sft", 0.25),
        (EasyVQA(num_questions=3), "sft", 0.2),
        (Shapes(num_questions=8), "pretrain", 0.2),
        (Needle(num_pictures=(4, 24)), "sft", 0.1),
    ]
    mixture = Mixture(
        [
            WeightedSource(source=TaskSource(task=task, length=10_000, stage=stage), weight=weight)
            for task, stage, weight in families
        ],
        seed=0,
    )
    draws = (mixture.draw(position) for position in range(num_samples))
    return [builder(mixture.record(draw), epoch=0) for draw in draws], model, processor


def time_steps(args: argparse.Namespace) -> dict[str, Any]:
    """Useful tokens a second of packed and of padded rows; the same samples in both."""
    samples, model, processor = examples(args.samples)
    tokens_per_tile = processor.tokens_per_tile
    samples.sort(key=lambda each: num_tokens(each, tokens_per_tile))
    packer: Packer[Example] = Packer(args.row_tokens, 10_000, 8)
    rows = []
    for position, sample in enumerate(samples):
        rows += packer.add(sample, size_of(sample, tokens_per_tile), position)
    rows += packer.flush()
    shuffled = [samples[number] for number in np.random.default_rng(0).permutation(len(samples))]

    def batches(parts: Sequence[Sequence[Sequence[Example]]]) -> list[Batch]:
        return [
            collate(
                part,
                image_token_id=processor.image_token_id,
                pad_token_id=processor.tokenizer.pad_token_id,
                tokens_per_tile=tokens_per_tile,
                averaging="square",
            )
            for part in parts
        ]

    def padded(order: Sequence[Example]) -> list[Batch]:
        starts = range(0, len(order), args.batch)
        return batches([[[each] for each in order[s : s + args.batch]] for s in starts])

    steps = {
        "packed": batches([[row.items] for row in rows]),
        "padded, by length": padded(samples),
        "padded": padded(shuffled),
    }
    state = TrainState(
        model=model,
        optimiser=Optimiser(model.named_parameters(), OptimConfig()),
        stream=Given(steps["packed"][0]),
        accelerator=Accelerator(cpu=True),
    )
    times: dict[str, list[float]] = {name: [] for name in steps}
    losses = {}
    for _ in range(args.repeats + 1):  # the first round warms up and compares the losses
        for name, micro_batches in steps.items():
            start = time.perf_counter()
            update(state, micro_batches, NEXT_TOKEN)
            times[name].append(time.perf_counter() - start)
            losses[name] = state.metrics["loss"]
            state.optimiser.zero_grad()
    expected = losses["packed"]
    assert all(abs(loss - expected) < 2e-3 * expected for loss in losses.values()), losses
    useful = sum(batch.num_tokens for batch in steps["packed"])
    result: dict[str, Any] = {"useful_tokens": useful, "loss": losses}
    for name, micro_batches in steps.items():
        ratios = [mine / packed for mine, packed in zip(times[name], times["packed"], strict=True)]
        result[name] = {
            "tokens_per_s": useful / statistics.median(times[name][1:]),
            "time_to_packed": statistics.quantiles(ratios[1:], n=4),
            "useful_share": useful / sum(batch.input_ids.numel() for batch in micro_batches),
        }
    return result


def main() -> None:
    """Count, time, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--rows", type=int, default=320, help="of each process")
    parser.add_argument("--accumulation", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=20, help="timed steps; 0 to count only")
    parser.add_argument("--samples", type=int, default=128, help="of a timed step")
    parser.add_argument("--row-tokens", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=16, help="samples of a padded batch")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="also write the JSON document here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found = fills(args.processes, args.rows, args.accumulation)
    print("| mixture | rule | fill | 5 % of rows below | tiles | idle at 1B | 8B | 38B |")
    for each in found:
        idle = " | ".join(f"{100 * share:.1f}" for share in each["idle"].values())
        print(
            f"| {each['mixture']} | {each['rule']} | {100 * each['fill']:.2f} | "
            f"{100 * each['fill_p5']:.1f} | {each['tiles']:.1f} | {idle} |"
        )
    pads = {
        f"{mixture}, {'by length' if by_length else 'as they come'}": padding(
            mixture, 8, 20_000, by_length=by_length
        )
        for mixture in MIXTURES
        for by_length in (False, True)
    }
    for name, share in pads.items():
        print(f"padded batches of 8, {name}: {100 * share:.1f} % useful")
    timed = time_steps(args) if args.repeats else {}
    for name in ("packed", "padded, by length", "padded") if timed else ():
        low, middle, high = timed[name]["time_to_packed"]
        print(
            f"{name}: {timed[name]['tokens_per_s']:.0f} useful tokens/s, {middle:.2f} of the "
            f"packed time ({low:.2f}-{high:.2f}), {100 * timed[name]['useful_share']:.1f} % useful"
        )
    document = json.dumps({"fills": found, "padded": pads, "steps": timed})
    if args.out:
        args.out.write_text(document, "utf-8")
    print(document)


if __name__ == "__main__":
    main()
