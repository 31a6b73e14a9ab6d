"""A conversation whose turns are answered by the best of several answers each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from cascadevl.engine.best_of_n import BestOfConfig, Candidate, Chosen, Selection, chosen, rounds
from cascadevl.engine.conversation import Session
from cascadevl.engine.draws import stream_of
from cascadevl.engine.requests import FinishReason
from cascadevl.types import Message


@dataclass(frozen=True, slots=True, kw_only=True)
class BestAnswer:
    """The best of several answers, all at once.

    Attributes:
        drawn: All of them, and which was chosen.
        select: By what.
    """

    drawn: Chosen
    select: str

    def __iter__(self) -> Iterator[str]:
        """Its one piece."""
        yield self.drawn.best.completion.text

    @property
    def finish_reason(self) -> FinishReason:
        """How it ended."""
        return self.drawn.best.completion.finish_reason

    @property
    def increments(self) -> tuple[float, ...]:
        """Position step with which each picture was read (V2PE)."""
        return self.drawn.best.completion.increments

    @property
    def num_tiles(self) -> int:
        """Tiles of the conversation's pictures."""
        return self.drawn.best.completion.usage.tiles

    @property
    def num_compressed(self) -> int:
        """Of them, those with fewer visual tokens than a full one."""
        return self.drawn.best.completion.usage.compressed_tiles

    @property
    def note(self) -> str:
        """How the choice came about, in words."""
        scores = sorted((each.score for each in self.drawn.candidates), reverse=True)
        others = ", ".join(f"{score:.2f}" for score in scores)
        what = "share of votes" if self.select == "vote" else f"score by {self.select}"
        return (
            f"the best of {len(scores)}, {what} {self.drawn.best.score:.2f} (all of them: {others})"
        )


@dataclass(kw_only=True, eq=False)
class BestSession:
    """Answers turns like a `Session`, each by the best of several answers.

    Attributes:
        session: Makes the requests; nothing is drawn by itself.
        config: How many are drawn.
        selection: Which one is given.
    """

    session: Session
    config: BestOfConfig
    selection: Selection

    def __post_init__(self) -> None:
        """Refuse to draw the same again and again.

        Raises:
            ConfigError: If several answers are drawn greedily.
        """
        self.config.check_temperature(self.session.sampling.temperature)

    def reset(self) -> None:
        """Forget the conversation."""
        self.session.reset()

    def ask(self, messages: Sequence[Message], /) -> BestAnswer:
        """Answer the last turn of a conversation.

        Args:
            messages: The whole conversation so far.

        Raises:
            DataError: If a message or picture cannot be used, or the question cannot be judged.
            RequestError: If the conversation does not fit the trained context.
        """
        request = self.session.request(messages)
        candidates: list[Candidate] = []
        for first, size in rounds(self.config.num_samples, self.config.round_size):
            left = self.config.num_samples - first
            if candidates and self.selection.is_settled(candidates, left):
                break
            seed = stream_of(request.sampling.seed, first)
            asked = replace(
                request, sampling=replace(request.sampling, seed=seed), num_samples=size
            )
            (new,) = self.session.engine.generate([asked])
            candidates = self.selection.judged(messages, candidates, new)
        return BestAnswer(drawn=chosen(candidates), select=self.config.select)
