"""The frame of bench_sft.py and bench_mpo.py: arguments, the checkpoint, the report."""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from experiment import markdown
from trl_peer import Peer, Trl, sweep

from cascadevl.data.packing import Packer, size_of
from cascadevl.data.processor import CascadeVLProcessor
from cascadevl.host_memory import keep_freed_memory
from cascadevl.model.loading import save
from cascadevl.sequence import Expanded, expand
from cascadevl.train.config import ModelConfig
from cascadevl.train.start import from_scratch
from cascadevl.types import Example
from cascadevl.workflows import nano

RELEASED_TOKENS_PER_TILE = 256

Written: TypeAlias = Callable[[str, Path, CascadeVLProcessor, argparse.Namespace], list[Example]]
"""Draws examples of a kind and writes them, and what else TRL's side reads, into a folder."""

Compared: TypeAlias = Callable[
    [Trl, str, argparse.Namespace, list[Example], CascadeVLProcessor], dict[str, Any]
]
"""Compares both sides on the examples of a kind."""


def arguments(description: str, kinds: Sequence[str], unit: str) -> argparse.ArgumentParser:
    """The arguments that both programs have; sizes without a default get theirs from the program.

    Args:
        description: Of the program.
        kinds: Kinds of examples.
        unit: What a row of the comparison is.
    """
    parser = argparse.ArgumentParser(description=description)
    add = parser.add_argument
    add("--trl-python", type=Path, required=True, help="Python of an environment with TRL")
    add("--kinds", nargs="+", choices=kinds, default=list(kinds))
    add("--preset", choices=("nano", "micro"), default="micro", help="shape of the model")
    add("--rows", type=int, help=f"{unit} of a round")
    add("--step-rows", type=int, help=f"{unit} of an optimiser step")
    add("--row-tokens", type=int, default=2048, help="tokens of a packed row")
    add("--equal-rows", type=int, help=f"{unit} of the proof of equal loss")
    add("--repeats", type=int, default=10, help="timed rounds of each side")
    add("--threads", type=int, default=2, help="threads of ours, and most of the peer")
    add("--sweep", action="store_true", help="look for the peer's best settings")
    add("--sweep-rounds", type=int, default=1, help="timed rounds of each setting")
    add("--batches", type=int, nargs="+", help=f"sizes tried, in {unit}")
    add("--peer-batch", type=int)
    add("--peer-attention", choices=("sdpa", "eager"), default="sdpa")
    add("--peer-threads", type=int, default=2)
    add("--peer-ungrouped", action="store_true")
    add("--out", type=Path, default=None, help="also write the JSON here")
    return parser


def expanded(example: Example, processor: CascadeVLProcessor) -> Expanded:
    """The tokens of an example, images expanded."""
    return expand(
        example.input_ids,
        example.trained,
        example.segments,
        example.parents,
        image_token_id=processor.image_token_id,
        tokens_per_image=[n * processor.tokens_per_tile for n in example.tiles_per_image],
        increments=example.increments,
    )


def packed(
    examples: Sequence[Example], tokens_per_tile: int, row_tokens: int
) -> list[list[Example]]:
    """The examples in rows."""
    packer: Packer[Example] = Packer(row_tokens, 10_000, len(examples))
    rows = []
    for number, example in enumerate(examples):
        rows += packer.add(example, size_of(example, tokens_per_tile), number)
    return [row.items for row in (*rows, *packer.flush())]


def chosen_peer(
    trl: Trl, kind: str, args: argparse.Namespace, *, packing: int = 0
) -> tuple[Peer, list[dict[str, Any]]]:
    """The peer's settings and the table of a sweep: the best of it, or those of the arguments.

    Args:
        trl: The peer.
        kind: Of examples; ``text`` is tried packed too.
        args: The arguments.
        packing: Tokens of a packed row of the peer, if nothing is looked for; 0 pads.
    """
    if args.sweep:
        return sweep(trl, kind, args)
    peer = Peer(
        batch=args.peer_batch,
        attention=args.peer_attention,
        threads=args.peer_threads,
        grouped=not args.peer_ungrouped and not packing,
        packing=packing,
    )
    return peer, []


def print_sweep(table: Sequence[dict[str, Any]], useful: int) -> None:
    """Print what was tried of the peer, if anything was.

    Args:
        table: Of a sweep.
        useful: Useful tokens of a round.
    """
    if not table:
        return
    cells = [
        [
            *(str(value) for value in row["peer"].values()),
            f"{useful / row['seconds']:.0f}" if row["seconds"] < math.inf else "no memory",
        ]
        for row in table
    ]
    print(markdown([*table[0]["peer"], "useful tokens/s"], cells))


def as_json(table: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The table of a sweep without infinite times, which JSON does not know."""
    return [{**row, "seconds": None} if row["seconds"] == math.inf else row for row in table]


def run(
    name: str, args: argparse.Namespace, script: str, write: Written, compare: Compared
) -> None:
    """Compare every kind, and print everything as one JSON document.

    Args:
        name: Of the benchmark.
        args: The arguments.
        script: TRL's side.
        write: Draws and writes what is compared on.
        compare: Compares.
    """
    keep_freed_memory()  # as our commands do; TRL's side is given the same
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    start = ModelConfig(preset=args.preset, precision="float32")
    model, processor = from_scratch(start, nano.tokenizer(), seed=0)
    results, versions = [], {}
    for kind in args.kinds:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            save(model, processor, folder / "model")
            examples = write(kind, folder, processor, args)
            trl = Trl(args.trl_python, folder, script)
            versions = trl.versions
            results.append(compare(trl, kind, args, examples, processor))
            trl.process.communicate(json.dumps({"do": "exit"}) + "\n")
    document = {"benchmark": name, "peer_versions": versions, "results": results}
    document["arguments"] = {name: str(value) for name, value in vars(args).items()}
    if args.out is not None:
        args.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(document))
