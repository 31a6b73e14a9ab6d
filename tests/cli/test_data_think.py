from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.eval.chat_server import Answered, Body, chat_server, said

from cascadevl.cli.main import main


def think(out: Path, *words: str) -> int:
    return main(["data", "think", str(out), *words])


def test_tasks_give_data_that_pass_the_check(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    words = ["--task", "text", "--task", "handwriting:add_digits", "--scenes", "6"]
    assert think(tmp_path / "a", *words, "--direct-ratio", "0.5") == 0
    shown = capsys.readouterr().out
    lines = (tmp_path / "a" / "thinking.jsonl").read_text("utf-8").splitlines()
    assert f"{len(lines)} thinking and {(len(lines) + 1) // 2} direct records" in shown
    assert f"--data {tmp_path / 'a' / 'meta.json'}" in shown
    assert main(["data", "check", str(tmp_path / "a" / "meta.json"), "--deep"]) == 0
    assert (
        f"all {len(lines) + (len(lines) + 1) // 2} records can be used" in capsys.readouterr().out
    )


def test_a_server_and_a_judge_over_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "secret")

    def answer(body: Body) -> Answered:
        if body["model"] == "judge":
            return said("Score: 8" if "2 + 2" in body["messages"][0]["content"] else "Score: 2")
        asked = body["messages"][1]["content"]
        return said("4" if asked.startswith("2 + 2") else "6", reasoning="adding both up gives it")

    lines = [{"question": "2 + 2?", "answer": "4"}, {"question": "3 + 3?", "answer": "6"}]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["--questions", str(tmp_path / "q.jsonl"), "--model", "big", "--samples", "2"]
    with chat_server(answer) as server:
        words += ["--url", server.url, "--judge", "judge", "--api-key-env", "MY_KEY"]
        assert think(tmp_path / "a", *words, "--temperature", "0.8", "--max-new-tokens", "99") == 0
        solving = [body for body in server.bodies if body["model"] == "big"]
        judging = [body for body in server.bodies if body["model"] == "judge"]
    assert {(body["temperature"], body["max_tokens"]) for body in solving} == {(0.8, 99)}
    assert {body["temperature"] for body in judging} == {0.0}
    assert {headers["Authorization"] for headers in server.headers} == {"Bearer secret"}
    shown = capsys.readouterr().out
    # The two samples of a question say the same.
    assert "2 questions, 1 without a good solution; 1 thinking and 1 direct records" in shown
    table = {line.split("  ")[0]: line.split()[-3:] for line in shown.splitlines() if "%" in line}
    assert table["all"][0] == "4"
    assert table["duplicate"][0] == "2"
    assert table["unclear"][:2] == ["1", "25.0"]


def test_nothing_kept_is_exit_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "q.jsonl").write_text('{"question": "2 + 2?", "answer": "4"}\n')
    assert think(tmp_path / "a", "--questions", str(tmp_path / "q.jsonl")) == 1
    assert "nothing was kept" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ([], "--task"),
        (["--task", "text", "--questions", "q.jsonl"], "--task"),
        (["--task", "texts"], "no task 'texts'"),
        (["--task", "easy_vqa:easy"], "no difficulties"),
        (["--task", "text:hard"], "hard"),
        (["--task", "text", "--url", "http://localhost:1/v1"], "--model"),
        (["--task", "text", "--url", "localhost", "--model", "m"], "http://host:port/v1"),
        (["--task", "text", "--judge", "m"], "--judge-url"),
        (["--questions", "absent.jsonl"], "absent.jsonl"),
    ],
)
def test_mistakes_end_with_a_word_that_helps(
    tmp_path: Path, words: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert think(tmp_path / "a", *words) == 2
    assert problem in capsys.readouterr().err


def test_an_interrupted_attempt_is_gone_on_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--task", "text", "--scenes", "3"]
    assert think(tmp_path / "a", *words) == 0
    assert think(tmp_path / "a", *words) == 2
    assert "resume" in capsys.readouterr().err
    assert think(tmp_path / "a", *words, "--resume") == 0
    assert think(tmp_path / "a", *words, "--resume", "--seed", "1") == 2
    assert "cannot go on" in capsys.readouterr().err
