"""Conversations that share a beginning, written once: what is common, and the rest of each.

Several branches of a record share its messages. A branch whose first turn has the role of the last
shared turn goes on with that turn; otherwise the shared turn is complete. Text after the last
picture of a shared turn that goes on is repeated in every branch, because the tokens at its end
depend on how the branch begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cascadevl.data.conversation import Piece, Template, render
from cascadevl.types import Message


@dataclass(frozen=True, slots=True)
class BranchWriter:
    """Writes training texts as pieces.

    Attributes:
        template: Conversation template.
        text_end: What stands, trained, at the end of a ``pretrain`` document.
    """

    template: Template
    text_end: str

    def segments(
        self, shared: Sequence[Message], branches: Sequence[Sequence[Message]], *, system: str
    ) -> list[list[Piece]]:
        """Pieces of segment 0 and of every branch; of segment 0 alone where there are none.

        Args:
            shared: The messages that all branches begin with.
            branches: What follows them, each on its own.
            system: System message; empty for no system turn.
        """
        if not branches:
            return [self._finished(shared, system)]
        alone = []
        border: int | None = None
        for branch in branches:
            goes_on = bool(shared and branch) and shared[-1].role == branch[0].role
            turns = [*shared, *branch]
            if goes_on:
                whole_turn = replace(shared[-1], parts=shared[-1].parts + branch[0].parts)
                turns = [*shared[:-1], whole_turn, *branch[1:]]
            beginning = render(
                shared, self.template, system=system, end="open" if goes_on else "followed"
            )
            alone.append(self._finished(turns, system))
            in_common = _num_equal(beginning, alone[-1])
            border = in_common if border is None else min(border, in_common)
        return [alone[0][:border], *(pieces[border:] for pieces in alone)]

    def _finished(self, turns: Sequence[Message], system: str) -> list[Piece]:
        pieces = render(turns, self.template, system=system)
        if turns and turns[0].role == "pretrain":
            pieces.append(Piece(self.text_end, trained=True))
        return pieces


def _num_equal(beginning: Sequence[Piece], whole: Sequence[Piece]) -> int:
    """How many leading pieces are the same; pictures by identity, never by their pixels."""
    number = 0
    for one, other in zip(beginning, whole, strict=False):
        same = one == other if isinstance(one.content, str) else one.content is other.content
        if not same:
            break
        number += 1
    return number
