"""Batch inference from a file of questions to a file of answers, which may be interrupted anywhere.

Answers are appended as they come, a line a sample, and noted in a journal beside the file
(`cascadevl.data.journal`): the same command goes on where the last attempt stopped, however it
ended, and no answer is lost or written twice. Questions that cannot be answered are tried again by
the next attempt, because people mend them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from cascadevl.data.journal import Journal, alone
from cascadevl.data.json_text import decode_json
from cascadevl.data.processor import CascadeVLProcessor
from cascadevl.data.questions import Line, RecordId, parse_question, read_lines, record_id
from cascadevl.engine.backends import Backend
from cascadevl.engine.requests import Completion, Request
from cascadevl.engine.sampling import SamplingParams
from cascadevl.errors import ConfigError, DataError, RequestError
from cascadevl.model.routing import VisualBudget
from cascadevl.model.v2pe import Increments

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
    token_ids: bool = False
    visual_budget: VisualBudget | None = None

    @property
    def journal(self) -> Path:
        """The journal beside the answers."""
        return self.out.with_name(f"{self.out.name}.journal")

    def settings(self) -> dict[str, Any]:
        """What the answers depend on, files left out: those may move."""
        values = asdict(self)
        left_out = {"questions", "out", "root"}
        if self.visual_budget is None:
            left_out.add("visual_budget")  # as in journals of models without one
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
    on_progress: Progress = lambda done, total, failed: None,
) -> OfflineReport:
    """Answer the questions of a file that have no answers yet.

    Args:
        config: What is asked, how, and where the answers go.
        processor: Makes prompts of conversations.
        backend: Answers.
        facts: JSON values that the answers depend on beside the configuration, such as the model.
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
        asking = _Asking(config, processor, answered)
        num_done = num_tokens = 0

        def tell() -> None:
            failed = len(asking.failures)
            on_progress(len(answered) + num_done + failed, total, failed)

        tell()
        for number, outcome in backend.answer(asking.requests()):
            line, name = asking.asked.pop(number)
            if isinstance(outcome, RequestError):
                asking.failures.append(Failure(line, outcome))
            else:
                rows = [_row(each, line, name, config) for each in outcome]
                journal.commit({config.out.name: rows}, {})
                num_done += 1
                num_tokens += sum(each.usage.completion_tokens for each in outcome)
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
class _Asking:
    """Makes requests of the lines that are not answered, and remembers whose they are."""

    config: OfflineConfig
    processor: CascadeVLProcessor
    answered: Mapping[int, RecordId]
    asked: dict[int, tuple[int, RecordId]] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)

    def requests(self) -> Iterator[Request]:
        number = 0
        for line in read_lines(self.config.questions):
            if line.number in self.answered:
                continue
            try:
                name, request = self._request(line)
            except (DataError, RequestError) as error:
                self.failures.append(Failure(line.number, error))
                continue
            self.asked[number] = line.number, name
            number += 1
            yield request

    def _request(self, line: Line) -> tuple[RecordId, Request]:
        config = self.config
        root = config.questions.parent if config.root is None else config.root
        name, messages = parse_question(line, file=config.questions, root=root)
        example = self.processor.builder.prompt(
            messages,
            system=config.system,
            thinking=config.thinking,
            source=f"{config.questions}:{line.number}",
        )
        sampling = replace(config.sampling, seed=seed_of(config.sampling.seed, line.number))
        return name, Request(
            prompt=example,
            sampling=sampling,
            num_samples=config.num_samples,
            increments=config.increments,
            visual_budget=config.visual_budget,
        )


def seed_of(seed: int, question: int | str) -> int:
    """The seed of a question: another for each, the same in every attempt.

    Args:
        seed: Of the whole work.
        question: Number of its line, or its identity.
    """
    digest = hashlib.blake2b(f"{seed}:{question}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _row(answer: Completion, line: int, name: RecordId, config: OfflineConfig) -> dict[str, Any]:
    row: dict[str, Any] = {
        "id": name,
        "line": line,
        "sample": answer.sample,
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "tokens": {
            "prompt": answer.usage.prompt_tokens,
            "visual": answer.usage.visual_tokens,
            "completion": answer.usage.completion_tokens,
        },
    }
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
