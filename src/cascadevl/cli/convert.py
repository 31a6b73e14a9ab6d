"""``cascadevl convert``: rewrite a checkpoint in another layout, or its language half alone."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from cascadevl.cli.arguments import Subparsers, byte_size

if TYPE_CHECKING:
    from cascadevl.model.checkpoint_names import Layout

LAYOUTS: dict[str, Layout] = {"hf": "hf", "hf-old": "hf_old", "github": "github"}


def add_parser(subparsers: Subparsers) -> None:
    """Describe the command."""
    parser = subparsers.add_parser(
        "convert",
        help="rewrite a checkpoint: GitHub <-> -HF layout, or its language half alone",
        description="Rewrite a checkpoint in another layout, shard by shard, without building "
        "the model. There and back again gives the same bytes in every tensor.",
    )
    parser.add_argument(
        "source", metavar="SRC", help="a checkpoint folder, a released name, or micro"
    )
    parser.add_argument("target", type=Path, metavar="DST", help="folder to write")
    form = parser.add_mutually_exclusive_group(required=True)
    form.add_argument(
        "--to",
        choices=tuple(LAYOUTS),
        help="hf: what transformers loads; hf-old: its key names before 4.52; github: the layout "
        "of the original repositories",
    )
    form.add_argument(
        "--language-only",
        action="store_true",
        help="the language half as a text-only checkpoint, which plain transformers and vLLM open",
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
    """Convert, and say where the result is."""
    from cascadevl.model.loading import find

    source = find(args.source)
    if args.language_only:
        from cascadevl.model.language_export import export_language

        export_language(source, args.target, max_shard_bytes=args.max_shard_bytes)
        print(f"wrote the language half to {args.target}")
        return 0
    from cascadevl.model.conversion import convert

    convert(source, args.target, layout=LAYOUTS[args.to], max_shard_bytes=args.max_shard_bytes)
    print(f"wrote {args.target} in the {args.to} layout")
    return 0
