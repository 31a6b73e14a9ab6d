"""Data for process reward models: steps of solutions, judged by how they can be continued.

VisualPRM (arXiv 2503.10291): from the end of every step the model goes on several times, and the
share of continuations that end in the right answer says whether the solution was right up to
there. The continuations of a step share its prompt in the engine, and the steps of a solution
share each other's. A question is written once all its steps are judged, so that an interruption of
any kind loses nothing that was finished; the same call goes on.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from cascadevl.data.journal import Journal, alone
from cascadevl.data.json_text import decode_json
from cascadevl.data.process_records import JudgedSolution, judged_question, process_fields
from cascadevl.data.processor import CascadeVLProcessor
from cascadevl.data.rollouts import Identity, StoredRollouts, identity_of
from cascadevl.data.writing import image_paths, write_meta
from cascadevl.engine.backends import Backend
from cascadevl.engine.offline import seed_of
from cascadevl.engine.requests import Completion, Request
from cascadevl.errors import DataError, RequestError
from cascadevl.scoring.guessing import Asked, Guessing
from cascadevl.scoring.steps import labels_of, steps_of
from cascadevl.tasks.problems import Problem, problem_of
from cascadevl.types import Message, Rollout, SampledAnswer
from cascadevl.workflows.process_config import ProcessConfig, ProcessReport

PROCESS, QUESTIONS = "process.jsonl", "questions.jsonl"
"""Judged solutions in the released form; and which questions are done, with what came of them."""

META, REPORT = "meta.json", "report.json"
"""What else is left in the folder."""


def make_process_data(
    config: ProcessConfig,
    processor: CascadeVLProcessor,
    backend: Backend,
    *,
    facts: Mapping[str, Any] | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> ProcessReport:
    """Judge the steps of all solutions of a store that have not been judged yet.

    Args:
        config: Of which solutions, and how.
        processor: Makes prompts of solutions up to a step.
        backend: Continues them.
        facts: JSON values that the continuations depend on besides, such as the model's name.
        on_progress: Told how many questions are done, and how many there are.

    Raises:
        ConfigError: If the folder belongs to other work, or is being written.
        DataError: If the store cannot be read.
        RequestError: If the backend cannot answer any more; the same call goes on.
    """
    stored = StoredRollouts(config.store)
    guessing = Guessing.among(_asked(rollout) for rollout in stored)
    settings = {**config.settings(), **(facts or {})}
    with alone(config.out / PROCESS):
        journal = Journal(config.out, [PROCESS, QUESTIONS], settings, resume=True)
        counts = Counter[str](journal.state)
        judging = _Judging(config, processor, guessing, _done(config.out / QUESTIONS))
        num_done = len(judging.done)

        def keep() -> None:
            nonlocal num_done
            while judging.finished:
                question = judging.finished.pop(0)
                rows = _rows(question, config)
                done = {"id": list(identity_of(question.rollout)), "outcome": question.outcome}
                counts.update(question.counts)
                journal.commit({PROCESS: rows, QUESTIONS: [done]}, counts)
                num_done += 1
            on_progress(num_done, len(stored))

        for number, outcome in backend.answer(judging.requests(stored)):
            judging.take(number, outcome)
            keep()
        keep()
        return _finish(config, counts, judging.failures)


@dataclass(slots=True, eq=False)
class _Solution:
    """A solution that is being judged: its steps, and what is known of each."""

    answer: SampledAnswer
    steps: list[str]
    mc: list[float | None]


@dataclass(slots=True, eq=False)
class _Question:
    """A question whose solutions are being judged."""

    rollout: Rollout
    problem: Problem
    outcome: str
    solutions: list[_Solution] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)  # added to the others when it is kept
    num_open: int = 0
    failed: bool = False


@dataclass(frozen=True, slots=True)
class _Continued:
    """What a request continues."""

    question: _Question
    solution: _Solution
    place: int
    begun: str


@dataclass(slots=True, eq=False)
class _Judging:
    """Makes requests of the steps that are not judged, and takes in what comes back."""

    config: ProcessConfig
    processor: CascadeVLProcessor
    guessing: Guessing
    done: frozenset[Identity]
    asked: dict[int, _Continued] = field(default_factory=dict)
    finished: list[_Question] = field(default_factory=list)
    failures: list[DataError | RequestError] = field(default_factory=list)

    def requests(self, stored: StoredRollouts) -> Iterator[Request]:
        number = 0
        for place, identity in enumerate(stored.identities):
            if identity in self.done:
                continue
            question = self._question(stored[place])
            try:
                asked = list(self._steps(question))
            except (DataError, RequestError) as error:
                self.failures.append(error)
                continue
            question.num_open = len(asked)
            if not asked:
                self.finished.append(question)
            for continued, request in asked:
                self.asked[number] = continued
                number += 1
                yield request

    def take(self, number: int, outcome: tuple[Completion, ...] | RequestError) -> None:
        continued = self.asked.pop(number)
        question = continued.question
        question.num_open -= 1
        if isinstance(outcome, RequestError):
            if not question.failed:
                self.failures.append(outcome)
            question.failed = True
            return
        check = question.problem.check
        right = [
            each.finish_reason == "stop" and check(continued.begun + each.text) for each in outcome
        ]
        continued.solution.mc[continued.place] = sum(right) / len(right)
        _count(outcome, question.counts)
        if not question.num_open and not question.failed:
            self.finished.append(question)

    def _question(self, rollout: Rollout) -> _Question:
        question = _Question(rollout, problem_of(rollout), "used")
        if not rollout.metric:
            question.outcome = "open"
        elif self.guessing.chance(_asked(rollout)) >= self.config.max_chance:
            question.outcome = "guessable"
        else:
            self._choose(question)
        return question

    def _choose(self, question: _Question) -> None:
        """Take the solutions that are judged; of the last step of each the end is known."""
        finished = self._finished(question)
        chosen = _balanced(finished) if self.config.choose == "balanced" else finished
        for answer in chosen[: self.config.num_solutions]:
            steps = steps_of(answer.text, self.config.rules)
            mc = [None] * (len(steps) - 1) + [float(answer.correct)]
            question.solutions.append(_Solution(answer, steps, mc))
        question.outcome = "used" if chosen else "one_sided" if finished else "no_solution"

    def _finished(self, question: _Question) -> list[SampledAnswer]:
        """The answers that came to their end and differ."""
        texts = dict[str, SampledAnswer]()
        for answer in question.rollout.answers:
            text = answer.text.strip()
            if answer.finish_reason != "stop" or not text or text in texts:
                continue
            if self.processor.template.reasoning is not None and "<think>" in text:
                question.counts["skipped/in_reasoning"] += 1  # the template would close it
                continue
            texts[text] = answer
        return list(texts.values())

    def _steps(self, question: _Question) -> Iterator[tuple[_Continued, Request]]:
        rules, name = self.config.rules, question.rollout.problem_id
        for order, solution in enumerate(question.solutions):
            for place in range(len(solution.steps) - 1):
                begun = rules.join([*solution.steps[: place + 1], ""])
                source = f"{name}/{order}/{place}"
                turns = (*question.rollout.prompt, Message.of("assistant", begun))
                sampling = self.config.sampling
                request = Request(
                    prompt=self.processor.builder.prompt(turns, end="open", source=source),
                    sampling=replace(sampling, seed=seed_of(sampling.seed, source)),
                    num_samples=self.config.num_continuations,
                    increments=self.config.increments,
                )
                yield _Continued(question, solution, place, begun), request


def _balanced(answers: Sequence[SampledAnswer]) -> list[SampledAnswer]:
    """Right and wrong answers in turn, as long as there are both."""
    right = [answer for answer in answers if answer.correct]
    wrong = [answer for answer in answers if not answer.correct]
    return [answer for pair in zip(right, wrong, strict=False) for answer in pair]


def _count(completions: Sequence[Completion], counts: Counter[str]) -> None:
    counts["continuations"] += len(completions)
    for each in completions:
        counts["tokens"] += each.usage.completion_tokens
        counts["prompt_tokens"] += each.usage.prompt_tokens
        counts["cached_tokens"] += each.usage.cached_tokens


def _asked(rollout: Rollout) -> Asked:
    return Asked(
        problem_id=rollout.problem_id,
        text=rollout.prompt[-1].text,
        reference=rollout.reference,
        num_choices=len(rollout.choices),
    )


def _done(path: Path) -> frozenset[Identity]:
    """The questions that are done: what the journal has left of their file."""
    found = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        row: Any = decode_json(line, source=f"{path}:{number}")
        weights, problem = row["id"]
        found.append((weights, problem))
    return frozenset(found)


def _rows(question: _Question, config: ProcessConfig) -> list[dict[str, Any]]:
    """The judged solutions of a question as they are written; counts what came of it."""
    rows: list[dict[str, Any]] = []
    counts = question.counts
    for order, solution in enumerate(question.solutions):
        mc = [share for share in solution.mc if share is not None]
        assert len(mc) == len(solution.steps), "every step is judged"
        labels = labels_of(mc, config.threshold)
        judged = JudgedSolution(
            question=judged_question(question.rollout.prompt),
            steps=tuple(solution.steps),
            labels=tuple(labels),
        )
        try:
            row = process_fields(
                judged,
                record_id=f"{question.rollout.problem_id}/{order}",
                images=image_paths(question.rollout.prompt),
                mc=mc,
            )
        except DataError as error:
            counts[f"skipped/{error.kind}"] += 1
            continue
        rows.append(row)
        counts["solutions"] += 1
        counts["right"] += solution.answer.correct
        counts["steps"] += len(mc)
        counts["minus"] += labels.count(False)
    counts[f"outcome/{question.outcome}"] += 1
    return rows


def _finish(
    config: ProcessConfig, counts: Counter[str], failures: Sequence[DataError | RequestError]
) -> ProcessReport:
    """Write the meta file and the report."""
    meta = None
    if counts["solutions"]:
        meta = config.out / META
        write_meta(meta, {"process": {"annotation": PROCESS, "length": counts["solutions"]}})
    report = ProcessReport(
        outcomes=_below("outcome/", counts),
        num_solutions=counts["solutions"],
        num_right=counts["right"],
        num_steps=counts["steps"],
        num_minus=counts["minus"],
        num_continuations=counts["continuations"],
        num_tokens=counts["tokens"],
        num_prompt_tokens=counts["prompt_tokens"],
        num_cached_tokens=counts["cached_tokens"],
        skipped=_below("skipped/", counts),
        failures=tuple(failures),
        meta=meta,
    )
    text = json.dumps(asdict(report), indent=2, default=str, ensure_ascii=False)
    (config.out / REPORT).write_text(text + "\n", "utf-8")
    return report


def _below(beginning: str, counts: Mapping[str, int]) -> dict[str, int]:
    found = {key: count for key, count in counts.items() if key.startswith(beginning)}
    return {key.removeprefix(beginning): count for key, count in sorted(found.items())}
