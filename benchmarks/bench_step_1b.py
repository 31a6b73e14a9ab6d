"""A training step of the 1B shape: its share of the machine's own bfloat16 matrix products.

InternVL3-1B's shape (InternViT-300M, Qwen2.5-0.5B, one table of 151,936 words) with random
weights. Floating point operations are counted by formula (`cascadevl.model.cost`), for what is
useful: padding, logits nobody needs and repeated work do not count. The machine's rate is measured
in the same process, before and after the steps, on the very products of the model: forward, and
both gradients, of every linear layer, into memory that is there already.

Ours trains bfloat16 weights with float32 masters; transformers' own step bfloat16 weights alone,
with sdpa attention, which saves it half the state. Both keep the memory that they free, as our
commands do (`cascadevl.host_memory`); ``transformers as it comes`` gives it back, which is what the
allocator does by itself. Two such models do not fit 23 GiB, so every
round runs each side in a process of its own, one after the other; two steps are not timed.
Equal losses are asserted first, in float32 on two layers of each half. The last line is one JSON
document. Run: ``python benchmarks/bench_step_1b.py --repeats 5 --threads 2``.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from bench_train_step import PeerBatch, peer_batch, peer_loss, peer_model, quartiles
from experiment import Given, random_example
from torch import Tensor
from transformers import InternVLForConditionalGeneration

from cascadevl.data.collate import collate
from cascadevl.host_memory import keep_freed_memory
from cascadevl.model.configuration import CascadeVLConfig
from cascadevl.model.cost import Work, causal_pairs, step_flops
from cascadevl.model.head import CHUNK_BYTES
from cascadevl.model.modeling import CascadeVLForConditionalGeneration
from cascadevl.model.zoo import config_for
from cascadevl.train.config import ModelConfig
from cascadevl.train.loop import TrainState, update
from cascadevl.train.objective import NEXT_TOKEN
from cascadevl.train.optim import OptimConfig, Optimiser
from cascadevl.train.start import make_trainable
from cascadevl.types import Batch, Example

VOCAB = 151936
WARM_UP = 2
"""Steps before the timed ones: a kept heap still grows in the second."""

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
SIDES = ("ours", "transformers", "transformers as it comes")
CASES: dict[str, list[tuple[int, int, int]]] = {
    "one tile": [(258, 1, 128)],
    "seven tiles": [(256, 7, 128)],
    "packed": [(150, 3, 60), (700, 0, 350), (200, 1, 100), (180, 0, 90), (300, 2, 150)],
}
"""Samples as (text tokens, tiles, targets). Ours packs them; transformers pads them."""


def shape(layers: int | None, vocab_size: int = VOCAB) -> CascadeVLConfig:
    """The 1B shape, or one with fewer layers in both halves."""
    values = config_for("InternVL3-1B").to_dict()
    text, vision = values["text_config"], values["vision_config"]
    text["vocab_size"] = vocab_size
    text["tie_word_embeddings"] = values["tie_word_embeddings"] = True
    if layers is not None:
        text["num_hidden_layers"] = vision["num_hidden_layers"] = layers
        text["layer_types"] = text["layer_types"][:layers]
    return CascadeVLConfig(**values)


def samples(case: str, config: CascadeVLConfig, *, divide: int = 1) -> list[Example]:
    """The samples of a case; ``divide`` shortens their texts."""
    rng = np.random.default_rng(0)
    return [
        random_example(
            f"{case}:{number}",
            max(8, text // divide),
            tiles,
            max(4, targets // divide),
            image_token_id=config.image_token_id,
            tile_px=config.tile_px,
            rng=rng,
        )
        for number, (text, tiles, targets) in enumerate(CASES[case])
    ]


def packed(examples: list[Example], config: CascadeVLConfig) -> Batch:
    """All samples in one row."""
    return collate(
        [examples],
        image_token_id=config.image_token_id,
        pad_token_id=0,
        tokens_per_tile=config.tokens_per_tile,
        averaging="token",
    )


def padded(examples: list[Example], config: CascadeVLConfig) -> PeerBatch:
    """A row each."""
    return peer_batch(
        examples,
        image_token_id=config.image_token_id,
        tokens_per_tile=config.tokens_per_tile,
        pad_token_id=0,
    )


def work_of(batch: Batch) -> Work:
    """What a step of a packed row has to do."""
    lengths = torch.bincount(batch.segments[batch.segments >= 0]).tolist()
    return Work(
        tokens=batch.num_tokens,
        tiles=batch.num_tiles,
        targets=len(batch.target_ids),
        pairs=causal_pairs(lengths),
    )


def prove_equal(case: str) -> float:
    """The float32 loss of two layers of each half, after asserting that both sides have it."""
    config = shape(2, vocab_size=config_for("InternVL3-1B").image_token_id + 1)
    torch.manual_seed(0)
    model = CascadeVLForConditionalGeneration(config).eval()
    examples = samples(case, config, divide=8)
    batch = packed(examples, config)
    with torch.no_grad():
        ours = NEXT_TOKEN.loss(model, batch, NEXT_TOKEN.weigh(batch)).loss
        peer = peer_model(model, "sdpa").eval()
        torch.testing.assert_close(
            ours, peer_loss(peer, padded(examples, config)), rtol=1e-5, atol=1e-5
        )
    return float(ours)


def products(config: CascadeVLConfig, work: Work) -> Iterator[tuple[int, int, int, int]]:
    """(rows, inputs, outputs, count) of every linear layer's product in a step."""
    vision, text = config.vision_config, config.text_config
    if work.tiles:
        rows = work.tiles * ((config.tile_px // vision.patch_size[0]) ** 2 + 1)
        width, inner, depth = vision.hidden_size, vision.intermediate_size, vision.num_hidden_layers
        yield rows, width, width, 4 * depth
        yield rows, width, inner, depth
        yield rows, inner, width, depth
    width, inner, depth = text.hidden_size, text.intermediate_size, text.num_hidden_layers
    key = text.num_key_value_heads * width // text.num_attention_heads
    yield work.tokens, width, width, 2 * depth
    yield work.tokens, width, key, 2 * depth
    yield work.tokens, width, inner, 2 * depth
    yield work.tokens, inner, width, depth
    most = CHUNK_BYTES // (4 * text.vocab_size)
    yield min(work.targets, most), width, text.vocab_size, max(1, work.targets // most)


def gemm_rate(
    config: CascadeVLConfig, work: Work, repeats: int, clock: Callable[[], float]
) -> float:
    """FLOP/s of the model's products alone, each at the quickest of its repeats."""
    flops, seconds = 0.0, 0.0
    for rows, inputs, outputs, count in products(config, work):
        x, w, g = (
            torch.randn(*size).bfloat16()
            for size in ((rows, inputs), (outputs, inputs), (rows, outputs))
        )
        targets = [torch.empty(rows, outputs), torch.empty(rows, inputs), torch.empty_like(w)]
        forms = ((x, w.mT), (g, w), (g.mT, x))
        for (a, b), out in zip(forms, targets, strict=True):
            out = out.bfloat16()
            torch.mm(a, b, out=out)
            times = []
            for _ in range(repeats):
                start = clock()
                torch.mm(a, b, out=out)
                times.append(clock() - start)
            seconds += count * min(times)
            flops += 2.0 * count * rows * inputs * outputs
    return flops / seconds


def our_step(config: CascadeVLConfig, batch: Batch, *, compile: bool) -> Callable[[], float]:
    """One optimiser step of ours."""
    with torch.device("cpu"):
        torch.set_default_dtype(torch.bfloat16)
        model = CascadeVLForConditionalGeneration(config)
        torch.set_default_dtype(torch.float32)
    accelerator = Accelerator(cpu=True)
    make_trainable(model, ModelConfig(precision="bfloat16"), accelerator)
    if compile:
        model.model.vision_tower.compile()
        model.model.language_model.compile()
    state: TrainState[Batch] = TrainState(
        model=model,
        optimiser=Optimiser(model.named_parameters(), OptimConfig(lr=1e-5)),
        stream=Given(batch),
        accelerator=accelerator,
    )

    def step() -> float:
        update(state, [batch], NEXT_TOKEN)
        state.optimiser.step(1.0)
        state.optimiser.zero_grad()
        return state.metrics["loss"]

    return step


def their_step(config: CascadeVLConfig, batch: PeerBatch) -> Callable[[], float]:
    """One optimiser step of plain transformers, all in bfloat16."""
    plain = type(config).__mro__[1].from_dict(config.to_dict())
    model = InternVLForConditionalGeneration._from_config(
        plain, attn_implementation="sdpa", dtype=torch.bfloat16
    ).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.05, fused=True)

    def step() -> float:
        loss: Tensor = peer_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        return float(loss.detach())

    return step


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """One side's steps, between two measurements of the machine's rate."""
    torch.manual_seed(0)
    clock = CLOCKS[args.clock]
    config = shape(args.layers)
    examples = samples(args.case, config)
    batch = packed(examples, config)
    work = work_of(batch)
    before = gemm_rate(config, work, args.gemm_repeats, clock)
    if args.side == "ours":
        step = our_step(config, batch, compile=args.compile)
    else:
        step = their_step(config, padded(examples, config))
    losses, seconds = [step() for _ in range(WARM_UP)], []
    for _ in range(args.steps):
        start = clock()
        losses.append(step())
        seconds.append(clock() - start)
    if args.profile:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            step()
        table = profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=40)
        print(table, file=sys.stderr)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    rate = statistics.mean((before, gemm_rate(config, work, args.gemm_repeats, clock)))
    flops = step_flops(config, work).total
    return {
        "seconds": seconds,
        "gemm_tflops": rate / 1e12,
        "share": [flops / each / rate for each in seconds],
        "flops": flops,
        "peak_gib": peak,
        "losses": losses,
    }


def child(args: argparse.Namespace, case: str, side: str) -> dict[str, Any]:
    """`measure` in a process of its own."""
    passed = ["threads", "steps", "gemm_repeats", "clock"] + (["layers"] if args.layers else [])
    options = [f"--{name.replace('_', '-')}={getattr(args, name)}" for name in passed]
    options += [f"--case={case}", f"--side={side}"]
    options += [f"--{name}" for name in ("compile", "profile") if getattr(args, name)]
    done = subprocess.run(
        [sys.executable, __file__, *options], stdout=subprocess.PIPE, text=True, check=True
    )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def compare(case: str, args: argparse.Namespace) -> dict[str, Any]:
    """Rounds of both sides in turn."""
    loss = prove_equal(case)
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in args.sides}
    for number in range(args.repeats):
        for side in args.sides:
            found[side].append(child(args, case, side))
            last = found[side][-1]
            print(f"{case}, round {number + 1}, {side}: {last}", file=sys.stderr, flush=True)
    result: dict[str, Any] = {"case": case, "loss_float32": loss, "rounds": found}
    for side, rounds in found.items():
        shares = [100 * share for each in rounds for share in each["share"]]
        seconds = [second for each in rounds for second in each["seconds"]]
        low, median, high = quartiles(shares)
        result[side] = {
            "share_percent": [low, median, high],
            "median_s": statistics.median(seconds),
            "gemm_tflops": statistics.median(each["gemm_tflops"] for each in rounds),
            "peak_gib": max(each["peak_gib"] for each in rounds),
        }
        print(
            f"{case}, {side}: {median:.1f} % of the bfloat16 product rate (quartiles "
            f"{low:.1f}-{high:.1f}, {len(shares)} steps), {result[side]['median_s']:.2f} s a step, "
            f"{result[side]['gemm_tflops']:.3f} TFLOP/s, {result[side]['peak_gib']:.1f} GiB"
        )
    return result


def main() -> None:
    """Measure one side as a child, or compare both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--cases", nargs="+", choices=CASES, default=list(CASES))
    add("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    add("--repeats", type=int, default=5, help="processes of each side")
    add("--steps", type=int, default=2, help="timed steps of each process, after two not timed")
    add("--gemm-repeats", type=int, default=5, help="runs of each product; the best counts")
    add("--layers", type=int, default=None, help="fewer layers in both halves")
    add("--threads", type=int, default=2)
    add("--clock", choices=CLOCKS, default="wall", help="cpu: for a busy machine and one thread")
    add("--compile", action="store_true", help="ours with compiled bodies")
    add("--profile", action="store_true", help="also a table of where a step's time goes")
    add("--case", choices=CASES, help="measure one side in this process")
    add("--side", choices=SIDES, help="which")
    add("--out", type=Path, default=None, help="also write the JSON here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.side:
        if args.side in ("ours", "transformers"):
            keep_freed_memory()
        print(json.dumps(measure(args)))
        return
    document = {
        "benchmark": "step_1b",
        "threads": args.threads,
        "torch": torch.__version__,
        "results": [compare(case, args) for case in args.cases],
    }
    if args.out is not None:
        args.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
