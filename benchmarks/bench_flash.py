"""What the router saves: time to first token, prefill and requests a second with and without it.

Two shapes with random weights: that of 1B, where most of the work is the vision tower's, and that
of 38B made smaller so that vision tower and language model stand in the same ratio of operations.
Sides are the plain model, the same weights as a Flash model that keeps all tiles, half of them, a
third (half of the visual tokens) and none. First it is proven that all tiles kept, by the budget or
by a threshold that the router must be asked for, give the plain model's tokens and
log-probabilities. All sides take turns; beside each ratio to the plain model stands what counted
operations say (`cascadevl.model.cost`). Then the router itself is timed against the vision towers
of 300M and 6B, of which some layers are computed and counted up to all.

The last line is one JSON document. Run: ``python benchmarks/bench_flash.py --threads 2``;
``--tiny`` proves that it works, in a minute.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_engine import quartiles
from flash_shapes import models_of, shapes, towers
from torch import Tensor

from cascadevl.data.tiling import normalise
from cascadevl.engine.engine import Engine
from cascadevl.engine.requests import (
    Completion,
    EngineConfig,
    ImageFeatures,
    ImageTiles,
    Request,
    TextIds,
)
from cascadevl.engine.sampling import SamplingParams
from cascadevl.host_memory import keep_freed_memory
from cascadevl.model.configuration import CascadeVLConfig
from cascadevl.model.cost import Work, causal_pairs, forward_flops, router_flops
from cascadevl.model.modeling import CascadeVLForConditionalGeneration
from cascadevl.model.routing import NEVER, KeepShare, Thresholds, VisualBudget, most_tokens
from cascadevl.types import VisualFeatures

BUDGETS: dict[str, VisualBudget] = {
    "all kept": "full",
    "half kept": KeepShare(0.5),
    "third kept": KeepShare(1 / 3),
    "none kept": "compressed",
}
PLAIN = "plain"
MEASURES = ("first", "prefill", "rate")
MOST = {"tokens": 0.0, "logprobs": 1e-3}
TIMED_LAYERS = 3
"""Layers of a vision tower that are timed beside the router."""


@dataclass(frozen=True, slots=True)
class Case:
    """Prompts: some text, a picture, a question.

    Attributes:
        texts: Text before and behind each picture.
        pictures: Their tiles.
    """

    texts: list[tuple[tuple[int, ...], tuple[int, ...]]]
    pictures: list[np.ndarray]

    def requests(
        self, budget: VisualBudget | None, features: Sequence[VisualFeatures], how: SamplingParams
    ) -> list[Request]:
        """What an engine is asked.

        Args:
            budget: Of every request; None for a plain model.
            features: Instead of the pictures, if there are any.
            how: Of the answers.
        """
        parts: list[Any] = [ImageTiles(tiles) for tiles in self.pictures]
        if features:
            parts = [ImageFeatures((each,)) for each in features]
        return [
            Request(
                prompt=(TextIds(before), part, TextIds(behind)),
                sampling=how,
                visual_budget=budget,
                stream=True,
            )
            for (before, behind), part in zip(self.texts, parts, strict=True)
        ]


def make_case(config: CascadeVLConfig, args: argparse.Namespace, *, number: int, seed: int) -> Case:
    """Random prompts; another seed shares nothing with this one."""
    generator = np.random.default_rng(seed)
    ordinary = [n for n in range(100, 2000) if n != config.image_token_id]

    def text(length: int) -> tuple[int, ...]:
        return tuple(generator.choice(ordinary, length).tolist())

    shape = (args.tiles, config.tile_px, config.tile_px, 3)
    return Case(
        texts=[(text(5), text(args.text_tokens - 5)) for _ in range(number)],
        pictures=[generator.integers(0, 256, shape, dtype=np.uint8) for _ in range(number)],
    )


class Sides:
    """The engines, and what each is asked."""

    def __init__(self, config: CascadeVLConfig, dtype: torch.dtype) -> None:
        """Build the models; their engines run on from case to case as servers do."""
        plain, flash = models_of(config, dtype)
        self.flash = flash
        self.engines = {PLAIN: Engine(plain, config=EngineConfig())}
        both = Engine(flash, config=EngineConfig())
        self.budgets: dict[str, VisualBudget | None] = {PLAIN: None, **BUDGETS}
        self.engines |= dict.fromkeys(BUDGETS, both)

    @torch.no_grad()
    def encoded(self, case: Case) -> list[VisualFeatures]:
        """The pictures of a case, encoded before, where that is not to be timed."""
        pixels = [normalise(each).to(self.flash.dtype) for each in case.pictures]
        return [self.flash.encode_images(each) for each in pixels]

    @torch.no_grad()
    def requests(
        self, side: str, case: Case, how: SamplingParams, features: Sequence[VisualFeatures]
    ) -> list[Request]:
        """What a side is asked; the plain one is given visual tokens in place of features."""
        if side == PLAIN:
            project = self.flash.model.multi_modal_projector
            features = [VisualFeatures(projected=project(each.patches)) for each in features]
        return case.requests(self.budgets[side], features, how)

    def seconds(self, side: str, requests: Sequence[Request]) -> float:
        """From the arrival of the requests to the end of all answers."""
        engine = self.engines[side]
        engine.forget()
        start = time.perf_counter()
        for request in requests:
            engine.add(request)
        while not engine.is_idle:
            engine.step()
        return time.perf_counter() - start


def prove_equal(sides: Sides, case: Case, new_tokens: int) -> float:
    """Kept by the budget, and kept by the router, everything is as in the plain model.

    Returns:
        The largest difference of a log-probability.
    """
    how = SamplingParams(max_tokens=new_tokens, ignore_eos=True, logprobs=0)

    def answered(engine: Engine, budget: VisualBudget | None) -> list[Completion]:
        engine.forget()
        return [each[0] for each in engine.generate(case.requests(budget, [], how))]

    wanted = answered(sides.engines[PLAIN], None)
    worst = 0.0
    asked = Thresholds(absolute=NEVER)
    for budget in ("full", asked):
        found = answered(sides.engines["all kept"], budget)  # type: ignore[arg-type]
        for one, other in zip(wanted, found, strict=True):
            assert one.token_ids == other.token_ids, (budget, one.token_ids, other.token_ids)
            assert one.logprobs is not None
            assert other.logprobs is not None
            pairs = zip(one.logprobs, other.logprobs, strict=True)
            worst = max(worst, *(abs(a.chosen - b.chosen) for a, b in pairs))
    assert worst <= MOST["logprobs"], worst
    return worst


def expected(config: CascadeVLConfig, side: str, measure: str, args: argparse.Namespace) -> float:
    """Operations of a measure on a side, of one request."""
    budget = BUDGETS.get(side, "full")
    counts = most_tokens(config, args.tiles, budget)
    new = args.new_tokens if measure == "rate" else 1
    length = args.text_tokens + sum(counts)
    tokens = length + new - 1
    encodes = measure != "prefill"
    small = sum(count < config.tokens_per_tile for count in counts)
    work = Work(
        tokens=tokens,
        tiles=args.tiles,
        compressed_tiles=small,
        targets=new,
        pairs=causal_pairs([tokens]),
    )
    cost = forward_flops(config, work)
    flops = cost.total
    if not encodes:  # the plain side is given visual tokens, the others patch features
        flops -= cost.vision + (cost.projector if side == PLAIN else 0.0)
    if encodes and side != PLAIN:
        flops += router_flops(config, args.tiles)
    return flops


def compare(name: str, config: CascadeVLConfig, args: argparse.Namespace) -> dict[str, Any]:
    """Prove, then time one shape."""
    sides = Sides(config, torch.float32 if args.tiny else torch.bfloat16)
    worst = prove_equal(sides, make_case(config, args, number=2, seed=0), args.new_tokens)
    print(f"\n{name}: equal answers proven, log-probabilities within {worst:.1e}")
    timed: dict[str, dict[str, list[float]]] = {
        measure: {side: [] for side in sides.budgets} for measure in MEASURES
    }
    for repetition in range(args.repeats + 1):  # the first one warms up
        for measure in MEASURES:
            number = args.requests if measure == "rate" else 1
            new = args.new_tokens if measure == "rate" else 1
            how = SamplingParams(max_tokens=new, ignore_eos=True)
            case = make_case(config, args, number=number, seed=1 + repetition)
            features = sides.encoded(case) if measure == "prefill" else []
            for side in sides.budgets:
                requests = sides.requests(side, case, how, features)
                seconds = sides.seconds(side, requests)
                if repetition:
                    timed[measure][side].append(seconds / number)
    rows = []
    for measure in MEASURES:
        base = timed[measure][PLAIN]
        for side, values in timed[measure].items():
            low, median, high = quartiles([b / v for b, v in zip(base, values, strict=True)])
            wanted = expected(config, PLAIN, measure, args) / expected(config, side, measure, args)
            middle = statistics.median(values)
            shown = f"{1 / middle:8.3g} /s" if measure == "rate" else f"{1e3 * middle:8.0f} ms"
            print(
                f"  {measure:8} {side:11} {shown}  {median:.2f}x (quartiles {low:.2f}-{high:.2f}), "
                f"operations say {wanted:.2f}x"
            )
            rows.append(
                {
                    "measure": measure,
                    "side": side,
                    "seconds": values,
                    "ratio": [low, median, high],
                    "expected": wanted,
                }
            )
    return {"shape": name, "logprobs_within": worst, "rows": rows}


def router_share(
    name: str, config: CascadeVLConfig, dtype: torch.dtype, args: argparse.Namespace
) -> dict[str, Any]:
    """The router's time over that of the vision tower, for one tile."""
    layers = int(config.vision_config.num_hidden_layers)
    counted = router_flops(config, 1) / forward_flops(config, Work(tokens=0, tiles=1)).vision
    config.vision_config.num_hidden_layers = min(TIMED_LAYERS, layers)
    config.text_config.num_hidden_layers = 1  # not timed here, and projectors are as wide
    config.text_config.hidden_size = config.text_config.intermediate_size = 256
    config.text_config.layer_types = ["full_attention"]
    config.text_config.vocab_size = 2048
    torch.manual_seed(0)
    model = CascadeVLForConditionalGeneration(config).to(dtype).eval()
    body, router = model.model.vision_tower, model.model.router
    assert router is not None
    pixels = torch.randn(1, 3, config.tile_px, config.tile_px, dtype=dtype)
    with torch.no_grad():
        hidden = body.embeddings(pixels)
    patches = torch.randn(1, hidden.shape[1] - 1, hidden.shape[2], dtype=dtype)

    def encode() -> None:
        states = hidden
        for layer in body.encoder.layer:
            states = layer(states)
            states = states if isinstance(states, Tensor) else states[0]

    work: dict[str, Callable[[], object]] = {"layers": encode, "router": lambda: router(patches)}
    spent: dict[str, list[float]] = {each: [] for each in work}
    for repetition in range(args.repeats + 1):
        for each, call in work.items():
            start = time.perf_counter()
            with torch.no_grad():
                call()
            if repetition:
                spent[each].append(time.perf_counter() - start)
    factor = layers / int(config.vision_config.num_hidden_layers)
    shares = [r / (factor * e) for r, e in zip(spent["router"], spent["layers"], strict=True)]
    low, median, high = quartiles(shares)
    print(
        f"router of {name}: {median:.2%} of the vision tower's time (quartiles {low:.2%}-"
        f"{high:.2%}), of its operations {counted:.2%}; {factor:g} times the layers timed"
    )
    return {"tower": name, "share": [low, median, high], "counted": counted, "seconds": spent}


def main() -> None:
    """Read the arguments, prove, time."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tiles", type=int, default=7, help="tiles of a picture")
    parser.add_argument("--text-tokens", type=int, default=30, help="text of a prompt")
    parser.add_argument("--requests", type=int, default=2, help="at once, for requests a second")
    parser.add_argument("--new-tokens", type=int, default=8, help="of an answer, likewise")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--shapes", nargs="*", help="only these, as ``1b`` or ``38b scaled``")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to see that it works")
    parser.add_argument("--out", type=Path, help="write the JSON document here too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    dtype = torch.float32 if args.tiny else torch.bfloat16
    document = {
        "arguments": {name: str(value) for name, value in vars(args).items()},
        "shapes": [
            compare(name, config, args)
            for name, config in shapes(args.tiny).items()
            if args.shapes is None or name in args.shapes
        ],
        "router": [
            router_share(name, config, dtype, args) for name, config in towers(args.tiny).items()
        ],
    }
    if args.out is not None:
        args.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
