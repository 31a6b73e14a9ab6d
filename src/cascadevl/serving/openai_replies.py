"""What OpenAI's clients read: the bodies of replies, and of the events of a stream.

What goes beyond OpenAI's stands in fields of its own: ``visual_tokens``, ``tiles``,
``compressed_tiles`` and ``tokens_per_tile`` of the prompt, ``reasoning_content`` beside the content
of an answer, and the ``abilities`` of a model.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

from pydantic import BaseModel

from cascadevl.scoring.verdicts import Finding, Verdict

FinishReason: TypeAlias = Literal["stop", "length", "tool_calls"]

LEAST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON cannot say (OpenAI's number)."""


class PromptDetails(BaseModel):
    """Parts of a prompt's tokens."""

    cached_tokens: int
    visual_tokens: int
    tiles: int
    compressed_tiles: int
    tokens_per_tile: list[int]


class CompletionDetails(BaseModel):
    """Parts of the tokens of answers.

    Attributes:
        reasoning_tokens: Those up to the end of the reasoning, the marks around it included.
    """

    reasoning_tokens: int


class Usage(BaseModel):
    """What a request took; the tokens of all its answers together.

    Attributes:
        completion_tokens_details: Of answers in a chat, where reasoning is told apart.
    """

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails | None = None


class TopLogprob(BaseModel):
    """A token that was probable."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A token that was taken."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Of all tokens of an answer, its reasoning and calls included."""

    content: list[TokenLogprob]


class FunctionCall(BaseModel):
    """What is called; a piece of it in a stream."""

    name: str | None = None
    arguments: str | None = None


class ToolCall(BaseModel):
    """A call of a tool; a piece of it in a stream, where ``index`` says of which."""

    index: int | None = None
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionCall


class ChatAnswer(BaseModel):
    """An answer, or a piece of it in a stream."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None


class StepScore(BaseModel):
    """A step of an answer, and how likely all is right up to it."""

    text: str
    score: float


class ClaimEvidence(BaseModel):
    """What a source says of a claim: the picture, or a passage of a document."""

    source: str
    finding: Finding
    probability: float | None
    passage: str | None


class CheckedClaim(BaseModel):
    """A claim of an answer, what becomes of it, and why."""

    text: str
    question: str
    is_negative: bool
    verdict: Verdict
    probability: float | None
    reason: str
    evidence: list[ClaimEvidence]


class VerificationReply(BaseModel):
    """An answer whose claims were checked.

    Attributes:
        text: The answer without what is withdrawn.
        claims: All of them, in order.
        num_probes: Questions that were asked for it; ``usage`` does not count them.
    """

    text: str
    claims: list[CheckedClaim]
    num_probes: int


class ChatChoice(BaseModel):
    """One of the answers.

    Attributes:
        verification: With ``verify``, its claims.
        score: With ``best_of``, what speaks for it: the reward model's score, or its share of the
            votes. The best one comes first.
        step_scores: With a process reward model, each of its steps.
    """

    index: int
    message: ChatAnswer
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    score: float | None = None
    step_scores: list[StepScore] | None = None
    verification: VerificationReply | None = None


class ChatCompletion(BaseModel):
    """The reply of ``/v1/chat/completions``.

    Attributes:
        num_drawn: With ``best_of``, answers that were drawn; ``usage`` counts all of them.
    """

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    num_drawn: int | None = None


class ChatDelta(BaseModel):
    """A piece of one of the answers.

    Attributes:
        score: With ``best_of``, in the event that ends it: as in `ChatChoice`.
        step_scores: The same.
        verification: With ``verify``, its claims, in an event of their own after its end.
    """

    index: int
    delta: ChatAnswer
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    score: float | None = None
    step_scores: list[StepScore] | None = None
    verification: VerificationReply | None = None


class ChatChunk(BaseModel):
    """One event of a stream of answers.

    Attributes:
        num_drawn: With ``best_of``, in the events that end answers: how many were drawn.
    """

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatDelta]
    usage: Usage | None = None
    num_drawn: int | None = None


class TextLogprobs(BaseModel):
    """Of the tokens of a continued text, in the older form."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class TextChoice(BaseModel):
    """One continuation, or a piece of it in a stream."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class TextCompletion(BaseModel):
    """The reply of ``/v1/completions``, and one event of its stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage | None = None


class Abilities(BaseModel):
    """What a client may want to know of a model and its server beforehand.

    Attributes:
        tile_px: Side of a tile.
        max_tiles: Most tiles of a picture, the thumbnail not counted.
        thumbnail: Whether a picture of several tiles has one.
        share_tiles: Whether the pictures of a conversation share ``max_tiles``.
        tokens_per_tile: Visual tokens of a full tile.
        routes: Whether tiles can be compressed (``visual_budget``).
        selects: What the best of several answers can be chosen by.
    """

    tile_px: int
    max_tiles: int
    thumbnail: bool
    share_tiles: bool
    tokens_per_tile: int
    routes: bool
    selects: list[Literal["vote", "prm", "outcome"]]


class Model(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int | None
    abilities: Abilities


class ModelList(BaseModel):
    """The reply of ``/v1/models``."""

    object: Literal["list"]
    data: list[Model]


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    """The reply to a request that failed."""

    error: ErrorDetail


class State(BaseModel):
    """The reply of ``/health`` and ``/ready``."""

    status: str


def sent(reply: BaseModel) -> bytes:
    """A reply as JSON, without the fields that nobody set: so null is sent where it says something.

    Args:
        reply: The reply, or an event of a stream.
    """
    return reply.model_dump_json(exclude_unset=True).encode()
