"""Rollouts, preference pairs and the filter over the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.data.some_rollouts import rollout
from tests.engine.small_backend import checkpoint, picture

from cascadevl.cli.main import main
from cascadevl.data.rollouts import ROLLOUTS, StoredRollouts, open_store


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(checkpoint(tmp_path_factory.mktemp("checkpoint") / "github"))


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")


def test_rollouts_of_tasks(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["data", "rollouts", str(tmp_path / "s"), "--model", model, "--task", "text"]
    words += ["--scenes", "3", "--num-samples", "4", "--max-tokens", "5", "--boxed", "--logprobs"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    stored = list(StoredRollouts(tmp_path / "s"))
    assert f"{len(stored)} questions have answers; 0 failed" in shown
    assert f"{4 * len(stored)} new answers: 0.0 % right" in shown
    for each in stored:
        assert each.weight_version == model
        assert each.prompt[-1].text.endswith("within \\boxed{}.")
        assert [len(answer.logprobs) for answer in each.answers] == [
            len(answer.token_ids) for answer in each.answers
        ]
        assert max(len(answer.token_ids) for answer in each.answers) <= 5
    before = (tmp_path / "s" / ROLLOUTS).read_bytes()
    assert main(words) == 0
    assert f"{len(stored)} questions have answers ({len(stored)} before)" in capsys.readouterr().out
    assert (tmp_path / "s" / ROLLOUTS).read_bytes() == before
    assert main([*words, "--temperature", "0.5"]) == 2
    assert "cannot go on" in capsys.readouterr().err
    assert main(["data", "filter", str(tmp_path / "s"), str(tmp_path / "q.jsonl")]) == 1
    assert f"0 questions from 0.2 to 0.8; {len(stored)} are harder" in capsys.readouterr().out


def test_open_questions_become_pairs_by_dropout(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture(3).source.save(tmp_path / "a.png")  # type: ignore[union-attr]
    lines = [
        {"id": n, "image": "a.png", "question": f"<image>\nWhat is written on door {n}?"}
        for n in range(3)
    ]
    lines.append({"id": 9, "image": "absent.png", "question": "<image>\nWhat?"})
    (tmp_path / "o.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["data", "rollouts", str(tmp_path / "s"), "--model", model, "--open"]
    words += ["--questions", str(tmp_path / "o.jsonl"), "--num-samples", "8", "--max-tokens", "90"]
    assert main(words) == 1
    assert "absent.png" in (shown := capsys.readouterr().out)
    assert "3 questions have answers; 1 failed" in shown
    pairs = ["data", "preferences", str(tmp_path / "s")]
    assert main([*pairs, str(tmp_path / "none")]) == 1
    shown = capsys.readouterr().out
    assert "open questions give pairs with --model" in shown
    assert "there are no pairs" in shown
    more = ["--model", model, "--max-tokens", "5", "--num-dropout", "2"]
    assert main([*pairs, str(tmp_path / "out"), *more]) == 0
    shown = capsys.readouterr().out
    lines = (tmp_path / "out" / "dropout.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    assert len(found) > 1
    assert f"{len(found)} of DropoutNTP" in shown
    assert f"--data {tmp_path / 'out' / 'meta.json'}" in shown
    for row in found:
        assert row["rejected"] != row["chosen"]
        assert row["image"] == str((tmp_path / "a.png").resolve())


def test_pairs_of_right_and_wrong_pass_the_check(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with open_store(tmp_path / "s", {}) as store:
        store.append([rollout(number) for number in range(5)])
    words = ["data", "preferences", str(tmp_path / "s"), str(tmp_path / "out")]
    assert main([*words, "--max-pairs", "1", "--keep-entailed"]) == 0
    shown = capsys.readouterr().out
    assert "5 pairs of a right and a wrong answer (0 left out" in shown
    check = ["data", "check", str(tmp_path / "out" / "meta.json"), "--deep", "--model", model]
    assert main(check) == 0
    assert "all 5 records can be used" in capsys.readouterr().out
    assert main(["data", "filter", str(tmp_path / "s"), str(tmp_path / "q.jsonl")]) == 0
    assert "5 questions from 0.2 to 0.8; 0 are harder" in capsys.readouterr().out
    again = ["data", "rollouts", str(tmp_path / "t"), "--model", model, "--num-samples", "1"]
    again += ["--questions", str(tmp_path / "q.jsonl"), "--max-tokens", "2"]
    assert main(again) == 0
    assert len(StoredRollouts(tmp_path / "t")) == 5


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["rollouts", "s", "--model", "m"], "--task"),
        (["rollouts", "s", "--model", "m", "--task", "text", "--open"], "--questions"),
        (["rollouts", "s", "--model", "m", "--task", "texts"], "no task 'texts'"),
        (["rollouts", "s", "--model", "m", "--task", "text", "--top-p", "0"], "top_p is 0.0"),
        (["preferences", "absent", "out"], "no store of rollouts"),
        (["filter", "absent", "q.jsonl"], "no store of rollouts"),
        (["filter", "absent", "q.jsonl", "--least", "0.9"], "0.9 to 0.8"),
        (["preferences", "absent", "out", "--kept-share", "2"], "kept_share is 2.0"),
    ],
)
def test_mistakes_end_with_a_word_that_helps(
    tmp_path: Path,
    words: list[str],
    problem: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["data", *words]) == 2
    assert problem in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
