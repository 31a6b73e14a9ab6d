"""``cascadevl show FILE``: what becomes of a picture, or how the steps of solutions were judged."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from cascadevl.cli.arguments import Subparsers, increment, positive_int

if TYPE_CHECKING:
    from cascadevl.workflows.show import PictureLayout

MAX_TILES, TILE_PX = 12, 448
"""Tiles and their side, where neither a model nor the command line says otherwise."""


def add_parser(subparsers: Subparsers) -> None:
    """Describe the command."""
    parser = subparsers.add_parser(
        "show",
        help="draw the tiles, tokens and positions of a picture, what a router makes of them, or "
        "judged steps",
        description="Draw a picture with its grid, its tiles and thumbnail in the order the "
        "model sees them, and each tile's tokens and positions, as a PNG. No model is needed. "
        "With --router, tiles are painted with a Flash model's probability that they lose nothing "
        "when compressed, and those that it compresses are marked. With --steps, make a page of "
        "solutions instead, on which every step has the colour of its score.",
    )
    parser.add_argument(
        "file", type=Path, metavar="FILE", help="the picture, or JSONL with --steps"
    )
    parser.add_argument(
        "--max-tiles", type=positive_int, help=f"(default: {MAX_TILES}, or the model's)"
    )
    parser.add_argument("--min-tiles", type=positive_int, help="(default: 1, or the model's)")
    parser.add_argument("--tile-px", type=positive_int, help=f"(default: {TILE_PX})")
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
    parser.add_argument("--router", metavar="MODEL", help="a Flash model, whose router is asked")
    parser.add_argument(
        "--visual-budget",
        metavar="B",
        help="with --router: tiles that stay full: full, compressed, a share (0.5 or 50%%), or "
        "threshold=P[,quantile=Q] (default: the model's thresholds)",
    )
    parser.add_argument(
        "--steps",
        action="store_true",
        help="FILE holds judged solutions, of `generate --reward-model` or `data process`",
    )
    parser.add_argument(
        "--questions", type=Path, metavar="Q.jsonl", help="with --steps: what was answered"
    )
    parser.add_argument(
        "--max-solutions", type=positive_int, default=50, metavar="N", help="with --steps (50)"
    )
    parser.add_argument(
        "--out", type=Path, help="the file to write (default: FILE.tiles.png, FILE.steps.html)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Draw, and say what was drawn."""
    return _show_steps(args) if args.steps else _show_tiles(args)


def _show_steps(args: argparse.Namespace) -> int:
    from cascadevl.workflows.step_view import read_solutions, write_page

    out: Path = args.out or args.file.with_name(f"{args.file.stem}.steps.html")
    solutions = read_solutions(args.file, questions=args.questions)
    number = write_page(solutions, out, title=args.file.stem, max_solutions=args.max_solutions)
    print(f"{number} solutions with their steps")
    print(f"wrote {out}")
    return 0


def _show_tiles(args: argparse.Namespace) -> int:
    from cascadevl.workflows.show_drawing import draw

    layout = _plain(args) if args.router is None else _routed(args)
    out: Path = args.out or args.file.with_name(f"{args.file.stem}.tiles.png")
    draw(layout, out)
    print(layout.summary)
    for tile in layout.tiles:
        route = ""
        if tile.probability is not None:
            verdict = "compressed" if tile.is_compressed else "full"
            route = f", {verdict} (probability {tile.probability:.3f})"
        print(f"  {tile.name:<12} {tile.num_tokens} tokens, positions {tile.positions}{route}")
    print(f"wrote {out}")
    return 0


def _plain(args: argparse.Namespace) -> PictureLayout:
    """The layout by what the command line says."""
    from cascadevl.data.tiling import TilingConfig
    from cascadevl.errors import ConfigError
    from cascadevl.workflows.show import lay_out

    if args.visual_budget is not None:
        raise ConfigError("--visual-budget is a model's: name a Flash model with --router MODEL")
    tiling = TilingConfig(
        tile_px=args.tile_px or TILE_PX,
        min_tiles=args.min_tiles or 1,
        max_tiles=args.max_tiles or MAX_TILES,
        thumbnail=not args.no_thumbnail,
    )
    return lay_out(
        args.file, tiling, tokens_per_tile=args.tokens_per_tile, increment=args.increment
    )


def _routed(args: argparse.Namespace) -> PictureLayout:
    """The layout by a model, and its routes."""
    from cascadevl.errors import ConfigError
    from cascadevl.model.routing import parse_budget
    from cascadevl.workflows.show_router import lay_out_routed

    if args.tile_px is not None or args.tokens_per_tile is not None:
        raise ConfigError(
            "--tile-px and --tokens-per-tile are the model's where --router names one; leave them "
            "out"
        )
    return lay_out_routed(
        args.file,
        args.router,
        budget=None if args.visual_budget is None else parse_budget(args.visual_budget),
        min_tiles=args.min_tiles,
        max_tiles=args.max_tiles,
        thumbnail=False if args.no_thumbnail else None,
        increment=args.increment,
    )
