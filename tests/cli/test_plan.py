"""`cascadevl plan` on the command line."""

from __future__ import annotations

import pytest

from cascadevl.cli.main import main

WORDS = ["plan", "--model", "38b", "--resolution", "896", "--rate", "2", "--requests", "30"]


def test_a_plan_shows_the_three_arrangements(capsys: pytest.CaptureFixture[str]):
    assert main([*WORDS, "--processors", "4", "--price", "3600"]) == 0
    out = capsys.readouterr().out
    for words in ("5 tiles", "1280 visual", "640 with the router", "DvD + router", "Neither half"):
        assert words in out
    rows = [line.split() for line in out.splitlines()]
    (seconds,) = (words[-1] for words in rows if words[:2] == ["seconds", "a"])
    (price,) = (words[-1] for words in rows if words[:1] == ["price"])
    assert float(price) == pytest.approx(1000 * float(seconds), rel=0.05)


def test_cores_are_planned_with_what_was_measured(capsys: pytest.CaptureFixture[str]):
    words = ["plan", "--model", "micro", "--resolution", "224", "--rate", "1", "--requests", "20"]
    assert main([*words, "--hardware", "cpu"]) == 2
    assert "give --flops, --bandwidth, --memory" in capsys.readouterr().err
    measured = ["--flops", "1e11", "--bandwidth", "8GB", "--memory", "8GB"]
    assert main([*words, "--hardware", "cpu", *measured]) == 0
    assert "2 x CPU core" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["plan"], "give --model, --resolution, --rate"),
        ([*WORDS, "--group", "1"], "a group of 2 holds it"),
        ([*WORDS[:2], "39b", *WORDS[3:]], "no released size is called '39b'"),
    ],
)
def test_mistakes_are_said(words: list[str], said: str, capsys: pytest.CaptureFixture[str]):
    assert main(words) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_the_reports_table_is_shown_with_the_error_of_every_row(
    capsys: pytest.CaptureFixture[str],
):
    assert main(["plan", "--table18"]) == 0
    out = capsys.readouterr().out
    uses = [
        line.split()[-1]
        for line in out.splitlines()
        if line.strip().startswith(("448", "896", "1344"))
    ]
    assert [uses.count(use) for use in ("fitted", "predicted", "excluded")] == [4, 12, 2]
