"""``cascadevl join``: a vision tower and a language model as the start of pre-training."""

from __future__ import annotations

import argparse
from pathlib import Path

from cascadevl.cli.arguments import Subparsers, byte_size


def add_parser(subparsers: Subparsers) -> None:
    """Describe the command."""
    parser = subparsers.add_parser(
        "join",
        help="join a vision encoder and a language model into a checkpoint to pre-train",
        description="Join a vision encoder and a language model by a projector with random "
        "weights, as pre-training starts. Weights are copied bit for bit, shard by shard; the "
        "tokens for pictures and boxes are added to the tokenizer.",
    )
    parser.add_argument(
        "--vision",
        metavar="DIR",
        required=True,
        help="an InternViT, or an InternVL checkpoint whose vision tower is taken (a folder, a "
        "downloaded repository, a released name)",
    )
    parser.add_argument(
        "--language",
        metavar="DIR",
        required=True,
        help="a text-only model: Qwen2, Qwen3, Qwen3-MoE, GPT-OSS, InternLM",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", required=True, help="folder to write")
    parser.add_argument(
        "--size",
        metavar="NAME",
        help="a released size, as internvl3_5-8b: other halves are refused, and the vocabulary, "
        "the context and the output head are made as released",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the projector (default: 0)"
    )
    parser.add_argument(
        "--max-shard-bytes",
        type=byte_size,
        default=5 * 10**9,
        metavar="N",
        help="largest file of weights, as 5000000 or 5GB (default: 5GB)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Join, and say what to do with the result."""
    from cascadevl.model.joining import join
    from cascadevl.model.loading import find

    join(
        find(args.vision),
        find(args.language),
        args.out,
        size=args.size,
        seed=args.seed,
        max_shard_bytes=args.max_shard_bytes,
    )
    print(f"wrote {args.out}; its projector is untrained: train it with")
    print(f"  cascadevl train pretrain --model {args.out} --data META.json --out RUN")
    return 0
