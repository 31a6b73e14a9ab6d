"""``cascadevl serve --ray``: both halves as replicas of a Ray cluster, behind a front of ours."""

from __future__ import annotations

import argparse
from contextlib import AbstractContextManager
from importlib.util import find_spec

from cascadevl.cli.arguments import positive_int
from cascadevl.cli.serve_members import member_settings
from cascadevl.errors import ConfigError

LOCAL = "local"
"""Stands for a cluster on this machine that ends with the command."""


def add_ray(parser: argparse.ArgumentParser) -> None:
    """Describe the arguments for a Ray cluster.

    Args:
        parser: Gets them.
    """
    group = parser.add_argument_group("Ray")
    group.add_argument(
        "--ray",
        nargs="?",
        const=LOCAL,
        metavar="ADDRESS",
        help="run both halves as Ray Serve deployments: of the cluster at this address (auto: the "
        "one that this host belongs to), or, without one, of a cluster on this machine; needs "
        "--wire, and the checkpoint on every host. --vision and --language are then the replicas "
        "at least (1)",
    )
    group.add_argument(
        "--max-vision", type=positive_int, metavar="N", help="vision replicas at most (as many)"
    )
    group.add_argument(
        "--max-language", type=positive_int, metavar="N", help="language replicas at most (as many)"
    )
    group.add_argument(
        "--load",
        type=float,
        default=8.0,
        metavar="R",
        help="requests in hand for each replica; with more, replicas are added (8)",
    )
    for half in ("vision", "language"):
        group.add_argument(
            f"--{half}-resource",
            metavar="NAME",
            help=f"run {half} replicas only on hosts that offer this resource of Ray; each takes "
            f"one, so room for four is: ray start --resources '{{\"NAME\": 4}}'",
        )
    group.add_argument(
        "--replica-cpus", type=float, default=1.0, metavar="N", help="cores of each replica (1)"
    )
    group.add_argument(
        "--replica-gpus", type=float, metavar="N", help="GPUs of each (1 with --device cuda)"
    )


def check_ray(args: argparse.Namespace) -> None:
    """Refuse words that make no cluster.

    Raises:
        ConfigError: If Ray is not installed, or words are missing or exclude each other.
    """
    if args.ray is None:
        return
    if find_spec("ray") is None:
        raise ConfigError("--ray needs the extra 'cluster': pip install 'cascadevl[cluster]'")
    if args.wire is None:
        raise ConfigError(
            "--ray needs a --wire that all hosts reach, as tcp://ADDRESS-OF-THIS-HOST:5555"
        )
    if args.vllm is not None:
        raise ConfigError("--vllm is one server; name it where a --role language joins the front")


def ray_halves(args: argparse.Namespace) -> AbstractContextManager[None]:
    """Both halves as deployments.

    Args:
        args: Of the command.

    Raises:
        ConfigError: If a scale cannot be.
    """
    from cascadevl.serving.ray_app import Scale, halves

    gpus = args.replica_gpus
    if gpus is None:
        gpus = 1.0 if args.device.startswith("cuda") else 0.0

    def scale(least: int | None, most: int | None, resource: str | None) -> Scale:
        least = least or 1
        return Scale(
            least=least,
            most=most or least,
            load=args.load,
            cpus=args.replica_cpus,
            gpus=gpus,
            resources={} if resource is None else {resource: 1.0},
        )

    return halves(
        member_settings(args, "vision", args.wire),
        scale(args.vision, args.max_vision, args.vision_resource),
        scale(args.language, args.max_language, args.language_resource),
        address=None if args.ray == LOCAL else args.ray,
    )
