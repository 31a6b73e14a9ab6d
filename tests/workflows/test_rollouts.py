"""Rollouts: what is asked is what is kept, and an interruption changes nothing."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.engine.small_backend import checkpoint
from tests.workflows.some_problems import (
    SAMPLING,
    Killed,
    Scripted,
    Sights,
    is_even,
    opened,
)

from cascadevl.data.example import ExampleBuilder, ExampleConfig
from cascadevl.data.processor import CascadeVLProcessor
from cascadevl.data.prompts import BOXED_INSTRUCTION, THINKING_PROMPT
from cascadevl.data.rollouts import ROLLOUTS, StoredRollouts
from cascadevl.engine.backends import ends_of, generate
from cascadevl.engine.engine import Engine
from cascadevl.engine.engine_backend import EngineBackend
from cascadevl.engine.offline import seed_of
from cascadevl.engine.requests import EngineConfig, Request
from cascadevl.errors import ConfigError, DataError, RequestError
from cascadevl.tasks.problems import problem_of
from cascadevl.types import Example, Message, Record
from cascadevl.workflows.rollouts import (
    RolloutConfig,
    RolloutReport,
    sample_rollouts,
    shown_prompt,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("checkpoint") / "github")


@pytest.fixture(scope="module")
def model(folder: Path) -> tuple[EngineBackend, CascadeVLProcessor]:
    return opened(folder)


def sample(
    out: Path, model: tuple[Any, CascadeVLProcessor], number: int = 6, **more: Any
) -> RolloutReport:
    values = {"num_samples": 3, "sampling": SAMPLING, **more}
    config = RolloutConfig(out=out, **values)
    return sample_rollouts(Sights(number), config, model[1], model[0], weight_version="w")


def assert_same(one: Example, other: Example) -> None:
    for name in ("input_ids", "tiles", "segments", "trained"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), name)
    assert (one.tiles_per_image, one.parents) == (other.tiles_per_image, other.parents)


def test_the_engine_answers_many_questions_and_what_it_says_is_kept(
    tmp_path: Path, model: tuple[EngineBackend, CascadeVLProcessor]
) -> None:
    """Question by question what the engine says to the same prompt alone."""
    backend, processor = model
    report = sample(tmp_path, model)
    stored = list(StoredRollouts(tmp_path))
    assert [each.problem_id for each in stored] == [f"sight:{n:03}" for n in range(6)]
    answers = [answer for each in stored for answer in each.answers]
    for number, each in enumerate(stored):
        request = Request(
            prompt=processor.builder.prompt(each.prompt),
            sampling=replace(SAMPLING, seed=seed_of(0, each.problem_id)),
            num_samples=3,
        )
        (alone,) = generate(backend, [request])
        ends = ends_of(backend.engine.model, processor, request)
        assert [answer.text for answer in each.answers] == [said.text for said in alone]
        assert [answer.token_ids for answer in each.answers] == [said.drawn for said in alone]
        assert (each.reference, each.weight_version) == (f"{number}", "w")
        for answer in each.answers:
            ended = answer.finish_reason == "stop"
            assert answer.correct == (ended and is_even(answer.text))
            assert answer.reward == answer.rewards["accuracy"] == float(answer.correct)
            assert len(answer.logprobs) == len(answer.token_ids) > 0
            assert (answer.token_ids[-1] in ends) == ended
            assert len(answer.token_ids) <= 8
    assert {answer.finish_reason for answer in answers} == {"stop", "length"}
    assert {answer.correct for answer in answers} == {False, True}
    assert (report.num_before, report.num_answered, report.num_answers) == (0, 6, 18)
    assert report.num_correct == sum(answer.correct for answer in answers)
    assert report.num_cut == sum(answer.finish_reason == "length" for answer in answers)
    assert report.num_tokens == sum(len(answer.token_ids) for answer in answers)


@pytest.mark.parametrize(
    "how", [{}, {"system": "Be brief."}, {"thinking": True}, {"boxed": True, "thinking": True}]
)
def test_a_stored_prompt_gives_exactly_the_example_that_the_engine_saw(
    tmp_path: Path, model: tuple[EngineBackend, CascadeVLProcessor], how: dict[str, Any]
) -> None:
    """For another question, and for training, where answers follow as branches."""
    processor = model[1]
    backend = Scripted(lambda request, number: f"The door is {number}.")
    sample(tmp_path, (backend, processor), 4, **how)
    config = ExampleConfig(
        template=processor.template.name,
        system="Something else, which must not matter.",
        tiling=processor.tiling,
    )
    builder = ExampleBuilder(processor.tokenizer, config, processor.tokens_per_tile)
    for request, rollout in zip(backend.asked, StoredRollouts(tmp_path), strict=True):
        seen = request.prompt
        assert isinstance(seen, Example)
        assert seen.num_tiles == (0 if int(rollout.problem_id[-1]) % 2 == 0 else 3)
        assert_same(processor.builder.prompt(rollout.prompt), seen)
        assert_same(builder.prompt(rollout.prompt), seen)
        trained = builder(
            Record(
                source="x",
                record_id="x",
                messages=rollout.prompt,
                branches=tuple((Message.of("assistant", a.text),) for a in rollout.answers),
            )
        )
        np.testing.assert_array_equal(trained.tiles, seen.tiles)
        for branch in (1, 2, 3):
            mine = (trained.segments == 0) | (trained.segments == branch)
            ids, is_trained = trained.input_ids[mine], trained.trained[mine]
            np.testing.assert_array_equal(ids[: len(seen.input_ids)], seen.input_ids)
            assert int(is_trained.argmax()) == len(seen.input_ids)


def test_prompts_say_what_was_asked_for(model: tuple[EngineBackend, CascadeVLProcessor]) -> None:
    processor, question = model[1], Message.of("user", "2 + 2?")

    def shown(**how: Any) -> list[str]:
        config = RolloutConfig(out=Path("x"), **how)
        return [turn.text for turn in shown_prompt(question, config, processor)]

    assert shown() == [processor.template.system, "2 + 2?"]
    assert shown(system="Be brief.") == ["Be brief.", "2 + 2?"]
    assert shown(thinking=True) == [THINKING_PROMPT, "2 + 2?"]
    assert shown(boxed=True)[1] == f"2 + 2?\n{BOXED_INSTRUCTION}"
    bare = CascadeVLProcessor(processor.tokenizer, system_message="")
    config = RolloutConfig(out=Path("x"))
    assert shown_prompt(question, config, bare) == (question,)


def test_defaults_are_those_of_mmpr() -> None:
    config = RolloutConfig(out=Path("x"))
    assert (config.num_samples, config.sampling.temperature) == (32, 1.0)
    assert config.sampling.max_tokens == 4096


@pytest.mark.parametrize("kill_after", [0, 1, 5])
def test_the_same_call_goes_on(
    tmp_path: Path, model: tuple[EngineBackend, CascadeVLProcessor], kill_after: int
) -> None:
    def says(request: Request, number: int) -> str:
        return f"{request.sampling.seed} {number}"

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    sample(whole, (Scripted(says), model[1]))
    with pytest.raises(Killed):
        sample(parts, (Scripted(says, kill_after), model[1]))
    rest = Scripted(says)
    report = sample(parts, (rest, model[1]))
    assert (report.num_before, report.num_answered) == (kill_after, 6 - kill_after)
    assert len(rest.asked) == 6 - kill_after
    assert (parts / ROLLOUTS).read_bytes() == (whole / ROLLOUTS).read_bytes()
    with pytest.raises(ConfigError, match="num_samples"):
        sample(parts, (rest, model[1]), num_samples=4)


@pytest.mark.slow
def test_processes_that_are_killed_leave_the_store_that_one_makes_alone(
    tmp_path: Path, folder: Path
) -> None:
    program = [sys.executable, "-m", "tests.workflows.kill_rollouts", str(folder), str(tmp_path)]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_what_cannot_be_asked_is_told_and_tried_again(
    tmp_path: Path, model: tuple[EngineBackend, CascadeVLProcessor]
) -> None:
    def says(request: Request, number: int) -> str | RequestError:
        is_long = "door 3" in model[1].decode(request.prompt.input_ids)  # type: ignore[union-attr]
        return RequestError("it does not fit") if is_long else "red"

    config = RolloutConfig(out=tmp_path, num_samples=1)
    told: list[tuple[int, int]] = []
    report = sample_rollouts(
        Sights(5, broken=(1,)),
        config,
        model[1],
        Scripted(says),
        on_progress=lambda done, total: told.append((done, total)),
    )
    assert [type(each) for each in report.failures] == [DataError, RequestError]
    assert report.num_answered == 3
    assert told[0] == (0, 5)
    assert told[-1] == (5, 5)
    report = sample_rollouts(Sights(5), config, model[1], Scripted(lambda request, number: "red"))
    assert (report.num_before, report.num_answered, report.failures) == (3, 2, ())


def test_a_stored_question_can_be_checked_again(tmp_path: Path, model: Any) -> None:
    sample(tmp_path, (Scripted(lambda request, number: "red"), model[1]), 2)
    (_, second) = StoredRollouts(tmp_path)
    problem = problem_of(second)
    assert problem.check("Answer: 1")
    assert not problem.check("Answer: 2")


def test_numbers_that_cannot_work_are_refused() -> None:
    with pytest.raises(ConfigError, match="num_samples is 0"):
        RolloutConfig(out=Path("x"), num_samples=0)
    with pytest.raises(ConfigError, match="system message is empty"):
        RolloutConfig(out=Path("x"), system=" ")


def test_a_chunk_that_was_interrupted_is_answered_again_as_a_whole(
    tmp_path: Path, model: tuple[EngineBackend, CascadeVLProcessor]
) -> None:
    _, processor = model
    engine = Engine(model[0].engine.model, processor, EngineConfig(num_pages=400, page_tokens=8))
    backend = EngineBackend(engine=engine)
    asked: list[list[int]] = []

    class Counting:
        """The engine, with a note of what is asked together; it may be lost on the way."""

        capabilities = backend.capabilities
        stream, load = backend.stream, backend.load

        def __init__(self, last: int) -> None:
            self.left = last

        def answer(self, requests: Any) -> Any:
            asked.append([])
            for outcome in backend.answer(requests):
                asked[-1].append(outcome[0])
                if self.left == 0:
                    raise RequestError("the server is gone")
                self.left -= 1
                yield outcome

    def once(out: Path, last: int) -> None:
        config = RolloutConfig(out=out, num_samples=3, sampling=SAMPLING, chunk=2)
        backend_now = Counting(last)
        sample_rollouts(Sights(6), config, processor, backend_now, before_chunk=engine.forget)

    with pytest.raises(RequestError, match="gone"):
        once(tmp_path / "a", 3)
    assert len(StoredRollouts(tmp_path / "a")) == 2  # the third answered question was not kept
    asked.clear()
    once(tmp_path / "a", 100)
    assert [len(each) for each in asked] == [0, 2, 2]
    once(tmp_path / "b", 100)
    answers = [[each.answers for each in StoredRollouts(tmp_path / out)] for out in ("a", "b")]
    assert answers[0] == answers[1]
