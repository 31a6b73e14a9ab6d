"""Checkpoints that come with the package: found by name, told when missing, known by edition."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from rich.console import Console
from tests.model import make_checkpoints

import cascadevl
from cascadevl.cli import chat
from cascadevl.cli.main import main, make_parser
from cascadevl.errors import CheckpointError
from cascadevl.model import shipped
from cascadevl.model.loading import find


@pytest.fixture
def assets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Assets with a micro of their own, in a working folder that has none."""
    folder = tmp_path / "assets"
    make_checkpoints.write_github(folder / "micro", "qwen3")
    (folder / "micro" / "README.md").write_text(f"---\n{shipped.EDITION_KEY}: 7\n---\n# micro\n")
    monkeypatch.setattr(shipped, "ASSETS", folder)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return folder


def test_the_name_opens_the_packages_own(assets: Path) -> None:
    assert find("micro") == assets / "micro"
    model, processor = cascadevl.load("micro")
    assert model.config.text_config.hidden_size == make_checkpoints.WIDTH
    assert processor.tokenizer.convert_tokens_to_ids("<|im_end|>") is not None


def test_a_folder_of_that_name_goes_first(assets: Path) -> None:
    shutil.copytree(assets / "micro", "micro")
    assert find("micro") == Path("micro")


def test_an_incomplete_package_is_told(assets: Path) -> None:
    (assets / "micro" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"install cascadevl again, or train .* `cascadevl"):
        cascadevl.load("micro")


def test_it_can_be_converted_by_its_name(assets: Path) -> None:
    assert main(["convert", "micro", "hf", "--to", "hf"]) == 0
    assert cascadevl.load("hf")[0].config.text_config.hidden_size == make_checkpoints.WIDTH


@pytest.mark.parametrize(
    ("card", "number"),
    [
        (f"---\nlicense: apache-2.0\n{shipped.EDITION_KEY}: 2\n---\n# micro\n", 2),
        ("---\nlicense: apache-2.0\n---\n# another\n", None),
        (f"# no front matter\n---\n{shipped.EDITION_KEY}: 2\n---\n", None),
        ("---\n- a list\n---\n", None),
        ("", None),
    ],
)
def test_the_edition_stands_in_the_card(tmp_path: Path, card: str, number: int | None) -> None:
    (tmp_path / "README.md").write_text(card)
    assert shipped.edition(tmp_path) == number


def test_a_folder_without_card_has_no_edition(tmp_path: Path) -> None:
    assert shipped.edition(tmp_path) is None


def test_chat_takes_it_without_being_told_and_names_the_edition(
    assets: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert make_parser().parse_args(["chat"]).model == "micro"
    lines = iter(["/quit"])
    monkeypatch.setattr(chat, "line_reader", lambda: lambda: next(lines))
    monkeypatch.setattr("rich.console.Console", lambda **kw: Console(width=500, **kw))
    assert main(["chat"]) == 0
    shown = capsys.readouterr().out
    assert f"micro, edition 7; what it can do: {assets / 'micro' / 'README.md'}" in shown
    assert chat.HELP in shown
