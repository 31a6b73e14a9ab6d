"""Small examinations while a model trains, for its learning curves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console

from cascadevl.data.processor import CascadeVLProcessor
from cascadevl.eval.responder import ModelResponder
from cascadevl.eval.runner import run_suite
from cascadevl.eval.suite import SuiteRow
from cascadevl.model.modeling import CascadeVLForConditionalGeneration
from cascadevl.train.loop import TrainState
from cascadevl.workflows.course import Course


def watcher(
    stage: str,
    course: Course,
    processor: CascadeVLProcessor,
    rows: Sequence[SuiteRow],
    *,
    seed: int,
    answer_tokens: int,
    console: Console,
) -> Callable[[TrainState[Any]], None]:
    """A function for a recipe to call now and then: asks, notes the shares, and shows them.

    Args:
        stage: Under which name they are noted.
        course: Where they are noted.
        processor: The model's.
        rows: What is asked.
        seed: Of the questions.
        answer_tokens: Longest answer.
        console: Where they are shown.
    """

    def watch(state: TrainState[Any]) -> None:
        assert isinstance(state.model, CascadeVLForConditionalGeneration)
        responder = ModelResponder(
            model=state.model, processor=processor, max_new_tokens=answer_tokens
        )
        scores = run_suite(responder, rows, seed=seed)
        course.note(stage, state.step, {score.row: score.estimate.value for score in scores})
        line = " · ".join(f"{score.label} {100 * score.estimate.value:.0f}" for score in scores)
        console.print(f"step {state.step}, % right: {line}", style="dim", highlight=False)

    return watch
