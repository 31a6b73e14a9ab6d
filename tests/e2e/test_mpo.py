"""From lines of preference data to an aligned model, through the command line."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import PIL.Image
import pytest
from tests.train.small_pairs import COLOURS, mpo_config

import cascadevl
from cascadevl.cli.main import main


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """A meta file with pairs as MMPR has them; one of the five cannot be used."""
    lines = []
    for number, (right, wrong) in enumerate(pairwise(COLOURS[:5])):
        PIL.Image.new("RGB", (60, 60), right).save(tmp_path / f"{right}.png")
        line = {"id": number, "image": f"{right}.png", "question": "<image>\nWhich color?"}
        lines.append({**line, "chosen": right, "rejected": f"there is {wrong} in it"})
    turns = [{"from": "human", "value": "Which color?"}, {"from": "gpt", "value": "red"}]
    lines.append({"id": 4, "conversations": turns})
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    meta = {"colours": {"root": str(tmp_path), "annotation": str(tmp_path / "pairs.jsonl")}}
    (tmp_path / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    return tmp_path / "meta.json"


def test_lines_of_pairs_are_shown_and_trained_on(
    pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = mpo_config(tmp_path / "unused", tmp_path / "start").model.path
    keys = {
        "model.precision": "float32",
        "data.max_tokens": 300,
        "data.prefetch": 0,
        "optim.lr": 1e-3,
        "run.num_steps": 3,
        "run.global_batch": 2,
        "run.log_interval": 1,
        "mpo.beta": 0.2,
    }
    words = ["train", "mpo", "--model", str(start), "--data", str(pairs)]
    words += [f"--{key}={value}" for key, value in keys.items()]
    assert main([*words, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "branch 1" in shown
    assert "branch 2" in shown
    assert main([*words, "--out", str(tmp_path / "run")]) == 0
    said = capsys.readouterr()
    assert "3 steps" in said.out
    assert "1 x not_a_pair of colours" in said.err
    cascadevl.load(tmp_path / "run" / "model")
    written = (tmp_path / "run" / "config.yaml").read_text(encoding="utf-8")
    assert "beta: 0.2" in written
    assert "reference: stored" in written
