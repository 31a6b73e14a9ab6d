"""The cascade: stages once each, on the model before, gone on with after any end, summed up."""

from __future__ import annotations

import dataclasses
import io
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from cascadevl.config import load_config
from cascadevl.errors import ConfigError, DataError
from cascadevl.workflows.cascade import DONE, cascade, right_answers
from cascadevl.workflows.cascade_config import CascadeConfig
from cascadevl.workflows.cascade_report import (
    ExamRow,
    StageLine,
    cells_of,
    clock,
    terminal_table,
)

QUIET = Console(quiet=True)

# Micro answers these rightly now and then, so that there are pairs and groups to learn from.
SMALL = """
model: micro
stages: [rollouts, pairs, mpo, filter, gspo]
problems: {tasks: ["charts:easy", "shapes:full"], scenes: 3}
rollouts: {num_samples: 4, max_tokens: 48}
pairs: {max_pairs: 2}
mpo:
  data: {max_tokens: 1024, jpeg: false, prefetch: 0}
  batch: {packing: count, row_samples: 3}
  optim: {lr: 1.0e-4}
  run: {num_steps: 2, checkpoint_interval: 1}
filter: {least: 0.1, most: 0.9}
gspo:
  data: {max_tokens: 512, jpeg: false}
  batch: {row_tokens: 2048}
  optim: {lr: 1.0e-4, warmup_ratio: 0.0}
  rollout: {prompts: 4, group: 4, max_prompt_tokens: 256, max_answer_tokens: 48}
  policy: {updates: 2}
  run: {num_steps: 4, checkpoint_interval: 2}
exam: {tasks: ["shapes:full"], questions: 2, answer_tokens: 48, temperatures: [0.0, 1.0]}
"""


def write_config(folder: Path, text: str = SMALL) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "cascade.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def config_of(folder: Path, *overrides: str) -> CascadeConfig:
    files = [write_config(folder)]
    return load_config(CascadeConfig, files=files, overrides=[f"out={folder / 'out'}", *overrides])


def weights_of(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cascade that went through without an interruption."""
    folder = tmp_path_factory.mktemp("whole")
    cascade(config_of(folder), console=QUIET)
    return folder


def test_every_stage_leaves_its_part_and_a_line(finished: Path) -> None:
    out = finished / "out"
    lines = json.loads((out / "summary.json").read_text("utf-8"))
    stages = ["start", "rollouts", "pairs", "mpo", "filter", "gspo"]
    assert [line["stage"] for line in lines] == stages
    assert [bool(line["exam"]) for line in lines] == [True, False, False, True, False, True]
    asked = [row["name"] for row in lines[0]["exam"]]
    assert asked == ["shapes:full", "shapes:full, drawn at 1"]
    by_stage = {line["stage"]: line for line in lines}
    assert by_stage["rollouts"]["facts"]["answers"] > 0
    assert by_stage["pairs"]["facts"]["pairs"] > 0
    assert by_stage["filter"]["facts"]["kept"] > 0
    assert all(by_stage[name]["flops"] > 0 for name in ("rollouts", "mpo", "gspo"))
    assert all(by_stage[name]["seconds"] > 0 for name in ("rollouts", "mpo", "gspo"))
    table = (out / "summary.md").read_text("utf-8").splitlines()
    assert len(table) == 2 + len(stages) + 1
    assert weights_of(out / "mpo/run/model") != weights_of(out / "gspo/run/model")


def test_right_answers_of_the_last_model_are_kept_one_by_one(finished: Path) -> None:
    config = config_of(finished)
    (*_, last) = json.loads((config.out / "summary.json").read_text("utf-8"))
    shares = {row: sum(right) / len(right) for row, right in right_answers(config).items()}
    assert shares == {row["name"]: pytest.approx(row["share"]) for row in last["exam"]}
    begun = json.loads((config.out / "start/exam.json").read_text("utf-8"))["right"]
    untrained = dataclasses.replace(config, stages=("rollouts",))
    assert right_answers(untrained) == begun


def test_what_is_done_is_not_done_again(finished: Path) -> None:
    config = config_of(finished)
    before = {path: path.stat().st_mtime_ns for path in config.out.rglob(DONE)}
    began = time.perf_counter()
    summary = cascade(config, console=QUIET)
    assert {path: path.stat().st_mtime_ns for path in config.out.rglob(DONE)} == before
    assert len(before) == 5
    assert summary.model == str(config.out / "gspo/run/model")
    assert time.perf_counter() - began < 20


def test_a_stage_that_was_done_otherwise_is_refused(finished: Path) -> None:
    with pytest.raises(ConfigError, match=r"mpo was done here with mpo\.mpo\.beta = 0\.1, and now"):
        cascade(config_of(finished, "mpo.mpo.beta=0.2"), console=QUIET)
    # How often is written down and saved is free.
    cascade(config_of(finished, "mpo.run.log_interval=1"), console=QUIET)


def test_killed_anywhere_it_ends_in_the_same_weights(finished: Path, tmp_path: Path) -> None:
    file = write_config(tmp_path)
    command = [sys.executable, "-m", "cascadevl.cli.main", "cascade", str(file)]
    command += [f"out={tmp_path / 'out'}"]
    chance = random.Random(0)
    for _ in range(4):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(timeout=chance.uniform(5, 15))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
        else:
            break
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1])["model"].endswith("gspo/run/model")
    for stage in ("mpo", "gspo"):
        whole = finished / "out" / stage / "run/model"
        assert weights_of(tmp_path / "out" / stage / "run/model") == weights_of(whole)


def test_reinforcement_alone_asks_the_cascades_questions(tmp_path: Path) -> None:
    config = config_of(tmp_path, "stages=[gspo]", "exam.tasks=[]", "gspo.run.num_steps=2")
    summary = cascade(config, console=QUIET)
    assert [line.stage for line in summary.lines] == ["start", "gspo"]
    assert summary.lines[-1].score is None
    resolved = (config.out / "gspo/run/config.yaml").read_text("utf-8")
    assert "charts:easy" in resolved


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["stages=[pairs, mpo]"], "pairs works on what rollouts leaves"),
        (["stages=[mpo]"], "mpo works on what pairs leaves"),
        (["stages=[]"], "name at least one"),
        (["stages=[gspo, gspo]"], "each once"),
        (["model=null"], "starts from a model"),
    ],
)
def test_stages_that_lack_something_are_refused(
    tmp_path: Path, overrides: list[str], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        config_of(tmp_path, *overrides)


def test_no_question_in_the_range_says_what_to_do(finished: Path, tmp_path: Path) -> None:
    config = config_of(tmp_path, "stages=[rollouts, filter]", "filter.least=0.99",
                       "filter.most=0.995", "exam.tasks=[]", "problems.scenes=1")  # fmt: skip
    with pytest.raises(DataError, match=r"have fewer, \d+ more"):
        cascade(config, console=QUIET)


def test_stages_are_taken_in_the_order_of_the_report(tmp_path: Path) -> None:
    config = config_of(tmp_path, "stages=[gspo, filter, rollouts]")
    assert config.ordered == ("rollouts", "filter", "gspo")


@pytest.mark.parametrize("temperatures", ["[]", "[0.0, -1.0]"])
def test_an_examination_without_a_temperature_is_refused(tmp_path: Path, temperatures: str) -> None:
    with pytest.raises(ConfigError, match=r"exam\.temperatures is .*give at least one"):
        config_of(tmp_path, f"exam.temperatures={temperatures}")


def test_the_shipped_configurations_can_be_read() -> None:
    for name, group in (("nano", 16), ("boxes", 16), ("micro", 8), ("chains", 8)):
        config = load_config(CascadeConfig, files=[Path(f"configs/cascade_{name}.yaml")])
        assert config.mpo.optim.lr > 0
        assert config.gspo.rollout.group == group
    flash = load_config(CascadeConfig, files=[Path("configs/cascade_flash_micro.yaml")])
    assert flash.ordered == ("vico", "router")
    assert flash.router.router.label == "ratio"


def test_the_table() -> None:
    def row(name: str, share: float) -> ExamRow:
        return ExamRow(
            name=name, share=share, low=share - 0.1, high=share + 0.1, num=9, constant=0.2
        )

    rows = [row("a", 0.4), row("b", 0.6)]
    start = StageLine(stage="start", seconds=0.0, flops=0.0, facts={}, exam=rows)
    data = StageLine(stage="rollouts", seconds=90.0, flops=2e12, facts={}, exam=[])
    last = dataclasses.replace(start, stage="mpo", seconds=4000.0, flops=3e12)
    headings, cells = cells_of([start, data, last])
    assert headings[:4] == ["stage", "mean", "a", "b"]
    assert cells[0][:4] == ["start", "50.0", "40.0 (30-50)", "60.0 (50-70)"]
    assert cells[1] == ["rollouts", "", "", "", "1.5 min", "1.5 min", "2", "2"]
    assert cells[2][4:] == ["1.11 h", "1.14 h", "3", "5"]
    assert cells[3][:4] == ["most frequent answer", "20.0", "20.0", "20.0"]
    # Where a router saved visual tokens, the table says how many were taken.
    routed = dataclasses.replace(last, stage="router", visual_share=0.55)
    headings, cells = cells_of([start, data, routed])
    assert headings[4:6] == ["visual tokens, %", "time"]
    assert [line[4] for line in cells] == ["100.0", "", "55.0", ""]
    assert {len(line) for line in cells} == {len(headings)}
    assert clock(59.0) == "59 s"


def test_the_table_fits_a_terminal() -> None:
    names = ("charts:easy@224", "handwriting:four", "printed:word@224", "shapes:full")
    rows = [
        ExamRow(name=name, share=1.0, low=0.61, high=1.0, num=9, constant=0.2) for name in names
    ]
    start = StageLine(stage="start", seconds=0.0, flops=0.0, facts={}, exam=rows)
    stages = [start, *(dataclasses.replace(start, stage=name) for name in ("vico", "router"))]
    stages[-1] = dataclasses.replace(stages[-1], visual_share=0.5)
    written = io.StringIO()
    Console(width=80, file=written).print(terminal_table(stages))
    text = written.getvalue()
    assert "…" not in text
    assert text.count("(61-100)") == 12
    assert "router" in text
    # A few kinds of questions and many stages stand upright.
    narrow = terminal_table([dataclasses.replace(start, exam=rows[:1])] * 6)
    assert narrow.columns[1].header == "charts:\neasy@224"
    assert len(narrow.rows) == 7
