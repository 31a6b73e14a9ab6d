"""Object existence in the manner of POPE: F1, accuracy and the share of yes, with intervals.

Li et al., "Evaluating object hallucination in large vision-language models" (arXiv 2305.10355).
Half of the questions name what is in the picture, half what is not. A model that makes things up
says yes too often: recall stays high while precision, F1 and accuracy fall, and the share of yes
rises above one half.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from cascadevl.scoring.answers import final_answer
from cascadevl.scoring.metrics import Estimate, wilson_interval

_WORD = re.compile(r"[a-z']+")
_NEGATIONS = frozenset(("no", "not", "isn't", "aren't", "none", "cannot", "nope"))
_AFFIRMATIONS = frozenset(("yes", "yeah", "yep", "indeed"))
NUM_RESAMPLES = 2000
"""Resamples of the pictures for intervals."""


def says_yes(text: str) -> bool | None:
    """Whether an answer says yes, by its first sentence; None if it says neither.

    POPE's public code takes everything for yes in whose first sentence there is no negation.

    Args:
        text: The whole answer.
    """
    words = _WORD.findall(final_answer(text).partition(".")[0].lower())
    if words and words[0] in _AFFIRMATIONS:
        return True
    if _NEGATIONS.intersection(words):
        return False
    return True if _AFFIRMATIONS.intersection(words) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class ExistenceScore:
    """How well somebody tells what is there, with 95 % intervals.

    Attributes:
        f1: Of "yes".
        accuracy: Share of right answers.
        yes_share: How often yes was said.
        precision: Of those, how many were right.
        recall: Of what is there, how much was said to be.
        num_unclear: Answers that said neither; counted as yes, as POPE's public code does.
    """

    f1: Estimate
    accuracy: Estimate
    yes_share: Estimate
    precision: float
    recall: float
    num_unclear: int


def existence_score(
    texts: Sequence[str],
    labels: Sequence[bool],
    pictures: Sequence[Hashable],
    generator: np.random.Generator,
) -> ExistenceScore:
    """Score answers to questions of existence.

    Where a picture has several questions, their answers are not independent: pictures are resampled
    then for all intervals. Otherwise shares get Wilson's, which is sound near 0 and 1 as well.

    Args:
        texts: The answers.
        labels: Whether yes is right.
        pictures: Which picture each question is about.
        generator: Of the resampling.

    Raises:
        ValueError: If there are no answers, or the arguments differ in length.
    """
    if not texts or not len(texts) == len(labels) == len(pictures):
        raise ValueError(
            f"{len(texts)} answers, {len(labels)} labels and {len(pictures)} pictures; give "
            f"equally many of each, at least one"
        )
    said = [says_yes(text) for text in texts]
    numbers = {picture: number for number, picture in enumerate(dict.fromkeys(pictures))}
    cells = np.zeros((len(numbers), 4))  # of each picture: right yes, wrong yes, wrong no, right no
    for yes, label, picture in zip(said, labels, pictures, strict=True):
        cells[numbers[picture], 2 * (yes is False) + (not label)] += 1
    weights = generator.multinomial(
        len(numbers), np.full(len(numbers), 1 / len(numbers)), size=NUM_RESAMPLES
    )
    whole, resampled = cells.sum(0, keepdims=True), weights @ cells
    is_alone = len(numbers) == len(texts)

    def estimate(of: _Statistic, *, is_share: bool) -> Estimate:
        value = float(of(whole)[0])
        if is_share and is_alone:
            low, high = wilson_interval(round(value * len(texts)), len(texts))
        else:
            low, high = np.quantile(of(resampled), (0.025, 0.975)).tolist()
        return Estimate(value=value, low=low, high=high, num=len(texts))

    return ExistenceScore(
        f1=estimate(_f1, is_share=False),
        accuracy=estimate(_accuracy, is_share=True),
        yes_share=estimate(_yes_share, is_share=True),
        precision=float(_share(whole[:, 0], whole[:, 1])[0]),
        recall=float(_share(whole[:, 0], whole[:, 2])[0]),
        num_unclear=sum(each is None for each in said),
    )


_Cells = Float[np.ndarray, "samples 4"]
_Statistic = Callable[[_Cells], Float[np.ndarray, " samples"]]


def _share(
    part: Float[np.ndarray, " samples"], rest: Float[np.ndarray, " samples"]
) -> Float[np.ndarray, " samples"]:
    """The share of a part; 0 where there is nothing."""
    total = part + rest
    shares: Float[np.ndarray, " samples"] = part / np.where(total > 0, total, 1)
    return shares


def _f1(cells: _Cells) -> Float[np.ndarray, " samples"]:
    return _share(2 * cells[:, 0], cells[:, 1] + cells[:, 2])


def _accuracy(cells: _Cells) -> Float[np.ndarray, " samples"]:
    return _share(cells[:, 0] + cells[:, 3], cells[:, 1] + cells[:, 2])


def _yes_share(cells: _Cells) -> Float[np.ndarray, " samples"]:
    return _share(cells[:, 0] + cells[:, 1], cells[:, 2] + cells[:, 3])
