"""Best of N: several answers are drawn, and one of them is given.

InternVL3 report, section 2.5; InternVL3.5's parallel thinking. Which one is a `Selection`: the
highest score of a process reward model, or of an outcome reward, or the answer that most samples
agree on (self-consistency). Drawn in rounds, answers need not all be drawn: a vote ends when its
leader cannot be overtaken, a search for a good score when one is found (docs/decisions/0037).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol, TypeAlias, runtime_checkable

from cascadevl.data.processor import CascadeVLProcessor
from cascadevl.engine.backends import Backend, generate
from cascadevl.engine.draws import stream_of
from cascadevl.engine.process_reward import SolutionScore
from cascadevl.engine.requests import Completion, Request
from cascadevl.engine.sampling import SamplingParams
from cascadevl.errors import ConfigError, DataError
from cascadevl.model.v2pe import Increments
from cascadevl.scoring.voting import ballot, is_decided, tally
from cascadevl.types import Message

Select: TypeAlias = Literal["prm", "outcome", "vote"]
"""By what an answer is chosen: a process reward model, the same of whole answers, or a vote."""

FAULTS_OF_TEXTS = frozenset(("control_token", "encoding", "image_count"))
"""Kinds of `DataError` with which a scorer refuses an answer, and not the question."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BestOfConfig:
    """How many answers are drawn to a question, and by what one is chosen.

    Attributes:
        num_samples: N, the most answers drawn.
        select: By what is chosen.
        round_size: Answers drawn before it is asked whether more are needed; None draws all at
            once. A vote then ends when its leader cannot be overtaken.
        stop_score: With a reward model, an answer of this score ends the drawing.
    """

    num_samples: int = 8  # both reports
    select: Select = "prm"
    round_size: int | None = None
    stop_score: float | None = None

    def __post_init__(self) -> None:
        """Refuse what draws nothing, or what would not be read.

        Raises:
            ConfigError: If a number is out of range, or two wishes exclude each other.
        """
        _check_rounds(self.num_samples, self.round_size)
        if self.stop_score is None:
            return
        if self.select == "vote":
            raise ConfigError("stop_score is given, but a vote has no scores; leave it out")
        if self.round_size is None:
            raise ConfigError(
                "stop_score is given, but all answers are drawn at once; say with round_size how "
                "many are drawn before the best of them is looked at"
            )

    def check_temperature(self, temperature: float) -> None:
        """Refuse to draw the same answer again and again.

        Raises:
            ConfigError: If several answers are drawn greedily.
        """
        _check_temperature(self.num_samples, temperature)


def rounds(num_samples: int, round_size: int | None) -> Iterator[tuple[int, int]]:
    """Number of the first answer and number of answers of each round.

    Args:
        num_samples: Most answers.
        round_size: Answers of a round; None for all.
    """
    size = round_size or num_samples
    for first in range(0, num_samples, size):
        yield first, min(size, num_samples - first)


def _check_rounds(num_samples: int, round_size: int | None) -> None:
    if num_samples < 1:
        raise ConfigError(f"num_samples is {num_samples}; it must be at least 1")
    if round_size is not None and round_size < 1:
        raise ConfigError(f"round_size is {round_size}; it must be at least 1, or None")


def _check_temperature(num_samples: int, temperature: float) -> None:
    if num_samples > 1 and temperature == 0:
        raise ConfigError(
            f"temperature is 0, so that all {num_samples} answers would be the same; use 0.6 or 0.7"
        )


@runtime_checkable
class Scorer(Protocol):
    """Scores several solutions of one question; `ProcessRewardModel` is one."""

    def __call__(self, prompt: Sequence[Message], solutions: Sequence[str]) -> list[SolutionScore]:
        """Scores in order.

        Raises:
            DataError: If one of them cannot be judged.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One of the answers that were drawn.

    Attributes:
        completion: The answer.
        score: What speaks for it: P("+") aggregated over its steps, or its share of the votes.
        steps: Its steps as they were judged; empty under voting.
        step_scores: P("+") of each.
    """

    completion: Completion
    score: float
    steps: tuple[str, ...] = ()
    step_scores: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """The answers to one question, and which is given.

    Attributes:
        candidates: In the order in which they were drawn.
        index: The chosen one.
    """

    candidates: tuple[Candidate, ...]
    index: int

    @property
    def best(self) -> Candidate:
        """The chosen one."""
        return self.candidates[self.index]


@runtime_checkable
class Selection(Protocol):
    """Which answer is given, and when no more are needed."""

    def judged(
        self, prompt: Sequence[Message], before: Sequence[Candidate], new: Sequence[Completion]
    ) -> list[Candidate]:
        """All answers with what speaks for them.

        Args:
            prompt: What was asked.
            before: Those of earlier rounds.
            new: Those that were drawn now.
        """
        ...

    def is_settled(self, candidates: Sequence[Candidate], num_left: int) -> bool:
        """Whether further answers are not needed.

        Args:
            candidates: All that were drawn so far.
            num_left: How many more may be drawn.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ByReward:
    """Takes the answer with the highest score.

    Attributes:
        scorer: A process reward model; with ``StepRules(max_steps=1)`` an outcome reward.
        stop_score: An answer of this score is good enough to stop at
            (`cascadevl.scoring.voting.calibrated_score`); None draws all.
    """

    scorer: Scorer
    stop_score: float | None = None

    def judged(
        self, prompt: Sequence[Message], before: Sequence[Candidate], new: Sequence[Completion]
    ) -> list[Candidate]:
        """Score the new answers; one whose text cannot be judged gets 0.

        Raises:
            DataError: If the question cannot be judged.
        """
        texts = [each.text for each in new]
        try:
            scores = self.scorer(prompt, texts)
        except DataError as error:
            _check_text_is_at_fault(error)
            scores = [self._alone(prompt, text) for text in texts]
        return [*before, *map(_scored, new, scores)]

    def _alone(self, prompt: Sequence[Message], text: str) -> SolutionScore:
        try:
            return self.scorer(prompt, [text])[0]
        except DataError as error:
            _check_text_is_at_fault(error)
            return SolutionScore(score=0.0, steps=(), step_scores=())

    def is_settled(self, candidates: Sequence[Candidate], num_left: int) -> bool:
        """Whether a finished answer has the score that is asked for."""
        if self.stop_score is None:
            return num_left == 0
        ended = [each.score for each in candidates if _has_ended(each.completion)]
        return num_left == 0 or max(ended, default=-1.0) >= self.stop_score


def _check_text_is_at_fault(error: DataError) -> None:
    if error.kind not in FAULTS_OF_TEXTS:
        raise error


def _scored(completion: Completion, score: SolutionScore) -> Candidate:
    return Candidate(
        completion=completion,
        score=score.score,
        steps=score.steps,
        step_scores=score.step_scores,
    )


@dataclass(frozen=True, slots=True)
class ByVotes:
    """Takes an answer that says what most of them say: the first one that does."""

    def judged(
        self, prompt: Sequence[Message], before: Sequence[Candidate], new: Sequence[Completion]
    ) -> list[Candidate]:
        """Count the votes anew; an answer without a final one has none."""
        del prompt
        every = [*(each.completion for each in before), *new]
        ballots = _ballots(every)
        votes = dict(tally(ballots))
        return [
            Candidate(completion=each, score=votes.get(vote or "", 0) / len(every))
            for each, vote in zip(every, ballots, strict=True)
        ]

    def is_settled(self, candidates: Sequence[Candidate], num_left: int) -> bool:
        """Whether the leader can no longer be overtaken."""
        return is_decided(_ballots([each.completion for each in candidates]), num_left)


def _ballots(completions: Sequence[Completion]) -> list[str | None]:
    return [ballot(each.text) if _has_ended(each) else None for each in completions]


def _has_ended(completion: Completion) -> bool:
    return completion.finish_reason == "stop"


def ranked(candidates: Sequence[Candidate]) -> list[int]:
    """Places of candidates, the best first: those that came to an end, by their scores.

    Args:
        candidates: In the order in which they were drawn; of equals the first is better.
    """
    return sorted(
        range(len(candidates)),
        key=lambda n: (not _has_ended(candidates[n].completion), -candidates[n].score, n),
    )


def chosen(candidates: Sequence[Candidate]) -> Chosen:
    """The best of some candidates: of those that came to an end, if any did, the highest score.

    Args:
        candidates: In the order in which they were drawn; of equals the first is taken.
    """
    return Chosen(candidates=tuple(candidates), index=ranked(candidates)[0])


def _sampling() -> SamplingParams:
    return SamplingParams(temperature=0.7, max_tokens=4096)  # VisualPRM's best of 8


@dataclass(frozen=True, slots=True, kw_only=True)
class BestOfN:
    """Answers conversations by the best of several answers each.

    Attributes:
        backend: Draws answers; all of one question share its prompt.
        processor: Makes prompts.
        selection: Which answer is given.
        num_samples: N, the most answers drawn to a question (both reports: 8).
        round_size: Answers drawn before it is asked whether more are needed; None draws all at
            once.
        sampling: How tokens are drawn. Every question and round has a random stream of its own.
        system: System message of conversations without one; the model's if None.
        thinking: Whether to reason first, through the system message.
        force_thinking: Whether answers are begun so that they do, or do not.
        thinking_budget: Most tokens of reasoning; see `Request`.
        increments: Position step of visual tokens; the model's if None.
    """

    backend: Backend
    processor: CascadeVLProcessor
    selection: Selection
    num_samples: int = 8
    round_size: int | None = None
    sampling: SamplingParams = field(default_factory=_sampling)
    system: str | None = None
    thinking: bool | None = None
    force_thinking: bool = False
    thinking_budget: int | None = None
    increments: Increments | None = None

    def __post_init__(self) -> None:
        """Refuse what draws nothing, or the same again and again.

        Raises:
            ConfigError: If a number is out of range, or several answers are drawn greedily.
        """
        _check_rounds(self.num_samples, self.round_size)
        _check_temperature(self.num_samples, self.sampling.temperature)

    def __call__(self, conversations: Sequence[Sequence[Message]]) -> list[str]:
        """The best answer to each conversation, in order."""
        every = self.choose(conversations, seed=self.sampling.seed)
        return [each.best.completion.text for each in every]

    def choose(self, conversations: Sequence[Sequence[Message]], *, seed: int) -> list[Chosen]:
        """All answers to each conversation, with the chosen one named; the same for the same seed.

        Args:
            conversations: Each ends with a question.
            seed: Of the draws.

        Raises:
            DataError: If a conversation or picture cannot be used.
            RequestError: If one cannot be answered.
        """
        found: list[list[Candidate]] = [[] for _ in conversations]
        examples = [
            self.processor.prompt(
                each,
                system=self.system,
                thinking=self.thinking,
                force_thinking=self.force_thinking,
            )
            for each in conversations
        ]
        for first, size in rounds(self.num_samples, self.round_size):
            left = self.num_samples - first
            open_ = [
                place
                for place, candidates in enumerate(found)
                if not candidates or not self.selection.is_settled(candidates, left)
            ]
            requests = [
                Request(
                    prompt=examples[place],
                    sampling=replace(self.sampling, seed=stream_of(stream_of(seed, place), first)),
                    num_samples=size,
                    increments=self.increments,
                    thinking_budget=self.thinking_budget,
                )
                for place in open_
            ]
            drawn = generate(self.backend, requests)
            for place, new in zip(open_, drawn, strict=True):
                found[place] = self.selection.judged(conversations[place], found[place], new)
        return [chosen(candidates) for candidates in found]
