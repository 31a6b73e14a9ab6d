"""``cascadevl serve --role ...``: one server of a decoupled server, and who computes in it."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from cascadevl.cli.chat import usable_device

if TYPE_CHECKING:
    from cascadevl.serving.members import EngineSettings, MemberSettings
    from cascadevl.serving.wire import Role


def add_vllm(parser: argparse.ArgumentParser) -> None:
    """Describe the arguments for a language half that vLLM computes.

    Args:
        parser: Gets them.
    """
    group = parser.add_argument_group("vLLM")
    group.add_argument(
        "--vllm",
        metavar="URL",
        help="a vLLM server that computes the language half, as http://localhost:8001/v1; the "
        "language server then only asks it",
    )
    group.add_argument("--served-model", metavar="NAME", help="as vLLM knows it, if several")
    group.add_argument(
        "--api-key-env",
        metavar="NAME",
        default="OPENAI_API_KEY",
        help="environment variable with vLLM's key (OPENAI_API_KEY)",
    )


def engine_settings(args: argparse.Namespace) -> EngineSettings:
    """What the arguments say of an engine."""
    from cascadevl.serving.members import EngineSettings

    return EngineSettings(
        weights=args.weights,
        cache_bytes=args.cache_bytes,
        batch_invariant=args.batch_invariant,
    )


def member_settings(
    args: argparse.Namespace, role: Role, front: str, *, features_at: str = ""
) -> MemberSettings:
    """What the arguments say of a server.

    Args:
        args: Of the command.
        role: Which half.
        front: Where its front is.
        features_at: Where a language server takes features.
    """
    from cascadevl.serving.members import MemberSettings, VllmSettings

    vllm = None
    if args.vllm is not None:
        vllm = VllmSettings(
            url=args.vllm, served_model=args.served_model, api_key_env=args.api_key_env
        )
    return MemberSettings(
        role=role,
        model=args.model,
        front=front,
        features_at=features_at,
        device=str(usable_device(args.device)),
        threads=args.threads,
        engine=engine_settings(args),
        vllm=vllm,
    )


def run_member(args: argparse.Namespace) -> int:
    """Be a vision or a language server until told to stop."""
    import asyncio
    import signal

    from cascadevl.serving.logs import logging_to
    from cascadevl.serving.members import make_member
    from cascadevl.serving.processes import end_with

    at = args.features or ""
    member = make_member(member_settings(args, args.role, args.join, features_at=at))
    signal.signal(signal.SIGTERM, lambda *_: member.stop())
    if args.parent is not None:
        end_with(args.parent, member.stop)
    with logging_to(args.log):
        asyncio.run(member.run())
    return 0
