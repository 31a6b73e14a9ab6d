"""What OpenAI's clients may ask: the bodies of requests, field by field.

These classes are the API's document too (``/openapi.json``). A field that is not known is an
error, because a wish that nobody reads is a wrong answer; fields that only name the user are taken
and not read; those of OpenAI that cannot be fulfilled here must have their neutral value.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, JsonValue

MAX_SAMPLES = 128
"""Most answers to one request (OpenAI's own limit)."""

_Samples: TypeAlias = Annotated[int, Field(ge=1, le=MAX_SAMPLES)]
_Tokens: TypeAlias = Annotated[int, Field(ge=1, le=2**31 - 1)]
_TokenId: TypeAlias = Annotated[int, Field(ge=0, le=2**31 - 1)]
_Zero: TypeAlias = Annotated[float, Field(ge=0, le=0)]


class _Strict(BaseModel):
    """Types as in JSON: no text for numbers."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class TextPart(_Strict):
    """Text within a message."""

    type: Literal["text"]
    text: str


class Address(_Strict):
    """Where a picture or video is: a data URL."""

    url: str


class ImagePart(_Strict):
    """A picture."""

    type: Literal["image_url"]
    image_url: Address


class VideoPart(_Strict):
    """A video."""

    type: Literal["video_url"]
    video_url: Address


_Part: TypeAlias = Annotated[TextPart | ImagePart | VideoPart, Field(discriminator="type")]


class SystemMessage(_Strict):
    """Instructions."""

    role: Literal["system", "developer"]
    content: str | list[TextPart]


class UserMessage(_Strict):
    """A question."""

    role: Literal["user"]
    content: str | Annotated[list[_Part], Field(min_length=1)]


class CalledFunction(_Strict):
    """What was called, with JSON text of its arguments."""

    name: str
    arguments: str


class Call(_Strict):
    """One call of a tool, of an earlier answer."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class AssistantMessage(_Strict):
    """An earlier answer."""

    role: Literal["assistant"]
    content: str | list[TextPart] | None = None
    reasoning_content: str | None = None
    tool_calls: list[Call] | None = None


class ToolMessage(_Strict):
    """What a tool returned."""

    role: Literal["tool"]
    content: str | list[TextPart]
    tool_call_id: str | None = None


_Message: TypeAlias = Annotated[
    SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")
]


class Function(_Strict):
    """A function that may be called."""

    name: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[a-zA-Z0-9_.-]+$")]
    description: str | None = None
    parameters: dict[str, JsonValue] | None = None
    strict: bool | None = None


class Tool(_Strict):
    """A tool; all of them are functions."""

    type: Literal["function"]
    function: Function


class _FunctionName(_Strict):
    name: str


class NamedTool(_Strict):
    """The one tool that must be called."""

    type: Literal["function"]
    function: _FunctionName


class TextFormat(_Strict):
    """Free text."""

    type: Literal["text"]


class JsonObjectFormat(_Strict):
    """Any JSON object."""

    type: Literal["json_object"]


class NamedSchema(_Strict):
    """A JSON schema with a name, which is not read."""

    model_config = ConfigDict(populate_by_name=True)

    name: str = "answer"
    description: str | None = None
    schema_: dict[str, JsonValue] = Field(alias="schema")
    strict: bool | None = None


class JsonSchemaFormat(_Strict):
    """JSON that follows a schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


_Format: TypeAlias = Annotated[
    TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")
]


class StreamOptions(_Strict):
    """What a stream brings beside the answer."""

    include_usage: bool = False
    include_obfuscation: bool | None = None


class Asking(_Strict):
    """What both ways to ask have in common."""

    model_config = ConfigDict(extra="forbid")

    model: str
    max_tokens: _Tokens | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: _Samples | None = None
    best_of: _Samples | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # Beyond OpenAI's, by the names that other servers give them.
    top_k: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    stop_token_ids: Annotated[list[_TokenId], Field(max_length=64)] | None = None
    ignore_eos: bool | None = None
    # Only their neutral values.
    frequency_penalty: _Zero | None = None
    presence_penalty: _Zero | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    # Taken and not read.
    user: str | None = None
    metadata: dict[str, JsonValue] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class ChatRequest(Asking):
    """The body of ``/v1/chat/completions``.

    Attributes:
        thinking: Whether to reason first; the answer is begun so that this is certain. Left out,
            the model does as it was taught.
        thinking_budget: Most tokens of reasoning; then its end is put in the model's mouth, and the
            answer goes on.
        select: With ``best_of``, by what answers are chosen: the steps of each as the server's
            reward model judges them (``prm``), the whole of each (``outcome``), or what most of
            them say (``vote``). Left out, the reward model if there is one.
        round_size: With ``best_of``, answers drawn before it is asked whether more are needed; a
            vote ends when its leader cannot be overtaken.
        stop_score: With ``round_size``, an answer of this score ends the drawing.
        increment: Position step of visual tokens (V2PE); left out, the model's own rule.
        verify: Whether the claims of the answer are held against the pictures and the server's
            documents; what was found comes with each choice.
        visual_budget: Which tiles a Flash model keeps full: ``full``, ``compressed``, a share
            (0.5 or ``50%``), ``threshold=P`` or ``threshold=P,quantile=Q``; left out, the server's
            default, or else the model's own thresholds.
    """

    messages: Annotated[list[_Message], Field(min_length=1)]
    max_completion_tokens: _Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: _Format | None = None
    thinking: bool | None = None
    thinking_budget: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    select: Literal["prm", "outcome", "vote"] | None = None
    round_size: _Samples | None = None
    stop_score: Annotated[float, Field(ge=0, le=1)] | None = None
    increment: Annotated[float, Field(gt=0, le=1)] | None = None
    visual_budget: Annotated[float, Field(ge=0, le=1)] | str | None = None
    verify: bool | None = None


class CompletionRequest(Asking):
    """The body of ``/v1/completions``: text, or its tokens, to be continued as it stands."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MAX_SAMPLES)]
        | Annotated[list[_TokenId], Field(min_length=1)]
        | Annotated[
            list[Annotated[list[_TokenId], Field(min_length=1)]],
            Field(min_length=1, max_length=MAX_SAMPLES),
        ]
    )
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: Literal[False] | None = None
    suffix: Literal[""] | None = None


REMEDIES: dict[str, str] = {
    "frequency_penalty": "only 0 is possible here; use repetition_penalty",
    "presence_penalty": "only 0 is possible here; use repetition_penalty",
    "logit_bias": "it is not possible here; leave it out",
    "echo": "it is not possible here; put the prompt before the answer yourself",
    "suffix": "it is not possible here; leave it out",
}
"""What to do about fields of OpenAI that cannot be fulfilled."""


def fields_of(model: type[BaseModel]) -> tuple[str, ...]:
    """Names of the fields of a body, for the nearest to a mistyped one."""
    return tuple(model.model_fields)


def json_schema_of(models: tuple[type[BaseModel], ...]) -> dict[str, Any]:
    """JSON schemas of models and all they are made of, as components of an OpenAPI document.

    Args:
        models: The models.
    """
    found: dict[str, Any] = {}
    for model in models:
        schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
        found |= schema.pop("$defs", {})
        found[model.__name__] = schema
    return found
