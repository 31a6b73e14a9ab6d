"""F1, accuracy and share of yes against scikit-learn, and how often their intervals hold."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score, precision_score, recall_score

from cascadevl.scoring.existence import existence_score, says_yes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("yes", True),
        ("Yes, there is no doubt.", True),
        ("No.", False),
        ("no, yes", False),
        ("There is not a dog. Yes.", False),
        ("There isn't one", False),
        ("I would say yes", True),
        ("A dog", None),
        ("", None),
        ("<think>no</think>yes", True),
        ("It is none\nAnswer: yes", True),
        ("nothing", None),
    ],
)
def test_what_says_yes(text: str, expected: bool | None):
    assert says_yes(text) is expected


def test_scores_are_those_of_scikit_learn():
    generator = np.random.default_rng(0)
    labels = generator.random(500) < 0.5
    said = np.where(generator.random(500) < 0.8, labels, generator.random(500) < 0.7)
    texts = ["yes" if each else "no" for each in said]
    score = existence_score(texts, labels.tolist(), range(500), generator)
    assert score.f1.value == pytest.approx(f1_score(labels, said))
    assert score.accuracy.value == pytest.approx(accuracy_score(labels, said))
    assert score.precision == pytest.approx(precision_score(labels, said))
    assert score.recall == pytest.approx(recall_score(labels, said))
    assert score.yes_share.value == pytest.approx(said.mean())
    for each in (score.f1, score.accuracy, score.yes_share):
        assert each.low < each.value < each.high
        assert each.num == 500


def test_an_answer_that_is_neither_counts_as_yes():
    score = existence_score(["dog", "no"], [True, True], ["a", "b"], np.random.default_rng(0))
    assert (score.num_unclear, score.yes_share.value, score.recall) == (1, 0.5, 0.5)


def test_nothing_is_found_where_nobody_says_yes():
    score = existence_score(["no"] * 4, [True, False] * 2, "abcd", np.random.default_rng(0))
    assert (score.f1.value, score.precision, score.recall) == (0, 0, 0)
    assert score.yes_share.low == 0 < score.yes_share.high  # Wilson: four answers are few


def test_several_questions_a_picture_widen_the_intervals():
    """Answers about a picture are all right or all wrong here: six say no more than one."""
    generator = np.random.default_rng(1)
    right = np.repeat(generator.random(60) < 0.7, 6)
    labels = np.tile([True, False], 180)
    texts = ["yes" if each else "no" for each in np.where(right, labels, ~labels)]
    pictures = np.repeat(np.arange(60), 6).tolist()
    grouped = existence_score(texts, labels.tolist(), pictures, generator)
    alone = existence_score(texts, labels.tolist(), range(360), generator)
    for name in ("f1", "accuracy"):
        wide, narrow = getattr(grouped, name), getattr(alone, name)
        assert wide.value == narrow.value
        ratio = (wide.high - wide.low) / (narrow.high - narrow.low)
        assert ratio == pytest.approx(6**0.5, rel=0.25)


def test_arguments_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match="1 answers, 2 labels"):
        existence_score(["yes"], [True, False], ["a"], np.random.default_rng(0))
    with pytest.raises(ValueError, match="at least one"):
        existence_score([], [], [], np.random.default_rng(0))
