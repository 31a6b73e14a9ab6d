"""Linear layers of a decode step and of a prefill: plain, packed, int8, and how near the memory.

For the shapes of Qwen2.5-0.5B (the language model of InternVL3-1B) and of nano, and for several
numbers of rows, every way of multiplying is run in turn, round after round, on as many copies of
the weight as do not fit into the caches (nano's own number of layers, which do). Equal results are
proven first, against products in float64. Reading speed of the memory is measured in the same run.
Sums over all layers give what a decode step costs. The last line is one JSON document.
Run: ``python benchmarks/bench_linear.py --threads 1 2 --repeats 15``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from cascadevl.engine.int8_linear import Int8Linear, Int8Table
from cascadevl.engine.packed_weights import PackedLinear

Shape: TypeAlias = tuple[str, int, int, int]
"""Name, input features, output features, and how many such layers a step runs through."""

SHAPES: dict[str, list[Shape]] = {
    "1b": [
        ("q, o", 896, 896, 48),
        ("k, v", 896, 128, 48),
        ("gate, up", 896, 4864, 48),
        ("down", 4864, 896, 24),
        ("head", 896, 151936, 1),
    ],
    "nano": [
        ("q, o", 192, 192, 8),
        ("k, v", 192, 64, 8),
        ("gate, up", 192, 512, 8),
        ("down", 512, 192, 4),
        ("head", 192, 1024, 1),
    ],
}
BASE = "bf16"
ERRORS = {"bf16": 5e-3, "packed bf16": 5e-3, "f32": 1e-6, "packed f32": 1e-6, "int8 kernel": 1.5e-2}
ERRORS |= {"int8 widened": 1.5e-2, "int8 both": 3e-2}
"""Largest relative distance from the product in float64, for normal weights and activations."""

ALWAYS_KERNEL, NEVER_KERNEL = Int8Table(kernel_rows=10**9), Int8Table(kernel_rows=0)


@dataclass(frozen=True, slots=True)
class Way:
    """One way of multiplying, on several copies of a weight.

    Attributes:
        calls: A call on each copy.
        num_bytes: Weight bytes that a call reads.
    """

    calls: list[Callable[[], Tensor]]
    num_bytes: int


def dynamic_int8(weight: Tensor, x: Tensor) -> Callable[[], Tensor]:
    """int8 activations too, with one scale for all rows of a call: for comparison only."""
    scale = (weight.double().abs().amax(1) / 127).clamp_min(1e-12)
    zero = torch.zeros(len(weight), dtype=torch.int64)
    quantised = torch.quantize_per_channel(weight.float(), scale, zero, 0, torch.qint8)
    packed = torch.ops.quantized.linear_prepack(quantised, None)
    return lambda: torch.ops.quantized.linear_dynamic(x, packed)


def ways(weights: Sequence[Tensor], x: Tensor, names: Sequence[str]) -> dict[str, Way]:
    """All ways of multiplying these float32 weights with these float32 rows."""
    rows = x.bfloat16()

    def linear(weight: Tensor, given: Tensor) -> Callable[[], Tensor]:
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
        layer.weight.data = weight
        return lambda: layer(given)

    def module(layer: nn.Module, given: Tensor) -> Callable[[], Tensor]:
        return lambda: layer(given)

    make: dict[str, Callable[[Tensor], Callable[[], Tensor]]] = {
        "bf16": lambda w: linear(w.bfloat16(), rows),
        "packed bf16": lambda w: module(PackedLinear(w.bfloat16(), None), rows),
        "f32": lambda w: linear(w, x),
        "packed f32": lambda w: module(PackedLinear(w, None), x),
        "int8 kernel": lambda w: module(Int8Linear(w, None, table=ALWAYS_KERNEL), rows),
        "int8 widened": lambda w: module(Int8Linear(w, None, table=NEVER_KERNEL), rows),
        "int8 both": lambda w: dynamic_int8(w, x),
    }
    size = {"bf16": 2, "packed bf16": 2, "f32": 4, "packed f32": 4}
    return {
        name: Way([make[name](w) for w in weights], size.get(name, 1) * weights[0].numel())
        for name in names
    }


def prove(found: dict[str, Way], weight: Tensor, x: Tensor) -> dict[str, Any]:
    """Distances from the product in float64, and whether packing changed a bit.

    The bfloat16 ways are compared with the product of the numbers rounded to bfloat16, the others
    with that of the float32 numbers.
    """
    exact = x.double() @ weight.double().T
    rounded = x.bfloat16().double() @ weight.bfloat16().double().T
    errors = {}
    for name, way in found.items():
        wanted = rounded if "bf16" in name else exact
        error = float((way.calls[0]().double() - wanted).norm() / wanted.norm())
        assert error < ERRORS[name], f"{name}: {error} from the product in float64"
        errors[name] = error
    equal = torch.equal(found["packed bf16"].calls[0](), found["bf16"].calls[0]())
    return {"errors": errors, "packed_bf16_bit_equal": equal}


def read_speed(num_mib: int, repeats: int) -> float:
    """Bytes a second of the fastest of three ways of reading a large tensor once."""
    floats = torch.ones(num_mib * 2**18)
    readers: list[Callable[[], Tensor]] = [
        floats.sum,
        floats.view(torch.int64).sum,
        lambda: torch.dot(floats, floats),
    ]
    best = float("inf")
    for _ in range(repeats):
        for reader in readers:
            start = time.perf_counter()
            reader()
            best = min(best, time.perf_counter() - start)
    return floats.nbytes / best


def timed(found: dict[str, Way], repeats: int, calls: int) -> dict[str, list[float]]:
    """Seconds a call, for every way and round; all ways take turns within a round."""
    times: dict[str, list[float]] = {name: [] for name in found}
    for number in range(repeats + 1):  # the first round warms up
        for name, way in found.items():
            todo = [way.calls[index % len(way.calls)] for index in range(calls)]
            start = time.perf_counter()
            for call in todo:
                call()
            if number:
                times[name].append((time.perf_counter() - start) / calls)
    return times


def num_copies(shape: Shape, family: str, cold_mib: int) -> int:
    """So many that not even those in int8 fit the caches; of nano as many as it has."""
    _, in_features, out_features, count = shape
    return count if family == "nano" else -(-cold_mib * 2**20 // (in_features * out_features))


def measure(args: argparse.Namespace, threads: int) -> list[dict[str, Any]]:
    """Every shape and number of rows with so many threads."""
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    results = []
    for family in args.shapes:
        for shape in SHAPES[family]:
            name, in_features, out_features, count = shape
            copies = num_copies(shape, family, args.cold_mib)
            weights = [
                torch.randn(out_features, in_features, generator=generator) * 0.05
                for _ in range(copies)
            ]
            for rows in args.rows:
                if name == "head" and rows > args.head_rows:
                    continue
                x = torch.randn(rows, in_features, generator=generator)
                found = ways(weights, x, [each for each in ERRORS if each not in args.without])
                proof = prove(found, weights[0], x)
                times = timed(found, args.repeats, copies if rows <= args.few_rows else 1)
                speed = read_speed(args.read_mib, 2)
                results.append(
                    {"family": family, "layer": name, "in": in_features, "out": out_features}
                    | {"count": count, "rows": rows, "threads": threads, "read_speed": speed}
                    | proof
                    | {"ways": summary(found, times, speed)}
                )
                show(results[-1])
    return results


def summary(
    found: dict[str, Way], times: dict[str, list[float]], speed: float
) -> dict[str, dict[str, Any]]:
    """Medians, paired ratios to ``F.linear`` in bfloat16, and bytes a second of weights."""
    result = {}
    for name, way in found.items():
        seconds = statistics.median(times[name])
        ratios = [base / mine for base, mine in zip(times[BASE], times[name], strict=True)]
        result[name] = {
            "us": 1e6 * seconds,
            "speedup": statistics.quantiles(ratios, n=4),
            "bytes_per_s": way.num_bytes / seconds,
            "of_read_speed": way.num_bytes / seconds / speed,
        }
    return result


def show(result: dict[str, Any]) -> None:
    """One line a way."""
    print(
        f"\n{result['family']} {result['layer']}: {result['in']} to {result['out']}, "
        f"{result['rows']} rows, {result['threads']} threads, memory "
        f"{result['read_speed'] / 1e9:.1f} GB/s, packed bf16 bit-equal: "
        f"{result['packed_bf16_bit_equal']}"
    )
    for name, each in result["ways"].items():
        low, middle, high = each["speedup"]
        print(
            f"  {name:<12} {each['us']:>10.1f} us  {middle:5.2f}x ({low:.2f}-{high:.2f})  "
            f"{each['bytes_per_s'] / 1e9:6.1f} GB/s ({100 * each['of_read_speed']:.0f} %)  "
            f"error {result['errors'][name]:.1e}",
            flush=True,
        )


def steps(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """All linear layers of a step, added up, for every family, number of rows and of threads."""
    sums = []
    keys = dict.fromkeys((r["family"], r["threads"], r["rows"]) for r in results)
    for family, threads, rows in keys:
        same = [
            r for r in results if (r["family"], r["threads"], r["rows"]) == (family, threads, rows)
        ]
        if len(same) < len(SHAPES[family]):
            continue
        total = {
            name: sum(r["count"] * r["ways"][name]["us"] for r in same) / 1e3
            for name in same[0]["ways"]
        }
        head = next(r for r in same if r["layer"] == "head")
        sums.append(
            {"family": family, "threads": threads, "rows": rows, "ms": total}
            | {"head_ms": {name: each["us"] / 1e3 for name, each in head["ways"].items()}}
        )
    return sums


def crossings(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The most rows at which the int8 kernel was still faster than widening, for every layer."""
    found = []
    for key in dict.fromkeys((r["family"], r["layer"], r["threads"]) for r in results):
        same = [r for r in results if (r["family"], r["layer"], r["threads"]) == key]
        wins = [
            r["rows"]
            for r in same
            if r["ways"]["int8 kernel"]["us"] < r["ways"]["int8 widened"]["us"]
        ]
        found.append(dict(zip(("family", "layer", "threads"), key, strict=True)))
        found[-1]["kernel_rows"] = max(wins, default=0)
    return found


def main() -> None:
    """Prove, time, add up, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 8, 16, 32, 64, 256, 1024])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--head-rows", type=int, default=16, help="most rows of the head")
    parser.add_argument("--few-rows", type=int, default=64, help="above, one call a round")
    parser.add_argument("--cold-mib", type=int, default=64, help="int8 weights to rotate through")
    parser.add_argument("--read-mib", type=int, default=512)
    parser.add_argument("--without", nargs="*", default=[], choices=[*ERRORS], help="ways left out")
    parser.add_argument("--out", type=Path, help="also write the JSON document here")
    args = parser.parse_args()
    results = []
    with torch.inference_mode():
        for threads in args.threads:
            results += measure(args, threads)
    sums, rows = steps(results), crossings(results)
    print("\n| shapes | threads | rows | ms of a step's linear layers (of it the head) |")
    for each in sums:
        parts = ", ".join(
            f"{name} {ms:.2f} ({each['head_ms'][name]:.2f})" for name, ms in each["ms"].items()
        )
        print(f"| {each['family']} | {each['threads']} | {each['rows']} | {parts} |")
    for each in rows:
        print(
            f"{each['family']} {each['layer']}, {each['threads']} threads: the int8 kernel wins "
            f"up to {each['kernel_rows']} rows"
        )
    document = json.dumps({"layers": results, "steps": sums, "kernel_rows": rows})
    if args.out:
        args.out.write_text(document, "utf-8")
    print(document)


if __name__ == "__main__":
    main()
