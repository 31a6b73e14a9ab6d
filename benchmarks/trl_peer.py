"""TRL seen from bench_sft.py, bench_mpo.py and bench_gspo.py: its process and settings."""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

LR = 1e-4
"""Learning rate of both sides."""

KEPT_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
    "MALLOC_TOP_PAD_": str(2**26),
    "MALLOC_ARENA_MAX": "1",
}
"""`cascadevl.host_memory.keep_freed_memory` for a process that does not import it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """How TRL is run.

    Attributes:
        batch: Rows of a micro-batch.
        grouped: Whether rows of like length share a batch.
        attention: ``sdpa`` or ``eager``.
        threads: Threads of torch.
        weights: Type of the weights; bfloat16 has no float32 masters.
        packing: Tokens of a packed row, 0 for padded batches.
    """

    batch: int = 8
    grouped: bool = True
    attention: str = "sdpa"
    threads: int = 2
    weights: str = "float32"
    packing: int = 0


class PeerDied(Exception):
    """TRL's process ended; most often it was killed because memory ran out."""


class Trl:
    """The process on TRL's side."""

    def __init__(self, python: Path, folder: Path, script: str = "trl_side.py") -> None:
        """Start it on a folder with a checkpoint and rows."""
        self.folder, self.command = folder, [str(python), str(Path(__file__).with_name(script))]
        self.start()

    def start(self) -> None:
        """Start it, or another in its place."""
        folder = self.folder
        self.process = subprocess.Popen(
            [*self.command, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(folder / "trl.log").open("w"),
            text=True,
            env={**os.environ, **KEPT_MEMORY},
        )
        self.log = folder / "trl.log"
        self.versions = self._answer()

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send a request and wait for its answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise PeerDied(f"TRL's side ended:\n{self.log.read_text()[-3000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def request(peer: Peer, rows: Sequence[int], steps: int, step_rows: int) -> dict[str, Any]:
    """What TRL's side is asked with."""
    accumulation = max(1, step_rows // peer.batch)
    settings = {**asdict(peer), "rows": list(rows), "steps": steps, "accumulation": accumulation}
    return {**settings, "lr": LR}


class Runner:
    """Rounds of one setting of the peer."""

    def __init__(self, trl: Trl, peer: Peer, args: argparse.Namespace) -> None:
        """Open TRL's trainer and let it warm up for a round."""
        self.trl = trl
        steps = -(-args.rows // args.step_rows)
        asked = request(peer, range(args.rows), steps, args.step_rows)
        trl.ask(do="train", **asked, precision="bfloat16")
        self.warm_up = trl.ask(do="round")

    def round(self) -> float:
        """Seconds of one epoch."""
        seconds: float = self.trl.ask(do="round")["seconds"]
        return seconds

    def close(self) -> None:
        """Give the trainer up."""
        self.trl.ask(do="close")


def sweep(trl: Trl, kind: str, args: argparse.Namespace) -> tuple[Peer, list[dict[str, Any]]]:
    """The peer's best settings: attention and threads first, then batch size and the rest."""
    table: list[dict[str, Any]] = []

    def tried(peer: Peer) -> float:
        if any(row["peer"] == asdict(peer) for row in table):
            return next(row["seconds"] for row in table if row["peer"] == asdict(peer))
        try:
            runner = Runner(trl, peer, args)
            seconds = min(runner.round() for _ in range(args.sweep_rounds))
            runner.close()
        except PeerDied:
            seconds = math.inf
            trl.start()
        table.append({"kind": kind, "peer": asdict(peer), "seconds": seconds})
        print(f"{kind} {peer}: {seconds:.2f} s", file=sys.stderr, flush=True)
        return seconds

    packings = (0, args.row_tokens) if kind == "text" else (0,)
    best = Peer(batch=min(8, args.step_rows))
    threads = sorted({1, args.threads})
    best = min(
        (replace(best, attention=a, threads=t) for a in ("sdpa", "eager") for t in threads),
        key=tried,
    )
    sizes_tried = [size for size in args.batches if size <= args.step_rows]
    best = min(
        (replace(best, batch=b, grouped=g) for b in sizes_tried for g in (True, False)), key=tried
    )
    padded_best = best
    for packing in packings[1:]:
        packed = (replace(padded_best, batch=b, packing=packing, grouped=False) for b in (1, 2, 4))
        attentions = ("sdpa", "eager")
        best = min(
            (best, *(replace(p, attention=a) for p in packed for a in attentions)), key=tried
        )
    tried(replace(best, weights="bfloat16"))
    return best, table
