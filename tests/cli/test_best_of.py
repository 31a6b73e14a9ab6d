"""The best of several answers, and thinking, by the words of the commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.engine.small_backend import checkpoint, picture

from cascadevl.cli.main import main


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("checkpoint") / "github")


def generate(model: Path, folder: Path, *more: str) -> int:
    picture(3).source.save(folder / "a.png")  # type: ignore[union-attr]
    part = {"type": "image_url", "image_url": {"url": "a.png"}}
    asked = {"id": 1, "messages": [{"role": "user", "content": [part]}]}
    (folder / "q.jsonl").write_text(json.dumps(asked) + "\n")
    files = [str(folder / "q.jsonl"), str(folder / "out.jsonl")]
    return main(["generate", *files, "--model", str(model), *more])


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]


def test_generate_writes_the_best_with_its_scores(model: Path, tmp_path: Path) -> None:
    judge = ("--reward-model", str(model), "--step-lines", "--reward-chunk", "2")
    how = ("--best-of", "3", "--temperature", "1", "--max-tokens", "6")
    assert generate(model, tmp_path, *judge, *how) == 0
    (row,) = rows(tmp_path)
    assert row["num_drawn"] == 3
    assert 0 <= row["score"] <= 1
    assert row["score"] == pytest.approx(sum(row["step_scores"]) / len(row["step_scores"]))


def test_generate_reasons_within_its_budget(model: Path, tmp_path: Path) -> None:
    how = ("--thinking", "on", "--force-thinking", "--thinking-budget", "3", "--max-tokens", "20")
    assert generate(model, tmp_path, *how, "--token-ids") == 0
    (row,) = rows(tmp_path)
    assert "</think>" in row["text"]
    assert row["content"] == row["text"].partition("</think>")[2].lstrip("\n")


def test_chat_gives_the_best_and_says_how_it_was_chosen(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["chat", str(model), "--question", "What?", "--max-new-tokens", "5"]
    assert main([*words, "--best-of", "3", "--temperature", "1", "--round-size", "2"]) == 0
    assert "the best of 3, share of votes" in capsys.readouterr().err
    how = ("--reward-model", str(model), "--temperature", "1", "--select", "outcome")
    assert main([*words, *how]) == 0
    assert "the best of 8, score by outcome 0." in capsys.readouterr().err


def test_chat_keeps_reasoning_apart(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["chat", str(model), "--question", "What?", "--max-new-tokens", "16"]
    assert main([*words, "--thinking", "on", "--force-thinking", "--thinking-budget", "4"]) == 0
    shown = capsys.readouterr()
    assert "think>" not in shown.out + shown.err
    assert shown.out.strip()
    assert shown.err.partition("\n\n")[0].strip()


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("--select", "vote"), "say --best-of N too"),
        (("--round-size", "2"), "--round-size chooses among several answers"),
        (("--best-of", "2"), "would be the same"),
        (("--best-of", "2", "--temperature", "1", "--select", "prm"), "there is no reward model"),
        (("--reward-model", "x", "--select", "vote"), "reads no --reward-model"),
        (("--force-thinking",), "--force-thinking needs --thinking"),
        (("--thinking", "off", "--thinking-budget", "3"), "nothing to budget"),
    ],
)
def test_mistakes_are_said(
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    problem: str,
) -> None:
    assert main(["chat", str(model), "--question", "?", *words]) == 2
    assert problem in capsys.readouterr().err
    assert generate(model, tmp_path, *words) == 2
    assert problem in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


def test_several_answers_and_the_best_of_several_are_two_things(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    how = ("--best-of", "2", "--num-samples", "2", "--temperature", "1")
    assert generate(model, tmp_path, *how) == 2
    assert "--num-samples asks for all of them" in capsys.readouterr().err
