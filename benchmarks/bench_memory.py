"""Memory of a long row with a large vocabulary: logits at the targets against all logits.

The text half of InternVL3-1B's shape in bfloat16, one packed row, forward and backward pass; every
measurement in a process of its own: the largest resident memory of the pass, less what was resident
before it (weights, inputs). Beside it stands what `cascadevl.model.cost` predicts: activations,
logits and gradients. "All logits" is the same model called as transformers is, with labels. Equal
losses are asserted on a short row in float32. The last line is one JSON document.
Run: ``python benchmarks/bench_memory.py --threads 2``; with all logits and no checkpointing the
released row of 4,096 tokens needs about 18 GiB. Linux only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from bench_step_1b import VOCAB, packed, shape
from experiment import markdown, random_example
from numpy.random import default_rng

from cascadevl.model.configuration import CascadeVLConfig
from cascadevl.model.cost import Work, activation_bytes, causal_pairs, weight_bytes
from cascadevl.model.head import CHUNK_BYTES
from cascadevl.model.modeling import CascadeVLForConditionalGeneration
from cascadevl.train.objective import NEXT_TOKEN
from cascadevl.types import Batch

HEADS = ("targets", "all")
FULL_LOGITS_BYTES = 10
"""A logit in bfloat16, and two of its float32 copy, its log-probability and its gradient."""


def row(config: CascadeVLConfig, tokens: int) -> Batch:
    """A row of text of which every token but the first two is a target."""
    return packed(
        [
            random_example(
                "row",
                tokens,
                0,
                tokens,
                image_token_id=config.image_token_id,
                tile_px=config.tile_px,
                rng=default_rng(0),
            )
        ],
        config,
    )


def loss_of(model: CascadeVLForConditionalGeneration, batch: Batch, head: str) -> torch.Tensor:
    """The mean loss of the row, either way."""
    if head == "targets":
        return NEXT_TOKEN.loss(model, batch, NEXT_TOKEN.weigh(batch)).loss
    labels = torch.full_like(batch.input_ids, -100)
    labels.view(-1)[batch.target_index + 1] = batch.target_ids
    loss: torch.Tensor = model(
        input_ids=batch.input_ids, labels=labels, position_ids=batch.position_ids, use_cache=False
    ).loss
    return loss


def prove_equal() -> float:
    """The float32 loss of a short row, after asserting that both ways give it."""
    torch.manual_seed(0)
    config = shape(2, vocab_size=1000)
    config.image_token_id = 999
    model = CascadeVLForConditionalGeneration(config).train()
    batch = row(config, 200)
    losses = [loss_of(model, batch, head) for head in HEADS]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
    return float(losses[0].detach())


def status_gib(field: str) -> float:
    """A field of /proc/self/status in GiB."""
    for line in Path("/proc/self/status").read_text("utf-8").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 2**20
    raise KeyError(field)


def predicted_gib(config: CascadeVLConfig, batch: Batch, args: argparse.Namespace) -> float:
    """Activations, logits, attention's kept probabilities and gradients, by formula."""
    work = Work(
        tokens=batch.num_tokens,
        targets=len(batch.target_ids),
        pairs=causal_pairs([batch.num_tokens]),
    )
    chunk = CHUNK_BYTES // (4 * config.text_config.vocab_size)
    cost = activation_bytes(config, work, recompute=args.checkpointing, head_chunk=chunk)
    head = cost.head
    if args.head == "all":
        head = FULL_LOGITS_BYTES * config.text_config.vocab_size * batch.input_ids.numel()
    weights = weight_bytes(config)
    # Both meet at the start of the backward pass, when few gradients are there; then layers give
    # memory back as gradients take it.
    backward = cost.language + max(head, weights.language) + weights.head
    return backward / 2**30


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Peak of a forward and backward pass."""
    config = shape(args.layers, vocab_size=args.vocab_size)
    config.image_token_id = args.vocab_size - 1
    config.vision_config.num_hidden_layers = 1
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = CascadeVLForConditionalGeneration(config).train()
    torch.set_default_dtype(torch.float32)
    if args.checkpointing:
        model.activation_checkpointing_enable()
    batch = row(config, args.tokens)
    loss_of(model, row(config, 16), args.head).backward()  # libraries take their own memory
    model.zero_grad()
    before = status_gib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", "utf-8")  # forget the peak so far
    loss = loss_of(model, batch, args.head)
    loss.backward()
    return {
        "measured_gib": status_gib("VmHWM") - before,
        "predicted_gib": predicted_gib(config, batch, args),
        "before_gib": before,
        "loss": float(loss.detach()),
    }


def child(args: argparse.Namespace, head: str, *, checkpointing: bool) -> dict[str, Any]:
    """`measure` in a process of its own."""
    options = [f"--tokens={args.tokens}", f"--vocab-size={args.vocab_size}", f"--head={head}"]
    options += [f"--threads={args.threads}"]
    options += ["--checkpointing"] if checkpointing else []
    options += [f"--layers={args.layers}"] if args.layers else []
    done = subprocess.run(
        [sys.executable, __file__, *options], stdout=subprocess.PIPE, text=True, check=True
    )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {"head": head, "checkpointing": checkpointing, **result}


def main() -> None:
    """Measure one way as a child, or all of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--tokens", type=int, default=4096)
    add("--vocab-size", type=int, default=VOCAB)
    add("--layers", type=int, default=None, help="of the text half; all 24 by default")
    add("--threads", type=int, default=2)
    add("--only-checkpointing", action="store_true", help="leave the larger half out")
    add("--head", choices=HEADS, help="measure one way in this process")
    add("--checkpointing", action="store_true", help="in this process")
    add("--out", type=Path, default=None, help="also write the JSON here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.head:
        print(json.dumps(measure(args)))
        return
    loss = prove_equal()
    ways = (True,) if args.only_checkpointing else (True, False)
    results = [child(args, head, checkpointing=way) for way in ways for head in HEADS]
    cells = [
        [
            each["head"],
            "yes" if each["checkpointing"] else "no",
            f"{each['measured_gib']:.2f}",
            f"{each['predicted_gib']:.2f}",
        ]
        for each in results
    ]
    print(markdown(["logits", "checkpointing", "peak, GiB", "predicted, GiB"], cells))
    document = {
        "benchmark": "memory",
        "tokens": args.tokens,
        "vocab_size": args.vocab_size,
        "loss_float32": loss,
        "results": results,
    }
    if args.out is not None:
        args.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
