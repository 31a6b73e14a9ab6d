from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tests.train.small_run import QUIET

from cascadevl.train.log import RunLog, counted, git_commit, write_facts


def steps(out: Path) -> list[int]:
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["step"] for line in lines]


def test_a_resumed_run_drops_lines_behind_its_step_and_a_torn_last_line(tmp_path: Path) -> None:
    with RunLog(tmp_path, title="a", num_steps=9, console=QUIET) as log:
        for step in (1, 2, 3, 4):
            log.write(step, {"loss": 1.0 / step})
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 5, "lo')
    with RunLog(tmp_path, title="a", num_steps=9, first_step=2, console=QUIET) as log:
        log.write(3, {"loss": 0.25})
    assert steps(tmp_path) == [1, 2, 3]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1.0), (2, 0.5), (3, 0.25)]


def test_without_a_terminal_plain_lines_are_shown() -> None:
    text = io.StringIO()
    console = Console(file=text, force_terminal=False, width=200)
    with RunLog(None, title="sft", num_steps=10, console=console) as log:
        log.advance(1)
        log.write(2, {"loss": 0.5, "tokens_per_s": 1234.0})
        log.message("skipped [3] records")
    assert text.getvalue() == "sft 2/10 loss 0.5000 1,234 tokens/s\nskipped [3] records\n"


def test_a_terminal_sees_a_bar_with_loss_and_speed() -> None:
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=120, color_system=None)
    with RunLog(None, title="sft", num_steps=10, first_step=4, console=console) as log:
        log.write(6, {"loss": 0.25, "tokens_per_s": 1234.0})
    assert "6/10" in text.getvalue()
    assert "loss 0.2500 · 1,234 tokens/s" in text.getvalue()


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    text = io.StringIO()
    console = Console(file=text)
    out = tmp_path / "run"
    with RunLog(out, title="a", num_steps=2, console=console, is_main=False) as log:
        log.write(1, {"loss": 1.0})
        log.message("hello")
    assert text.getvalue() == ""
    assert not out.exists()


@pytest.mark.parametrize(
    ("num_parts", "told"),
    [(45, [5, 9, 14, 18, 23, 27, 32, 36, 41, 45]), (3, [1, 2, 3]), (1, [1]), (0, [])],
)
def test_a_pass_of_many_parts_is_told_in_ten_lines_at_most(num_parts: int, told: list[int]) -> None:
    text = io.StringIO()
    console = Console(file=text, force_terminal=False, width=200)
    parts = [f"part {number}" for number in range(num_parts)]
    assert list(counted(parts, "the reference", console, is_main=True)) == parts
    lines = [f"the reference: {number} of {num_parts}" for number in told]
    assert text.getvalue().splitlines() == lines


def test_a_terminal_sees_one_bar_of_a_pass() -> None:
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=120, color_system=None)
    assert list(counted(range(45), "the reference", console, is_main=True)) == [*range(45)]
    assert "the reference" in text.getvalue()
    assert "100%" in text.getvalue()
    assert text.getvalue().count("\n") == 1


@pytest.mark.parametrize("is_terminal", [False, True])
def test_other_processes_do_their_parts_in_silence(is_terminal: bool) -> None:
    text = io.StringIO()
    console = Console(file=text, force_terminal=is_terminal, color_system=None)
    assert list(counted(range(3), "the reference", console, is_main=False)) == [0, 1, 2]
    assert text.getvalue() == ""


def test_facts_of_a_run_are_kept(tmp_path: Path) -> None:
    write_facts(tmp_path / "run", "optim:\n  lr: 1.0\n", seed=7)
    facts = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert facts["seed"] == 7
    assert facts["torch"].startswith("2.")
    assert (tmp_path / "run" / "config.yaml").read_text(encoding="utf-8") == "optim:\n  lr: 1.0\n"
    assert git_commit(tmp_path) is None
