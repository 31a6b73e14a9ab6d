"""Rollouts made by hand, for tests of whatever is made of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tests.data.conftest import picture

from cascadevl.types import ImageRef, Message, Rollout, SampledAnswer


def answer(text: str, *, correct: bool = False, cut: bool = False) -> SampledAnswer:
    return SampledAnswer(
        text=text,
        token_ids=tuple(text.encode()),
        finish_reason="length" if cut else "stop",
        correct=correct,
        rewards={"accuracy": float(correct)},
        reward=float(correct),
    )


def answers(right: Sequence[str], wrong: Sequence[str]) -> tuple[SampledAnswer, ...]:
    return (*(answer(text, correct=True) for text in right), *map(answer, wrong))


def rollout(number: int, *, weights: str = "w1", **more: Any) -> Rollout:
    """A question with some answers; every third shows a drawn picture."""
    question = f"What is {number} + 1?\n\u00fc"
    parts: tuple[Any, ...] = (question,)
    if number % 3 == 0:
        parts = (ImageRef(picture(12 + number, 9, seed=number)), f"\n{question}")
    values: dict[str, Any] = {
        "problem_id": f"sums:{number}",
        "prompt": (Message.of("system", "Be brief."), Message("user", parts)),
        "reference": str(number + 1),
        "answers": answers([f"It is\nAnswer: {number + 1}"], ["Answer: 0", "I do not know."]),
        "weight_version": weights,
        "metric": "number",
    }
    return Rollout(**(values | more))
