"""Verdicts by what sources say, and answers without what is withdrawn."""

from __future__ import annotations

import pytest

from cascadevl.errors import ConfigError
from cascadevl.scoring.claims import Claim, claims_of
from cascadevl.scoring.verdicts import (
    Checked,
    Evidence,
    Limits,
    Verdict,
    calibrated_limits,
    decided,
    finding_of,
    revised,
)

CLAIM = Claim(text="a dog", question="Is there a dog?")
LIMITS = Limits(keep=0.7, withdraw=0.3)


def evidence(source: str, probability: float | None) -> Evidence:
    return Evidence(source=source, probability=probability, finding=finding_of(probability, LIMITS))


def test_limits_are_where_they_are():
    found = [finding_of(chance, LIMITS) for chance in (0.7, 0.69, 0.3, 0.29, None)]
    assert found == ["supports", "undecided", "undecided", "contradicts", "undecided"]
    for keep, withdraw in ((0.3, 0.7), (1.1, 0.5), (0.5, -0.1)):
        with pytest.raises(ConfigError, match="two probabilities"):
            Limits(keep=keep, withdraw=withdraw)


@pytest.mark.parametrize(
    ("chances", "verdict", "probability", "reason"),
    [
        ((0.9,), "kept", 0.9, "picture supports it (0.90)"),
        ((0.1,), "withdrawn", 0.1, "picture contradicts it (0.10)"),
        ((0.5,), "flagged", 0.5, "picture is undecided (0.50)"),
        ((None,), "flagged", None, "picture gives no clear answer"),
        ((0.9, 0.5), "kept", 0.9, "picture supports it (0.90)"),
        ((0.5, 0.1), "withdrawn", 0.1, "a.md:1-2 contradicts it (0.10)"),
        ((None, 0.8), "kept", 0.8, "a.md:1-2 supports it (0.80)"),
        ((0.9, 0.8), "kept", 0.85, "picture supports it (0.90); a.md:1-2 supports it (0.80)"),
        (
            (0.9, 0.1),
            "flagged",
            0.5,
            "picture supports it (0.90); a.md:1-2 contradicts it (0.10); they disagree",
        ),
    ],
)
def test_verdicts(
    chances: tuple[float | None, ...], verdict: Verdict, probability: float | None, reason: str
):
    sources = ("picture", "a.md:1-2")
    found = decided(CLAIM, [evidence(*each) for each in zip(sources, chances, strict=False)])
    assert (found.verdict, found.reason) == (verdict, reason)
    assert found.probability == (None if probability is None else pytest.approx(probability))
    assert len(found.evidence) == len(chances)


def test_nothing_known_decides_nothing():
    with pytest.raises(ValueError, match="'a dog'"):
        decided(CLAIM, [])


def without(answer: str, *gone: int, asked: str = "") -> str:
    """An answer without some of its claims."""
    checks = [
        Checked(
            claim=claim,
            verdict="withdrawn" if number in gone else "kept",
            probability=0.5,
            evidence=(),
            reason="",
        )
        for number, claim in enumerate(claims_of(answer, asked))
    ]
    assert max(gone) < len(checks)
    return revised(answer, checks)


@pytest.mark.parametrize(
    ("answer", "gone", "left"),
    [
        ("There is a dog. There is a cat.", (0,), "There is a cat."),
        ("There is a dog. There is a cat.", (1,), "There is a dog."),
        ("There is a dog. There is a cat.", (0, 1), ""),
        ("A is b. C is d. E is f.", (1,), "A is b. E is f."),
        ("There is a dog, a cat and a bird.", (1,), "There is a dog and a bird."),
        ("There is a dog, a cat and a bird.", (2,), "There is a dog, a cat."),
        ("There is a dog, a cat and a bird.", (0,), "a cat and a bird."),
        ("2 shapes: red circle top, blue square left.", (1,), "2 shapes: blue square left."),
        ("2 shapes: red circle top, blue square left.", (2,), "2 shapes: red circle top."),
        ("The dog is brown and the cat is black.", (0,), "the cat is black."),
        ("The dog is brown and the cat is black.", (1,), "The dog is brown."),
        ("- a red car\n- a blue car\n- a man", (1,), "- a red car\n- a man"),
        ("- a red car\n- a blue car", (1,), "- a red car"),
    ],
)
def test_what_is_left(answer: str, gone: tuple[int, ...], left: str):
    assert without(answer, *gone) == left


def test_a_reply_that_is_withdrawn_becomes_the_other_one():
    assert without("Yes.", 0, asked="Is there a dog?") == "No."
    assert without("no", 0, asked="Is there a dog?") == "yes"


def test_a_claim_in_other_words_cannot_be_taken_out():
    check = Checked(claim=CLAIM, verdict="withdrawn", probability=0.1, evidence=(), reason="")
    assert revised("Something.", [check]) == "Something."


def test_limits_keep_and_withdraw_what_is_right_often_enough():
    chances = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]
    truth = [False, False, True, False, True, False, True, True]
    limits = calibrated_limits(chances, truth, precision=1.0)
    assert limits.keep == 0.7
    assert finding_of(0.2, limits) == "contradicts"
    assert finding_of(0.3, limits) == "undecided"
    easier = calibrated_limits(chances, truth, precision=0.75)
    assert easier.keep == 0.5
    assert finding_of(0.4, easier) == "contradicts"
    assert finding_of(0.5, easier) == "supports"


def test_limits_do_not_cross_and_may_never_be_reached():
    apart = calibrated_limits([0.1, 0.9], [False, True], precision=0.5)
    assert apart.keep == apart.withdraw == 0.5
    never = calibrated_limits([0.2, 0.8], [True, False], precision=0.9)
    assert finding_of(0.99, never) == finding_of(0.0, never) == "undecided"
