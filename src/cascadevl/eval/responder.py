"""Whatever answers: a model of this process, or a server behind a URL.

Evaluation knows responders only through this Protocol, so that the same suite measures a
checkpoint, a best-of-N scheme or a URL.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from cascadevl.data.processor import CascadeVLProcessor
from cascadevl.engine.conversation import answer
from cascadevl.model.modeling import CascadeVLForConditionalGeneration
from cascadevl.model.routing import VisualBudget
from cascadevl.types import Message


@runtime_checkable
class Responder(Protocol):
    """Answers conversations."""

    def __call__(self, conversations: Sequence[Sequence[Message]]) -> list[str]:
        """One answer for each conversation, in order."""
        ...


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer, and how it ended.

    Attributes:
        text: What was said, empty if nothing was.
        finish: ``"stop"`` if the responder came to an end, ``"length"`` if it was stopped at its
            limit of tokens, ``"refused"`` if this conversation cannot be answered at all.
        note: Why it was refused.
    """

    text: str
    finish: Literal["stop", "length", "refused"] = "stop"
    note: str = ""


@runtime_checkable
class Sampler(Protocol):
    """A responder that draws its answers, and says how each ended."""

    def sample(self, conversations: Sequence[Sequence[Message]], *, seed: int) -> list[Reply]:
        """One answer for each conversation, in order; the same seed gives the same answers.

        A conversation that occurs several times gets an answer of its own each time.
        """
        ...


def replies(
    responder: Responder, conversations: Sequence[Sequence[Message]], *, seed: int
) -> list[Reply]:
    """Answers of any responder; one that is no `Sampler` is taken to end all of its answers.

    Args:
        responder: Who answers.
        conversations: What is asked.
        seed: Of the draw, where the responder draws.
    """
    if isinstance(responder, Sampler):
        return responder.sample(conversations, seed=seed)
    return [Reply(text) for text in responder(conversations)]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelResponder:
    """A model of this process, answering greedily unless a temperature is given.

    Attributes:
        model: The model.
        processor: Its processor.
        max_new_tokens: Longest answer.
        temperature: 0 for greedy answers.
        top_p: Share of probability that answers are drawn from.
        seed: Of sampled answers.
        visual_budget: Which tiles are compressed, if the model has a router; None for its own
            thresholds.
    """

    model: CascadeVLForConditionalGeneration
    processor: CascadeVLProcessor
    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    visual_budget: VisualBudget | None = None

    def __call__(self, conversations: Sequence[Sequence[Message]]) -> list[str]:
        """Answer all conversations; pictures that several share are encoded once."""
        return [reply.text for reply in self.sample(conversations, seed=self.seed)]

    def sample(self, conversations: Sequence[Sequence[Message]], *, seed: int) -> list[Reply]:
        """The same with another seed, and with how each answer ended."""
        answers = answer(
            self.model,
            self.processor,
            conversations,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=seed,
            visual_budget=self.visual_budget,
        )
        return [Reply(each.text, each.finish_reason) for each in answers]
