"""The parts of a training step that are ours, each against what it replaces, at the 1B shape.

Forward and backward pass of the vision tower's attention, of log-probabilities and of the
normalisation, and the optimiser's update, in bfloat16 and interleaved. Equal results are asserted
before anything is timed. The last line is one JSON document.
Run: ``python benchmarks/bench_parts.py --repeats 15 --threads 2``; with ``--clock cpu --threads 1``
on a busy machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_step_1b import CLOCKS, VOCAB
from bench_train_step import quartiles
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from cascadevl.losses.logprobs import token_logprobs
from cascadevl.model.dense_attention import dense_attention
from cascadevl.model.norm import LeanRMSNorm
from cascadevl.train.optim import OptimConfig, Optimiser

Way = Callable[[], list[Tensor]]
"""Computes the part once; returns what must be equal."""


def drawn(*size: int) -> Tensor:
    """Random numbers in bfloat16 that want a gradient."""
    return torch.randn(*size).bfloat16().requires_grad_()


def attention(args: argparse.Namespace) -> dict[str, Way]:
    """Tiles of 1,025 patches, 16 heads of 64."""
    states = [drawn(args.tiles, 1025, 16, 64) for _ in range(3)]
    moved = [each.transpose(1, 2) for each in states]
    grad = torch.randn(args.tiles, 1025, 16, 64).bfloat16()

    def ours() -> list[Tensor]:
        return list(torch.autograd.grad(dense_attention(*moved, 0.125), states, grad))

    def theirs() -> list[Tensor]:
        out = F.scaled_dot_product_attention(*moved, scale=0.125).transpose(1, 2).contiguous()
        return list(torch.autograd.grad(out, states, grad))

    return {"ours": ours, "torch": theirs}


def logprobs(args: argparse.Namespace) -> dict[str, Way]:
    """Targets among 151,936 words."""
    logits, ids = drawn(args.targets, VOCAB), torch.randint(0, VOCAB, (args.targets,))
    grad = torch.randn(args.targets)

    def ours() -> list[Tensor]:
        return list(torch.autograd.grad(token_logprobs(logits, ids), logits, grad))

    def theirs() -> list[Tensor]:
        logs = logits.log_softmax(-1, dtype=torch.float32).gather(-1, ids[:, None]).squeeze(-1)
        return list(torch.autograd.grad(logs, logits, grad))

    return {"ours": ours, "torch": theirs}


def norm(args: argparse.Namespace) -> dict[str, Way]:
    """Tokens of 896 channels."""
    states, grad = drawn(1, args.tokens, 896), torch.randn(1, args.tokens, 896).bfloat16()
    theirs = Qwen2RMSNorm(896).bfloat16()
    norms = {"ours": LeanRMSNorm(theirs.weight, theirs.variance_epsilon), "transformers": theirs}

    def way(module: nn.Module) -> Way:
        return lambda: list(torch.autograd.grad(module(states), [states, theirs.weight], grad))

    return {name: way(module) for name, module in norms.items()}


def optimiser(args: argparse.Namespace) -> dict[str, Way]:
    """A table of 151,936 words and a few layers' matrices: gradients in, weights out."""
    sizes = [(VOCAB, 896), *[(4864, 896)] * args.matrices]
    weights = [torch.randn(size).bfloat16() for size in sizes]
    gradients = [torch.randn(size).bfloat16() for size in sizes]
    model = nn.ParameterList([nn.Parameter(weight.clone()) for weight in weights])
    mine = Optimiser(model.named_parameters(), OptimConfig(lr=1e-3, weight_decay=0.05))
    plain = [nn.Parameter(weight.clone()) for weight in weights]
    masters = [nn.Parameter(weight.float()) for weight in weights]
    fused = torch.optim.AdamW(masters, lr=1e-3, weight_decay=0.05, fused=True)

    def ours() -> list[Tensor]:
        for parameter, gradient in zip(model, gradients, strict=True):
            parameter.grad = gradient
        mine.collect()
        mine.clip()
        mine.step(1.0)
        mine.zero_grad()
        return [parameter.detach() for parameter in model]

    def theirs() -> list[Tensor]:
        for master, gradient in zip(masters, gradients, strict=True):
            master.grad = gradient.float()
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        fused.step()
        fused.zero_grad()
        with torch.no_grad():
            torch._foreach_copy_(plain, masters)
        return [parameter.detach() for parameter in plain]

    return {"ours": ours, "torch": theirs}


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Way]]] = {
    "vision attention": attention,
    "log-probabilities": logprobs,
    "normalisation": norm,
    "optimiser": optimiser,
}


def compare(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Assert equal results, then time both ways in turn."""
    ways = PARTS[name](args)
    clock = CLOCKS[args.clock]
    for mine, theirs in zip(*(way() for way in ways.values()), strict=True):
        error = (mine.float() - theirs.float()).norm() / theirs.float().norm()
        assert error < 1e-2, f"{name}: results differ by {float(error):.1e}"
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(args.repeats):
        for way, compute in ways.items():
            start = clock()
            compute()
            seconds[way].append(clock() - start)
    mine, theirs = seconds.values()
    low, median, high = quartiles([b / a for a, b in zip(mine, theirs, strict=True)])
    times = ", ".join(f"{way} {1e3 * statistics.median(s):.1f} ms" for way, s in seconds.items())
    print(f"{name}: {median:.2f}x (quartiles {low:.2f}-{high:.2f}); {times}", flush=True)
    return {"part": name, "ratio": median, "ratio_quartiles": [low, high], "seconds": seconds}


def main() -> None:
    """Compare every part and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    add("--repeats", type=int, default=15)
    add("--threads", type=int, default=2)
    add("--clock", choices=CLOCKS, default="wall")
    add("--tiles", type=int, default=1)
    add("--tokens", type=int, default=2048)
    add("--targets", type=int, default=110)
    add("--matrices", type=int, default=12)
    add("--out", type=Path, default=None, help="also write the JSON here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    results = [compare(name, args) for name in args.parts]
    document = {
        "benchmark": "parts",
        "threads": args.threads,
        "clock": args.clock,
        "torch": torch.__version__,
        "results": results,
    }
    if args.out is not None:
        args.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
