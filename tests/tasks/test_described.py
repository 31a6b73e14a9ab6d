"""Questions about pictures told in words."""

from __future__ import annotations

from cascadevl.tasks.described import Described
from cascadevl.tasks.handwriting import Handwriting
from cascadevl.tasks.shapes import Shapes


def test_a_scene_is_told_in_words_and_asked_the_same() -> None:
    task = Handwriting(difficulty="add", num_questions=4)
    for index in range(20):
        seen, told = task.draw("train", 3, index), Described(task=task).draw("train", 3, index)
        assert told.images == ()
        assert told.description == ""
        assert len(told.questions) == len(seen.questions) > 0
        for question, original in zip(told.questions, seen.questions, strict=True):
            assert question.prompt == f"{seen.description}\n{original.prompt}"
            assert question.answer == original.answer
            assert question.reasoning == original.reasoning
            assert question.check(original.answer)


def test_it_says_what_it_is_made_of() -> None:
    told = Described(task=Shapes(difficulty="full"))
    assert told.name == "shapes, described"
    assert told.kinds == Shapes(difficulty="full").kinds
    scene = told.draw("test", 0, 0)
    assert scene.scene_id == "described/" + Shapes(difficulty="full").draw("test", 0, 0).scene_id
