from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tests.engine.small_backend import checkpoint, picture
from tests.engine.vllm_double import TextModel, vllm_double
from tests.model import make_flash

from cascadevl.cli.main import main


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("checkpoint") / "github")


def write_questions(folder: Path, number: int) -> Path:
    picture(3).source.save(folder / "a.png")  # type: ignore[union-attr]
    lines = [
        {"id": place, "messages": [{"role": "user", "content": content(place)}]}
        for place in range(number)
    ]
    file = folder / "q.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def content(place: int) -> list[dict[str, Any]]:
    shown = [{"type": "image_url", "image_url": {"url": "a.png"}}] if place % 2 else []
    return [*shown, {"type": "text", "text": f"What is {place}?"}]


def words(model: Path, folder: Path, *more: str) -> list[str]:
    files = [str(folder / "q.jsonl"), str(folder / "out.jsonl")]
    return ["generate", *files, "--model", str(model), "--max-tokens", "4", *more]


def in_order(file: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return sorted(rows, key=lambda row: (row["line"], row["sample"]))


@pytest.mark.parametrize("backend", ["engine", "transformers"])
def test_questions_become_answers(
    model: Path, tmp_path: Path, backend: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_questions(tmp_path, 3)
    more = (
        *("--backend", backend),
        "--num-samples",
        "2",
        "--temperature",
        "1",
        "--token-ids",
        "--logprobs",
        "1",
    )
    assert main(words(model, tmp_path, *more)) == 0
    said = capsys.readouterr().err
    assert "3 of 3 questions are answered, 0 failed" in said
    rows = in_order(tmp_path / "out.jsonl")
    assert [(row["id"], row["line"], row["sample"]) for row in rows] == [
        (place, place + 1, sample) for place in range(3) for sample in range(2)
    ]
    assert all(len(row["logprobs"]) == len(row["token_ids"]) for row in rows)
    assert [bool(row["tokens"]["visual"]) for row in rows[::2]] == [False, True, False]
    before = (tmp_path / "out.jsonl").read_bytes()
    assert main(words(model, tmp_path, *more)) == 0
    assert "3 of 3 questions are answered (3 before)" in capsys.readouterr().err
    assert (tmp_path / "out.jsonl").read_bytes() == before


def test_failures_are_told_with_their_lines(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_questions(tmp_path, 2)
    file.write_text(file.read_text() + '{"id": 9, "messages": []}\n' + "nonsense\n")
    assert main(words(model, tmp_path)) == 1
    said = capsys.readouterr().err
    assert f"{file}:3: " in said
    assert said.count(f"{file}:4: ") == 1
    assert "2 of 4 questions are answered, 2 failed" in said


def test_the_answers_do_not_depend_on_who_answers(
    model: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    text = TextModel(model, tmp_path_factory.mktemp("text") / "half")
    answers = []
    with vllm_double(text) as server:
        ways = (
            ["--backend", "transformers"],
            ["--backend", server.url],
            ["--batch-invariant"],
            ["--weights", "packed"],
        )
        for number, more in enumerate(ways):
            folder = tmp_path / f"{number}"
            folder.mkdir()
            write_questions(folder, 3)
            assert main(words(model, folder, *more)) == 0
            answers.append(in_order(folder / "out.jsonl"))
    assert answers == [answers[0]] * 4


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--backend", "sglang"), "no backend 'sglang'"),
        (("--top-p", "0"), "top_p is 0.0"),
        (("--device", "nowhere"), "cannot be used here"),
    ],
)
def test_mistakes_are_said_before_anything_is_written(
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: tuple[str, ...],
    message: str,
) -> None:
    write_questions(tmp_path, 1)
    assert main(words(model, tmp_path, *more)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


def num_lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


@pytest.mark.slow
def test_killed_at_any_moment_no_answer_is_lost_or_doubled(model: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
        write_questions(folder, 200)
    more = ("--num-samples", "2", "--temperature", "1", "--seed", "4", "--batch-invariant")
    assert main(words(model, whole, *more)) == 0

    chance = random.Random(0)
    out = parts / "out.jsonl"
    command = [sys.executable, "-m", "cascadevl.cli.main", *words(model, parts, *more)]
    for killed in range(4):
        running = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        wanted = 40 * killed + chance.randrange(10, 40)  # lines of answers before it is killed
        while running.poll() is None and (
            not out.exists() or out.read_bytes().count(b"\n") < wanted
        ):
            time.sleep(0.01)
        running.send_signal(signal.SIGKILL)
        assert running.wait() == -signal.SIGKILL
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL, env=os.environ)
    assert in_order(out) == in_order(whole / "out.jsonl")


def test_a_budget_reaches_every_backend_and_is_reported(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model = make_flash.write_flash(tmp_path / "model", max_dynamic_patch=4)
    text = TextModel(model, tmp_path_factory.mktemp("text") / "half")
    answers: dict[str, list[Any]] = {}
    with vllm_double(text) as server:
        for budget in ("full", "0.5", "compressed", "threshold=0.4,quantile=0.3"):
            for number, backend in enumerate(("engine", "transformers", server.url)):
                folder = tmp_path / f"{budget} {number}"
                folder.mkdir()
                write_questions(folder, 3)
                more = ("--backend", backend, "--visual-budget", budget, "--token-ids")
                assert main(words(model, folder, *more)) == 0
                rows = in_order(folder / "out.jsonl")
                answers.setdefault(budget, []).append(
                    [(row["token_ids"], row["tokens"]) for row in rows]
                )
    for ways in answers.values():
        assert ways[1:] == ways[:1] * 2
    full, half, compressed = (answers[budget][0][1][1] for budget in ("full", "0.5", "compressed"))
    tiles = full["tiles"]
    assert tiles > 1
    assert (full["compressed_tiles"], full["visual"]) == (0, 4 * tiles)
    assert (compressed["compressed_tiles"], compressed["visual"]) == (tiles, tiles)
    assert (half["compressed_tiles"], half["visual"]) == (tiles // 2, 4 * tiles - 3 * (tiles // 2))
    assert "tiles" not in answers["full"][0][0][1]


def test_another_budget_is_another_setting(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_flash.write_flash(tmp_path / "model", max_dynamic_patch=4)
    write_questions(tmp_path, 2)
    assert main(words(model, tmp_path, "--visual-budget", "0.5")) == 0
    assert main(words(model, tmp_path, "--visual-budget", "0.6")) == 2
    assert "visual_budget" in capsys.readouterr().err
    assert main(words(model, tmp_path, "--visual-budget", "2")) == 2
    assert "must lie in 0 to 1" in capsys.readouterr().err
