"""Batch inference from a file of questions to a file of answers, which may be interrupted anywhere.

Answers are appended as they come, a line a sample, and noted in a journal beside the file
(`cascadevl.data.journal`): the same command goes on where the last attempt stopped, however it
ended, and no answer is lost or written twice. Questions that cannot be answered are tried again by
the next attempt, because people mend them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from cascadevl.data.journal import Journal, alone
from cascadevl.data.json_text import decode_json
from cascadevl.data.processor import CascadeVLProcessor
from cascadevl.data.questions import Line, RecordId, parse_question, read_lines, record_id
from cascadevl.engine.backends import Backend
from cascadevl.engine.best_of_n import BestOfConfig, Candidate, Selection, chosen
from cascadevl.engine.draws import stream_of
from cascadevl.engine.requests import Completion, Request
from cascadevl.engine.sampling import SamplingParams
from cascadevl.engine.thinking import parted
from cascadevl.errors import ConfigError, DataError, RequestError
from cascadevl.model.routing import VisualBudget
from cascadevl.model.v2pe import Increments
from cascadevl.types import Message

Progress = Callable[[int, int, int], None]
"""Takes the number of questions that are done, of all questions, and of those that failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OfflineConfig:
    """What is asked, how, and where the answers go.

    Attributes:
        questions: File with a conversation a line; see `parse_question`.
        out: File of answers; a journal of the same name stands beside it.
        root: Folder that relative paths of pictures start from; that of the questions if None.
        sampling: How tokens are chosen. Every question gets a seed of its own from its seed and
            the number of the line.
        num_samples: Answers to each question.
        increments: Position step of visual tokens; the model's if None.
        system: System message of conversations that have none; the model's if None.
        thinking: Whether to reason first; as the conversation says if None.
        force_thinking: Whether answers are begun so that they do, or do not.
        thinking_budget: Most tokens of reasoning; see `Request`.
        best_of: Draw several answers and write the best one; ``num_samples`` is then not read.
        token_ids: Whether the tokens of an answer are written, too.
        visual_budget: Which tiles of a question are compressed, if the model has a router; its
            own thresholds if None.
    """

    questions: Path
    out: Path
    root: Path | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    num_samples: int = 1
    increments: Increments | None = None
    system: str | None = None
    thinking: bool | None = None
    force_thinking: bool = False
    thinking_budget: int | None = None
    best_of: BestOfConfig | None = None
    token_ids: bool = False
    visual_budget: VisualBudget | None = None

    def __post_init__(self) -> None:
        """Refuse to draw the same again and again.

        Raises:
            ConfigError: If the best of several greedy answers is wanted.
        """
        if self.best_of is not None:
            self.best_of.check_temperature(self.sampling.temperature)

    @property
    def journal(self) -> Path:
        """The journal beside the answers."""
        return self.out.with_name(f"{self.out.name}.journal")

    def settings(self) -> dict[str, Any]:
        """What the answers depend on, files left out: those may move."""
        values = asdict(self)
        left_out = {"questions", "out", "root"}
        for name in ("visual_budget", "thinking_budget", "best_of"):
            if values[name] is None:
                left_out.add(name)  # as in journals of commands without one
        if not self.force_thinking:
            left_out.add("force_thinking")
        return {name: values[name] for name in values if name not in left_out}


@dataclass(frozen=True, slots=True)
class Failure:
    """A question that cannot be answered.

    Attributes:
        line: Its line.
        error: Why.
    """

    line: int
    error: DataError | RequestError


@dataclass(frozen=True, slots=True, kw_only=True)
class OfflineReport:
    """What became of the questions.

    Attributes:
        num_questions: Lines that are not blank.
        num_before: Questions that were answered by earlier attempts.
        num_answered: Questions that this attempt answered.
        num_tokens: Tokens of its answers.
        failures: Questions that could not be answered, in the order of their lines.
    """

    num_questions: int
    num_before: int
    num_answered: int
    num_tokens: int
    failures: tuple[Failure, ...]


def answer_file(
    config: OfflineConfig,
    processor: CascadeVLProcessor,
    backend: Backend,
    *,
    facts: Mapping[str, Any],
    selection: Selection | None = None,
    on_progress: Progress = lambda done, total, failed: None,
) -> OfflineReport:
    """Answer the questions of a file that have no answers yet.

    Args:
        config: What is asked, how, and where the answers go.
        processor: Makes prompts of conversations.
        backend: Answers.
        facts: JSON values that the answers depend on beside the configuration, such as the model.
        selection: Which of several answers is written, with ``config.best_of``.
        on_progress: Told how far it is.

    Raises:
        ConfigError: If the answers there are were made with other settings or of another file,
            or somebody else is writing them.
        DataError: If the file of questions cannot be read.
        RequestError: If the backend cannot answer any more.
    """
    with alone(config.out):
        is_begun = config.out.exists() and config.out.stat().st_size > 0
        if is_begun and not config.journal.exists():
            raise ConfigError(
                f"{config.out} is there, but its journal {config.journal.name} is not, so that "
                f"nobody knows what is complete in it; choose another file"
            )
        journal = Journal(
            config.out.parent,
            [config.out.name],
            {**config.settings(), **facts},
            resume=True,
            journal=config.journal.name,
        )
        answered = _answered(config.out)
        total = _check_same(config, answered)
        asking = _Asking(config, processor, answered, selection)
        num_done = num_tokens = 0

        def tell() -> None:
            failed = len(asking.failures)
            on_progress(len(answered) + num_done + failed, total, failed)

        tell()
        while not asking.is_done:
            for number, outcome in backend.answer(asking.requests()):
                done = asking.take(number, outcome)
                if done is not None:
                    journal.commit({config.out.name: done.rows}, {})
                    num_done += 1
                    num_tokens += done.num_tokens
                tell()
        tell()
    return OfflineReport(
        num_questions=total,
        num_before=len(answered),
        num_answered=num_done,
        num_tokens=num_tokens,
        failures=tuple(sorted(asking.failures, key=lambda failure: failure.line)),
    )


@dataclass(slots=True, eq=False)
class _Open:
    """A question that is being answered.

    Attributes:
        number: Its line.
        name: Its id.
        messages: The conversation.
        candidates: Answers that were drawn before, where the best of several is wanted.
        num_tokens: Their tokens.
    """

    number: int
    name: RecordId
    messages: Sequence[Message]
    candidates: list[Candidate] = field(default_factory=list)
    num_tokens: int = 0


@dataclass(frozen=True, slots=True)
class _Done:
    """A question that is answered: its lines of the file, and the tokens they took."""

    rows: list[dict[str, Any]]
    num_tokens: int


@dataclass(slots=True, eq=False)
class _Asking:
    """Makes requests of the lines that are not answered, and remembers whose they are."""

    config: OfflineConfig
    processor: CascadeVLProcessor
    answered: Mapping[int, RecordId]
    selection: Selection | None
    asked: dict[int, _Open] = field(default_factory=dict)
    again: list[_Open] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    is_begun: bool = False

    @property
    def is_done(self) -> bool:
        """Whether there is nothing more to ask."""
        return self.is_begun and not self.again

    def requests(self) -> Iterator[Request]:
        """Of all lines at first; then of the questions that need more answers."""
        again, self.again = self.again, []
        sources: Iterable[Line | _Open] = again if self.is_begun else self._lines()
        self.is_begun, number = True, 0
        for each in sources:
            try:
                opened = self._opened(each) if isinstance(each, Line) else each
                request = self._request(opened)
            except (DataError, RequestError) as error:
                self.failures.append(Failure(each.number, error))
                continue
            self.asked[number] = opened
            number += 1
            yield request

    def take(self, number: int, outcome: tuple[Completion, ...] | RequestError) -> _Done | None:
        """Take in what came back; gives the question if it is answered with it."""
        opened = self.asked.pop(number)
        if isinstance(outcome, RequestError):
            self.failures.append(Failure(opened.number, outcome))
            return None
        opened.num_tokens += sum(each.usage.completion_tokens for each in outcome)
        if self.config.best_of is None:
            rows = [_row(each, opened, self.config) for each in outcome]
            return _Done(rows, opened.num_tokens)
        return self._chosen(opened, outcome, self.config.best_of)

    def _chosen(
        self, opened: _Open, outcome: Sequence[Completion], config: BestOfConfig
    ) -> _Done | None:
        """The best answer, unless more are to be drawn first."""
        assert self.selection is not None, "somebody chooses"
        try:
            found = self.selection.judged(opened.messages, opened.candidates, outcome)
        except (DataError, RequestError) as error:
            self.failures.append(Failure(opened.number, error))
            return None
        opened.candidates = found
        if not self.selection.is_settled(found, config.num_samples - len(found)):
            self.again.append(opened)
            return None
        choice = chosen(found)
        best = choice.best
        row = _row(replace(best.completion, sample=choice.index), opened, self.config)
        row |= {"score": best.score, "num_drawn": len(found)}
        if best.steps:
            row |= {"steps": list(best.steps), "step_scores": list(best.step_scores)}
        return _Done([row], opened.num_tokens)

    def _lines(self) -> Iterator[Line]:
        lines = read_lines(self.config.questions)
        return (line for line in lines if line.number not in self.answered)

    def _opened(self, line: Line) -> _Open:
        config = self.config
        root = config.questions.parent if config.root is None else config.root
        name, messages = parse_question(line, file=config.questions, root=root)
        return _Open(line.number, name, messages)

    def _request(self, opened: _Open) -> Request:
        config = self.config
        example = self.processor.builder.prompt(
            opened.messages,
            system=config.system,
            thinking=config.thinking,
            force_thinking=config.force_thinking,
            source=f"{config.questions}:{opened.number}",
        )
        seed, num_samples = seed_of(config.sampling.seed, opened.number), config.num_samples
        if config.best_of is not None:
            first, most = len(opened.candidates), config.best_of.num_samples
            seed = stream_of(seed, first)
            num_samples = min(config.best_of.round_size or most, most - first)
        return Request(
            prompt=example,
            sampling=replace(config.sampling, seed=seed),
            num_samples=num_samples,
            increments=config.increments,
            visual_budget=config.visual_budget,
            thinking_budget=config.thinking_budget,
        )


def seed_of(seed: int, question: int | str) -> int:
    """The seed of a question: another for each, the same in every attempt.

    Args:
        seed: Of the whole work.
        question: Number of its line, or its identity.
    """
    digest = hashlib.blake2b(f"{seed}:{question}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _row(answer: Completion, asked: _Open, config: OfflineConfig) -> dict[str, Any]:
    row: dict[str, Any] = {
        "id": asked.name,
        "line": asked.number,
        "sample": answer.sample,
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "tokens": {
            "prompt": answer.usage.prompt_tokens,
            "visual": answer.usage.visual_tokens,
            "completion": answer.usage.completion_tokens,
        },
    }
    begun = config.force_thinking and bool(config.thinking)
    reasoning, content = parted(answer.text, is_begun=begun)
    if reasoning:
        row |= {"reasoning_content": reasoning, "content": content}
    if answer.usage.tiles:
        row["tokens"]["tiles"] = answer.usage.tiles
        row["tokens"]["compressed_tiles"] = answer.usage.compressed_tiles
    if config.token_ids:
        row["token_ids"] = list(answer.token_ids)
    if answer.logprobs is not None:
        row["logprobs"] = [[each.chosen, dict(each.top)] for each in answer.logprobs]
    return row


def _answered(out: Path) -> dict[int, RecordId]:
    """Lines that are answered in full, with the ids they had: what the journal has left."""
    found: dict[int, RecordId] = {}
    for line in read_lines(out):
        row = decode_json(line.content, source=f"{out}:{line.number}")
        if not isinstance(row, dict) or "line" not in row or "id" not in row:
            raise ConfigError(f"{out}:{line.number} is no answer; choose another file")
        found[row["line"]] = row["id"]
    return found


def _check_same(config: OfflineConfig, answered: Mapping[int, RecordId]) -> int:
    """Count the questions, and refuse a file that is not the one that was answered before."""
    left, total = dict(answered), 0
    for line in read_lines(config.questions):
        total += 1
        if line.number not in left:
            continue
        before = left.pop(line.number)
        place = f"{config.questions}:{line.number}"
        now = record_id(decode_json(line.content, source=place), line)
        if now != before:
            raise ConfigError(
                f"{place} has the id {now!r}, but {config.out} answers {before!r} there: the file "
                f"was changed since; choose another file for the answers"
            )
    if left:
        raise ConfigError(
            f"{config.out} answers line {min(left)}, which {config.questions} does not have: the "
            f"file was changed since; choose another file for the answers"
        )
    return total
