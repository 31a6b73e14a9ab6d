"""Checked answers in the terminal."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console
from tests.cli.test_chat import Echo, talk

from cascadevl.cli.main import main
from cascadevl.cli.talk import Chat
from cascadevl.scoring.claims import Claim
from cascadevl.scoring.verdicts import Checked, Verification
from cascadevl.tasks.shapes import Shapes


def test_verdicts_follow_the_answer_and_the_conversation_goes_on_with_what_is_left():
    claim = Claim(text="a \x1bdog", question="Is there a dog?", span=(0, 3))
    gone = Checked(
        claim=claim, verdict="withdrawn", probability=0.12, evidence=(), reason="picture says no"
    )
    chat = Chat(Echo(), Console(file=io.StringIO(), width=200))
    chat.verify = lambda _, answer: Verification(answer=answer, checks=(gone,), text="[bold]left")
    shown = talk(chat, "hi")
    assert "withdrawn 0.12 a \ufffddog (picture says no)" in shown
    assert "what is left: [bold]left" in shown
    assert chat.messages[-1].text == "[bold]left"
    chat.verify = lambda *_: None
    talk(chat, "more")
    assert chat.messages[-1].text.endswith("more\n")


def test_micro_checks_what_it_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    scene = Shapes(px=224, difficulty="full").draw("test", 3, 1)
    assert scene.image is not None
    scene.image.save(tmp_path / "a.png")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.md").write_text("The red circle was drawn in 1889.")
    words = ["chat", "micro", "--image", str(tmp_path / "a.png"), "--question", "List all shapes."]
    assert main([*words, "--verify", "--documents", str(tmp_path / "notes")]) == 0
    said = capsys.readouterr()
    assert said.out.count("\n") == 1  # a pipe gets the answer alone
    for item in said.out.strip().split(", "):
        assert item in said.err
    assert "kept" in said.err
    assert main([*words, "--documents", str(tmp_path)]) == 2
    assert "add --verify" in capsys.readouterr().err
    assert main([*words, "--verify", "--limits", "0.2,0.8"]) == 2
    assert "two probabilities" in capsys.readouterr().err
    assert main([*words, "--verify", "--documents", str(tmp_path / "absent")]) == 2
    assert "no such folder" in capsys.readouterr().err
