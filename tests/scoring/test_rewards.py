from __future__ import annotations

import math
from dataclasses import replace

import pytest

from cascadevl.errors import ConfigError
from cascadevl.scoring.rewards import (
    VERIFIERS,
    Response,
    RewardConfig,
    judged,
    length,
    verifier_named,
    verifiers_of,
)

GOOD = Response(
    text="<think>\n2 + 2 = 4\n</think>\n\n\\boxed{4}",
    question="2 + 2?",
    reference="4",
    correct=True,
    num_tokens=10,
    max_tokens=100,
)
WRONG = replace(GOOD, text="<think>\n2 + 2 = 5\n</think>\n\n5", correct=False)
BARE = replace(GOOD, text="4")
CUT = replace(BARE, num_tokens=100, is_cut=True)


def shouting(response: Response) -> float:
    """A verifier of one's own."""
    return float(response.text.isupper())


def broken(_: Response) -> float:
    return math.nan


def total(response: Response, config: RewardConfig | None = None) -> float:
    config = config or RewardConfig()
    return judged(response, verifiers_of(config), config).total


def test_nine_tenths_for_the_answer_and_one_for_the_form():
    assert [total(each) for each in (GOOD, WRONG, BARE)] == pytest.approx([1.0, 0.1, 0.9])


def test_values_are_kept_unweighted():
    config = RewardConfig()
    assert judged(WRONG, verifiers_of(config), config).values == {"accuracy": 0.0, "format": 1.0}


def test_a_box_is_asked_for_by_its_own_verifier():
    assert [VERIFIERS["boxed_format"](each) for each in (GOOD, WRONG, BARE)] == [1.0, 0.0, 0.0]


def test_ones_own_verifier_is_named_by_module_and_function():
    config = RewardConfig(weights={f"{__name__}:shouting": 2.0, "accuracy": 1.0})
    assert total(replace(WRONG, text="FIVE"), config) == 2.0
    assert total(replace(GOOD, text="FOUR"), config) == 3.0


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("acuracy", "did you mean 'accuracy'"),
        ("no_such_module:f", "cannot be imported.*PYTHONPATH"),
        ("math:no_such_function", "cannot be imported"),
        ("math:pi", "not a function"),
    ],
)
def test_a_verifier_that_is_not_there_is_refused(name: str, words: str):
    with pytest.raises(ConfigError, match=words):
        verifier_named(name)


def test_weight_0_only_records():
    config = RewardConfig(weights={"accuracy": 1.0, "format": 0.0})
    reward = judged(BARE, verifiers_of(config), config)
    assert (reward.total, reward.values["format"]) == (1.0, 0.0)


@pytest.mark.parametrize("weights", [{}, {"accuracy": 0.0}, {"accuracy": math.nan}])
def test_weights_that_reward_nothing_are_refused(weights: dict[str, float]):
    with pytest.raises(ConfigError, match=r"rewards\.weights"):
        RewardConfig(weights=weights)


def test_a_cut_answer_earns_nothing_even_if_it_happens_to_be_right():
    assert total(CUT) == 0.0
    assert total(CUT, RewardConfig(overlong="keep")) == pytest.approx(0.9)
    assert total(CUT, RewardConfig(overlong="leave_out")) == pytest.approx(0.9)


def test_the_penalty_for_length_reaches_a_cut_answer_under_every_rule():
    for rule in ("zero", "keep", "leave_out"):
        config = RewardConfig(weights={"accuracy": 1.0, "length": 0.5}, overlong=rule)
        wanted = -0.5 if rule == "zero" else 0.5
        assert total(CUT, config) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("num_tokens", "wanted"), [(1, 0.0), (80, 0.0), (85, -0.25), (90, -0.5), (100, -1.0)]
)
def test_length_falls_over_the_last_fifth(num_tokens: int, wanted: float):
    assert length(replace(GOOD, num_tokens=num_tokens)) == pytest.approx(wanted)


def test_a_value_that_is_no_number_names_verifier_and_answer():
    config = RewardConfig(weights={f"{__name__}:broken": 1.0})
    with pytest.raises(ValueError, match=r"broken' gave nan for the answer '4'"):
        total(BARE, config)
