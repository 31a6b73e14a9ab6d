"""``cascadevl serve --role ...``: one server of a decoupled server, and who computes in it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cascadevl.cli.chat import usable_device

if TYPE_CHECKING:
    from cascadevl.data.processor import CascadeVLProcessor
    from cascadevl.engine.engine import Engine
    from cascadevl.model.modeling import CascadeVLForConditionalGeneration
    from cascadevl.serving.vllm_answers import VllmAnswers


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


def engine_of(
    args: argparse.Namespace,
    model: CascadeVLForConditionalGeneration,
    processor: CascadeVLProcessor,
) -> Engine:
    """The engine that the arguments describe.

    Args:
        args: Of the command.
        model: Or its language half.
        processor: Its processor.
    """
    from cascadevl.engine.engine import Engine
    from cascadevl.engine.packed_weights import pack
    from cascadevl.engine.requests import EngineConfig

    config = EngineConfig(cache_bytes=args.cache_bytes, batch_invariant=args.batch_invariant)
    held = model if args.weights == "stored" else pack(model, args.weights, release=True)
    return Engine(held, processor, config)


def use_threads(number: int) -> None:
    """Compute with so many threads from now on."""
    import torch

    torch.set_num_threads(number)


def run_member(args: argparse.Namespace) -> int:
    """Be a vision or a language server until told to stop."""
    import asyncio
    import signal

    from cascadevl.model.loading import find
    from cascadevl.serving.logs import logging_to
    from cascadevl.serving.member import Member, fingerprint
    from cascadevl.serving.processes import end_with

    if args.threads is not None:
        use_threads(args.threads)
    weights = fingerprint(Path(find(args.model)))
    make: Any = _vision_server if args.role == "vision" else _language_server
    member: Member = make(args, weights)
    signal.signal(signal.SIGTERM, lambda *_: member.stop())
    if args.parent is not None:
        end_with(args.parent, member.stop)
    with logging_to(args.log):
        asyncio.run(member.run())
    return 0


def _vision_server(args: argparse.Namespace, weights: str) -> Any:
    from cascadevl.model.vision_half import load_vision_half
    from cascadevl.serving.vision_server import VisionConfig, VisionServer

    device = usable_device(args.device)
    model, _ = load_vision_half(args.model, device=device, embedding=False)
    config = VisionConfig(batch_invariant=args.batch_invariant)
    return VisionServer(model, args.join, weights=weights, config=config)


def _language_server(args: argparse.Namespace, weights: str) -> Any:
    from cascadevl.model.language_half import load_language_half
    from cascadevl.serving.engine_thread import EngineThread
    from cascadevl.serving.language_server import LanguageServer

    device, asks = usable_device(args.device), args.vllm is not None
    model, processor = load_language_half(args.model, device=device, layers=not asks)
    answers = (
        _vllm_answers(args, model, processor)
        if asks
        else EngineThread(engine_of(args, model, processor))
    )
    server = LanguageServer(
        answers,
        args.join,
        args.features,
        image_token_id=int(model.config.image_token_id),
        weights=weights,
    )
    if not isinstance(answers, EngineThread):
        answers.on_lost = server.stop  # the front asks others; a new start waits for vLLM
    return server


def _vllm_answers(
    args: argparse.Namespace,
    model: CascadeVLForConditionalGeneration,
    processor: CascadeVLProcessor,
) -> VllmAnswers:
    import os

    from cascadevl.engine.http_json import HttpServer
    from cascadevl.engine.vllm import connect
    from cascadevl.serving.vllm_answers import VllmAnswers

    http = HttpServer(url=args.vllm, api_key=os.environ.get(args.api_key_env))
    return VllmAnswers(connect(model, processor, http, served_model=args.served_model))
