"""A demo of few questions, for tests of what comes after its lesson."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from cascadevl.data.processor import CascadeVLProcessor
from cascadevl.eval.suite import SuiteRow
from cascadevl.workflows.demonstration import Demonstration, begin


def small_demo(
    out: Path, processor: CascadeVLProcessor, rows: Sequence[SuiteRow], console: Console
) -> Demonstration:
    """A demo that has not examined anything yet."""
    return Demonstration(
        out=out,
        rows=rows,
        curve_rows=rows,
        answer_tokens=4,
        processor=processor,
        course=begin(out, Console(quiet=True)),
        console=console,
    )
