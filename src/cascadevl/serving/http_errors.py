"""Errors as OpenAI's clients read them: what is wrong, in which field, and what to do."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping

from fastapi import FastAPI, Request, Response
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException

from cascadevl.errors import (
    CascadeVLError,
    DataError,
    LogitsError,
    ServerError,
    UnavailableError,
)
from cascadevl.serving.openai_replies import ErrorDetail, ErrorReply, sent
from cascadevl.serving.openai_schema import REMEDIES, fields_of

CLIENT_GONE = 499
"""Stands in the numbers for a client that went away."""

LATER = {"Retry-After": "5"}
"""Of an answer that may be another in some seconds."""

_LOG = logging.getLogger(__name__)

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}


class Refusal(CascadeVLError):
    """An answer that is an error.

    Attributes:
        status: HTTP status.
        param: The field that is wrong.
        code: A short fixed word for the sort of problem.
        headers: Of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Keep the parts; the message says what is wrong, and what to do."""
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.headers = dict(headers or {})

    def body(self) -> bytes:
        """The error in OpenAI's form."""
        type_ = _TYPES.get(self.status, _TYPES[400 if self.status < 500 else 500])
        detail = ErrorDetail(message=str(self), type=type_, param=self.param, code=self.code)
        return sent(ErrorReply(error=detail))

    def response(self) -> Response:
        """The answer."""
        return Response(
            self.body(),
            status_code=self.status,
            headers=self.headers,
            media_type="application/json",
        )

    def event(self) -> bytes:
        """The error as the last event of a stream."""
        return b"data: " + self.body() + b"\n\n"


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


def refusal_of(error: CascadeVLError) -> Refusal:
    """The answer to a request that failed.

    Args:
        error: Why.
    """
    if isinstance(error, Refusal):
        return error
    if isinstance(error, UnavailableError):
        return Refusal(503, str(error), code="unavailable", headers=LATER)
    if isinstance(error, ServerError | LogitsError):
        return Refusal(500, str(error), code="answer_lost")
    code = error.kind if isinstance(error, DataError) else "invalid_value"
    return Refusal(400, str(error), code=code)


def refusal_of_body(error: ValidationError, model: type[BaseModel]) -> Refusal:
    """The answer to a body that does not have its form.

    Args:
        error: What pydantic found.
        model: The form.
    """
    found = error.errors(include_url=False, include_input=False, include_context=False)
    first = max(found, key=lambda each: len(each["loc"]))  # of a choice of forms, the nearest
    place = [str(each) for each in first["loc"] if "[" not in str(each)]
    param = ".".join(place) or None
    problem = first["msg"]
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(place[-1], fields_of(model), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return Refusal(400, f"unknown field {param!r}{hint}", param, "unknown_field")
    remedy = REMEDIES.get(place[0] if place else "")
    message = f"{param}: {problem}" if param else problem
    return Refusal(400, f"{message}; {remedy}" if remedy else message, param, "invalid_value")


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, CascadeVLError)
    return refusal_of(error).response()


async def _of_http(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    headers = error.headers or {}
    return Refusal(error.status_code, str(error.detail), headers=headers).response()


async def _unforeseen(request: Request, error: Exception) -> Response:
    _LOG.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return Refusal(500, "something is wrong with the server; its log says what").response()


def add_handlers(app: FastAPI) -> None:
    """Answer every error in OpenAI's form.

    Args:
        app: The application.
    """
    app.add_exception_handler(CascadeVLError, _refused)
    app.add_exception_handler(HTTPException, _of_http)
    app.add_exception_handler(Exception, _unforeseen)
