"""The examples run as they stand, quietly, and are notebooks in the percent format."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


def test_the_examples_are_all_there():
    numbers = [int(file.name[:2]) for file in EXAMPLES]
    assert numbers == list(range(1, len(EXAMPLES) + 1))
    assert len(EXAMPLES) >= 5


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda file: file.stem)
def test_an_example_runs_without_a_warning(example: Path, tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-W", "error", str(example)],
        env=os.environ | {"TMPDIR": str(tmp_path), "TQDM_DISABLE": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    # transformers draws a progress bar when it loads; whatever else is on stderr is a complaint.
    complaints = [line for line in done.stderr.splitlines() if "Loading weights" not in line]
    assert [line for line in complaints if line.strip()] == []


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda file: file.stem)
def test_an_example_is_a_notebook_that_begins_with_its_title(example: Path):
    text = example.read_text(encoding="utf-8")
    assert text.startswith("# %% [markdown]\n# # ")
    assert text.count("\n# %%\n") >= 3
