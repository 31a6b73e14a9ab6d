"""From a file of questions to a file of answers: complete, exact and unharmed by interruptions."""

from __future__ import annotations

import json
import random
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tests.engine.small_backend import checkpoint, picture
from torch import Tensor

from cascadevl.data.processor import CascadeVLProcessor
from cascadevl.engine.backends import Capabilities, Outcome
from cascadevl.engine.offline import OfflineConfig, OfflineReport, answer_file, seed_of
from cascadevl.engine.requests import Completion, Request, TokenOutput, Usage
from cascadevl.engine.sampling import SamplingParams
from cascadevl.errors import ConfigError, DataError, RequestError
from cascadevl.model.repository_files import load_processor

FACTS = {"model": "tiny"}


class Killed(BaseException):
    """The process ends here."""


@dataclass
class Echo:
    """A backend without a model: says which seed it was asked with; some requests fail, or kill.

    Answers come in a scrambled order, as many at a time as a real one has in flight.
    """

    kill_after: int | None = None
    asked: list[Request] = field(default_factory=list)

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(increments=True, logprobs=True, constrained=True, weight_refresh=True)

    def answer(self, requests: Iterable[Request]) -> Iterator[Outcome]:
        waiting: list[tuple[int, Request]] = []
        chance = random.Random(0)
        done = 0
        source = enumerate(requests)
        while True:
            waiting += [each for _, each in zip(range(5 - len(waiting)), source, strict=False)]
            if not waiting:
                return
            number, request = waiting.pop(chance.randrange(len(waiting)))
            if done == self.kill_after:
                raise Killed
            done += 1
            self.asked.append(request)
            yield number, self.outcome(number, request)

    def outcome(self, number: int, request: Request) -> tuple[Completion, ...] | RequestError:
        if request.sampling.max_tokens > 900:
            return RequestError("it does not fit: 1000 tokens but only 900")
        usage = Usage(prompt_tokens=9, visual_tokens=4, cached_tokens=3, completion_tokens=2)
        return tuple(
            Completion(
                request_id=number,
                sample=sample,
                text=f"{request.sampling.seed} {sample} ü\n",
                token_ids=(1, sample),
                finish_reason="stop",
                usage=usage,
            )
            for sample in range(request.num_samples)
        )

    def stream(self, request: Request) -> AsyncIterator[TokenOutput]:
        raise NotImplementedError

    def load(self, state: Mapping[str, Tensor]) -> None:
        raise NotImplementedError


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> CascadeVLProcessor:
    return load_processor(checkpoint(tmp_path_factory.mktemp("checkpoint") / "github"))


def write_questions(file: Path, number: int = 20) -> Path:
    picture(3).source.save(file.with_name("a.png"))  # type: ignore[union-attr]
    lines: list[object] = []
    for place in range(number):
        asked = {"from": "human", "value": f"<image>\nWhat is {place}?"}
        lines.append({"id": f"q{place % 7}", "image": "a.png", "conversations": [asked]})
    file.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return file


def config_of(folder: Path, **more: Any) -> OfflineConfig:
    given: dict[str, Any] = {
        "questions": folder / "q.jsonl",
        "out": folder / "out.jsonl",
        "num_samples": 3,
        **more,
    }
    return OfflineConfig(**given)


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def in_order(file: Path) -> list[dict[str, Any]]:
    return sorted(rows(file), key=lambda row: (row["line"], row["sample"]))


def answered(
    processor: CascadeVLProcessor, folder: Path, backend: Echo | None = None, **more: Any
) -> OfflineReport:
    config = config_of(folder, **more)
    return answer_file(config, processor, backend or Echo(), facts=FACTS)


def test_every_question_has_its_answers(processor: CascadeVLProcessor, tmp_path: Path) -> None:
    write_questions(tmp_path / "q.jsonl")
    backend, told = Echo(), []
    config = config_of(tmp_path, sampling=SamplingParams(seed=5), token_ids=True)
    report = answer_file(
        config,
        processor,
        backend,
        facts=FACTS,
        on_progress=lambda done, total, failed: told.append((done, total, failed)),
    )
    expected = [
        {
            "id": f"q{line % 7}",
            "line": line + 1,
            "sample": sample,
            "text": f"{seed_of(5, line + 1)} {sample} ü\n",
            "finish_reason": "stop",
            "tokens": {"prompt": 9, "visual": 4, "completion": 2},
            "token_ids": [1, sample],
        }
        for line in range(20)
        for sample in range(3)
    ]
    assert in_order(config.out) == expected
    assert (report.num_questions, report.num_answered, report.num_before) == (20, 20, 0)
    assert report.num_tokens == 20 * 3 * 2
    assert told[0] == (0, 20, 0)
    assert told[-1] == (20, 20, 0)
    assert sorted(tmp_path.iterdir()) == sorted(
        tmp_path / name for name in ("a.png", "q.jsonl", "out.jsonl", "out.jsonl.journal")
    )


def test_prompts_are_those_of_the_processor(processor: CascadeVLProcessor, tmp_path: Path) -> None:
    write_questions(tmp_path / "q.jsonl", 1)
    backend = Echo()
    answered(processor, tmp_path, backend, system="Be brief.", increments=0.25)
    (request,) = backend.asked
    text = processor.decode(request.prompt.input_ids)  # type: ignore[union-attr]
    assert "Be brief." in text
    assert text.count("<IMG_CONTEXT>") == 1
    assert "What is 0?" in text
    assert text.endswith("<|im_start|>assistant\n")
    assert (request.increments, request.num_samples) == (0.25, 3)


def test_seeds_are_all_different_and_do_not_depend_on_the_attempt() -> None:
    seeds = {seed_of(seed, line) for seed in range(20) for line in range(200)}
    assert len(seeds) == 4000
    assert seed_of(3, 8) == seed_of(3, 8)
    assert max(seeds) < 2**64


@pytest.mark.parametrize("kill_after", [0, 1, 9, 19])
def test_an_attempt_goes_on_where_another_ended(
    processor: CascadeVLProcessor, tmp_path: Path, kill_after: int
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
        write_questions(folder / "q.jsonl")
    answered(processor, whole)
    with pytest.raises(Killed):
        answered(processor, parts, Echo(kill_after=kill_after))
    backend = Echo()
    report = answered(processor, parts, backend)
    assert in_order(parts / "out.jsonl") == in_order(whole / "out.jsonl")
    assert (report.num_before, report.num_answered) == (kill_after, 20 - kill_after)
    assert len(backend.asked) == 20 - kill_after
    last = answered(processor, parts, backend)
    assert (last.num_before, last.num_answered) == (20, 0)


def test_whatever_bytes_a_kill_left_the_result_is_the_same(
    processor: CascadeVLProcessor, tmp_path: Path
) -> None:
    """Answers are written before they are noted: so at a kill the journal is never ahead."""
    write_questions(tmp_path / "q.jsonl", 6)
    config = config_of(tmp_path)
    answered(processor, tmp_path)
    whole, journal = config.out.read_bytes(), config.journal.read_bytes()
    expected = in_order(config.out)
    notes = journal.splitlines(keepends=True)
    sizes = [0, *(json.loads(note)["sizes"]["out.jsonl"] for note in notes[1:])]
    chance = random.Random(1)
    for _ in range(30):
        complete = chance.randrange(7)  # questions that were noted
        end = (
            sizes[complete]
            if complete == 6
            else chance.randint(sizes[complete], sizes[complete + 1])
        )
        kept = b"".join(notes[: complete + 1])
        if end == sizes[min(complete + 1, 6)] and complete < 6:
            kept += notes[complete + 1][: chance.randrange(len(notes[complete + 1]))]
        config.out.write_bytes(whole[:end])
        config.journal.write_bytes(kept)
        report = answered(processor, tmp_path)
        assert in_order(config.out) == expected
        assert report.num_before == complete


def test_bad_questions_are_counted_with_their_lines_and_tried_again(
    processor: CascadeVLProcessor, tmp_path: Path
) -> None:
    file = write_questions(tmp_path / "q.jsonl", 4)
    lines = file.read_text().splitlines()
    lines[1] = "{'single': 'quotes'}"
    lines[2] = lines[2].replace("a.png", "missing.png")
    file.write_text("\n".join(lines))
    report = answered(processor, tmp_path)
    assert [failure.line for failure in report.failures] == [2, 3]
    assert "double quotes" in str(report.failures[0].error)
    assert "missing.png" in str(report.failures[1].error)
    for failure in report.failures:
        assert str(failure.error).startswith(f"{file}:{failure.line}: ")
        assert "prompt" not in str(failure.error)
    assert all(isinstance(failure.error, DataError) for failure in report.failures)
    assert {row["line"] for row in rows(tmp_path / "out.jsonl")} == {1, 4}

    (tmp_path / "missing.png").write_bytes((tmp_path / "a.png").read_bytes())
    report = answered(processor, tmp_path)
    assert (report.num_before, report.num_answered) == (2, 1)
    assert [failure.line for failure in report.failures] == [2]
    found = [(row["line"], row["sample"]) for row in in_order(tmp_path / "out.jsonl")]
    assert found == [(line, sample) for line in (1, 3, 4) for sample in range(3)]


def test_what_the_backend_refuses_is_a_failure_of_that_question(
    processor: CascadeVLProcessor, tmp_path: Path
) -> None:
    write_questions(tmp_path / "q.jsonl", 2)
    report = answered(processor, tmp_path, sampling=SamplingParams(max_tokens=1000))
    assert [failure.line for failure in report.failures] == [1, 2]
    assert "does not fit" in str(report.failures[0].error)
    assert rows(tmp_path / "out.jsonl") == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_samples": 2}, "num_samples = 3 and cannot go on with 2"),
        ({"sampling": SamplingParams(top_k=4)}, "sampling"),
        ({"system": "other"}, "system"),
    ],
)
def test_other_settings_do_not_go_on(
    processor: CascadeVLProcessor, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    write_questions(tmp_path / "q.jsonl", 2)
    answered(processor, tmp_path)
    before = (tmp_path / "out.jsonl").read_bytes()
    with pytest.raises(ConfigError, match=message):
        answered(processor, tmp_path, **change)
    with pytest.raises(ConfigError, match="model"):
        answer_file(config_of(tmp_path), processor, Echo(), facts={"model": "other"})
    assert (tmp_path / "out.jsonl").read_bytes() == before


def test_another_file_of_questions_does_not_go_on(
    processor: CascadeVLProcessor, tmp_path: Path
) -> None:
    file = write_questions(tmp_path / "q.jsonl", 3)
    answered(processor, tmp_path)
    lines = file.read_text().splitlines()
    file.write_text("\n".join(lines[1:]))
    with pytest.raises(ConfigError, match=r"q\.jsonl:1 has the id 'q1', but .* answers 'q0' there"):
        answered(processor, tmp_path)
    file.write_text("\n".join(lines[:2]))
    with pytest.raises(ConfigError, match="answers line 3, which"):
        answered(processor, tmp_path)
    file.write_text("\n".join([*lines, lines[0]]))  # more of them are welcome
    assert answered(processor, tmp_path).num_answered == 1


def test_a_file_that_somebody_else_made_is_left_alone(
    processor: CascadeVLProcessor, tmp_path: Path
) -> None:
    write_questions(tmp_path / "q.jsonl", 1)
    (tmp_path / "out.jsonl").write_text("precious\n")
    with pytest.raises(ConfigError, match=r"its journal out\.jsonl\.journal is not"):
        answered(processor, tmp_path)
    assert (tmp_path / "out.jsonl").read_text() == "precious\n"
    assert not (tmp_path / "out.jsonl.lock").exists()


def test_an_attempt_that_ended_before_it_began_is_gone_on_with(
    processor: CascadeVLProcessor, tmp_path: Path
) -> None:
    write_questions(tmp_path / "q.jsonl", 1)
    (tmp_path / "out.jsonl").touch()
    (tmp_path / "out.jsonl.lock").touch()
    (tmp_path / "out.jsonl.partial").write_text('{"sett')
    assert answered(processor, tmp_path).num_answered == 1


def test_two_at_a_time_do_not_write_one_file(processor: CascadeVLProcessor, tmp_path: Path) -> None:
    write_questions(tmp_path / "q.jsonl", 2)

    class Meanwhile(Echo):
        def answer(self, requests: Iterable[Request]) -> Iterator[Outcome]:
            with pytest.raises(ConfigError, match="being written by another process"):
                answered(processor, tmp_path)
            yield from super().answer(requests)

    assert answered(processor, tmp_path, Meanwhile()).num_answered == 2
    assert answered(processor, tmp_path).num_before == 2
