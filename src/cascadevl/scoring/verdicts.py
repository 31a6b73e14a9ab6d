"""What becomes of a claim: kept, flagged or withdrawn, by what pictures and documents say of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from cascadevl.errors import ConfigError
from cascadevl.scoring.claims import Claim
from cascadevl.scoring.voting import calibrated_score

_JOINT_BEFORE = re.compile(r"(?:,|[ \t](?:and|but|while|whereas))?[ \t]*\Z")
_JOINT_AFTER = re.compile(r"\A[ \t,.;:!]*(?:(?:and|but|while|whereas)\s)?")
_BULLET = re.compile(r"(\A|\n)[ \t]*(?:[-*\u2022]|[0-9]{1,3}[.)])[ \t]*\Z")
_LITTLE = 1e-9
"""Less than any two probabilities differ by."""

Finding: TypeAlias = Literal["supports", "contradicts", "undecided"]
"""What a source says of a claim."""

Verdict: TypeAlias = Literal["kept", "flagged", "withdrawn"]
"""What becomes of a claim."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """From the probability that a claim holds to what a source says of it.

    Attributes:
        keep: From this probability on it supports the claim.
        withdraw: Below this one it contradicts it; between the two it is undecided.
    """

    keep: float = 0.7
    withdraw: float = 0.3

    def __post_init__(self) -> None:
        """Check the order.

        Raises:
            ConfigError: If they are no probabilities, or the wrong way round.
        """
        if not 0 <= self.withdraw <= self.keep <= 1:
            raise ConfigError(
                f"a claim is kept from {self.keep} and withdrawn below {self.withdraw}; give two "
                f"probabilities, the first not smaller than the second"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What one source says of a claim.

    Attributes:
        source: ``"picture"``, or file and lines of a passage.
        probability: That the claim holds, by this source; None where it gave no clear answer.
        finding: What it says.
        passage: The text that was read; empty for pictures.
    """

    source: str
    probability: float | None
    finding: Finding
    passage: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """A claim with what was found of it.

    Attributes:
        claim: The claim.
        verdict: What becomes of it.
        probability: That it holds: of the source that decided; the mean of those that disagree, or
            do not decide; None where no source gave an answer.
        evidence: What each source says.
        reason: Why, in a sentence.
    """

    claim: Claim
    verdict: Verdict
    probability: float | None
    evidence: tuple[Evidence, ...]
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """An answer whose claims were checked.

    Attributes:
        answer: As it was given.
        checks: Its claims, in order.
        text: The answer without what was withdrawn.
    """

    answer: str
    checks: tuple[Checked, ...]
    text: str


def finding_of(probability: float | None, limits: Limits) -> Finding:
    """What a probability says.

    Args:
        probability: That a claim holds; None if nothing is known.
        limits: From where on it says something.
    """
    if probability is None:
        return "undecided"
    if probability >= limits.keep:
        return "supports"
    return "contradicts" if probability < limits.withdraw else "undecided"


def decided(claim: Claim, evidence: Sequence[Evidence]) -> Checked:
    """The verdict on a claim: kept or withdrawn where sources agree, flagged where they do not.

    A source that is undecided leaves it to the others.

    Args:
        claim: The claim.
        evidence: What each source says of it; at least one.

    Raises:
        ValueError: If there is none.
    """
    if not evidence:
        raise ValueError(f"nothing is known of the claim {claim.text!r}; ask a source first")
    findings = {each.finding for each in evidence}
    verdict: Verdict = "flagged"
    if "contradicts" not in findings and "supports" in findings:
        verdict = "kept"
    elif "supports" not in findings and "contradicts" in findings:
        verdict = "withdrawn"
    deciding = [each for each in evidence if each.finding != "undecided"] or list(evidence)
    known = [each.probability for each in deciding if each.probability is not None]
    return Checked(
        claim=claim,
        verdict=verdict,
        probability=sum(known) / len(known) if known else None,
        evidence=tuple(evidence),
        reason="; ".join(map(_worded, deciding)) + _disagreement(findings),
    )


def _worded(evidence: Evidence) -> str:
    if evidence.probability is None:
        return f"{evidence.source} gives no clear answer"
    words = {
        "supports": "supports it",
        "contradicts": "contradicts it",
        "undecided": "is undecided",
    }
    return f"{evidence.source} {words[evidence.finding]} ({evidence.probability:.2f})"


def _disagreement(findings: set[Finding]) -> str:
    return "; they disagree" if {"supports", "contradicts"} <= findings else ""


def revised(answer: str, checks: Sequence[Checked]) -> str:
    """An answer without the claims that were withdrawn.

    What stood between them goes with them; a reply of yes or no becomes the other one. Claims that
    do not stand in the answer word for word cannot be taken out.

    Args:
        answer: As it was given.
        checks: Its claims, in order.
    """
    text, last = answer, len(answer)
    for check in reversed(checks):
        claim = check.claim
        if check.verdict != "withdrawn" or claim.span is None or claim.span[1] > last:
            continue
        start, end = claim.span
        last = start
        if claim.opposite:
            text = text[:start] + claim.opposite + text[end:]
        else:
            text = _joined(text[:start], text[end:])
    return text.strip()


def _joined(before: str, after: str) -> str:
    """What stood around something that is taken out, with the marks and words that joined it."""
    before = _JOINT_BEFORE.sub("", _BULLET.sub(r"\1", before))
    if before and not before.endswith((".", "!", "?", ";", ":", "\n")):
        return before + after  # the sentence goes on, or ends with its own mark
    after = _JOINT_AFTER.sub("", after)
    if before.endswith("\n") or not before or after.startswith("\n"):
        return before + (after.removeprefix("\n") if before.endswith("\n") else after)
    return f"{before} {after}" if after else before


def calibrated_limits(
    probabilities: Sequence[float], truth: Sequence[bool], *, precision: float
) -> Limits:
    """Limits beyond which claims are true, or false, often enough.

    To be chosen on claims that nothing is measured on afterwards. Where no limit reaches the
    precision nothing is kept, or nothing withdrawn.

    Args:
        probabilities: That each of many claims holds.
        truth: Whether it does.
        precision: Share of the kept claims that must be true, and of the withdrawn that must be
            false.
    """
    keep = calibrated_score(probabilities, truth, precision=precision)
    least = calibrated_score(
        [1 - each for each in probabilities], [not each for each in truth], precision=precision
    )
    above = 1.0 if keep is None else keep
    # The limit itself is not withdrawn, so it lies a little above the last one that is.
    below = 0.0 if least is None else min(1 - least + _LITTLE, 1.0)
    if below > above:  # both are often enough right in between
        above = below = min(max(0.5, above), below)
    return Limits(keep=above, withdraw=below)
