"""``cascadevl merge ADAPTER --out DIR``: an adapter and its base as one model."""

from __future__ import annotations

import argparse
from pathlib import Path

from cascadevl.cli.arguments import Subparsers, byte_size


def add_parser(subparsers: Subparsers) -> None:
    """Describe the command."""
    parser = subparsers.add_parser(
        "merge",
        help="merge an adapter (LoRA) into its base model",
        description="Merge an adapter into its base model and write the result, which every "
        "program that opens the base opens too. Sums are computed in float32 and rounded once to "
        "the precision of the base.",
    )
    parser.add_argument("adapter", type=Path, metavar="ADAPTER", help="folder of the adapter")
    parser.add_argument("--out", type=Path, metavar="DIR", required=True, help="folder to write")
    parser.add_argument(
        "--base",
        metavar="DIR",
        help="the base model, if it is no longer where it was when the adapter was trained",
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
    """Merge, and say where the result is."""
    from cascadevl.errors import CheckpointError
    from cascadevl.model.adapter_files import is_adapter_folder
    from cascadevl.model.loading import load, save

    if not is_adapter_folder(args.adapter):
        raise CheckpointError(
            f"{args.adapter} is not the folder of an adapter: it should hold adapter_config.json "
            "and no config.json"
        )
    model, processor = load(args.adapter, base=args.base)
    save(model, processor, args.out, max_shard_bytes=args.max_shard_bytes)
    print(f"wrote the merged model to {args.out}")
    return 0
