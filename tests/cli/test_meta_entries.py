"""Commands take meta files with tasks and streams: the check, and the dry run of a mixture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from tests.train.small_run import tokenizer

from cascadevl.cli.main import main
from cascadevl.data.check import MAX_GENERATED


@pytest.fixture
def meta(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("COLUMNS", "200")
    datasets.disable_progress_bars()
    turns = [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]
    rows = [{"conversations": turns}] * 7 + [{"conversations": turns[:1]}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    entries: dict[str, Any] = {
        "sums": {"annotation": "task:text", "length": 5000, "repeat_time": 2},
        "shapes": {"annotation": "task:shapes", "length": 3},
        "rows": {"annotation": "rows.parquet", "stream": True, "length": 90},
    }
    (tmp_path / "meta.json").write_text(json.dumps(entries))
    return tmp_path / "meta.json"


def row_of(name: str, shown: str) -> list[str]:
    (line,) = (line for line in shown.splitlines() if line.startswith(f"│ {name} "))
    return [cell.strip() for cell in line.strip("│").split("│")]


def test_the_check_looks_at_the_first_records_of_what_has_no_end(
    meta: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "check", str(meta)]) == 1
    shown = capsys.readouterr().out
    # data set, records looked at, good, bad, per epoch, images, videos
    assert row_of("sums", shown) == ["sums", f"{MAX_GENERATED:,}", "1,000", "0", "10,000", "0", "0"]
    assert row_of("shapes", shown) == ["shapes", "3", "3", "0", "3", "3", "0"]
    assert row_of("rows", shown) == ["rows", "8", "7", "1", "90", "0", "0"]
    assert "rows: 1 x bad_turns" in shown
    assert "rows:0:7: " in shown


def test_a_dry_run_draws_from_the_mixture_and_writes_nothing(
    meta: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer().save_pretrained(tmp_path / "tokenizer")
    words = ["train", "pretrain", "--data", str(meta), "--dry-run", "--out", str(tmp_path / "run")]
    preset = ["--model.preset", "nano", "--model.tokenizer", str(tmp_path / "tokenizer")]
    limits = ["--data.max_tokens", "2000", "--data.max_tiles", "1"]
    assert main([*words, *preset, *limits, "--data.mixture", "1:1000"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("(shapes)") == 3  # by size they would be three records in ten thousand
    assert not (tmp_path / "run").exists()
    assert main([*words, *preset, "--data.mixture", "1:0"]) == 2
    assert "the mixture is '1:0'" in capsys.readouterr().err
