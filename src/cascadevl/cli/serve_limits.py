"""Whom a server answers, and how much: arguments of ``cascadevl serve`` about keys and limits."""

from __future__ import annotations

import argparse
import ipaddress
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from cascadevl.cli.arguments import byte_size, positive_int
from cascadevl.errors import ConfigError

if TYPE_CHECKING:
    from cascadevl.serving.admission import ApiConfig
    from cascadevl.serving.limits import Limits
    from cascadevl.serving.remote import Fetcher
    from cascadevl.serving.run_server import ListenConfig

_LOCAL = ("127.0.0.1", "localhost", "::1")

_NUMBERS = {
    "--max-tokens": (1024, "of an answer, where a request names none"),
    "--max-requests": (1024, "in hand; more are refused for the moment"),
    "--max-waiting": (4096, "answers that wait for their turn; requests are refused meanwhile"),
    "--max-images": (64, "pictures and videos of a request"),
    "--max-pixels": (100_000_000, "of the pictures of a request, once decoded"),
    "--max-tiles": (256, "of the pictures of a request"),
    "--max-prompt-tokens": (2**18, "of a prompt, pictures included"),
    "--max-answer-tokens": (2**20, "of all answers to a request together"),
}
"""Limits, each with its default and what it is of."""


def add_limits(parser: argparse.ArgumentParser) -> None:
    """Describe them."""
    group = parser.add_argument_group("limits")
    for flag, (default, help_) in _NUMBERS.items():
        group.add_argument(
            flag, type=positive_int, default=default, metavar="N", help=f"{help_} ({default})"
        )
    group.add_argument(
        "--max-body",
        type=byte_size,
        default=2**26,
        metavar="N",
        help="of a request, pictures included, as 20MB (64 MiB)",
    )
    group.add_argument(
        "--max-held",
        type=byte_size,
        default=2**30,
        metavar="N",
        help="of the bodies of all requests in hand (1 GiB)",
    )
    group.add_argument(
        "--visual-budget",
        metavar="B",
        help="tiles that a Flash model keeps full, where a request does not say: full, compressed, "
        "a share (0.5 or 50%%), or threshold=P[,quantile=Q] (default: the model's thresholds)",
    )
    group.add_argument(
        "--drain",
        type=positive_int,
        default=60,
        metavar="S",
        help="seconds for what is in hand after SIGTERM (60)",
    )


def add_safety(parser: argparse.ArgumentParser) -> None:
    """Describe who may ask, from where pictures come, and where the log goes."""
    group = parser.add_argument_group("safety")
    group.add_argument(
        "--api-keys",
        type=Path,
        metavar="FILE",
        help="a line for each who may ask: a name and a key (default: everybody may)",
    )
    group.add_argument(
        "--max-per-minute",
        type=positive_int,
        metavar="N",
        help="questions with each of the keys in any minute (default: any number)",
    )
    group.add_argument(
        "--images-from",
        action="append",
        default=[],
        metavar="HOST",
        help="a host from which pictures are fetched by their address, as *.example.org, or * for "
        "every public one; may be given several times (default: none, data URLs only)",
    )
    group.add_argument(
        "--images-network",
        action="append",
        default=[],
        type=ipaddress.ip_network,
        metavar="NETWORK",
        help="a network that is not public in which such hosts may be all the same, as 10.1.0.0/16",
    )
    group.add_argument(
        "--log",
        type=Path,
        metavar="FILE",
        help="where a line of JSON is added for each request (default: standard error)",
    )


def check_safety(args: argparse.Namespace) -> None:
    """Refuse a limit that nothing can be held against.

    Raises:
        ConfigError: If there is one.
    """
    if args.max_per_minute is not None and args.api_keys is None:
        raise ConfigError("--max-per-minute counts the questions of each key; give --api-keys, too")


def api_config(args: argparse.Namespace) -> ApiConfig:
    """Limits of all requests together."""
    from cascadevl.serving.admission import ApiConfig

    return ApiConfig(
        model_name=args.name or args.model,
        max_requests=args.max_requests,
        max_waiting=args.max_waiting,
        max_body_bytes=args.max_body,
        max_held_bytes=args.max_held,
    )


def limits_of(args: argparse.Namespace) -> Limits:
    """Limits of each request."""
    from cascadevl.serving.limits import Limits

    return Limits(
        max_images=args.max_images,
        max_pixels=args.max_pixels,
        max_tiles=args.max_tiles,
        max_prompt_tokens=args.max_prompt_tokens,
        max_answer_tokens=args.max_answer_tokens,
    )


def listen_config(args: argparse.Namespace) -> ListenConfig:
    """Where the server listens, and to whom.

    Raises:
        ConfigError: If the keys cannot be used.
    """
    from cascadevl.serving.keys import Keys
    from cascadevl.serving.run_server import ListenConfig

    keys = None if args.api_keys is None else Keys.read(args.api_keys)
    if keys is None and args.host not in _LOCAL:
        print(f"whoever reaches {args.host} can ask; --api-keys admits some alone", file=sys.stderr)
    return ListenConfig(
        host=args.host,
        port=args.port,
        keys=keys,
        per_minute=args.max_per_minute,
        drain_s=args.drain,
    )


def fetcher_of(args: argparse.Namespace) -> Fetcher | None:
    """Who fetches pictures by their addresses, if any are.

    Raises:
        ConfigError: If a host is none.
    """
    if not args.images_from:
        return None
    from cascadevl.serving.remote import Fetcher, RemoteConfig

    hosts, networks = tuple(args.images_from), tuple(args.images_network)
    return Fetcher(RemoteConfig(hosts=hosts, networks=networks))
