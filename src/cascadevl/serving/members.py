"""Vision and language servers made of a few words, in whatever process or host they are to run."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from cascadevl.data.processor import CascadeVLProcessor
from cascadevl.engine.engine import Engine
from cascadevl.engine.http_json import HttpServer
from cascadevl.engine.packed_weights import Weights, held
from cascadevl.engine.requests import EngineConfig
from cascadevl.engine.vllm import connect
from cascadevl.model.language_half import load_language_half
from cascadevl.model.loading import find
from cascadevl.model.modeling import CascadeVLForConditionalGeneration
from cascadevl.model.vision_half import load_vision_half
from cascadevl.serving.engine_thread import EngineThread
from cascadevl.serving.language_server import LanguageServer
from cascadevl.serving.member import Member, fingerprint
from cascadevl.serving.vision_server import VisionConfig, VisionServer
from cascadevl.serving.vllm_answers import VllmAnswers
from cascadevl.serving.wire import Role


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """What an engine is made of, and so far as it applies a vision server.

    Attributes:
        weights: How the weights are held.
        cache_bytes: For keys and values.
        batch_invariant: Whether every answer is computed as if it ran alone.
    """

    weights: Weights = "stored"
    cache_bytes: int = 2**30
    batch_invariant: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmSettings:
    """A vLLM server that computes instead of an engine.

    Attributes:
        url: Its base address.
        served_model: The model's name as it knows it; None for its only one.
        api_key_env: Environment variable with its key.
    """

    url: str
    served_model: str | None = None
    api_key_env: str = "OPENAI_API_KEY"


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberSettings:
    """What a server of one half is made of: plain values, which travel to other hosts.

    Attributes:
        role: Which half.
        model: The checkpoint, as its host finds it.
        front: Where the front is.
        features_at: Where a language server takes features.
        device: Computes.
        threads: Of torch; None leaves them.
        engine: Of a language server.
        vllm: Computes instead of an engine.
    """

    role: Role
    model: str
    front: str
    features_at: str = ""
    device: str = "cpu"
    threads: int | None = None
    engine: EngineSettings = EngineSettings()
    vllm: VllmSettings | None = None


def make_engine(
    model: CascadeVLForConditionalGeneration,
    processor: CascadeVLProcessor,
    settings: EngineSettings,
) -> Engine:
    """An engine.

    Args:
        model: Or its language half.
        processor: Its processor.
        settings: What it is made of.
    """
    config = EngineConfig(
        cache_bytes=settings.cache_bytes, batch_invariant=settings.batch_invariant
    )
    return Engine(held(model, settings.weights), processor, config)


def make_member(settings: MemberSettings) -> Member:
    """Open a half, and bind it to its front; nothing runs before `Member.run`.

    Args:
        settings: What it is made of.

    Raises:
        CheckpointError: If the checkpoint cannot be opened.
        RequestError: If a vLLM server cannot be reached.
    """
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    weights = fingerprint(Path(find(settings.model)))
    if settings.role == "language":
        return _language_server(settings, weights)
    model, _ = load_vision_half(settings.model, device=settings.device, embedding=False)
    held(model, settings.engine.weights)  # in the model itself
    config = VisionConfig(batch_invariant=settings.engine.batch_invariant)
    return VisionServer(model, settings.front, weights=weights, config=config)


def _language_server(settings: MemberSettings, weights: str) -> LanguageServer:
    vllm = settings.vllm
    model, processor = load_language_half(
        settings.model, device=settings.device, layers=vllm is None
    )
    answers = (
        EngineThread(make_engine(model, processor, settings.engine))
        if vllm is None
        else _vllm_answers(vllm, model, processor)
    )
    server = LanguageServer(
        answers,
        settings.front,
        settings.features_at,
        image_token_id=int(model.config.image_token_id),
        weights=weights,
    )
    if not isinstance(answers, EngineThread):
        answers.on_lost = server.stop  # the front asks others; a new start waits for vLLM
    return server


def _vllm_answers(
    settings: VllmSettings,
    model: CascadeVLForConditionalGeneration,
    processor: CascadeVLProcessor,
) -> VllmAnswers:
    http = HttpServer(url=settings.url, api_key=os.environ.get(settings.api_key_env))
    return VllmAnswers(connect(model, processor, http, served_model=settings.served_model))
