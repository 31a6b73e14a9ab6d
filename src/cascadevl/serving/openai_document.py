"""The OpenAPI document: bodies are read in threads, so they are described here by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from cascadevl.serving.openai_replies import ErrorReply
from cascadevl.serving.openai_schema import ChatRequest, CompletionRequest, json_schema_of

BODIES: dict[str, type[BaseModel]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
}
"""Forms of the bodies, by their paths."""

_ERRORS = {
    400: "The request cannot be answered as asked",
    401: "No valid API key",
    404: "There is no such model",
    413: "The body is too long",
    415: "The body is not JSON",
    429: "Too many requests in hand; ask again later",
    500: "The answer was lost",
    503: "The server is about to stop, lacks a part at the moment, or is broken",
}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """How a route may fail, for its description.

    Args:
        *statuses: HTTP statuses.
    """
    return {status: {"model": ErrorReply, "description": _ERRORS[status]} for status in statuses}


class ApiApp(FastAPI):
    """An application that describes the bodies of its requests."""

    def openapi(self) -> dict[str, Any]:
        """The document, which is made once."""
        if not self.openapi_schema:
            document = get_openapi(title=self.title, version=self.version, routes=self.routes)
            schemas = document["components"]["schemas"]
            schemas.update(json_schema_of(tuple(BODIES.values())))
            for name in ("HTTPValidationError", "ValidationError"):
                schemas.pop(name, None)  # FastAPI's own form of errors, which is never sent
            for path, operations in document["paths"].items():
                for operation in operations.values():
                    operation["responses"].pop("422", None)
                if path in BODIES:
                    operations["post"]["requestBody"] = _body(BODIES[path])
            self.openapi_schema = document
        return self.openapi_schema


def _body(model: type[BaseModel]) -> Mapping[str, Any]:
    reference = {"$ref": f"#/components/schemas/{model.__name__}"}
    return {"required": True, "content": {"application/json": {"schema": reference}}}
