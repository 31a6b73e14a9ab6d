"""Who answers: the arguments that choose a backend, and the backend that they name."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, Any

from cascadevl.cli.arguments import byte_size, positive_int

if TYPE_CHECKING:
    import torch

    from cascadevl.data.processor import CascadeVLProcessor
    from cascadevl.engine.backends import Backend
    from cascadevl.engine.engine import Engine


def add_backend(parser: argparse.ArgumentParser) -> None:
    """Describe the arguments.

    Args:
        parser: Gets them, and has ``--model``.
    """
    group = parser.add_argument_group("who answers")
    group.add_argument(
        "--backend",
        default="engine",
        metavar="B",
        help="engine (the default), transformers (slow, the reference), or the address of a vLLM "
        "server with the language half, as http://localhost:8000/v1",
    )
    group.add_argument("--served-model", metavar="NAME", help="as the server knows it, if several")
    group.add_argument(
        "--api-key-env",
        metavar="NAME",
        default="OPENAI_API_KEY",
        help="environment variable with the server's key (OPENAI_API_KEY)",
    )
    group.add_argument(
        "--concurrency", type=positive_int, default=16, metavar="N", help="requests at a time (16)"
    )
    group.add_argument(
        "--timeout", type=float, default=600.0, metavar="S", help="of the server, in seconds (600)"
    )
    add_computing(group)


def add_computing(group: argparse._ArgumentGroup) -> None:
    """How a model of ours computes.

    Args:
        group: Gets the arguments.
    """
    group.add_argument(
        "--cache-bytes",
        type=byte_size,
        default=2**30,
        metavar="N",
        help="memory of the engine for keys and values, as 500MB or 4GB (default: 1 GiB)",
    )
    group.add_argument(
        "--weights",
        choices=("stored", "packed", "int8"),
        default="stored",
        help="as stored (default), packed for a CPU, or the language half in int8",
    )
    group.add_argument(
        "--batch-invariant",
        action="store_true",
        help="compute every answer as if it ran alone, to the bit; slower",
    )
    group.add_argument("--device", default="cpu", help="cpu (the default), cuda, ...")


def open_backend(args: argparse.Namespace) -> tuple[Backend, CascadeVLProcessor]:
    """The backend that the arguments name, and the processor of its model.

    Args:
        args: With those of `add_backend`, and ``model``.

    Raises:
        CheckpointError: If the model cannot be opened.
        ConfigError: If there is no such backend or device.
        RequestError: If a server cannot be reached.
    """
    from cascadevl.cli.chat import usable_device
    from cascadevl.errors import ConfigError

    device = usable_device(args.device)
    if args.backend in ("engine", "transformers"):
        return _own_backend(args, device)
    if "://" not in args.backend:
        raise ConfigError(
            f"there is no backend {args.backend!r}; give engine, transformers, or the address of "
            f"a vLLM server as http://localhost:8000/v1"
        )
    from cascadevl.engine.http_json import HttpServer
    from cascadevl.engine.packed_weights import held
    from cascadevl.engine.vllm import connect
    from cascadevl.model.vision_half import load_vision_half

    key = os.environ.get(args.api_key_env)
    server = HttpServer(url=args.backend, api_key=key, timeout_s=args.timeout)
    half, processor = load_vision_half(args.model, device=device)
    held(half, args.weights)  # in the model itself
    served, most = args.served_model, args.concurrency
    return connect(half, processor, server, served_model=served, concurrency=most), processor


def _own_backend(
    args: argparse.Namespace, device: torch.device
) -> tuple[Backend, CascadeVLProcessor]:
    import cascadevl

    model, processor = cascadevl.load(args.model, device=device)
    if args.backend == "transformers":
        from cascadevl.engine.transformers_backend import TransformersBackend

        return TransformersBackend(model=model, processor=processor), processor
    from cascadevl.engine.engine import Engine
    from cascadevl.engine.engine_backend import EngineBackend
    from cascadevl.engine.packed_weights import held
    from cascadevl.engine.requests import EngineConfig

    config = EngineConfig(cache_bytes=args.cache_bytes, batch_invariant=args.batch_invariant)
    return EngineBackend(engine=Engine(held(model, args.weights), processor, config)), processor


def engine_of(backend: Backend) -> Engine | None:
    """The engine of a backend, if it is one of this process.

    Args:
        backend: From `open_backend`.
    """
    from cascadevl.engine.engine_backend import EngineBackend

    return backend.engine if isinstance(backend, EngineBackend) else None


def backend_facts(args: argparse.Namespace) -> dict[str, Any]:
    """What answers depend on beside their configuration; a server may move to another address.

    Args:
        args: With those of `add_backend`, and ``model``.
    """
    kind = "vllm" if "://" in args.backend else args.backend
    return {"model": args.model, "backend": kind, "weights": args.weights}
