"""Which questions a guess answers too often."""

from __future__ import annotations

import pytest

from cascadevl.scoring.guessing import FEWEST, Asked, Guessing


def number(place: int, reference: str | None = None) -> Asked:
    return Asked(
        problem_id=f"handwriting/easy/112px/train/0:{place}#0",
        text="What number is written?",
        reference=str(place) if reference is None else reference,
    )


def test_the_most_frequent_reference_of_a_material_says_it() -> None:
    asked = [number(place) for place in range(96)]
    assert Guessing.among(asked).chance(asked[0]) == pytest.approx(1 / 96)
    asked += [number(place, "7") for place in range(96, 100)]
    assert Guessing.among(asked).chance(asked[0]) == pytest.approx(5 / 100)  # with that of place 7


def test_words_of_a_question_tell_its_kind_whatever_its_numbers() -> None:
    colours = [
        Asked(problem_id=f"shapes/train/0:{n}#1", text=f"Colour of shape {n}?", reference=colour)
        for n, colour in enumerate(["red", "green", "blue", "red"] * 5)
    ]
    counts = [
        Asked(problem_id=f"shapes/train/0:{n}#0", text="How many?", reference=str(n))
        for n in range(80)
    ]
    guessing = Guessing.among([*colours, *counts])
    assert guessing.chance(colours[0]) == pytest.approx(0.5)
    assert guessing.chance(counts[0]) == pytest.approx(0.1)  # 10 of all 100 are red
    assert len(colours) == FEWEST


def test_choices_and_questions_of_two_answers_need_no_others() -> None:
    guessing = Guessing.among([])
    asked = Asked(problem_id="mine:1:a", text="?", reference="B", num_choices=4)
    assert guessing.chance(asked) == 0.25
    assert guessing.chance(Asked(problem_id="mine:2", text="?", reference="Yes.")) == 0.5
    assert guessing.chance(Asked(problem_id="mine:3", text="?", reference="42")) == 0.0
