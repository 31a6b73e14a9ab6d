"""``cascadevl show FILE``: what becomes of a picture before the model sees it."""

from __future__ import annotations

import argparse
from pathlib import Path

from cascadevl.cli.arguments import Subparsers, increment, positive_int


def add_parser(subparsers: Subparsers) -> None:
    """Describe the command."""
    parser = subparsers.add_parser(
        "show",
        help="draw the tiles, tokens and positions of a picture",
        description="Draw a picture with its grid, its tiles and thumbnail in the order the "
        "model sees them, and each tile's tokens and positions, as a PNG. No model is needed.",
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="the picture")
    parser.add_argument("--max-tiles", type=positive_int, default=12, help="(default: 12)")
    parser.add_argument("--min-tiles", type=positive_int, default=1, help="(default: 1)")
    parser.add_argument("--tile-px", type=positive_int, default=448, help="(default: 448)")
    parser.add_argument("--no-thumbnail", action="store_true", help="leave the thumbnail out")
    parser.add_argument(
        "--tokens-per-tile",
        type=positive_int,
        help="visual tokens of a tile (default: one for each 28 px square, 256 at 448 px)",
    )
    parser.add_argument(
        "--increment",
        type=increment,
        default=1.0,
        metavar="X",
        help="position step of a visual token (V2PE), as 0.25 or 1/4 (default: 1)",
    )
    parser.add_argument("--out", type=Path, help="the PNG to write (default: FILE.tiles.png)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Draw, and print the same facts in words."""
    from cascadevl.data.tiling import TilingConfig
    from cascadevl.workflows.show import draw, lay_out

    tiling = TilingConfig(
        tile_px=args.tile_px,
        min_tiles=args.min_tiles,
        max_tiles=args.max_tiles,
        thumbnail=not args.no_thumbnail,
    )
    layout = lay_out(
        args.file, tiling, tokens_per_tile=args.tokens_per_tile, increment=args.increment
    )
    out: Path = args.out or args.file.with_name(f"{args.file.stem}.tiles.png")
    draw(layout, out)
    print(layout.summary)
    for tile in layout.tiles:
        print(f"  {tile.name:<12} {tile.num_tokens} tokens, positions {tile.positions}")
    print(f"wrote {out}")
    return 0
