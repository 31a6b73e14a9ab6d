"""Serving pictures: coupled, decoupled (DvD), both with a router, and a plain transformers server.

Real server processes over HTTP on loopback, pinned to cores, with a model of InternVL3.5-38B's
proportions (serving_model.py) at 448, 896 and 1344 px and answers of 32 and 256 tokens. Requests
come at random times and wait for nobody; each has a picture of its own.

Two loads: ``sent`` is 1.3 times what the coupled server answers at 448 px, the same at all
resolutions, as the report's 16 a second are for its 38B; ``calm`` is 0.7 times what the coupled
server answers at that resolution, and is what latencies are read from.

Two sorts of rows. ``same hardware``: two cores each; coupled is one process with two threads,
batching and feature cache on, at the best settings of a sweep (896 px) that is recorded. ``vision
core added`` is what table 18 compares: coupled on one core, DvD with a second one for its vision
server. All of them are set beside the plain transformers server, too.

Equal answers are proven first, on a small model in float32: all servers say the same. Beside each
ratio stand table 18's, the bound from counted operations, and what the planner
(docs/concepts/planner.md) says with three figures that it finds on the coupled rows at 448 px.

The last line is one JSON document. Run: ``python benchmarks/bench_serving.py``; ``--tiny`` proves
that it works, in minutes; ``--soak MINUTES`` is the load test (200 clients) instead. A quick look:
``--outputs 32 --loads sent --repeats 1``; everything takes an hour or more on two cores.
``--sides`` leaves out what is not named; ``--again FILES`` measures nothing, but compares what
``--out`` wrote in several runs. The tables are those of RESULTS.md.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from serving_arms import Arm, running
from serving_client import Summary, Wish, open_loop, summary
from serving_compare import compare, errors
from serving_model import Checkpoints, write_checkpoints
from serving_planned import Planned, measured_here, question_of
from serving_soak import soak, told
from serving_tables import tables

from cascadevl.model.loading import find
from cascadevl.planning.hardware import Hardware

RESOLUTIONS = (448, 896, 1344)
BUDGETS: dict[str, float | str] = {"half": 1 / 3, "compressed": "compressed"}
"""Share of tiles kept: a third leaves half of the visual tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """A server and what it is asked for.

    Attributes:
        arm: The server.
        budget: Of the router: a key of `BUDGETS`; None without one.
    """

    arm: Arm
    budget: str | None = None


def sides_of(coupled: Arm, cores: tuple[int, int], *, router: bool) -> dict[str, Side]:
    """All that is compared, by name.

    Args:
        coupled: The coupled server at its best settings.
        cores: Of the machine.
        router: Whether the router's rows are wanted.
    """
    apart = Arm(kind="decoupled", cores=cores, weights=coupled.weights)
    sides = {
        "transformers": Side(arm=Arm(kind="transformers", cores=cores, threads=2)),
        "coupled": Side(arm=coupled),
        "coupled, one core": Side(arm=replace(coupled, cores=cores[1:], threads=1)),
        "DvD": Side(arm=apart),
    }
    if router:
        for arm, name in ((apart, "DvD"), (coupled, "coupled")):
            for budget in BUDGETS:
                sides[f"{name} + router, {budget}"] = Side(arm=arm, budget=budget)
    return sides


def bodies_of(
    side: Side, px: int, new_tokens: int, seeds: Sequence[int], tiles: int
) -> list[bytes]:
    """Requests with a picture each.

    Args:
        side: Who is asked.
        px: Side of the pictures.
        new_tokens: Of the answers.
        seeds: One for each request.
        tiles: Of a picture. Where there is only one, two of three pictures are compressed for
            ``half``, so that half of the visual tokens are left on average.
    """
    bodies = []
    for seed in seeds:
        budget = None if side.budget is None else BUDGETS[side.budget]
        if side.budget == "half" and tiles == 1:
            budget = "compressed" if seed % 3 else "full"
        wish = Wish(resolution_px=px, new_tokens=new_tokens, seed=seed, visual_budget=budget)
        bodies.append(wish.body())
    return bodies


class Bench:
    """Runs servers one after the other, and asks each the same.

    Attributes:
        made: The checkpoints.
        scale: Side of a tile over that of the real model: 1, or less if tiny.
        number: Requests of a run.
        seed: The next one; no picture is ever sent twice.
    """

    def __init__(self, made: Checkpoints, *, number: int) -> None:
        """Bind checkpoints."""
        self.made, self.number, self.seed = made, number, 0
        self.scale = made.config.tile_px / 448

    def px(self, resolution: int) -> int:
        """The side of the pictures that stand for a resolution."""
        return round(resolution * self.scale)

    def ask(
        self, address: str, side: Side, resolution: int, new_tokens: int, rate: float
    ) -> Summary:
        """Send a run of requests.

        Args:
            address: Of the server.
            side: What it is.
            resolution: Of the pictures.
            new_tokens: Of the answers.
            rate: Requests a second; 0 for all at once.
        """
        seeds = range(self.seed, self.seed + self.number)
        self.seed += self.number
        px = self.px(resolution)
        tiles = question_of(self.made.config, px, new_tokens).tiles
        bodies = bodies_of(side, px, new_tokens, seeds, tiles)
        answers = asyncio.run(open_loop(address, bodies, rate, seed=resolution + new_tokens))
        return summary(answers, new_tokens)

    def checkpoint(self, side: Side) -> Path:
        """What a server serves."""
        return self.made.plain if side.budget is None else self.made.flash

    def warm(self, address: str, side: Side, resolution: int) -> None:
        """Send a few requests that are not counted."""
        Bench(self.made, number=2).ask(address, side, resolution, 2, 0.0)

    def capacity(self, side: Side, resolution: int, new_tokens: int) -> float:
        """Requests a second when all come at once."""
        with running(side.arm, self.checkpoint(side)) as served:
            self.warm(served.address, side, resolution)
            return self.ask(served.address, side, resolution, new_tokens, 0.0).requests_per_s


def prove(cores: tuple[int, int], *, router: bool) -> None:
    """All servers give the same greedy answers."""
    with TemporaryDirectory(prefix="prove-") as folder:
        bench = Bench(write_checkpoints(Path(folder), tiny=True), number=3)
        said: dict[str, list[str]] = {}
        for name, side in sides_of(Arm(kind="coupled", cores=cores), cores, router=router).items():
            full = replace(side, budget=None)
            bodies = bodies_of(full, bench.px(896), 12, range(3), 5)
            with running(side.arm, bench.checkpoint(side)) as served:
                answers = asyncio.run(open_loop(served.address, bodies, 0.0, seed=0))
            summary(answers, 12)
            said[name] = [answer.text for answer in answers]
        assert all(texts == said["coupled"] for texts in said.values()), said
        assert len(set(said["coupled"])) == 3, "the answers do not depend on the pictures"
    print("all servers give the same answers")


def sweep(bench: Bench, cores: tuple[int, int], new_tokens: int) -> tuple[Arm, dict[str, float]]:
    """The coupled server at its best settings, and the requests a second of each.

    Args:
        bench: Asks.
        cores: Of the machine.
        new_tokens: Of the answers.
    """
    found: dict[str, float] = {}
    best: tuple[float, Arm] | None = None
    for threads in (1, 2):
        for weights in ("stored", "packed"):
            arm = Arm(kind="coupled", cores=cores, threads=threads, weights=weights)
            rate = bench.capacity(Side(arm=arm), 896, new_tokens)
            setting = f"{threads} threads a half, weights {weights}"
            found[f"{new_tokens} tokens, {setting}"] = rate
            print(f"coupled, {new_tokens} tokens, {setting}: {rate:.3f} requests/s", flush=True)
            if best is None or rate > best[0]:
                best = rate, arm
    assert best is not None
    return best[1], found


def measure(
    bench: Bench, all_sides: dict[int, dict[str, Side]], arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """All rows, round by round; within one, the coupled server's first.

    Args:
        bench: Asks.
        all_sides: What is compared, by number of tokens.
        arguments: Of the program.
    """
    rows: list[dict[str, Any]] = []
    for new_tokens, sides in all_sides.items():
        order = ["coupled", *(name for name in sides if name != "coupled")]
        sent = 1.3 * bench.capacity(sides["coupled"], 448, new_tokens)
        for number in range(arguments.repeats):
            for resolution in arguments.resolutions:
                loads = {"sent": sent}
                for name in order:
                    about = {"side": name, "px": resolution, "output": new_tokens, "round": number}
                    for row in measured(bench, sides[name], about, loads):
                        rows.append(row)
                        show(row)
                    if name == "coupled" and "calm" in arguments.loads:
                        loads["calm"] = 0.7 * rows[-1]["requests_per_s"]
                        rows += measured(bench, sides[name], about, {"calm": loads["calm"]})
                        show(rows[-1])
    return rows


def measured(
    bench: Bench, side: Side, about: dict[str, Any], loads: dict[str, float]
) -> list[dict[str, Any]]:
    """One server under one load after the other.

    Args:
        bench: Asks.
        side: Which server.
        about: What the rows are about.
        loads: Requests a second of each.
    """
    resolution, new_tokens = about["px"], about["output"]
    rows = []
    with running(side.arm, bench.checkpoint(side)) as served:
        bench.warm(served.address, side, resolution)
        for load, rate in loads.items():
            found = bench.ask(served.address, side, resolution, new_tokens, rate)
            about["threads"] = side.arm.threads
            rows.append({**about, "load": load, "rate": rate, **asdict(found)})
    return rows


def show(row: dict[str, Any]) -> None:
    """Print a row."""
    first = " / ".join(f"{each:.2f}" for each in row["first_s"])
    later = " / ".join(f"{1000 * each:.0f}" for each in row["next_s"])
    print(
        f"{row['px']:5} px, {row['output']:3} tokens, {row['load']} {row['rate']:.3f}/s, "
        f"{row['side']:24} {row['requests_per_s']:7.3f} requests/s; first token {first} s; next "
        f"{later} ms; {row['compressed_share']:.0%} of the tiles compressed",
        flush=True,
    )


def bench_all(arguments: argparse.Namespace) -> dict[str, Any]:
    """Prove, sweep, measure, compare."""
    cores = (arguments.cores[0], arguments.cores[1])
    prove(cores, router=arguments.router)
    with TemporaryDirectory(prefix="bench-serving-") as folder:
        made = write_checkpoints(Path(folder), tiny=arguments.tiny)
        bench = Bench(made, number=arguments.requests)
        core = measured_here(cores[1], tiny=arguments.tiny)
        sides, settings = {}, {}
        for new_tokens in arguments.outputs:
            best, found = sweep(bench, cores, new_tokens)
            known = sides_of(best, cores, router=arguments.router)
            wanted = {"coupled", "coupled, one core", *(arguments.sides or known)}
            sides[new_tokens] = {name: known[name] for name in known if name in wanted}
            settings |= found
        rows = measure(bench, sides, arguments)
    return compared(
        {"tiny": arguments.tiny, "core": asdict(core), "sweep": settings, "rows": rows}, bench
    )


def compared(measured: dict[str, Any], bench: Bench) -> dict[str, Any]:
    """What was measured, with its ratios and what the planner says to it."""
    core, rows = Hardware(**measured["core"]), measured["rows"]
    planned = Planned.fitted(bench.made.config, core, rows, bench)
    print(
        f"the planner finds {planned.share:.0%} of a core's operations, {planned.memory:.0%} of "
        f"its bytes, and two threads {planned.gain:.2f} times as fast as one"
    )
    document = measured | {
        "fit": {name: getattr(planned, name) for name in ("share", "memory", "gain")},
        "errors": errors(rows, planned),
        "ratios": compare(rows, planned),
    }
    print(tables(document))
    return document


def compare_again(arguments: argparse.Namespace) -> dict[str, Any]:
    """The rows of several documents together."""
    documents = [json.loads(path.read_text(encoding="utf-8")) for path in arguments.again]
    together = documents[0] | {"rows": [row for each in documents for row in each["rows"]]}
    with TemporaryDirectory(prefix="bench-serving-") as folder:
        made = write_checkpoints(Path(folder), tiny=together["tiny"])
    return compared(together, Bench(made, number=arguments.requests))


def soak_all(arguments: argparse.Namespace) -> dict[str, Any]:
    """The load test, on the shipped model, in one process and in several."""
    cores = (arguments.cores[0], arguments.cores[1])
    result: dict[str, Any] = {}
    for kind in ("coupled", "decoupled"):
        arm = Arm(
            kind="coupled" if kind == "coupled" else "decoupled",
            cores=cores,
            cache_bytes=arguments.cache_mib * 2**20,
        )
        with running(arm, find("micro"), batch_invariant=True) as served:
            found = soak(served, clients=arguments.clients, seconds=60 * arguments.soak)
        print(f"{kind}: {told(found)}", flush=True)
        found.check()
        result[kind] = {**asdict(found), "growth": found.growth}
    return result


def main() -> None:
    """Read the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--requests", type=int, default=16, help="of each run")
    parser.add_argument("--repeats", type=int, default=3, help="rounds, for the quartiles")
    parser.add_argument("--loads", nargs="+", default=("sent", "calm"), choices=("sent", "calm"))
    parser.add_argument("--resolutions", type=int, nargs="+", default=RESOLUTIONS)
    parser.add_argument("--outputs", type=int, nargs="+", default=(32, 256))
    parser.add_argument("--cores", type=int, nargs=2, default=(0, 1))
    parser.add_argument("--again", type=Path, nargs="+", help="documents to compare, instead")
    parser.add_argument(
        "--sides", nargs="+", help="servers to compare; coupled ones are always there"
    )
    parser.add_argument("--no-router", dest="router", action="store_false")
    parser.add_argument("--soak", type=float, metavar="MINUTES", help="the load test instead")
    parser.add_argument("--clients", type=int, default=200, help="of the load test")
    parser.add_argument(
        "--cache-mib",
        type=int,
        default=128,
        help="keys and values in the load test: few, so that they are full soon",
    )
    parser.add_argument("--tiny", action="store_true", help="a small model, to see that it works")
    parser.add_argument("--out", type=Path, help="write the JSON document here too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.again:
        document = compare_again(arguments)
    else:
        document = bench_all(arguments) if arguments.soak is None else soak_all(arguments)
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
