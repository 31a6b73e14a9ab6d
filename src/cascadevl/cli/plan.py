"""``cascadevl plan``: what a server will do on some hardware, by simulation."""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from cascadevl.cli.arguments import Subparsers, byte_size, positive_int
from cascadevl.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from cascadevl.model.configuration import CascadeVLConfig
    from cascadevl.planning.counts import Counts
    from cascadevl.planning.hardware import Hardware
    from cascadevl.planning.plan import Option, Plan, Site
    from cascadevl.planning.service import Question

_CPU_SHARE = 0.5
"""Of the rate of a large product, which small models come near to on a CPU."""

_QUANTILES = (0.5, 0.95, 0.99)


def add_parser(subparsers: Subparsers) -> None:
    """Describe the command."""
    parser = subparsers.add_parser(
        "plan",
        help="what a server will do on some hardware",
        description="Requests a second, latency and cost of a server that does not exist yet: "
        "coupled, decoupled (DvD), and decoupled with a router, from counted operations and bytes "
        "and a simulation of who waits for whom. With --table18, the same for InternVL3.5's own "
        "measurements, with the error of every row.",
    )
    parser.add_argument(
        "--table18", action="store_true", help="compare with the measurements of the report"
    )
    _add_question(parser)
    _add_hardware(parser)
    parser.set_defaults(run=run)


def _add_question(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is asked")
    group.add_argument("--model", metavar="M", help="38b, a released name, or a checkpoint folder")
    group.add_argument(
        "--resolution", type=positive_int, metavar="PX", help="side of the picture of a request"
    )
    group.add_argument("--rate", type=float, metavar="R", help="requests a second")
    group.add_argument(
        "--output", type=positive_int, default=32, metavar="N", help="tokens of an answer (32)"
    )
    group.add_argument(
        "--text",
        type=positive_int,
        default=64,
        metavar="N",
        help="tokens of a question, template included (64)",
    )
    group.add_argument(
        "--compressed",
        type=float,
        default=2 / 3,
        metavar="S",
        help="share of tiles that a router compresses (2/3, which halves the visual tokens)",
    )
    group.add_argument(
        "--requests", type=positive_int, default=400, metavar="N", help="to simulate (400)"
    )
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of their arrivals (0)")


def _add_hardware(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what there is")
    group.add_argument(
        "--hardware",
        choices=("a100", "h100", "h200", "cpu"),
        default="a100",
        help="each processor (a100); cpu is one core, by --flops, --bandwidth and --memory",
    )
    group.add_argument(
        "--processors", type=positive_int, metavar="N", help="of them (16; 2 cores of a CPU)"
    )
    group.add_argument(
        "--group",
        type=positive_int,
        metavar="N",
        help="of them that are one language server (the fewest that hold the model)",
    )
    group.add_argument(
        "--share",
        type=float,
        metavar="S",
        help="of the operations a second that is reached (default: as fitted to the report's "
        "measurements; 0.5 on a CPU)",
    )
    group.add_argument(
        "--link",
        type=byte_size,
        default=25 * 10**9 // 8,
        metavar="B",
        help="bytes a second between the halves (3.1 GB)",
    )
    group.add_argument(
        "--price", type=float, metavar="P", help="of a processor for an hour, in any currency"
    )
    group.add_argument("--flops", type=float, metavar="F", help="of a core: BF16 products a second")
    group.add_argument(
        "--bandwidth", type=byte_size, metavar="B", help="of a core: bytes read a second, as 8GB"
    )
    group.add_argument("--memory", type=byte_size, metavar="B", help="that a core may fill, as 8GB")


def run(args: argparse.Namespace) -> int:
    """Print the plan, or the comparison."""
    if find_spec("simpy") is None:
        raise ConfigError("planning needs the extra 'plan': pip install 'cascadevl[plan]'")
    if args.table18:
        return _print_table18()
    missing = [name for name in ("model", "resolution", "rate") if getattr(args, name) is None]
    if missing:
        raise ConfigError(f"give --{', --'.join(missing)}, or --table18")
    return _print_plan(args)


def _print_plan(args: argparse.Namespace) -> int:
    from rich.console import Console

    from cascadevl.data.tiling import TilingConfig, num_tiles_of
    from cascadevl.planning.counts import count
    from cascadevl.planning.plan import make_plan
    from cascadevl.planning.service import Question
    from cascadevl.planning.simulation import Load

    config = _config(args.model)
    counts = count(config)
    tiling = TilingConfig(tile_px=config.tile_px, max_tiles=config.max_tiles)
    question = Question(
        tiles=num_tiles_of(args.resolution, args.resolution, tiling),
        text_tokens=args.text,
        new_tokens=args.output,
    )
    site = _site(args, counts)
    load = Load(rate=args.rate, num_requests=args.requests, seed=args.seed)
    plan = make_plan(counts, question, site, load, compressed_share=args.compressed)
    console = Console(highlight=False)
    for line in _facts(args, counts, question, site):
        console.print(line)
    console.print(_table(plan, args.rate, args.price))
    console.print(
        f"\nNeither half waits at {plan.ratio:.2f} vision processors to one of the language half; "
        f"with the router at {plan.routed_ratio:.2f}. Seconds a request are those of one processor."
    )
    return 0


def _config(name: str) -> CascadeVLConfig:
    from cascadevl.model.part import load_settings
    from cascadevl.model.shipped import SHIPPED
    from cascadevl.model.zoo import ZOO, config_for

    for model in ZOO.values():
        if model.preset == name.lower():
            return config_for(model.name)
    if name in SHIPPED or Path(name).is_dir():
        return load_settings(name)[0]
    return config_for(name)


def _site(args: argparse.Namespace, counts: Counts) -> Site:
    from cascadevl.planning.plan import Site, smallest_group
    from cascadevl.planning.table18 import share_for

    hardware = _hardware(args)
    is_cpu = args.hardware == "cpu"
    share = _CPU_SHARE if is_cpu else share_for(counts)
    return Site(
        hardware=hardware,
        processors=args.processors or (2 if is_cpu else 16),
        group=args.group or smallest_group(counts, hardware),
        compute_share=share if args.share is None else args.share,
        link_bytes_per_s=float(args.link),
    )


def _hardware(args: argparse.Namespace) -> Hardware:
    from cascadevl.planning.hardware import HARDWARE, measured_core

    if args.hardware != "cpu":
        return HARDWARE[args.hardware]
    names = ("flops", "bandwidth", "memory")
    missing = [name for name in names if getattr(args, name) is None]
    if missing:
        raise ConfigError(
            f"--hardware cpu needs what was measured of a core: give --{', --'.join(missing)}"
        )
    return measured_core(args.flops, float(args.bandwidth), float(args.memory))


def _facts(
    args: argparse.Namespace, counts: Counts, question: Question, site: Site
) -> tuple[str, str]:
    """What was counted and assumed."""
    from dataclasses import replace

    visual = question.visual_tokens(counts)
    fewer = replace(question, compressed_share=args.compressed).visual_tokens(counts)
    side = args.resolution
    return (
        f"{args.model}: a picture of {side} x {side} ({question.tiles} tiles, {visual} visual "
        f"tokens, {fewer} with the router), {question.text_tokens} tokens of text, "
        f"{question.new_tokens} of the answer",
        f"{site.processors} x {site.hardware.name}, {site.group} a language server; reached are "
        f"{site.compute_share:.1%} of the operations and {site.memory_share:.0%} of the bytes a "
        f"second\n",
    )


def _table(plan: Plan, rate: float, price: float | None) -> Table:
    """A column for each arrangement, a row for each figure."""
    from rich.table import Table

    table = Table("", box=None, pad_edge=False)
    for option in plan.options:
        table.add_column(option.name, justify="right")
    columns = [_figures(option, rate, price) for option in plan.options]
    for name in columns[0]:
        table.add_row(name, *(column[name] for column in columns))
    return table


def _figures(option: Option, rate: float, price: float | None) -> dict[str, str]:
    layout, used = option.layout, option.run
    group = (option.processors - layout.vision) // layout.language
    figures = {
        "vision processors": f"{layout.vision}" if layout.vision else "the same",
        "language processors": f"{layout.language} x {group}",
        "requests/s at most": f"{option.capacity_per_s:.2f}",
        f"requests/s of {rate:g}": f"{used.requests_per_s:.2f}",
    }
    for each in _QUANTILES:
        figures[f"first token, s, {each:.0%}"] = f"{used.first_token_s(each):.2f}"
    for each in _QUANTILES:
        figures[f"next token, ms, {each:.0%}"] = f"{1000 * used.token_s(each):.0f}"
    figures["seconds a request"] = f"{option.processor_s:.2f}"
    figures[f"processors for {rate:g}/s"] = f"{option.processors_for(rate)}"
    if price is not None:
        figures["price of 1000"] = f"{1000 * option.processor_s * price / 3600:.2f}"
    return figures


def _print_table18() -> int:
    from rich.console import Console
    from rich.table import Table

    from cascadevl.planning.table18 import ASSUMED, FITTED, SENT_PER_S, predictions

    console = Console(highlight=False)
    for model, found in FITTED.items():
        console.print(
            f"{model}, fitted: {found.compute_share:.1%} of the operations a second, "
            f"{found.num_requests} requests sent"
        )
        table = Table("px", "setting", box=None, pad_edge=False)
        for heading in ("measured", "planned", "error", ""):
            table.add_column(heading, justify="right")
        for each in predictions(model):
            row = each.row
            measured, planned = f"{row.requests_per_s:.2f}", f"{each.requests_per_s:.2f}"
            cells = (str(row.resolution_px), row.setting, measured, planned, f"{each.error:+.1%}")
            table.add_row(*cells, row.use)
        console.print(table, "")
    console.print(
        f"Excluded are rows above the {SENT_PER_S:g} requests a second that were sent. Assumed: "
        f"{ASSUMED.text_tokens} tokens of text,\n{ASSUMED.new_tokens} of an answer, "
        f"{ASSUMED.compressed_share:.0%} of the tiles compressed, {ASSUMED.vision_gpus} GPUs of "
        f"the vision server."
    )
    return 0
