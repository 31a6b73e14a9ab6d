"""Whatever answers: a model in this process today, an engine or a server later.

Evaluation knows responders only through this Protocol, so that the same suite measures a
checkpoint, a best-of-N scheme or a URL.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from cascadevl.data.processor import CascadeVLProcessor
from cascadevl.model.generation import answer
from cascadevl.model.modeling import CascadeVLForConditionalGeneration
from cascadevl.types import Message


@runtime_checkable
class Responder(Protocol):
    """Answers conversations."""

    def __call__(self, conversations: Sequence[Sequence[Message]]) -> list[str]:
        """One answer for each conversation, in order."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelResponder:
    """A model of this process, answering greedily unless a temperature is given.

    Attributes:
        model: The model.
        processor: Its processor.
        max_new_tokens: Longest answer.
        temperature: 0 for greedy answers.
        seed: Of sampled answers.
    """

    model: CascadeVLForConditionalGeneration
    processor: CascadeVLProcessor
    max_new_tokens: int = 64
    temperature: float = 0.0
    seed: int = 0

    def __call__(self, conversations: Sequence[Sequence[Message]]) -> list[str]:
        """Answer all conversations; pictures that several share are encoded once."""
        answers = answer(
            self.model,
            self.processor,
            conversations,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            seed=self.seed,
        )
        return [each.text for each in answers]
