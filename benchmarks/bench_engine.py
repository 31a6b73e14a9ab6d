"""The engine against transformers' generate, row by row of issue 5's table.

Equal answers are proven first: greedy tokens on small shapes of every kind of text body in float32;
then, at the measured shape and type, transformers' own tokens are fed to the engine, and each must
lie within 0.1 of the engine's top logit. Both sides then answer the same prompts with a fixed
length of answer, interleaved, every side at its best setting found by a sweep that is recorded.
Transformers is timed twice: in this process, which keeps freed memory as our commands do, and in
one of its own as it comes. ``--vllm URL --checkpoint FOLDER`` adds a running vLLM server of that
checkpoint's language half (docs/concepts/vllm.md); all then answer with its weights.

The last line is one JSON document. Run: ``python benchmarks/bench_engine.py --threads 2``;
``--rows decode_1 nano`` chooses rows; ``--tiny`` proves that it works, in a minute.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from engine_peers import (
    Case,
    Elsewhere,
    Ours,
    Peer,
    Timing,
    Transformers,
    Vllm,
    make_case,
    peer_sweep,
)
from engine_proof import prove_small_bodies, prove_within

from cascadevl.engine.packed_weights import can_pack
from cascadevl.host_memory import keep_freed_memory
from cascadevl.model.loading import load
from cascadevl.model.modeling import CascadeVLForConditionalGeneration
from cascadevl.model.presets import nano_config
from cascadevl.model.zoo import config_for


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table.

    Attributes:
        text_tokens: Text of every prompt.
        num_tiles: Tiles of the one picture of every prompt.
        num_prompts: Prompts at once.
        num_samples: Answers of each.
        new_tokens: Length of every answer.
        measure: ``first`` is the time to the first token, ``rate`` tokens a second after it,
            ``whole`` the time of everything.
        aim: The ratio that the issue asks for.
        asked_before: Whether another question about the picture was answered before.
        preset: ``1b`` or ``nano``.
    """

    text_tokens: int
    num_tiles: int
    num_prompts: int = 1
    num_samples: int = 1
    new_tokens: int = 32
    measure: str = "whole"
    aim: float
    asked_before: bool = False
    preset: str = "1b"


ROWS = {
    "first_1": Row(text_tokens=15, num_tiles=1, new_tokens=1, measure="first", aim=1 / 0.8),
    "first_7": Row(text_tokens=15, num_tiles=7, new_tokens=1, measure="first", aim=1 / 0.8),
    "second_7": Row(
        text_tokens=15, num_tiles=7, new_tokens=1, measure="first", aim=1 / 0.3, asked_before=True
    ),
    "decode_1": Row(text_tokens=15, num_tiles=1, measure="rate", aim=1.8),
    # Long enough that a server whose answers begin one after another has them all for a while.
    "decode_4": Row(text_tokens=15, num_tiles=7, num_prompts=4, measure="rate", aim=8.0),
    "decode_16": Row(
        text_tokens=15, num_tiles=1, num_prompts=16, new_tokens=128, measure="rate", aim=1.5
    ),
    "samples_8": Row(text_tokens=15, num_tiles=7, num_samples=8, aim=5.0),
    "nano": Row(
        text_tokens=80,
        num_tiles=1,
        num_prompts=16,
        num_samples=32,
        new_tokens=48,
        aim=5.0,
        preset="nano",
    ),
}


@dataclass(frozen=True, slots=True)
class Machine:
    """What the machine can do at most, measured here.

    Attributes:
        bytes_per_s: Reading memory that is in no cache.
        flops_per_s: A large matrix product in the type of the model.
    """

    bytes_per_s: float
    flops_per_s: float


def measure_machine(dtype: torch.dtype, *, tiny: bool) -> Machine:
    """Reading much more than the caches hold, and a large product.

    Args:
        dtype: Of the model.
        tiny: Measure with small sizes, only to see that it works.
    """
    side = 128 if tiny else 2048
    memory = torch.zeros(2**20 if tiny else 2**27, dtype=torch.int64)
    square = torch.randn(side, side).to(dtype)
    read = min(_time(memory.sum) for _ in range(5))
    product = min(_time(lambda: square @ square) for _ in range(5))
    return Machine(memory.nbytes / read, 2 * side**3 / product)


def _time(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


KEEPING, PLAIN = "transformers", "transformers_plain"
"""Transformers where freed memory is kept, and as it comes."""


def plain_transformers(
    preset: str,
    dtype: torch.dtype,
    checkpoint: Path | None,
    settings: tuple[str, str],
    threads: int,
) -> Transformers:
    """Transformers in the process that calls this.

    Args:
        preset: As `make_model` takes it, and so are the next two.
        dtype: Type of the weights.
        checkpoint: Weights of the larger model.
        settings: Attention and cache.
        threads: Of this process.
    """
    torch.set_num_threads(threads)
    return Transformers(make_model(preset, dtype, checkpoint), *settings)


def make_model(
    preset: str, dtype: torch.dtype, checkpoint: Path | None
) -> CascadeVLForConditionalGeneration:
    """A model of this shape with random weights; or a checkpoint's instead of the larger one."""
    if preset != "nano" and checkpoint is not None:
        return load(checkpoint, dtype=dtype)[0]
    torch.manual_seed(0)
    config = nano_config(2048, image_token_id=7) if preset == "nano" else config_for("InternVL3-1B")
    return CascadeVLForConditionalGeneration(config).to(dtype).eval()


def value_of(row: Row, timing: Timing) -> float:
    """What is compared: larger is better."""
    if row.measure == "first":
        return 1 / timing.first_s
    if row.measure == "whole":
        return 1 / timing.whole_s
    return timing.later / (timing.whole_s - timing.first_s)


def limit_of(
    row: Row, model: CascadeVLForConditionalGeneration, case: Case, machine: Machine
) -> float:
    """The same value if only the machine's limit counted."""
    text = [*model.model.language_model.layers.parameters(), *model.lm_head.parameters()]
    vision = model.model.vision_tower.parameters()
    steps, answers = row.new_tokens - 1, row.num_prompts * row.num_samples
    flops = 2 * sum(p.numel() for p in model.model.language_model.layers.parameters())
    prompt_tokens = case.num_prompt_tokens * row.num_prompts
    if row.asked_before:  # the picture's keys and values are there too
        prompt_tokens = len(case.questions[0]) * row.num_prompts
    patches = (case.image_px // 14) ** 2 + 1
    encode = 2 * sum(p.numel() for p in vision) * patches * row.num_tiles * row.num_prompts
    first = (flops * prompt_tokens + (0 if row.asked_before else encode)) / machine.flops_per_s
    step = max(
        sum(p.nbytes for p in text) / machine.bytes_per_s,
        answers * 2 * sum(p.numel() for p in text) / machine.flops_per_s,
    )
    return value_of(row, Timing(first, first + steps * step, answers * steps))


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def turn(names: Sequence[str], by: int) -> list[str]:
    """The same names from another one on, so that nobody always follows the same neighbour."""
    start = by % len(names)
    return [*names[start:], *names[:start]]


def compare(name: str, row: Row, arguments: argparse.Namespace) -> dict[str, object]:
    """Prove, sweep, then time one row."""
    dtype = torch.float32 if row.preset == "nano" else torch.bfloat16
    preset = "nano" if arguments.tiny else row.preset
    model = make_model(preset, dtype, arguments.checkpoint)
    machine = measure_machine(dtype, tiny=arguments.tiny)
    case = make_case(row, model, seed=0)
    theirs, best, sweep = peer_sweep(model, make_case(row, model, seed=1), Transformers)
    margin = prove_within(model, theirs, case, at_most=0.1)
    plain = Elsewhere(
        partial(plain_transformers, preset, dtype, arguments.checkpoint, best, arguments.threads)
    )
    peers: dict[str, Peer] = {KEEPING: theirs, PLAIN: plain, "ours": Ours(model)}
    if can_pack(model):
        peers["ours_packed"] = Ours(model, "packed")
        if dtype == torch.bfloat16:
            peers["ours_int8"] = Ours(model, "int8")
    if arguments.vllm is not None and preset != "nano":
        peers["vllm"] = Vllm(arguments.vllm, arguments.checkpoint)
    timings: dict[str, list[float]] = {peer: [] for peer in peers}
    short = replace(row, num_tiles=1, num_prompts=1, num_samples=1, new_tokens=2)
    for answers in peers.values():  # warm up
        answers.time(make_case(short, model, seed=2))
    for repetition in range(arguments.repeats):
        for peer in turn(list(peers), repetition):
            fresh = make_case(row, model, seed=3 + repetition)
            timings[peer].append(value_of(row, peers[peer].time(fresh)))
    plain.close()
    unit = {"first": "1/s to the first token", "rate": "tokens/s", "whole": "1/s"}[row.measure]
    limit = limit_of(row, model, case, machine)
    result: dict[str, object] = {
        "row": name,
        "unit": unit,
        "aim": row.aim,
        "margin": margin,
        "sweep": sweep,
        "machine": {"bytes_per_s": machine.bytes_per_s, "flops_per_s": machine.flops_per_s},
        "limit": limit,
    }
    print(f"\n{name} ({unit}), limit of the machine {limit:.3g}, aim {row.aim:.2f}x; ratios to")
    print(f"{KEEPING} and {PLAIN}")
    for peer, values in timings.items():
        middle = statistics.median(values)
        ratios = {
            base: quartiles([v / t for v, t in zip(values, timings[base], strict=True)])
            for base in (KEEPING, PLAIN)
        }
        said = " and ".join(
            f"{median:.2f}x (quartiles {low:.2f}-{high:.2f})"
            for low, median, high in ratios.values()
        )
        print(
            f"  {peer:18} {middle:9.3g}  {said}, {len(values)} repetitions, "
            f"{middle / limit:.0%} of the limit"
        )
        result[peer] = {"values": values, "ratios": ratios}
    return result


def main() -> None:
    """Read the arguments and compare."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--vllm", metavar="URL", help="a running server; needs --checkpoint")
    parser.add_argument("--checkpoint", type=Path, help="weights of the rows that are not nano's")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to see that it works")
    parser.add_argument("--out", type=Path, help="write the JSON document here too")
    arguments = parser.parse_args()
    if arguments.vllm is not None and arguments.checkpoint is None:
        parser.error("--vllm needs --checkpoint, the weights that the server's were exported from")
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    prove_small_bodies()
    document = {
        "threads": arguments.threads,
        "tiny": arguments.tiny,
        "rows": [
            compare(name, shrunk(ROWS[name], tiny=arguments.tiny), arguments)
            for name in arguments.rows
        ],
    }
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(document))


def shrunk(row: Row, *, tiny: bool) -> Row:
    """The row with few answers of few tokens, if it is only to be seen to work."""
    if not tiny:
        return row
    return replace(
        row,
        num_prompts=min(row.num_prompts, 2),
        num_samples=min(row.num_samples, 3),
        new_tokens=min(row.new_tokens, 4),
    )


if __name__ == "__main__":
    main()
