"""Metrics against published or hand-worked values."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascadevl.scoring import metrics


def test_wilson_interval_by_hand() -> None:
    # 8 of 10 with z = 1.959964: the textbook interval is 0.4902 to 0.9433.
    low, high = metrics.wilson_interval(8, 10)
    assert low == pytest.approx(0.4902, abs=5e-5)
    assert high == pytest.approx(0.9433, abs=5e-5)


def test_wilson_interval_solves_its_equation() -> None:
    # Both ends are the shares p at which (k/n - p)^2 = z^2 p (1 - p) / n.
    z = 1.6448536269514722
    for end in metrics.wilson_interval(3, 17, confidence=0.9):
        assert (3 / 17 - end) ** 2 == pytest.approx(z * z * end * (1 - end) / 17)


def test_wilson_interval_at_the_borders() -> None:
    assert metrics.wilson_interval(0, 0) == (0.0, 1.0)
    low, high = metrics.wilson_interval(0, 20)
    assert low == 0.0
    assert 0.1 < high < 0.2
    assert metrics.wilson_interval(20, 20)[1] == 1.0
    with pytest.raises(ValueError, match="5 right answers of 4"):
        metrics.wilson_interval(5, 4)


@given(st.integers(0, 300), st.integers(1, 300))
def test_wilson_interval_holds_the_share(num_right: int, num_total: int) -> None:
    num_right = min(num_right, num_total)
    low, high = metrics.wilson_interval(num_right, num_total)
    assert 0.0 <= low <= num_right / num_total <= high <= 1.0


def test_accuracy() -> None:
    estimate = metrics.accuracy([True, False, True, True])
    assert (estimate.value, estimate.num) == (0.75, 4)
    assert (estimate.low, estimate.high) == metrics.wilson_interval(3, 4)
    assert metrics.accuracy([]).value == 0.0


def test_bootstrap_interval_agrees_with_the_normal_one() -> None:
    values = np.random.default_rng(0).normal(2.0, 1.0, size=400)
    low, high = metrics.bootstrap_interval(values.tolist(), np.random.default_rng(1))
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert low == pytest.approx(values.mean() - half, abs=0.02)
    assert high == pytest.approx(values.mean() + half, abs=0.02)


def test_bootstrap_interval_is_reproducible_and_needs_values() -> None:
    first, second = (
        metrics.bootstrap_interval([0.0, 1.0, 1.0], np.random.default_rng(3)) for _ in range(2)
    )
    assert first == second
    assert metrics.bootstrap_interval([0.5, 0.5], np.random.default_rng(0)) == (0.5, 0.5)
    with pytest.raises(ValueError, match="no values"):
        metrics.bootstrap_interval([], np.random.default_rng(0))


def test_most_frequent_share() -> None:
    assert metrics.most_frequent_share(["a", "b", "a", "c"]) == 0.5
    assert metrics.most_frequent_share([]) == 0.0


def test_macro_f1_by_hand() -> None:
    predictions = ["a", "a", "b", "c", "a"]
    truths = ["a", "b", "b", "b", "a"]
    # a: precision 2/3, recall 1 -> 0.8; b: precision 1, recall 1/3 -> 0.5; c is no true class.
    assert metrics.macro_f1(predictions, truths) == pytest.approx((0.8 + 0.5) / 2)
    assert metrics.macro_f1([], []) == 0.0
    with pytest.raises(ValueError, match="1 predictions for 2"):
        metrics.macro_f1(["a"], ["a", "b"])


def test_area_under_roc_equals_the_loops() -> None:
    generator = np.random.default_rng(0)
    scores = generator.integers(0, 6, size=30).tolist()  # with ties
    positive = (generator.random(30) < 0.4).tolist()
    right = [s for s, p in zip(scores, positive, strict=True) if p]
    wrong = [s for s, p in zip(scores, positive, strict=True) if not p]
    wins = sum((r > w) + (r == w) / 2 for r in right for w in wrong)
    found = metrics.area_under_roc(list(map(float, scores)), positive)
    assert found == pytest.approx(wins / (len(right) * len(wrong)))


def test_area_under_roc_at_the_borders() -> None:
    assert metrics.area_under_roc([0.1, 0.9], [False, True]) == 1.0
    assert metrics.area_under_roc([0.9, 0.1], [False, True]) == 0.0
    assert metrics.area_under_roc([0.5, 0.5], [False, True]) == 0.5
    assert math.isnan(metrics.area_under_roc([0.1, 0.9], [True, True]))
    with pytest.raises(ValueError, match="1 scores for 2 cases"):
        metrics.area_under_roc([0.1], [True, False])
