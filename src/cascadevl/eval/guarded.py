"""A responder behind the hallucination guard: what is left of its answers, measured as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cascadevl.engine.backends import Backend
from cascadevl.engine.guard import Guard, Said, verify
from cascadevl.engine.requests import Request
from cascadevl.eval.responder import Responder
from cascadevl.scoring.verdicts import Limits, Verification, calibrated_limits
from cascadevl.types import Message


@dataclass(frozen=True, slots=True, kw_only=True)
class Guarded:
    """Answers as somebody else does, without what the guard withdraws.

    Attributes:
        responder: Answers.
        backend: The model that is asked whether it is so.
        guard: Checks answers.
    """

    responder: Responder
    backend: Backend
    guard: Guard

    def __call__(self, conversations: Sequence[Sequence[Message]]) -> list[str]:
        """One answer for each conversation, in order."""
        return [each.text for each in self.verified(conversations)]

    def verified(self, conversations: Sequence[Sequence[Message]]) -> list[Verification]:
        """The same with every claim and its verdict."""
        answers = self.responder(conversations)
        return verify(
            self.backend,
            self.guard,
            [
                Said(
                    about=Request(prompt=self.guard.processor.prompt(list(conversation))),
                    question=conversation[-1].text,
                    answer=answer,
                )
                for conversation, answer in zip(conversations, answers, strict=True)
            ],
        )


def calibrated(
    guarded: Guarded,
    conversations: Sequence[Sequence[Message]],
    truth: Sequence[bool],
    *,
    precision: float,
) -> Limits:
    """Limits for a guard, by yes-or-no questions whose answers are known.

    To be chosen on questions that nothing is measured on afterwards.

    Args:
        guarded: The guard with the model that is asked.
        conversations: The questions.
        truth: Whether yes is right.
        precision: Share of the kept claims that must be true, and of the withdrawn that must be
            false.
    """
    yes = Guarded(responder=_yes, backend=guarded.backend, guard=guarded.guard)
    checks = [each.checks[0].probability for each in yes.verified(conversations)]
    known = [
        (chance, label) for chance, label in zip(checks, truth, strict=True) if chance is not None
    ]
    return calibrated_limits(
        [chance for chance, _ in known], [label for _, label in known], precision=precision
    )


def _yes(conversations: Sequence[Sequence[Message]]) -> list[str]:
    return ["yes" for _ in conversations]
