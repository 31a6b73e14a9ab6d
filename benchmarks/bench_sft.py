"""Useful tokens a second of fine-tuning: ours against TRL's SFTTrainer on the same rows.

The same checkpoint, the same token ids, labels and tiles, the same rows an optimiser step, one
machine. TRL runs in its own environment (``--trl-python``), as a process that trains an epoch when
it is told to and sleeps otherwise: rounds of both sides take turns. Neither side's time holds
tokenising or cutting tiles. Two kinds of rows, with the lengths of bench_packing.py made smaller:

- ``mixed``: a quarter text, one picture, many pictures. TRL refuses to pack it: padded batches.
- ``text``: TRL packs it ("bfd"), or pads it, whichever is quicker.

Equal loss is asserted first, in float32 on one batch, token averaging as TRL has it. ``--sweep``
looks for the peer's best settings and prints the table; without it they are arguments. TRL trains
float32 weights under bfloat16 autocast; ours bfloat16 weights with float32 masters, the same bytes
of state. bfloat16 weights without masters, which lose small updates, are in the sweep's table for
completeness but never the peer. The last line is one JSON document.
Run: ``python benchmarks/bench_sft.py --trl-python VENV/bin/python --sweep --threads 2``.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from bench_packing import sizes
from bench_train_step import quartiles
from experiment import Given, random_example
from safetensors.torch import save_file
from torch import Tensor
from trl_frame import (
    RELEASED_TOKENS_PER_TILE,
    arguments,
    as_json,
    chosen_peer,
    expanded,
    packed,
    print_sweep,
    run,
)
from trl_peer import LR, Peer, Runner, Trl, request

from cascadevl.data.collate import collate, num_tokens
from cascadevl.data.processor import CascadeVLProcessor
from cascadevl.train.config import ModelConfig
from cascadevl.train.loop import TrainState, update
from cascadevl.train.objective import NEXT_TOKEN
from cascadevl.train.optim import OptimConfig, Optimiser
from cascadevl.train.start import from_scratch, make_trainable
from cascadevl.types import Batch, Example

KINDS = ("mixed", "text")


def draw_rows(
    kind: str, count: int, processor: CascadeVLProcessor, max_tokens: int
) -> list[Example]:
    """Random tokens and tiles; lengths as bench_packing.py draws them, made smaller.

    A tile has fewer visual tokens here than in the released models, and texts are shortened
    likewise, so that the shares of text and pictures are those of the released sizes. The second
    half of the text is the answer.
    """
    rng = np.random.default_rng(0)
    shrink = RELEASED_TOKENS_PER_TILE // processor.tokens_per_tile
    drawn: list[Example] = []
    for size in sizes(kind, 0):
        text = max(8, (size.tokens - RELEASED_TOKENS_PER_TILE * size.tiles) // shrink)
        if text + processor.tokens_per_tile * size.tiles > max_tokens:
            continue
        drawn.append(
            random_example(
                f"{kind}:{len(drawn)}",
                text,
                size.tiles,
                text - text // 2,
                image_token_id=processor.image_token_id,
                tile_px=processor.tiling.tile_px,
                rng=rng,
            )
        )
        if len(drawn) == count:
            break
    return drawn


def write_rows(
    kind: str, folder: Path, processor: CascadeVLProcessor, args: argparse.Namespace
) -> list[Example]:
    """Draw rows, and write them as TRL's side reads them, images expanded."""
    rows = draw_rows(kind, args.rows, processor, args.row_tokens)
    tensors: dict[str, Tensor] = {}
    for number, row in enumerate(rows):
        whole = expanded(row, processor)
        ids = torch.from_numpy(whole.input_ids)
        tensors[f"ids.{number}"] = ids
        tensors[f"labels.{number}"] = ids.masked_fill(~torch.from_numpy(whole.trained), -100)
        tensors[f"tiles.{number}"] = torch.from_numpy(row.tiles)
    save_file(tensors, folder / "rows.safetensors")
    return rows


class Ours:
    """Our side: packs, collates and trains; a round is an epoch, as TRL's is."""

    def __init__(
        self, rows: Sequence[Example], processor: CascadeVLProcessor, args: argparse.Namespace
    ) -> None:
        """Build the model that the checkpoint holds."""
        self.rows, self.processor, self.args = rows, processor, args
        config = ModelConfig(preset=args.preset, precision="bfloat16")
        model, _ = from_scratch(config, processor.tokenizer, seed=0)
        accelerator = Accelerator(cpu=True)
        make_trainable(model, config, accelerator)
        self.state: TrainState[Batch] = TrainState(
            model=model,
            optimiser=Optimiser(model.named_parameters(), OptimConfig(lr=LR)),
            stream=Given(self.batch(rows[:1])),
            accelerator=accelerator,
        )
        self.round_number = 0
        self.slots = 0

    def batch(self, row: Sequence[Example]) -> Batch:
        """One packed row."""
        return collate(
            [row],
            image_token_id=self.processor.image_token_id,
            pad_token_id=self.processor.tokenizer.pad_token_id,
            tokens_per_tile=self.processor.tokens_per_tile,
            averaging="token",
        )

    def round(self) -> float:
        """Seconds of one epoch in an order of its own."""
        torch.set_num_threads(self.args.threads)
        start = time.perf_counter()
        order = np.random.default_rng(self.round_number).permutation(len(self.rows))
        self.round_number += 1
        self.slots = 0
        for first in range(0, len(order), self.args.step_rows):
            chosen = [self.rows[n] for n in order[first : first + self.args.step_rows]]
            rows = packed(chosen, self.processor.tokens_per_tile, self.args.row_tokens)
            batches = [self.batch(row) for row in rows]
            self.slots += sum(batch.input_ids.numel() for batch in batches)
            update(self.state, batches, NEXT_TOKEN)
            self.state.optimiser.step(1.0)
            self.state.optimiser.zero_grad()
        return time.perf_counter() - start


def prove_equal(
    trl: Trl, rows: Sequence[Example], processor: CascadeVLProcessor, args: argparse.Namespace
) -> dict[str, float]:
    """The float32 loss of one batch of a few rows; asserts that TRL's is the same.

    Both divide the sum over all targets by their number; TRL's trainer computes it from what its
    own collation made, padded or packed.
    """
    model, _ = from_scratch(
        ModelConfig(preset=args.preset, precision="float32"), processor.tokenizer, seed=0
    )
    pictured = [n for n, row in enumerate(rows) if row.num_tiles]
    plain = [n for n, row in enumerate(rows) if not row.num_tiles]
    numbers = pictured[: args.equal_rows // 2]
    numbers += plain[: args.equal_rows - len(numbers)]
    batch = collate(
        [[rows[n] for n in numbers]],
        image_token_id=processor.image_token_id,
        pad_token_id=processor.tokenizer.pad_token_id,
        tokens_per_tile=processor.tokens_per_tile,
        averaging="token",
    )
    with torch.no_grad():
        ours = float(NEXT_TOKEN.loss(model.eval(), batch, NEXT_TOKEN.weigh(batch)).loss)
    losses = {"ours": ours}
    forms = {"sdpa": ("sdpa", 0), "eager": ("eager", 0)}
    if not pictured:
        forms["sdpa, packed"] = ("sdpa", batch.input_ids.numel())
    for form, (attention, packing) in forms.items():
        peer = Peer(batch=1 if packing else len(numbers), attention=attention, packing=packing)
        asked = request(peer, numbers, steps=1, step_rows=len(numbers))
        losses[form] = trl.ask(do="loss", **asked, precision="float32")["loss"]
        assert abs(losses[form] - ours) < 1e-5 * max(1.0, abs(ours)), losses
    return losses


def compare(
    trl: Trl,
    kind: str,
    args: argparse.Namespace,
    rows: Sequence[Example],
    processor: CascadeVLProcessor,
) -> dict[str, Any]:
    """Equal loss, the sweep if it is wanted, then rounds in turn."""
    losses = prove_equal(trl, rows, processor, args)
    packing = args.row_tokens if kind == "text" and args.peer_packed else 0
    peer, table = chosen_peer(trl, kind, args, packing=packing)
    ours, runner = Ours(rows, processor, args), Runner(trl, peer, args)
    ours.round()
    seconds: dict[str, list[float]] = {"ours": [], "trl": []}
    for _ in range(args.repeats):
        seconds["ours"].append(ours.round())
        seconds["trl"].append(runner.round())
    runner.close()
    useful = sum(num_tokens(row, processor.tokens_per_tile) for row in rows)
    ratios = [theirs / mine for mine, theirs in zip(*seconds.values(), strict=True)]
    low, median, high = quartiles(ratios)
    speed = {name: useful / statistics.median(values) for name, values in seconds.items()}
    print(
        f"{kind}: {median:.2f}x TRL (quartiles {low:.2f}-{high:.2f}, {args.repeats} rounds), "
        f"{speed['ours']:.0f} against {speed['trl']:.0f} useful tokens/s; {len(rows)} rows, "
        f"{useful} tokens, {sum(row.num_tiles for row in rows)} tiles; ours fills "
        f"{100 * useful / ours.slots:.1f} % of its slots; TRL at {peer}; float32 losses {losses}"
    )
    print_sweep(table, useful)
    return {
        "kind": kind,
        "ratio": median,
        "ratio_quartiles": [low, high],
        "tokens_per_s": speed,
        "peer": asdict(peer),
        "losses": losses,
        "sweep": as_json(table),
        "seconds": seconds,
        "useful_tokens": useful,
        "fill": useful / ours.slots,
    }


def parse() -> argparse.Namespace:
    """The arguments."""
    parser = arguments(__doc__.splitlines()[0], KINDS, "samples")
    parser.add_argument("--peer-packed", action="store_true", help="let TRL pack the text rows")
    parser.set_defaults(
        rows=64, step_rows=32, equal_rows=6, batches=[2, 4, 8, 16, 32], peer_batch=8
    )
    return parser.parse_args()


if __name__ == "__main__":
    run("sft", parse(), "trl_side.py", write_rows, compare)
