"""Scenes, questions and records: what holds for every family."""

from __future__ import annotations

import numpy as np
import PIL.Image
import pytest
from tests.golden.regenerate import setups

from cascadevl.errors import ConfigError
from cascadevl.tasks import TASKS
from cascadevl.tasks.base import (
    DESCRIBE_PROMPT,
    Metric,
    Question,
    Scene,
    Task,
    TaskSource,
    chance_levels,
    scene_generator,
    to_prompt,
    to_record,
)
from cascadevl.tasks.contact_sheet import contact_sheet
from cascadevl.types import ImageRef

ALL = setups()
QUESTION = Question(prompt="2 + 3?", answer="5", kind="add", reasoning="2 + 3 = 5")
SCENE = Scene(
    scene_id="s/1",
    images=(PIL.Image.new("RGB", (8, 8)),),
    questions=(QUESTION, Question(prompt="Is it?", answer="yes", kind="yes_no")),
    description="Nothing.",
)


@pytest.mark.parametrize("name", sorted(ALL))
def test_a_scene_is_a_function_of_split_seed_and_index(name: str) -> None:
    task = ALL[name]
    first, again = task.draw("train", 3, 7), task.draw("train", 3, 7)
    assert first.questions == again.questions
    assert first.description == again.description
    if first.image is not None and again.image is not None:
        assert first.image.tobytes() == again.image.tobytes()
        assert first.image.mode == "RGB"
        assert first.image.size == (112, 112)
    others = [task.draw("train", 4, 7), task.draw("train", 3, 8), task.draw("test", 3, 7)]
    assert len({scene.scene_id for scene in (first, *others)}) == 4
    assert any(other.questions != first.questions for other in others)


@pytest.mark.parametrize("name", sorted(ALL))
def test_every_reference_answer_passes_its_own_check(name: str) -> None:
    for index in range(30):
        for question in ALL[name].draw("train", 0, index).questions:
            assert question.kind in ALL[name].kinds
            for style in ("short", "steps", "think"):
                assert question.check(question.response(style))
            assert not question.check("")
            assert not question.check("something else")


@pytest.mark.parametrize("name", sorted(ALL))
def test_kinds_are_all_asked_and_no_answer_is_too_frequent(name: str) -> None:
    task = ALL[name]
    levels = chance_levels(task, "test", seed=1, num_scenes=200)
    assert set(levels) == set(task.kinds)
    for kind, chance in levels.items():
        assert chance.share < 0.62, f"{kind}: {chance.answer!r} is right in {chance.share:.0%}"


@pytest.mark.parametrize("family", sorted(set(TASKS) - {"chains", "letters", "subset_sum", "text"}))
def test_questions_do_not_depend_on_the_picture_size(family: str) -> None:
    small, large = TASKS[family](px=112), TASKS[family](px=224)
    for index in range(5):
        left, right = small.draw("test", 0, index), large.draw("test", 0, index)
        assert left.questions == right.questions
        assert right.image is not None
        assert right.image.size == (224, 224)


@pytest.mark.parametrize("family", sorted(set(TASKS) - {"easy_vqa", "needle"}))
def test_an_unknown_difficulty_is_refused(family: str) -> None:
    with pytest.raises(ConfigError, match=r"no difficulty 'hardest'; choose from \['"):
        TASKS[family](difficulty="hardest")


def test_num_questions_is_a_limit() -> None:
    assert len(TASKS["shapes"](num_questions=2).draw("train", 0, 0).questions) == 2
    assert len(TASKS["easy_vqa"](num_questions=1).draw("train", 0, 0).questions) == 1


@pytest.mark.parametrize(
    ("metric", "answer", "right", "wrong"),
    [
        ("exact", "blue", "Blue.", "dark blue"),
        ("number", "12", "12.0", "12.1"),
        ("relaxed", "100", "104", "106"),
        ("list", "a, b", "b and a", "a"),
        ("box", "[[0, 0, 10, 10]]", "[0, 0, 10, 9]", "[0, 0, 10, 3]"),
        ("math", "1/2", "0.5", "0.6"),
        ("choice", "B", "(B)", "(A)"),
    ],
)
def test_each_metric_checks(metric: Metric, answer: str, right: str, wrong: str) -> None:
    choices = (("A", "red"), ("B", "green"))
    question = Question(prompt="?", answer=answer, kind="k", metric=metric, choices=choices)
    assert question.check(right)
    assert question.check(f"<think>{wrong}</think>\nAnswer: {right}")
    assert not question.check(wrong)
    assert not question.check(f"{right}\nAnswer: {wrong}")


def test_response_styles() -> None:
    assert QUESTION.response("short") == "5"
    assert QUESTION.response("steps") == "2 + 3 = 5\nAnswer: 5"
    assert QUESTION.response("think") == "<think>\n2 + 3 = 5\n</think>\n\n5"
    assert SCENE.questions[1].response("think") == "yes"


def test_sft_record_shares_the_picture() -> None:
    record = to_record(SCENE, task="demo")
    (message,) = record.messages
    assert (message.role, len(message.parts)) == ("user", 1)
    assert isinstance(message.parts[0], ImageRef)
    texts = [[(turn.role, turn.text) for turn in branch] for branch in record.branches]
    assert texts == [
        [("user", "\n2 + 3?"), ("assistant", "2 + 3 = 5\nAnswer: 5")],
        [("user", "\nIs it?"), ("assistant", "yes")],
    ]
    assert (record.dataset, record.record_id, record.source) == ("demo", "s/1", "s/1")


def test_prompt_is_the_beginning_of_what_was_trained() -> None:
    record = to_record(SCENE, task="demo")
    for question, branch in zip(SCENE.questions, record.branches, strict=True):
        (asked,) = to_prompt(SCENE, question)
        assert asked.parts == record.messages[0].parts + branch[0].parts


def test_pretrain_record_describes_first() -> None:
    record = to_record(SCENE, task="demo", stage="pretrain", style="short")
    texts = [[turn.text for turn in branch] for branch in record.branches]
    assert texts == [[f"\n{DESCRIBE_PROMPT}", "Nothing."], ["\n2 + 3?", "5"], ["\nIs it?", "yes"]]


def test_document_is_one_interleaved_text() -> None:
    record = to_record(SCENE, task="demo", stage="document", style="short")
    (message,) = record.messages
    assert (message.role, record.branches) == ("pretrain", ())
    assert isinstance(message.parts[0], ImageRef)
    assert message.text == "\nNothing.\n2 + 3? 5\nIs it? yes"


def test_text_scene_is_a_conversation() -> None:
    scene = TASKS["text"](num_questions=2).draw("train", 0, 0)
    record = to_record(scene, task="text", stage="pretrain")
    assert [turn.role for turn in record.messages] == ["user", "assistant"] * 2
    assert [turn.text for turn in record.messages[::2]] == [q.prompt for q in scene.questions]
    assert record.branches == ()
    assert to_prompt(scene, scene.questions[0])[0].text == scene.questions[0].prompt


def test_source_draws_records() -> None:
    task: Task = TASKS["shapes"]()
    source = TaskSource(task=task, split="test", length=3, seed=5)
    assert (source.name, len(source)) == ("shapes", 3)
    assert source[2].record_id == task.draw("test", 5, 2).scene_id
    for index in (-1, 3):
        with pytest.raises(IndexError, match="of 3 of task 'shapes'"):
            source[index]


def test_generators_differ_by_every_argument() -> None:
    draws = {
        float(scene_generator(*arguments).random())
        for arguments in (
            ("a", "train", 0, 0),
            ("b", "train", 0, 0),
            ("a", "test", 0, 0),
            ("a", "train", 1, 0),
            ("a", "train", 0, 1),
        )
    }
    assert len(draws) == 5


def test_chance_level_counts_by_kind() -> None:
    class Loaded:
        name = "loaded"
        kinds = ("k",)

        def draw(self, split: str, seed: int, index: int) -> Scene:
            question = Question(prompt="?", answer="ab"[index % 4 == 0], kind="k")
            return Scene(scene_id=str(index), images=(), questions=(question,), description="")

    chance = chance_levels(Loaded(), num_scenes=8)["k"]
    assert (chance.answer, chance.share, chance.num) == ("a", 0.75, 8)


def test_contact_sheet_shows_every_picture() -> None:
    scenes = [TASKS["shapes"](px=64).draw("train", 0, index) for index in range(3)]
    sheet = np.asarray(contact_sheet(scenes, num_columns=2, cell_px=100))
    height = sheet.shape[0] // 2
    for number, scene in enumerate(scenes):
        left, top = number % 2 * 100 + 4, number // 2 * height + 4
        assert (sheet[top : top + 64, left : left + 64] == np.asarray(scene.image)).all()
        assert (sheet[top + 64 : top + height - 8, left : left + 96] < 128).any()  # some text
