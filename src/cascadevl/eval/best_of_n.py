"""Best of N as a responder: what it gives in an examination, and how each answer ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cascadevl.engine.best_of_n import BestOfN
from cascadevl.eval.responder import Reply
from cascadevl.types import Message


@dataclass(frozen=True, slots=True)
class BestOfNResponder:
    """Answers by the best of several, as a `Responder` and a `Sampler`.

    Attributes:
        best_of_n: Draws and chooses.
    """

    best_of_n: BestOfN

    def __call__(self, conversations: Sequence[Sequence[Message]]) -> list[str]:
        """The best answer to each conversation, in order."""
        return self.best_of_n(conversations)

    def sample(self, conversations: Sequence[Sequence[Message]], *, seed: int) -> list[Reply]:
        """The same with another seed, and with how each answer ended."""
        replies = []
        for each in self.best_of_n.choose(conversations, seed=seed):
            completion = each.best.completion
            assert completion.finish_reason != "cancelled", "outcomes are answers that have ended"
            replies.append(Reply(completion.text, completion.finish_reason))
        return replies
