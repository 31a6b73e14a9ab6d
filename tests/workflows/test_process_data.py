"""Data for process rewards: steps are judged as by hand, and an interruption changes nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.data.conftest import picture
from tests.engine.small_backend import checkpoint
from tests.workflows.some_problems import SAMPLING, Killed, Scripted, opened

from cascadevl.cli.main import main
from cascadevl.data.example import ExampleBuilder, ExampleConfig
from cascadevl.data.meta import read_meta
from cascadevl.data.process_records import StepBuilder, read_judged
from cascadevl.data.processor import CascadeVLProcessor
from cascadevl.data.rollouts import open_store
from cascadevl.engine.engine_backend import EngineBackend
from cascadevl.engine.offline import seed_of
from cascadevl.engine.requests import Request
from cascadevl.errors import ConfigError, RequestError
from cascadevl.scoring.steps import StepRules
from cascadevl.tasks.naming import open_entry
from cascadevl.train.config import DataConfig, ModelConfig
from cascadevl.train.prm import PRMConfig
from cascadevl.types import Example, ImageRef, Message, Rollout, SampledAnswer
from cascadevl.workflows.dry_run import SeenSample, first_samples
from cascadevl.workflows.process_config import ProcessConfig, ProcessReport
from cascadevl.workflows.process_data import PROCESS, QUESTIONS, make_process_data

RIGHT = "Three red.\n\nTwo blue.\n\nAnswer: 5"
WRONG = "Three red.\n\nNine blue.\n\nAnswer: 12"
LONG = "\n\n".join(f"Step {n}" for n in range(25)) + "\n\nAnswer: 5"
MODEL = tuple[EngineBackend, CascadeVLProcessor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("checkpoint") / "github")


@pytest.fixture(scope="module")
def model(folder: Path) -> MODEL:
    return opened(folder)


def answer(text: str, *, correct: bool = False, cut: bool = False) -> SampledAnswer:
    return SampledAnswer(
        text=text,
        token_ids=(1,),
        finish_reason="length" if cut else "stop",
        correct=correct,
        rewards={},
        reward=float(correct),
    )


def question(name: str, *answers: SampledAnswer, **values: Any) -> Rollout:
    parts: tuple[Any, ...] = (f"How many, {name}?",)
    if values.pop("shows", True):
        parts = (ImageRef(picture(60, 40, seed=1)), f"\nHow many, {name}?")
    given = {"reference": "5", "metric": "number", **values}
    prompt = (Message.of("system", "Be brief."), Message("user", parts))
    return Rollout(problem_id=f"balls:{name}", prompt=prompt, answers=answers, **given)


def several() -> list[Rollout]:
    solved = (answer(RIGHT, correct=True), answer(WRONG))
    return [
        question("a", *solved, answer(RIGHT, correct=True), answer("Cut off", cut=True)),
        question("b", answer("5", correct=True), shows=False),
        question("c", answer(LONG, correct=True)),
        question("d", *solved, reference="yes", metric="exact"),
        question("e", *solved, metric=""),
        question("f", answer("Cut off", cut=True), answer(" ")),
        question("g", *solved, metric="choice", choices=(("A", "5"), ("B", "6"))),
    ]


def store(path: Path, rollouts: Sequence[Rollout]) -> Path:
    with open_store(path, {}) as opened_store:
        opened_store.append(rollouts)
    return path


def says(processor: CascadeVLProcessor) -> Any:
    """Continuations: hopeless after nine blue ones, else right one time in four or always."""

    def answer_to(request: Request, number: int) -> str:
        assert isinstance(request.prompt, Example)
        text = processor.tokenizer.decode(request.prompt.input_ids)
        if "Nine" in text:
            return "Answer: 12"
        return "Answer: 5" if "Two blue" in text or number % 4 == 0 else "Answer: 6"

    return answer_to


def judged(
    rollouts: Path, out: Path, backend: Any, processor: CascadeVLProcessor, **values: Any
) -> ProcessReport:
    settings = {"num_continuations": 8, "sampling": SAMPLING, **values}
    config = ProcessConfig(store=rollouts, out=out, **settings)
    return make_process_data(config, processor, backend)


def rows(out: Path, name: str = PROCESS) -> dict[str, dict[str, Any]]:
    lines = (out / name).read_text("utf-8").splitlines()
    return {str(row["id"]): row for row in map(json.loads, lines)}


def test_steps_are_judged_by_the_share_of_right_continuations(tmp_path: Path, model: MODEL) -> None:
    backend = Scripted(says(model[1]))
    report = judged(store(tmp_path / "s", several()), tmp_path / "out", backend, model[1])
    found = rows(tmp_path / "out")
    assert {name: row["mc"] for name, row in found.items()} == {
        "balls:a/0": [0.25, 1.0, 1.0],
        "balls:a/1": [0.25, 0.0, 0.0],
        "balls:b/0": [1.0],
        "balls:c/0": [0.25] * 8 + [1.0],
    }
    answers = [turn["value"] for turn in found["balls:a/1"]["conversations"][2::2]]
    assert answers == ["+", "-", "-"]
    assert report.outcomes == {"guessable": 2, "no_solution": 1, "open": 1, "used": 3}
    assert (report.num_solutions, report.num_right) == (4, 3)
    assert (report.num_steps, report.num_minus) == (16, 2)
    assert report.num_continuations == 8 * 12 == 8 * len(backend.asked)
    assert report.failures == ()


def test_what_is_written_trains(tmp_path: Path, model: MODEL) -> None:
    report = judged(
        store(tmp_path / "s", several()), tmp_path / "out", Scripted(says(model[1])), model[1]
    )
    assert report.meta is not None
    (spec,) = read_meta(report.meta)
    source = open_entry(spec)
    build = StepBuilder(
        ExampleBuilder(model[1].tokenizer, ExampleConfig(tiling=model[1].tiling), 4)
    )
    records = [source[number] for number in range(len(source))]
    by_first = {read_judged(each).steps[-1]: each for each in records}
    wrong = read_judged(by_first["Answer: 12"])
    assert wrong.steps == tuple(WRONG.split("\n\n"))
    assert wrong.labels == (True, False, False)
    assert wrong.question.parts[1] == "\nHow many, a?"
    for record in records:
        example = build(record)
        assert int(example.trained.sum()) == len(read_judged(record).labels)
        assert (example.num_tiles > 0) == ("b?" not in record.messages[1].text)


def test_a_dry_run_shows_that_labels_alone_are_trained(
    tmp_path: Path, model: MODEL, folder: Path
) -> None:
    report = judged(
        store(tmp_path / "s", several()), tmp_path / "out", Scripted(says(model[1])), model[1]
    )
    assert report.meta is not None
    config = PRMConfig(
        model=ModelConfig(path=str(folder)), data=DataConfig(meta=(report.meta,), jpeg=False)
    )
    (sample,) = first_samples(config, 1)
    assert isinstance(sample, SeenSample)
    trained = [span.text for span in sample.spans if span.trained]
    assert len(trained) == sample.num_trained > 0
    assert set(trained) <= {"+", "-"}


def test_a_continuation_goes_on_where_the_step_ends(tmp_path: Path, model: MODEL) -> None:
    """The prompt is the question as it was shown and the solution so far, nothing more."""
    backend, processor = Scripted(says(model[1])), model[1]
    asked = several()[0]
    judged(store(tmp_path / "s", [asked]), tmp_path / "out", backend, processor)
    begun = [
        "\n\n".join([*text.split("\n\n")[:number], ""])
        for text in (RIGHT, WRONG)
        for number in (1, 2)
    ]
    prompt = processor.builder.prompt(asked.prompt).input_ids
    assert len(backend.asked) == 4
    for number, (request, text) in enumerate(zip(backend.asked, begun, strict=True)):
        assert isinstance(request.prompt, Example)
        ids = request.prompt.input_ids
        np.testing.assert_array_equal(ids[: len(prompt)], prompt)
        assert processor.tokenizer.decode(ids[len(prompt) :]) == text
        assert request.num_samples == 8
        source = f"balls:a/{number // 2}/{number % 2}"
        assert request.sampling.seed == seed_of(SAMPLING.seed, source)


@pytest.mark.parametrize(
    ("values", "mc", "minus"),
    [
        ({"threshold": 0.25}, [[0.25, 1.0, 1.0], [0.25, 0.0, 0.0]], 4),
        ({"num_solutions": 1}, [[0.25, 1.0, 1.0]], 0),
        ({"choose": "balanced", "num_solutions": 3}, [[0.25, 1.0, 1.0], [0.25, 0.0, 0.0]], 2),
        ({"rules": StepRules(max_steps=2)}, [[1.0, 1.0], [0.0, 0.0]], 2),
        ({"rules": StepRules(max_steps=1)}, [[1.0], [0.0]], 1),
    ],
)
def test_counts_and_threshold_are_chosen(
    values: dict[str, Any], mc: list[list[float]], minus: int, tmp_path: Path, model: MODEL
) -> None:
    rollouts = store(tmp_path / "s", several()[:1])
    report = judged(rollouts, tmp_path / "out", Scripted(says(model[1])), model[1], **values)
    assert [row["mc"] for row in rows(tmp_path / "out").values()] == mc
    assert report.num_minus == minus


def test_as_many_right_as_wrong_solutions_or_none(tmp_path: Path, model: MODEL) -> None:
    wrong = [answer(f"{WRONG}{number}") for number in range(5)]
    right = [answer(RIGHT, correct=True), answer(LONG, correct=True)]
    asked = [
        question("a", *wrong, *right, right[0]),
        question("b", *wrong[:2]),
        question("c", right[1]),
        question("d", wrong[0], right[1], wrong[1]),
    ]
    report = judged(
        store(tmp_path / "s", asked),
        tmp_path / "out",
        Scripted(says(model[1])),
        model[1],
        choose="balanced",
    )
    assert report.outcomes == {"one_sided": 2, "used": 2}
    assert (report.num_solutions, report.num_right) == (6, 3)
    ends = {name: row["mc"][-1] for name, row in rows(tmp_path / "out").items()}
    assert ends == {f"balls:a/{number}": float(number % 2 == 0) for number in range(4)} | {
        f"balls:d/{number}": float(number == 0) for number in range(2)
    }
    with pytest.raises(ConfigError, match="nothing can be balanced"):
        ProcessConfig(store=tmp_path, out=tmp_path, choose="balanced", num_solutions=1)


@pytest.mark.parametrize("kill_after", [0, 1, 5, 9])
def test_the_same_call_goes_on(tmp_path: Path, model: MODEL, kill_after: int) -> None:
    rollouts = store(tmp_path / "s", several())
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    first = judged(rollouts, whole, Scripted(says(model[1])), model[1])
    with pytest.raises(Killed):
        judged(rollouts, parts, Scripted(says(model[1]), kill_after), model[1])
    rest = Scripted(says(model[1]))
    again = judged(rollouts, parts, rest, model[1])
    assert len(rest.asked) == (12 if kill_after < 4 else 8)
    for name in (PROCESS, QUESTIONS):
        assert (parts / name).read_bytes() == (whole / name).read_bytes()
    assert (again.outcomes, again.num_continuations) == (first.outcomes, first.num_continuations)
    assert again.num_minus == first.num_minus
    none = Scripted(says(model[1]))
    assert judged(rollouts, parts, none, model[1]).num_solutions == 4
    assert none.asked == []
    with pytest.raises(ConfigError, match="num_continuations"):
        judged(rollouts, parts, rest, model[1], num_continuations=4)


@pytest.mark.slow
def test_processes_that_are_killed_leave_the_data_that_one_makes_alone(
    tmp_path: Path, folder: Path
) -> None:
    program = [sys.executable, "-m", "tests.workflows.kill_process", str(folder), str(tmp_path)]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_what_cannot_be_continued_is_told_and_tried_again(tmp_path: Path, model: MODEL) -> None:
    rollouts = store(tmp_path / "s", several())

    def refuses(request: Request, number: int) -> str | RequestError:
        said: str = says(model[1])(request, number)
        return RequestError("it does not fit") if said == "Answer: 12" else said

    report = judged(rollouts, tmp_path / "out", Scripted(refuses), model[1])
    assert [str(each) for each in report.failures] == ["it does not fit"]
    assert report.outcomes["used"] == 2
    assert not any(name.startswith("balls:a") for name in rows(tmp_path / "out"))
    rest = Scripted(says(model[1]))
    report = judged(rollouts, tmp_path / "out", rest, model[1])
    assert (len(rest.asked), report.outcomes["used"], report.failures) == (4, 3, ())


def test_a_continuation_that_was_cut_off_is_not_right(tmp_path: Path, model: MODEL) -> None:
    """The real engine, whose random model finds no answer; some continuations end, some do not."""
    rollouts = store(tmp_path / "s", several()[:1])
    report = judged(rollouts, tmp_path / "out", model[0], model[1])
    assert [row["mc"][:-1] for row in rows(tmp_path / "out").values()] == [[0.0, 0.0]] * 2
    assert report.num_tokens <= report.num_continuations * SAMPLING.max_tokens
    shared = report.num_cached_tokens / report.num_prompt_tokens
    assert shared > 0.8, "continuations of a step share its prompt"


def test_the_command_samples_judges_and_goes_on(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    words = ["data", "process", str(tmp_path / "s"), str(tmp_path / "out"), "--model", str(folder)]
    words += ["--task", "text", "--scenes", "3", "--num-solutions", "2", "--num-continuations", "2"]
    words += ["--max-tokens", "4", "--lines", "--max-chance", "1"]
    code = main(words)
    shown = capsys.readouterr().out
    assert code == (0 if (tmp_path / "out" / "meta.json").exists() else 1)
    assert "questions" in shown
    assert main(words) == code
    assert capsys.readouterr().out == shown
