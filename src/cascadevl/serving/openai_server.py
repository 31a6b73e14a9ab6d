"""The HTTP API, in OpenAI's form: what is asked where, and what comes back.

Everything that takes time happens elsewhere: bodies are read and pictures cut in threads, answers
are computed by whoever implements `Answers`. A client that goes away calls its request off.
"""

from __future__ import annotations

from typing import Any

from fastapi import Request, Response
from fastapi.responses import StreamingResponse

from cascadevl.serving.api import Api
from cascadevl.serving.http_errors import Refusal, add_handlers
from cascadevl.serving.openai_document import ApiApp, errors
from cascadevl.serving.openai_prompts import Asker
from cascadevl.serving.openai_replies import (
    Abilities,
    ChatCompletion,
    Model,
    ModelList,
    State,
    TextCompletion,
    sent,
)
from cascadevl.version import __version__

_JSON = "application/json"
_STREAM: dict[str, Any] = {"content": {"text/event-stream": {"schema": {"type": "string"}}}}


def make_app(api: Api) -> ApiApp:
    """The application.

    Args:
        api: What its routes share.
    """
    app = ApiApp(title="cascadevl", version=__version__)
    add_handlers(app)
    _add_answers(app, api)
    _add_models(app, api)
    _add_state(app, api)
    return app


def _add_answers(app: ApiApp, api: Api) -> None:
    failures = errors(400, 401, 404, 413, 415, 429, 500, 503)

    @app.post(
        "/v1/chat/completions",
        responses={200: {"model": ChatCompletion, **_STREAM}, **failures},
        response_class=StreamingResponse,
    )
    async def chat_completions(request: Request) -> Response:
        """Answer a conversation."""
        return await api.chat(request)

    @app.post(
        "/v1/completions",
        responses={200: {"model": TextCompletion, **_STREAM}, **failures},
        response_class=StreamingResponse,
    )
    async def completions(request: Request) -> Response:
        """Continue texts."""
        return await api.completions(request)


def _add_models(app: ApiApp, api: Api) -> None:
    def model() -> Model:
        return Model(
            id=api.config.model_name,
            object="model",
            created=api.started,
            owned_by="cascadevl",
            max_model_len=api.asker.config.trained_context,
            abilities=_abilities(api.asker),
        )

    @app.get("/v1/models", responses={200: {"model": ModelList}, **errors(401)})
    async def models() -> Response:
        """The models there are."""
        return Response(sent(ModelList(object="list", data=[model()])), media_type=_JSON)

    @app.get("/v1/models/{name:path}", responses={200: {"model": Model}, **errors(401, 404)})
    async def one_model(name: str) -> Response:
        """One of them."""
        api.check_model(name)
        return Response(sent(model()), media_type=_JSON)


def _abilities(asker: Asker) -> Abilities:
    settings = asker.processor.settings
    return Abilities(
        tile_px=settings.tiling.tile_px,
        max_tiles=settings.tiling.max_tiles,
        thumbnail=settings.tiling.thumbnail,
        share_tiles=settings.share_tiles,
        tokens_per_tile=settings.tokens_per_tile,
        routes=asker.config.flash_mode,
        selects=["prm", "outcome", "vote"] if asker.critics.has_reward_model else ["vote"],
    )


def _add_state(app: ApiApp, api: Api) -> None:
    @app.get("/health", responses={200: {"model": State}, **errors(503)})
    async def health() -> Response:
        """Whether the server works."""
        if (failure := api.answers.failure) is not None:
            raise Refusal(503, failure, code="broken")
        return Response(sent(State(status="ok")), media_type=_JSON)

    @app.get("/ready", responses={200: {"model": State}, **errors(503)})
    async def ready() -> Response:
        """Whether it takes requests."""
        if (reason := api.unready) is not None:
            raise reason
        if (missing := api.answers.unready) is not None:
            raise Refusal(503, missing, code="not_ready")
        return Response(sent(State(status="ready")), media_type=_JSON)

    @app.get("/metrics", responses={200: {"content": {"text/plain": {}}}, **errors(401)})
    async def metrics() -> Response:
        """Numbers for Prometheus."""
        return Response(api.metrics.text(), media_type="text/plain; version=0.0.4")
