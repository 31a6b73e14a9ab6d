from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from cascadevl.cli import main as cli
from cascadevl.cli import zoo
from cascadevl.errors import ConfigError
from cascadevl.version import __version__


def shell(*words: str) -> subprocess.CompletedProcess[str]:
    """The command as a person runs it: the script that installation made."""
    script = Path(sys.executable).with_name("cascadevl")
    return subprocess.run([str(script), *words], capture_output=True, text=True)


def test_the_installed_command_lists_every_command():
    done = shell("--help")
    assert done.returncode == 0
    for command in (
        "chat",
        "show",
        "train",
        "cascade",
        "data",
        "convert",
        "zoo",
        "demo",
        "nano",
        "micro",
    ):
        assert f"\n    {command} " in done.stdout


def test_a_mistake_ends_with_one_line_and_exit_code_2(tmp_path: Path):
    done = shell("chat", "model", "--image", str(tmp_path / "absent.png"))
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == f"error: there is no picture {tmp_path / 'absent.png'}\n"


def test_the_package_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "cascadevl", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == f"cascadevl {__version__}"


def test_version(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as done:
        cli.main(["--version"])
    assert done.value.code == 0
    assert capsys.readouterr().out.strip() == f"cascadevl {__version__}"


@pytest.mark.parametrize("words", [[], ["zooo"], ["data"], ["train"], ["convert", "a", "b"]])
def test_words_that_are_no_command_are_refused(words: list[str]):
    with pytest.raises(SystemExit) as done:
        cli.main(words)
    assert done.value.code == 2


def raising(error: BaseException):
    def run(args: argparse.Namespace) -> int:
        raise error

    return run


def outcome(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(zoo, "run", raising(error))
    return cli.main(["zoo"])


def test_our_errors_and_those_of_files_are_worded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert outcome(ConfigError("tile_px is 0"), monkeypatch) == 2
    assert capsys.readouterr().err == "error: tile_px is 0\n"
    assert outcome(PermissionError(13, "Permission denied", "/x/y"), monkeypatch) == 2
    assert capsys.readouterr().err == "error: /x/y: Permission denied\n"


def test_ctrl_c_ends_with_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    assert outcome(KeyboardInterrupt(), monkeypatch) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ZeroDivisionError):
        outcome(ZeroDivisionError(), monkeypatch)


def test_traceback_can_be_asked_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(zoo, "run", raising(ConfigError("no")))
    with pytest.raises(ConfigError):
        cli.main(["--traceback", "zoo"])


@pytest.mark.parametrize("length", [10, 10**6])
def test_a_reader_that_has_enough_gets_no_complaint(length: int):
    program = f"""
import sys
from cascadevl.cli import main, zoo
zoo.run = lambda args: print("x" * {length}) or 0
sys.exit(main.main(["zoo"]))"""
    done = subprocess.run(
        f"{sys.executable} -c '{program}' | (exec <&-; sleep 0.5); echo ${{PIPESTATUS[0]}}",
        shell=True,
        executable="/bin/bash",
        capture_output=True,
        text=True,
    )
    assert done.stdout == "1\n"
    assert done.stderr == ""
