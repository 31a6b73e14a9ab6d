"""Preference data from stored rollouts to what a run trains on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.data.conftest import picture
from tests.data.some_rollouts import answer, answers, rollout
from tests.engine.small_backend import checkpoint
from tests.workflows.some_problems import Killed, Scripted, opened

from cascadevl.data.example import ExampleBuilder, ExampleConfig
from cascadevl.data.hub import open_source
from cascadevl.data.meta import read_meta
from cascadevl.data.processor import CascadeVLProcessor
from cascadevl.data.rollouts import open_store
from cascadevl.data.source import Source
from cascadevl.data.spans import describe
from cascadevl.engine.engine_backend import EngineBackend
from cascadevl.engine.requests import Request
from cascadevl.engine.sampling import SamplingParams
from cascadevl.errors import ConfigError, RequestError
from cascadevl.types import Example, ImageRef, Message, Rollout
from cascadevl.workflows.preference_config import PreferenceConfig, PreferenceReport
from cascadevl.workflows.preference_data import make_preferences

DOOR = "The door is red and the wall is green."


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[EngineBackend, CascadeVLProcessor]:
    return opened(checkpoint(tmp_path_factory.mktemp("checkpoint") / "github"))


def open_question(number: int, *said: str, pictures: int = 1) -> Rollout:
    shown = [ImageRef(picture(90, 60, seed=number)) for _ in range(pictures)]
    return rollout(
        number,
        problem_id=f"open:{number}",
        prompt=(Message.of("user", *shown, f"\nWhat is on door {number}?"),),
        reference="",
        metric="",
        answers=tuple(map(answer, said)),
    )


def keep(folder: Path, rollouts: Sequence[Rollout]) -> Path:
    with open_store(folder, {}) as store:
        store.append(rollouts)
    return folder


def made(
    folder: Path, rollouts: Sequence[Rollout], model: Any = None, **more: Any
) -> PreferenceReport:
    config = PreferenceConfig(store=keep(folder / "store", rollouts), out=folder / "out", **more)
    if model is None:
        return make_preferences(config)
    return make_preferences(config, backend=model[0], processor=model[1])


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    text = (folder / "out" / f"{name}.jsonl").read_text("utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_right_answers_against_wrong_ones(tmp_path: Path) -> None:
    questions = [
        rollout(0),
        rollout(1, answers=answers(["Answer: 2"], ["Answer: 2 apples"])),
        rollout(2, answers=answers([], ["no"])),
        rollout(3, answers=answers(["Answer: 4", "4"], [])),
        open_question(4, DOOR),
    ]
    report = made(tmp_path, questions)
    expected = {"paired": 1, "entailed": 1, "none_correct": 1, "all_correct": 1, "open": 1}
    assert report.outcomes == expected
    assert (report.num_pairs, report.num_entailed, report.num_dropout) == (2, 1, 0)
    found = rows(tmp_path, "correctness")
    assert {row["rejected"] for row in found} == {"Answer: 0", "I do not know."}
    for order, row in enumerate(found):
        image = row.pop("image")
        assert Path(image).parent == (tmp_path / "store" / "images").resolve()
        rejected = row.pop("rejected")
        assert rejected != row["chosen"]
        assert row == {
            "id": f"sums:0/{order}",
            "system_prompt": "Be brief.",
            "question": "<image>\nWhat is 0 + 1?\n\u00fc",
            "chosen": "It is\nAnswer: 1",
            "answer_gt": "1",
        }
    assert report.mean_characters == (15.0, (9 + 14) / 2)
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    assert meta == {
        "correctness": {
            "root": "",
            "data_augment": False,
            "repeat_time": 1,
            "annotation": "correctness.jsonl",
            "length": 2,
        }
    }
    assert json.loads((tmp_path / "out" / "report.json").read_text())["num_pairs"] == 2


def test_what_is_written_trains_on_the_prompt_that_was_answered(
    tmp_path: Path, model: tuple[EngineBackend, CascadeVLProcessor]
) -> None:
    processor = model[1]
    question = rollout(3)
    report = made(tmp_path, [question])
    assert report.meta is not None
    (spec,) = read_meta(report.meta)
    source = open_source(spec)
    assert isinstance(source, Source)
    config = ExampleConfig(tiling=processor.tiling)
    builder = ExampleBuilder(processor.tokenizer, config, processor.tokens_per_tile)
    seen = processor.builder.prompt(question.prompt)
    for number in range(len(source)):
        example = builder(source[number])
        assert example.parents == (-1, 0, 0)
        np.testing.assert_array_equal(example.tiles, seen.tiles)
        first = example.input_ids[example.segments != 2]
        np.testing.assert_array_equal(first[: len(seen.input_ids)], seen.input_ids)
        trained = [span.text for span in describe(example, processor.tokenizer) if span.trained]
        assert trained[0] == "It is\nAnswer: 4<|im_end|>"
        assert trained[1] in ("Answer: 0<|im_end|>", "I do not know.<|im_end|>")


def test_fewer_pairs_of_a_question_where_there_are_very_many() -> None:
    config = PreferenceConfig(store=Path("s"), out=Path("o"))
    assert config.rules(500_000).max_pairs == 15
    assert config.rules(500_001).max_pairs == 3
    own = PreferenceConfig(store=Path("s"), out=Path("o"), max_pairs=7)
    assert own.rules(500_001).max_pairs == 7


# -- DropoutNTP


def test_the_model_continues_the_first_half_without_the_picture(
    tmp_path: Path, model: tuple[EngineBackend, CascadeVLProcessor]
) -> None:
    backend = Scripted(lambda request, number: f" blue, {request.sampling.seed % 7}.")
    sampling = SamplingParams(temperature=0.7, max_tokens=9)
    report = made(
        tmp_path,
        [open_question(1, DOOR, "It says so and so."), rollout(3)],
        (backend, model[1]),
        sampling=sampling,
    )
    (request,) = backend.asked
    prompt = request.prompt
    assert isinstance(prompt, Example)
    assert prompt.num_tiles == 0
    text = model[1].decode(prompt.input_ids)
    assert text.endswith(
        "<|im_start|>user\nWhat is on door 1?<|im_end|>\n<|im_start|>assistant\nThe door is red and"
    )
    assert (request.num_samples, request.sampling.temperature) == (1, 0.7)
    assert request.sampling.max_tokens == 9
    (row,) = rows(tmp_path, "dropout")
    assert row["id"] == "open:1/drop/0"
    assert row["question"] == "<image>\nWhat is on door 1?"
    assert row["chosen"] == DOOR
    assert row["rejected"] == f"The door is red and blue, {request.sampling.seed % 7}."
    assert "answer_gt" not in row
    assert (report.num_dropout, report.num_pairs) == (1, 2)
    assert report.meta is not None
    assert [spec.name for spec in read_meta(report.meta)] == ["correctness", "dropout"]


def test_the_engine_continues_answers(
    tmp_path: Path, model: tuple[EngineBackend, CascadeVLProcessor]
) -> None:
    """The model's own words after the same half, not those of the picture."""
    questions = [open_question(number, DOOR) for number in range(5)]
    sampling = SamplingParams(temperature=1.0, max_tokens=6)
    report = made(tmp_path, questions, model, sampling=sampling, group=2)
    found = rows(tmp_path, "dropout")
    assert report.num_dropout == len(found) == 5
    assert all(row["rejected"].startswith("The door is red and") for row in found)
    assert len({row["rejected"] for row in found}) > 1


def test_which_questions_and_answers_are_continued(
    tmp_path: Path, model: tuple[EngineBackend, CascadeVLProcessor]
) -> None:
    def says(request: Request, number: int) -> str | RequestError:
        text = model[1].decode(request.prompt.input_ids)  # type: ignore[union-attr]
        if "door 5" in text:
            return RequestError("it does not fit")
        return " the wall is green." if "door 4" in text else " blue."

    questions = [
        open_question(0, DOOR, DOOR[::-1], "three words now"),
        open_question(1, DOOR, pictures=0),
        open_question(2, "red"),
        open_question(3),
        open_question(4, DOOR),
        open_question(5, DOOR),
        open_question(6, f"{DOOR} <|im_end|> {DOOR} {DOOR}"),
        rollout(9, answers=answers([DOOR], ["no"])),
    ]
    report = made(tmp_path, questions, (Scripted(says), model[1]), num_dropout=2, dropout="all")
    assert report.num_dropout == 3
    expected = ["open:0/drop/0", "open:0/drop/1", "sums:9/drop/0"]
    assert [row["id"] for row in rows(tmp_path, "dropout")] == expected
    assert report.dropped == {
        "no_picture": 1,
        "too_short": 1,
        "no_answer": 1,
        "same": 1,
        "refused": 1,
        "control_token": 1,
    }


def test_reasoning_in_a_channel_of_its_own_is_not_cut(
    tmp_path: Path, model: tuple[EngineBackend, CascadeVLProcessor]
) -> None:
    folder = checkpoint(tmp_path / "gpt_oss", "gpt_oss")
    processor = opened(folder)[1]
    assert processor.template.reasoning is not None
    long = "<think>\none two three four five six seven\n</think>\n\nred"
    short = "<think>\none\n</think>\n\nThe door is red and the wall is green now."
    questions = [open_question(0, long), open_question(1, short)]
    backend = Scripted(lambda request, number: " blue.")
    report = made(tmp_path, questions, (backend, processor))
    assert (report.num_dropout, report.dropped) == (1, {"in_reasoning": 1})


# -- interruptions


def test_an_attempt_that_was_killed_goes_on_and_writes_the_same(
    tmp_path: Path, model: tuple[EngineBackend, CascadeVLProcessor]
) -> None:
    def says(request: Request, number: int) -> str:
        return f" {request.sampling.seed}."

    questions = [open_question(number, DOOR) for number in range(9)]
    questions += [rollout(number) for number in range(9)]
    whole = made(tmp_path / "whole", questions, (Scripted(says), model[1]), group=4)
    for kill_after in (0, 3, 6):
        folder = tmp_path / f"{kill_after}"
        with pytest.raises(Killed):
            made(folder, questions, (Scripted(says, kill_after), model[1]), group=4)
        backend = Scripted(says)
        report = made(folder, questions, (backend, model[1]), group=4)
        assert len(backend.asked) == 9 - kill_after // 4 * 4
        for name in ("correctness", "dropout"):
            moved = [{**row, "image": None} for row in rows(folder, name)]
            assert moved == [{**row, "image": None} for row in rows(tmp_path / "whole", name)]
        assert report.num_dropout == whole.num_dropout == 9
        assert report.outcomes == whole.outcomes


def test_a_store_that_has_grown_is_other_work(tmp_path: Path) -> None:
    made(tmp_path, [rollout(0)])
    assert made(tmp_path, [rollout(0)]).num_pairs == 2
    with pytest.raises(ConfigError, match="rollouts"):
        made(tmp_path, [rollout(0), rollout(1)])
    config = PreferenceConfig(store=tmp_path / "store", out=tmp_path / "out", max_pairs=1)
    with pytest.raises(ConfigError, match="max_pairs"):
        make_preferences(config)


def test_nothing_to_pair_leaves_no_meta_file(tmp_path: Path) -> None:
    report = made(tmp_path, [open_question(0, DOOR)])
    assert report.meta is None
    assert not (tmp_path / "out" / "meta.json").exists()


@pytest.mark.parametrize(
    "values", [{"kept_share": 1.0}, {"group": 0}, {"num_dropout": 0}, {"max_pairs": 0}]
)
def test_numbers_that_cannot_work_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(values))):
        PreferenceConfig(store=Path("s"), out=Path("o"), **values)
