"""What the scheduler speaks of: answers on their way, and the plan of one step."""

from __future__ import annotations

from dataclasses import dataclass, field

from cascadevl.engine.cache import PromptTokens

NO_LANE = -1
"""Lane of a job that holds no pages."""


@dataclass(slots=True, eq=False)
class Job:
    """One answer on its way.

    Attributes:
        arrival: Number of the request.
        sample: Which of its answers.
        prompt: What is to be read.
        keys: Keys of the prompt's full pages.
        max_tokens: Most tokens of the answer.
        siblings: Samples that begin when this job has read the prompt.
        generated: Tokens of the answer so far.
        pages: Its pages, in the order of the tokens.
        computed: Tokens whose keys and values are in the pages.
        cached: Tokens of the prompt that were found in pages when it was admitted first.
        lane: Its row in the scheduler's table of pages; negative while it has no pages.
    """

    arrival: int
    sample: int
    prompt: PromptTokens
    keys: tuple[bytes, ...]
    max_tokens: int
    siblings: tuple[int, ...] = ()
    generated: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    computed: int = 0
    cached: int | None = None
    lane: int = NO_LANE

    @property
    def order(self) -> tuple[int, int]:
        """Who was there first."""
        return self.arrival, self.sample

    @property
    def num_tokens(self) -> int:
        """Tokens that are known: the prompt and the answer so far."""
        return len(self.prompt.ids) + len(self.generated)

    @property
    def is_running(self) -> bool:
        """Whether it holds pages."""
        return self.lane != NO_LANE


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens of one job, from ``start`` to before ``stop``, to be computed in one step."""

    job: Job
    start: int
    stop: int


@dataclass(slots=True, eq=False)
class Plan:
    """One step. Its tokens stand in a row: those of ``decodes``, one each, then the chunks.

    Attributes:
        decodes: Jobs that compute the one token after those they have computed.
        chunks: Stretches of prompts, or of answers that are computed again.
        copies: Pages to be copied before anything is computed, as (from, to).
        sampled: Jobs that take a new token after the step.
        rows: Which token of the row each of them continues.
        forks: Jobs that begin after the step with the pages of another: (of whom, the new job).
        preempted: How many jobs lost their pages for this step.
    """

    decodes: list[Job] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    sampled: list[Job] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    forks: list[tuple[Job, Job]] = field(default_factory=list)
    preempted: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens computed in the step."""
        return len(self.decodes) + sum(chunk.stop - chunk.start for chunk in self.chunks)
