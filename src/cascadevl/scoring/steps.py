"""Solutions as steps: split, merged, labelled, and what scores of steps say of a whole solution.

VisualPRM (arXiv 2503.10291). A step's worth is the share of its continuations that end in the right
answer, mc; it is labelled right where that exceeds a threshold. A process reward model gives every
step the probability that all is right so far, and a solution is worth their mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

Aggregate: TypeAlias = Literal["mean", "min", "product", "last"]
"""How the scores of a solution's steps become one."""

AGGREGATES: Mapping[Aggregate, Callable[[Sequence[float]], float]] = {
    "mean": lambda scores: math.fsum(scores) / len(scores),  # VisualPRM and both reports
    "min": min,
    "product": math.prod,
    "last": lambda scores: scores[-1],
}


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRules:
    r"""How a solution is taken apart.

    Attributes:
        separator: Stands between steps. Released data: a blank line; small models that write a
            step a line need ``"\n"``.
        max_steps: Most steps; neighbours are joined where there are more. 1 takes a solution as a
            whole, which makes of a process reward an outcome reward.
    """

    separator: str = "\n\n"
    max_steps: int = 12  # arXiv 2503.10291; the script of VisualPRM v1.1: 16

    def __post_init__(self) -> None:
        """Refuse what would leave no steps.

        Raises:
            ValueError: If the separator is not made of line breaks, or no step is allowed.
        """
        if not self.separator or self.separator.strip("\n"):
            raise ValueError(
                f"the separator of steps is {self.separator!r}; give one or more line breaks"
            )
        if self.max_steps < 1:
            raise ValueError(f"max_steps is {self.max_steps}; it must be at least 1")

    def join(self, steps: Sequence[str]) -> str:
        """Steps as one text.

        Args:
            steps: The steps, in order.
        """
        return self.separator.join(steps)


def split_steps(text: str, separator: str = "\n\n") -> list[str]:
    """The steps of a solution, without the blank space around each.

    Args:
        text: The solution; a text of blanks has no steps.
        separator: Stands between steps.
    """
    return [step for part in text.split(separator) if (step := part.strip())]


def merge_steps(steps: Sequence[str], rules: StepRules) -> list[str]:
    """At most ``max_steps`` steps: runs of ``ceil(n / max_steps)`` neighbours become one each.

    Args:
        steps: The n steps.
        rules: What is allowed.
    """
    size = max(1, -(-len(steps) // rules.max_steps))
    return [rules.join(steps[first : first + size]) for first in range(0, len(steps), size)]


def steps_of(text: str, rules: StepRules) -> list[str]:
    """The steps of a solution as they are judged.

    Args:
        text: The solution.
        rules: How it is taken apart.
    """
    return merge_steps(split_steps(text, rules.separator), rules)


def labels_of(mc: Sequence[float], threshold: float = 0.0) -> list[bool]:
    """Which steps count as right: those with ``mc > threshold``.

    Args:
        mc: Share of right continuations from each step.
        threshold: 0, the best one in VisualPRM's ablation, asks for a single right continuation.
    """
    return [share > threshold for share in mc]


def aggregated(scores: Sequence[float], how: Aggregate = "mean") -> float:
    """One score of a solution; 0 if it has no steps.

    Args:
        scores: Of its steps, each a probability.
        how: ``mean`` as in the reports, ``min``, ``product``, or that of the ``last`` step.
    """
    return AGGREGATES[how](scores) if scores else 0.0


def f1(found: Sequence[bool], truth: Sequence[bool]) -> float:
    """F1 of finding what is true; 0 where neither has any.

    Args:
        found: What was said of each.
        truth: What holds.
    """
    both = sum(a and b for a, b in zip(found, truth, strict=True))
    total = sum(found) + sum(truth)
    return 2 * both / total if total else 0.0


def macro_f1(found: Sequence[bool], truth: Sequence[bool | None]) -> float:
    """Mean of the F1 of right steps and that of wrong ones, as VisualProcessBench scores.

    Args:
        found: Whether each step was taken for right.
        truth: Whether it is; None for a neutral one, which does not count.
    """
    kept = [(a, b) for a, b in zip(found, truth, strict=True) if b is not None]
    said, holds = [a for a, _ in kept], [b for _, b in kept]
    return (f1(said, holds) + f1([not a for a in said], [not b for b in holds])) / 2


def best_threshold(scores: Sequence[float], truth: Sequence[bool | None]) -> tuple[float, float]:
    """The threshold above which a step is best taken for right, and its macro-F1.

    To be chosen on data that nothing is measured on afterwards. VisualProcessBench's authors use
    0.85 for VisualPRM.

    Args:
        scores: P("+") of each step.
        truth: Whether it is right; None for a neutral one.

    Raises:
        ValueError: If there are no scores.
    """
    if not scores:
        raise ValueError("there are no scores to choose a threshold by; give at least one")
    tried = [(macro_f1([s > t for s in scores], truth), t) for t in sorted({0.0, *scores})]
    value, threshold = max(tried, key=lambda each: (each[0], -each[1]))
    return threshold, value
