from __future__ import annotations

from pathlib import Path

import pytest
from tests.train.small_gspo import ODD_LENGTH, write_questions, write_start

from cascadevl.cli.main import main, make_parser
from cascadevl.cli.train import read_config
from cascadevl.train.gspo_config import GSPOConfig

SMALL = [
    *("--data.max_tokens=128", "--batch.row_tokens=128", "--rollout.prompts=2"),
    *("--rollout.group=4", "--rollout.max_prompt_tokens=64", "--rollout.max_answer_tokens=4"),
    "--rollout.engine.num_pages=100",
    *("--policy.updates=1", "--run.num_steps=2", "--model.precision=float32"),
    f"--rewards.weights={{'{ODD_LENGTH}': 1.0}}",
]


def test_questions_and_rewards_can_be_given_on_the_command_line():
    words = ["--questions", "a.jsonl", "--rewards.weights={accuracy: 1.0}", "--policy.clip_low=0.1"]
    config = read_config(make_parser().parse_args(["train", "gspo", *words]))
    assert isinstance(config, GSPOConfig)
    assert config.problems.file == Path("a.jsonl")
    assert config.rewards.weights == {"accuracy": 1.0}
    assert config.policy.clip_low == 0.1


def test_a_dry_run_shows_the_first_questions(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    start = write_start(tmp_path)
    write_questions(tmp_path)
    words = ["--model", str(start), "--questions", str(tmp_path / "questions.jsonl"), *SMALL]
    assert main(["train", "gspo", *words, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("─ sample ") == 3
    assert "what?<|im_end|>" in shown
    assert shown.count("0 of them trained") == 3


def test_a_run_from_the_command_line_leaves_a_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    start = write_start(tmp_path)
    write_questions(tmp_path)
    words = ["--model", str(start), "--questions", str(tmp_path / "questions.jsonl"), *SMALL]
    assert main(["train", "gspo", *words, "--out", str(tmp_path / "run")]) == 0
    assert "2 steps, loss " in capsys.readouterr().out
    assert (tmp_path / "run" / "model" / "config.json").is_file()


def test_a_run_without_questions_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    start = write_start(tmp_path)
    out = ["--out", str(tmp_path / "run")]
    assert main(["train", "gspo", "--model", str(start), *SMALL, *out]) == 2
    assert "--questions FILE.jsonl" in capsys.readouterr().err
    assert main(["train", "gspo", "--model", str(start), *SMALL, "--data", "a.json", *out]) == 2
    assert "GSPO does not read data.meta" in capsys.readouterr().err
