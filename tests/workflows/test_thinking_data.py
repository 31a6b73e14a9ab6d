"""Thinking data from end to end: what is asked, filtered, written, resumed, and trained on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from tests.workflows.some_solutions import (
    BOXED,
    SYSTEM,
    Scripted,
    Sums,
    records,
    right,
    values,
    write_questions,
)

from cascadevl.data.conversation import thinking_answer
from cascadevl.data.example import ExampleBuilder, ExampleConfig
from cascadevl.data.hub import open_source
from cascadevl.data.meta import read_meta
from cascadevl.data.spans import describe
from cascadevl.data.tokenizer import build_tokenizer
from cascadevl.errors import ConfigError, RequestError
from cascadevl.eval.responder import Reply
from cascadevl.tasks.handwriting import Handwriting
from cascadevl.tasks.problems import TaskProblems
from cascadevl.tasks.text import Text
from cascadevl.types import Message, Record
from cascadevl.workflows.thinking_config import ThinkingConfig
from cascadevl.workflows.thinking_data import make_thinking_data

# -- from tasks


def test_worked_reasoning_of_tasks_becomes_both_modes(tmp_path: Path) -> None:
    task = Handwriting(difficulty="add_digits", num_questions=3)
    problems = TaskProblems(tasks=[Text(num_questions=2), task], num_scenes=20)
    report = make_thinking_data(problems, ThinkingConfig(out=tmp_path))

    # By hand: every question with steps, scene by scene, the tasks in turn.
    expected, pictures = [], []
    for number in range(20):
        for each in (Text(num_questions=2), task):
            scene = each.draw("train", 0, number)
            for order, question in enumerate(scene.questions):
                if question.reasoning is not None:
                    expected.append((f"{scene.scene_id}#{order}", scene, question))
    thinking, direct = records(tmp_path, "thinking"), records(tmp_path, "direct")
    assert [record["id"] for record in thinking] == [f"{name}/think/0" for name, _, _ in expected]
    assert [record["id"] for record in direct] == [f"{name}/direct" for name, _, _ in expected]
    for (_, scene, question), with_steps, without in zip(expected, thinking, direct, strict=True):
        shown = "<image>\n" if scene.images else ""
        steps = f"<think>\n{question.reasoning}\n</think>\n\n{question.answer}"
        assert values(with_steps) == [SYSTEM, shown + question.prompt, steps]
        assert values(without) == [shown + question.prompt, question.answer]
        assert [turn["from"] for turn in with_steps["conversations"]] == ["system", "human", "gpt"]
        assert with_steps.get("image") == without.get("image")
        if scene.images:
            pictures.append(with_steps["image"])
            seen = PIL.Image.open(tmp_path / with_steps["image"])
            np.testing.assert_array_equal(np.asarray(seen), np.asarray(scene.images[0]))
    assert len(set(pictures)) > 5
    assert (report.num_problems, report.num_unsolved) == (len(expected), 0)
    assert (report.num_thinking, report.num_direct, report.dropped) == (
        len(expected),
        len(expected),
        {},
    )


def test_what_is_written_trains_the_thinking_and_the_answer_and_no_more(tmp_path: Path) -> None:
    """From the meta file to the tokens: the released template letter by letter, and the targets."""
    task = Handwriting(difficulty="add_digits", num_questions=3)
    problems = TaskProblems(tasks=[task], num_scenes=4)
    report = make_thinking_data(problems, ThinkingConfig(out=tmp_path))
    assert report.meta is not None
    tokenizer = build_tokenizer([SYSTEM, "What is the sum of the two numbers? 1 + 2 = 3"], 600)
    builder = ExampleBuilder(tokenizer, ExampleConfig(system=""), 256)
    seen = {}
    for spec in read_meta(report.meta):
        record = open_source(spec)[0]  # type: ignore[index]
        assert isinstance(record, Record)
        example = builder(record)
        seen[spec.name] = [
            (span.text, span.trained) for span in describe(example, tokenizer) if span.text
        ]
    question = next(q for q in task.draw("train", 0, 0).questions if q.reasoning)
    asked = (
        "<|im_start|>user\n<img><IMG_CONTEXT></img>\n"
        f"{question.prompt}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert seen["thinking"] == [
        (f"<|im_start|>system\n{SYSTEM}<|im_end|>\n{asked}", False),
        (f"<think>\n{question.reasoning}\n</think>\n\n{question.answer}<|im_end|>", True),
        ("\n", False),
    ]
    assert seen["direct"] == [(asked, False), (f"{question.answer}<|im_end|>", True), ("\n", False)]


def test_an_answer_in_a_box_is_asked_for_and_given(tmp_path: Path) -> None:
    problems = TaskProblems(tasks=[Text()], num_scenes=10)
    make_thinking_data(problems, ThinkingConfig(out=tmp_path, boxed=True))
    for record in records(tmp_path, "thinking"):
        _, asked, answer = values(record)
        assert asked.endswith(f"\n{BOXED}")
        assert answer.rpartition("</think>\n\n")[2].startswith("\\boxed{")
        assert answer.endswith("}")
    for record in records(tmp_path, "direct"):
        assert "boxed" not in "".join(values(record))


def test_gpt_oss_and_own_system_prompts(tmp_path: Path) -> None:
    problems = TaskProblems(tasks=[Text()], num_scenes=4)
    for name, settings, expected in (
        ("oss", {"template": "internvl3_5_gpt_oss"}, "Reasoning: high\n\n# Valid channels: anal"),
        ("own", {"system": "Think first."}, "Think first."),
    ):
        make_thinking_data(problems, ThinkingConfig(out=tmp_path / name, **settings))
        assert expected in values(records(tmp_path / name, "thinking")[0])[0]


# -- the ratio of modes


@pytest.mark.parametrize(
    ("ratio", "num_direct", "repeats"),
    [(0.0, 0, None), (0.25, 2, 1.0), (0.5, 4, 1.0), (1.0, 8, 1.0), (3.0, 8, 3.0)],
)
def test_direct_answers_come_in_their_ratio(
    tmp_path: Path, ratio: float, num_direct: int, repeats: float | None
) -> None:
    config = ThinkingConfig(out=tmp_path, num_samples=1, direct_ratio=ratio, group=3)
    report = make_thinking_data(Sums(8), config, responder=Scripted(right))
    assert (report.num_thinking, report.num_direct) == (8, num_direct)
    meta = json.loads((tmp_path / "meta.json").read_text("utf-8"))
    assert meta.get("direct", {}).get("repeat_time") == repeats
    if ratio == 0.5:  # spread over the questions, not the first half of them
        names = [record["id"] for record in records(tmp_path, "direct")]
        assert names == [f"sum:{n}/direct" for n in (0, 2, 4, 6)]


def test_nothing_kept_writes_no_meta_file(tmp_path: Path) -> None:
    config = ThinkingConfig(out=tmp_path, num_samples=1)
    report = make_thinking_data(Sums(2), config, responder=Scripted(lambda *_: Reply("")))
    assert (report.meta, report.num_unsolved) == (None, 2)
    assert not (tmp_path / "meta.json").exists()


# -- interruptions


def test_interrupted_work_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    """The server dies in the third group, twice; what comes out is what one attempt writes."""

    class Dying(Scripted):
        def __init__(self, lives: int) -> None:
            super().__init__(right)
            self.lives = lives

        def sample(self, conversations: Sequence[Sequence[Message]], *, seed: int) -> list[Reply]:
            if len(self.seeds) == self.lives:
                raise RequestError("the server is gone")
            return super().sample(conversations, seed=seed)

    settings: dict[str, Any] = {"num_samples": 2, "group": 2, "direct_ratio": 0.5}
    whole = ThinkingConfig(out=tmp_path / "whole", **settings)
    first = Scripted(right)
    expected = make_thinking_data(Sums(9), whole, responder=first)

    parts = ThinkingConfig(out=tmp_path / "parts", resume=True, **settings)
    seeds = []
    for lives in (2, 0, 1):
        dying = Dying(lives)
        with pytest.raises(RequestError):
            make_thinking_data(Sums(9), parts, responder=dying)
        seeds += dying.seeds
        with (tmp_path / "parts" / "thinking.jsonl").open("a") as file:
            file.write('{"id": "half a rec')  # what a crash in the middle of writing leaves
    last = Scripted(right)
    report = make_thinking_data(Sums(9), parts, responder=last)
    assert seeds + last.seeds == first.seeds  # nothing was asked twice
    assert replace(report, meta=None) == replace(expected, meta=None)
    for name in ("thinking.jsonl", "direct.jsonl", "meta.json"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()

    # Finished work is only reported again.
    again = make_thinking_data(Sums(9), parts, responder=Dying(0))
    assert again == report
    with pytest.raises(ConfigError, match="resume"):
        make_thinking_data(Sums(9), replace(parts, resume=False), responder=last)
    with pytest.raises(ConfigError, match=r"num_samples = 2 and cannot go on with 3"):
        make_thinking_data(Sums(9), replace(parts, num_samples=3), responder=last)
    with pytest.raises(ConfigError, match="model"):
        make_thinking_data(Sums(9), parts, responder=last, facts={"model": "other"})


def test_broken_questions_are_left_out_and_counted(tmp_path: Path) -> None:
    lines = [
        {"question": "One and one?", "answer": 2},
        {"question": "No answer?"},
        {"question": "<image>\nWhich?", "answer": "2", "image": "absent.png"},
        {"question": "Two and two?", "answer": "4"},
    ]
    problems = write_questions(tmp_path / "q.jsonl", lines)
    replies = {"One": "2", "Two": "4"}
    responder = Scripted(
        lambda text, _: Reply(thinking_answer("adding both up gives it", replies[text[:3]]))
    )
    config = ThinkingConfig(out=tmp_path / "out", num_samples=1)
    report = make_thinking_data(problems, config, responder=responder)
    assert dict(report.skipped) == {"bad_field": 1, "missing_image": 1}
    assert (report.num_problems, report.num_thinking) == (2, 2)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"num_samples": 0}, "num_samples"),
        ({"keep": 0}, "keep"),
        ({"group": 0}, "group"),
        ({"direct_ratio": -1.0}, "direct_ratio"),
        ({"system": " "}, "empty"),
        ({"template": "llama"}, "llama"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        ThinkingConfig(out=Path("x"), **settings)
