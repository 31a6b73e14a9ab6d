"""Rollouts: many answers to each of many questions, checked, and kept in a store.

InternVL3.5 report, Cascade RL: what a model answers to verifiable questions is sampled once, and
serves offline RL as well as the choice of questions for online RL. The engine answers many
questions at once, and reads the prompt of each only once for all its answers. A question is kept
as soon as all of its answers are there, so that an interruption of any kind loses nothing that
was finished; the same call goes on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

from cascadevl.data.conversation import system_text
from cascadevl.data.processor import CascadeVLProcessor
from cascadevl.data.prompts import BOXED_INSTRUCTION
from cascadevl.data.rollouts import RolloutStore, open_store
from cascadevl.engine.backends import Backend
from cascadevl.engine.offline import seed_of
from cascadevl.engine.requests import Completion, Request
from cascadevl.engine.sampling import SamplingParams
from cascadevl.errors import ConfigError, DataError, RequestError
from cascadevl.model.v2pe import Increments
from cascadevl.tasks.problems import Problem, Problems
from cascadevl.types import Message, Rollout, SampledAnswer

Progress: TypeAlias = Callable[[int, int], None]
"""Takes the number of groups of problems that were taken up, and of all groups."""


def _mmpr_sampling() -> SamplingParams:
    return SamplingParams(temperature=1.0, max_tokens=4096)


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutConfig:
    r"""How answers are sampled.

    Attributes:
        out: Folder of the store.
        num_samples: Answers to each question (MMPR: up to 32).
        sampling: How tokens are chosen (MMPR: temperature 1; public script: 0.7, top_k 50; at most
            4,096 tokens). Every question gets a seed of its own from its seed and the question.
        increments: Position step of visual tokens; the model's if None.
        system: System message; the model's if None.
        thinking: Whether to reason first, through the template's Thinking system message.
        boxed: Ask for the answer within ``\boxed{}``.
        chunk: Groups of problems that are answered and kept together; 0 keeps every question as
            soon as it is answered. An interrupted chunk is answered again as a whole: so the same
            questions are computed side by side, and answers are the same to the bit without the
            cost of ``batch_invariant``.
    """

    out: Path
    num_samples: int = 32
    sampling: SamplingParams = field(default_factory=_mmpr_sampling)
    increments: Increments | None = None
    system: str | None = None
    thinking: bool = False
    boxed: bool = False
    chunk: int = 0

    def __post_init__(self) -> None:
        """Refuse what could not be kept.

        Raises:
            ConfigError: If a number is out of range, or the system message is empty.
        """
        if self.num_samples < 1:
            raise ConfigError(f"num_samples is {self.num_samples}; it must be at least 1")
        if self.chunk < 0:
            raise ConfigError(f"chunk is {self.chunk}; use 0 to keep questions one by one")
        if self.system is not None and not self.system.strip():
            raise ConfigError(
                "the system message is empty, and prompts are kept as they were shown; leave it "
                "out for the model's own"
            )

    def settings(self) -> dict[str, Any]:
        """What the answers depend on; where they are kept is free."""
        return {name: value for name, value in asdict(self).items() if name != "out"}


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutReport:
    """What became of the questions.

    Attributes:
        num_before: Questions that were answered by earlier attempts.
        num_answered: Questions that this attempt answered.
        num_answers: Answers of this attempt.
        num_correct: Those of them that are right.
        num_cut: Those that were cut off at the limit of tokens.
        num_tokens: Tokens of them all.
        failures: Questions, or groups of them, that cannot be answered; the next attempt tries
            them again.
    """

    num_before: int
    num_answered: int
    num_answers: int
    num_correct: int
    num_cut: int
    num_tokens: int
    failures: tuple[DataError | RequestError, ...]


def sample_rollouts(
    problems: Problems,
    config: RolloutConfig,
    processor: CascadeVLProcessor,
    backend: Backend,
    *,
    weight_version: str = "",
    facts: Mapping[str, Any] | None = None,
    on_progress: Progress = lambda done, total: None,
    before_chunk: Callable[[], None] = lambda: None,
) -> RolloutReport:
    """Sample answers to all problems that the store does not have yet.

    Args:
        problems: What is asked.
        config: How, and where the answers are kept.
        processor: Makes prompts of conversations.
        backend: Answers.
        weight_version: Which weights the backend has; part of a rollout's identity.
        facts: JSON values that the answers depend on besides, such as the kind of backend.
        on_progress: Told how far it is.
        before_chunk: Called before each chunk: makes the backend forget what it remembers.

    Raises:
        ConfigError: If the store was begun with other settings, or is being written.
        RequestError: If the backend cannot answer any more; the same call goes on.
    """
    settings = {"problems": problems.settings(), **config.settings(), **(facts or {})}
    counts = Counter[str]()
    with open_store(config.out, settings) as store:
        asking = _Asking(problems, config, processor, store, weight_version, on_progress)
        total = len(problems)
        size = config.chunk or max(total, 1)
        for first in range(0, total, size):
            before_chunk()
            kept: list[Rollout] = []
            for rollout in asking.answered(backend, range(first, min(first + size, total))):
                kept.append(rollout)
                _count(rollout.answers, counts)
                if not config.chunk:
                    counts["questions"] += store.append([kept.pop()])
            counts["questions"] += store.append(kept)
        on_progress(total, total)
    return RolloutReport(
        num_before=asking.num_before,
        num_answered=counts["questions"],
        num_answers=counts["answers"],
        num_correct=counts["correct"],
        num_cut=counts["cut"],
        num_tokens=counts["tokens"],
        failures=tuple(asking.failures),
    )


@dataclass(slots=True, eq=False)
class _Asking:
    """Makes requests of the problems that have no answers, and remembers whose they are."""

    problems: Problems
    config: RolloutConfig
    processor: CascadeVLProcessor
    store: RolloutStore
    weight_version: str
    on_progress: Progress
    asked: dict[int, tuple[Problem, tuple[Message, ...]]] = field(default_factory=dict)
    failures: list[DataError | RequestError] = field(default_factory=list)
    num_before: int = 0

    def answered(self, backend: Backend, groups: range) -> Iterator[Rollout]:
        """Rollouts of the problems of some groups, as they are done."""
        for number, outcome in backend.answer(self._requests(groups)):
            problem, prompt = self.asked.pop(number)
            if isinstance(outcome, RequestError):
                self.failures.append(outcome)
                continue
            yield Rollout(
                problem_id=problem.problem_id,
                prompt=prompt,
                reference=problem.reference,
                answers=tuple(sampled_answer(problem, each) for each in outcome),
                weight_version=self.weight_version,
                metric=problem.metric,
                choices=problem.choices,
            )

    def _requests(self, groups: range) -> Iterator[Request]:
        number = 0
        for group in groups:
            self.on_progress(group, len(self.problems))
            for problem in self._group(group):
                if (self.weight_version, problem.problem_id) in self.store:
                    self.num_before += 1
                    continue
                try:
                    prompt = shown_prompt(problem.prompt, self.config, self.processor)
                    request = self._request(problem, prompt)
                except (DataError, RequestError) as error:
                    self.failures.append(error)
                    continue
                self.asked[number] = problem, prompt
                number += 1
                yield request

    def _group(self, number: int) -> list[Problem]:
        try:
            return list(self.problems[number])
        except DataError as error:
            self.failures.append(error)
            return []

    def _request(self, problem: Problem, prompt: tuple[Message, ...]) -> Request:
        sampling = self.config.sampling
        return Request(
            prompt=self.processor.builder.prompt(prompt, source=problem.problem_id),
            sampling=replace(sampling, seed=seed_of(sampling.seed, problem.problem_id)),
            num_samples=self.config.num_samples,
            increments=self.config.increments,
        )


def shown_prompt(
    question: Message, config: RolloutConfig, processor: CascadeVLProcessor
) -> tuple[Message, ...]:
    """A question as it is shown, its system message written out.

    So a stored prompt does not depend on a default, and gives the same example anywhere.

    Args:
        question: The user's turn.
        config: Says the system message, and whether a box is asked for.
        processor: Knows the model's own system message.
    """
    if config.boxed:
        question = replace(question, parts=(*question.parts, f"\n{BOXED_INSTRUCTION}"))
    own = processor.system_message if config.system is None else config.system
    thinking = True if config.thinking else None
    system = system_text([question], processor.template, system=own, thinking=thinking)
    return (Message.of("system", system), question) if system else (question,)


def sampled_answer(problem: Problem, completion: Completion) -> SampledAnswer:
    """An answer with what is found of it.

    One that was cut off has no final answer, and is never right (docs/decisions/0021).

    Args:
        problem: What was asked.
        completion: What came.
    """
    assert completion.finish_reason != "cancelled", "outcomes are answers that have ended"
    finished = completion.finish_reason == "stop"
    correct = finished and problem.check(completion.text)
    return SampledAnswer(
        text=completion.text,
        token_ids=completion.drawn,
        finish_reason=completion.finish_reason,
        correct=correct,
        rewards={"accuracy": float(correct)},
        reward=float(correct),
        logprobs=_logprobs(completion),
    )


def _logprobs(completion: Completion) -> tuple[float, ...]:
    """Of all tokens that were drawn; empty if the backend does not know all of them."""
    known = [*(completion.logprobs or ())]
    if completion.end_logprobs is not None:
        known.append(completion.end_logprobs)
    return tuple(each.chosen for each in known) if len(known) == len(completion.drawn) else ()


def _count(answers: tuple[SampledAnswer, ...], counts: Counter[str]) -> None:
    counts["answers"] += len(answers)
    counts["correct"] += sum(answer.correct for answer in answers)
    counts["cut"] += sum(answer.finish_reason == "length" for answer in answers)
    counts["tokens"] += sum(len(answer.token_ids) for answer in answers)
