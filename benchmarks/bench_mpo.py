"""Useful tokens a second of MPO: ours against TRL's DPOTrainer on the same pairs.

The same checkpoint, the same token ids and tiles, the same pairs an optimiser step, the same three
losses (``["sigmoid", "bco_pair", "sft"]``), one machine, rounds in turn as in bench_sft.py. Neither
side's time holds tokenising or cutting tiles. Two kinds of pairs:

- ``images``: one picture each. TRL lays prompt and picture out for both answers, and keeps a second
  model that it asks for the reference at every step: it refuses to store that for pictures.
- ``text``: TRL stores the reference's log-probabilities before training, as ours does.

Ours stores them always. What that pass costs is timed too: ``ratio`` is training alone, as of a
second epoch; ``ratio_with_pass`` is one epoch with its pass, the number to quote for pictures.
Useful tokens are those of prompt, visual tokens and both answers, each once.

Equal loss is asserted first, in float32, pair by pair, against a reference of other weights, where
both sides mean the same: without a reward shift (TRL has none), and one pair at a time (TRL's
``sft`` is a mean over the tokens of a batch). The last line is one JSON document.
Run: ``python benchmarks/bench_mpo.py --trl-python VENV/bin/python --sweep --threads 2``.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
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

from cascadevl.data.collate import num_tokens
from cascadevl.data.pairs import PairBatch, PairCollate, digest
from cascadevl.data.processor import CascadeVLProcessor
from cascadevl.data.stream import CollateConfig
from cascadevl.losses.mpo import MPOSettings
from cascadevl.model.loading import save
from cascadevl.model.modeling import CascadeVLForConditionalGeneration
from cascadevl.train.config import ModelConfig
from cascadevl.train.logprobs import answer_logprobs
from cascadevl.train.loop import TrainState, update
from cascadevl.train.mpo_objective import ShiftMemory, mpo_objective
from cascadevl.train.optim import OptimConfig, Optimiser
from cascadevl.train.start import from_scratch, make_trainable
from cascadevl.types import NO_PARENT, Example

KINDS = ("images", "text")


def draw_pairs(
    kind: str, count: int, processor: CascadeVLProcessor, max_tokens: int
) -> list[Example]:
    """Random tokens and tiles; lengths as bench_packing.py draws them, made smaller as in SFT.

    A quarter of the text is the prompt, the rest the chosen answer; the rejected answer is between
    half and one and a half times as long.
    """
    rng = np.random.default_rng(0)
    shrink = RELEASED_TOKENS_PER_TILE // processor.tokens_per_tile
    drawn: list[Example] = []
    for size in sizes(kind, 0):
        text = max(12, (size.tokens - RELEASED_TOKENS_PER_TILE * size.tiles) // shrink)
        prompt = max(4, text // 4)
        rejected = max(2, int((text - prompt) * rng.uniform(0.5, 1.5)))
        if text + rejected + processor.tokens_per_tile * size.tiles > max_tokens:
            continue
        lengths = (prompt, text - prompt, rejected)
        drawn.append(as_pair(f"{kind}:{len(drawn)}", lengths, size.tiles, processor, rng))
        if len(drawn) == count:
            break
    return drawn


def as_pair(
    name: str,
    lengths: tuple[int, int, int],
    tiles: int,
    processor: CascadeVLProcessor,
    rng: np.random.Generator,
) -> Example:
    """Tokens of prompt, chosen and rejected answer as three segments."""
    example = random_example(
        name,
        sum(lengths),
        tiles,
        sum(lengths[1:]),
        image_token_id=processor.image_token_id,
        tile_px=processor.tiling.tile_px,
        rng=rng,
    )
    segments = np.repeat(np.arange(3), lengths)
    return replace(example, segments=segments, parents=(NO_PARENT, 0, 0), trained=segments > 0)


def write_pairs(
    kind: str, folder: Path, processor: CascadeVLProcessor, args: argparse.Namespace
) -> list[Example]:
    """Draw pairs, and write them as TRL's side reads them, with a reference of other weights."""
    start = ModelConfig(preset=args.preset, precision="float32")
    other, _ = from_scratch(start, processor.tokenizer, seed=1)
    save(other, processor, folder / "reference")
    pairs = draw_pairs(kind, args.rows, processor, args.row_tokens)
    tensors: dict[str, Tensor] = {}
    for number, pair in enumerate(pairs):
        whole = expanded(pair, processor)
        for segment, name in enumerate(("prompt", "chosen", "rejected")):
            tensors[f"{name}.{number}"] = torch.from_numpy(
                whole.input_ids[whole.segments == segment]
            )
        tensors[f"tiles.{number}"] = torch.from_numpy(pair.tiles)
    save_file(tensors, folder / "rows.safetensors")
    return pairs


def collate_of(processor: CascadeVLProcessor) -> PairCollate:
    """How rows of pairs become tensors."""
    return PairCollate(
        packed=CollateConfig(
            image_token_id=processor.image_token_id,
            pad_token_id=processor.tokenizer.pad_token_id,
            tokens_per_tile=processor.tokens_per_tile,
        )
    )


@torch.no_grad()
def reference_of(
    model: CascadeVLForConditionalGeneration, rows: Sequence[list[Example]], collate: PairCollate
) -> dict[bytes, tuple[float, float]]:
    """The model's log-probabilities of all answers: what a run stores before its first step."""
    known: dict[bytes, tuple[float, float]] = {}
    for row in rows:
        batch = collate([row])
        samples = answer_logprobs(model, batch.packed)
        values = zip(samples[batch.chosen].tolist(), samples[batch.rejected].tolist(), strict=True)
        known.update(zip(map(digest, row), values, strict=True))
    return known


class Ours:
    """Our side: packs, collates and trains; a round is an epoch, as TRL's is."""

    def __init__(
        self, pairs: Sequence[Example], processor: CascadeVLProcessor, args: argparse.Namespace
    ) -> None:
        """Build the model that the checkpoint holds, and store what it thinks as the reference."""
        self.pairs, self.processor, self.args = pairs, processor, args
        config = ModelConfig(preset=args.preset, precision="bfloat16")
        self.model, _ = from_scratch(config, processor.tokenizer, seed=0)
        accelerator = Accelerator(cpu=True)
        make_trainable(self.model, config, accelerator)
        self.collate = collate_of(processor)
        self.memory = ShiftMemory()
        self.objective = mpo_objective(MPOSettings(), self.memory, accelerator)
        self.state: TrainState[PairBatch] = TrainState(
            model=self.model,
            optimiser=Optimiser(self.model.named_parameters(), OptimConfig(lr=LR)),
            stream=Given(self.collate([[pairs[0]]])),
            accelerator=accelerator,
            memory=self.memory,
        )
        self.reference_pass()
        self.round_number = 0

    def reference_pass(self) -> float:
        """Seconds in which the log-probabilities of all pairs are computed."""
        torch.set_num_threads(self.args.threads)
        start = time.perf_counter()
        rows = packed(self.pairs, self.processor.tokens_per_tile, self.args.row_tokens)
        with self.model.no_drop_path():
            reference = reference_of(self.model, rows, self.collate)
        seconds = time.perf_counter() - start
        if self.collate.reference is None:  # later passes are of trained weights, for their time
            self.collate = replace(self.collate, reference=reference)
        return seconds

    def round(self) -> float:
        """Seconds of one epoch in an order of its own."""
        torch.set_num_threads(self.args.threads)
        start = time.perf_counter()
        order = np.random.default_rng(self.round_number).permutation(len(self.pairs))
        self.round_number += 1
        with self.model.no_drop_path():
            for first in range(0, len(order), self.args.step_rows):
                chosen = [self.pairs[n] for n in order[first : first + self.args.step_rows]]
                rows = packed(chosen, self.processor.tokens_per_tile, self.args.row_tokens)
                update(self.state, [self.collate([row]) for row in rows], self.objective)
                self.state.optimiser.step(1.0)
                self.state.optimiser.zero_grad()
                self.memory.advance(self.state.metrics)
        return time.perf_counter() - start


def prove_equal(
    trl: Trl,
    pairs: Sequence[Example],
    processor: CascadeVLProcessor,
    args: argparse.Namespace,
) -> dict[str, list[float]]:
    """The float32 loss of some pairs, one by one; asserts that TRL's are the same."""
    config = ModelConfig(preset=args.preset, precision="float32")
    model, reference = (
        from_scratch(config, processor.tokenizer, seed=seed)[0].eval() for seed in (0, 1)
    )
    numbers = list(range(min(args.equal_rows, len(pairs))))
    known = reference_of(reference, [[pairs[n]] for n in numbers], collate_of(processor))
    collate = replace(collate_of(processor), reference=known)
    objective = mpo_objective(MPOSettings(), ShiftMemory(), Accelerator(cpu=True))
    with torch.no_grad():
        ours = [float(objective.loss(model, collate([[pairs[n]]]), 1.0).loss) for n in numbers]
    losses = {"ours": ours}
    for attention in ("sdpa", "eager"):
        asked = request(Peer(batch=1, attention=attention), numbers, steps=1, step_rows=1)
        losses[attention] = trl.ask(do="loss", **asked, precision="float32")["losses"]
        np.testing.assert_allclose(losses[attention], ours, rtol=1e-5)
    return losses


def compare(
    trl: Trl,
    kind: str,
    args: argparse.Namespace,
    pairs: Sequence[Example],
    processor: CascadeVLProcessor,
) -> dict[str, Any]:
    """Equal loss, the sweep if it is wanted, then rounds in turn."""
    losses = prove_equal(trl, pairs, processor, args)
    peer, table = chosen_peer(trl, "pairs", args)
    ours, runner = Ours(pairs, processor, args), Runner(trl, peer, args)
    ours.round()
    seconds: dict[str, list[float]] = {"ours": [], "pass": [], "trl": []}
    for _ in range(args.repeats):
        seconds["ours"].append(ours.round())
        seconds["pass"].append(ours.reference_pass())
        seconds["trl"].append(runner.round())
    runner.close()
    useful = sum(num_tokens(pair, processor.tokens_per_tile) for pair in pairs)
    alone = quartiles([t / o for o, t in zip(seconds["ours"], seconds["trl"], strict=True)])
    whole = quartiles(
        [
            t / (o + p)
            for o, p, t in zip(*(seconds[n] for n in ("ours", "pass", "trl")), strict=True)
        ]
    )
    speed = {name: useful / statistics.median(seconds[name]) for name in ("ours", "trl")}
    print(
        f"{kind}: {alone[1]:.2f}x TRL (quartiles {alone[0]:.2f}-{alone[2]:.2f}, {args.repeats} "
        f"rounds) in training, {whole[1]:.2f}x ({whole[0]:.2f}-{whole[2]:.2f}) with the reference "
        f"pass of one epoch; {speed['ours']:.0f} against {speed['trl']:.0f} useful tokens/s; "
        f"{len(pairs)} pairs, {useful} tokens, {sum(pair.num_tiles for pair in pairs)} tiles; TRL "
        f"at {peer}, its reference {'stored' if kind == 'text' else 'beside every step'}; largest "
        f"difference of losses {differences(losses):.1e}"
    )
    print_sweep(table, useful)
    return {
        "kind": kind,
        "ratio": alone[1],
        "ratio_quartiles": [alone[0], alone[2]],
        "ratio_with_pass": whole[1],
        "ratio_with_pass_quartiles": [whole[0], whole[2]],
        "tokens_per_s": speed,
        "peer": asdict(peer),
        "losses": losses,
        "sweep": as_json(table),
        "seconds": seconds,
        "useful_tokens": useful,
        "tiles": sum(pair.num_tiles for pair in pairs),
    }


def differences(losses: dict[str, list[float]]) -> float:
    """The largest difference of a loss between the sides."""
    ours = np.array(losses["ours"])
    return max(float(np.abs(np.array(values) - ours).max()) for values in losses.values())


def parse() -> argparse.Namespace:
    """The arguments."""
    parser = arguments(__doc__.splitlines()[0], KINDS, "pairs")
    parser.set_defaults(rows=48, step_rows=16, equal_rows=4, batches=[1, 2, 4, 8, 16], peer_batch=4)
    return parser.parse_args()


if __name__ == "__main__":
    run("mpo", parse(), "trl_mpo_side.py", write_pairs, compare)
