from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import PIL.Image
import pytest
from rich.console import Console
from tests.model import make_checkpoints, make_flash

from cascadevl.cli.main import main
from cascadevl.cli.talk import Chat, user_message
from cascadevl.engine import engine
from cascadevl.errors import RequestError
from cascadevl.types import ImageRef, Message


@dataclass
class Reply:
    """Two pieces; cut off or with another increment where the question says so."""

    messages: Sequence[Message]
    increments: tuple[float, ...] = ()
    num_tiles: int = 0
    num_compressed: int = 0
    finish_reason: str | None = None
    note: str = ""

    def __iter__(self) -> Iterator[str]:
        text = self.messages[-1].text
        yield f"[bold]{len(self.messages)}: "
        if "stop" in text:
            raise KeyboardInterrupt
        yield text.strip() + "\n"
        self.finish_reason = "length" if "long story" in text else "stop"


class Echo:
    """Answers with what it was asked, and remembers it."""

    def __init__(self) -> None:
        self.asked: list[tuple[Message, ...]] = []
        self.resets = 0
        self.increments: tuple[float, ...] = ()
        self.tiles = (0, 0)

    def ask(self, messages: Sequence[Message]) -> Reply:
        self.asked.append(tuple(messages))
        if "fail" in messages[-1].text:
            raise RequestError("too long")
        return Reply(messages, self.increments, *self.tiles)

    def reset(self) -> None:
        self.resets += 1


@pytest.fixture
def chat() -> Chat:
    return Chat(Echo(), Console(file=io.StringIO(), width=200))


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    PIL.Image.new("RGB", (4, 4)).save(tmp_path / "a picture.png")
    return tmp_path / "a picture.png"


def talk(chat: Chat, *lines: str) -> str:
    rest = list(lines)

    def read() -> str:
        if not rest:
            raise EOFError
        return rest.pop(0)

    chat.talk(read)
    assert not rest or "/quit" in lines
    return chat.console.file.getvalue()  # type: ignore[attr-defined]


def test_the_conversation_grows_with_question_and_answer(chat: Chat):
    shown = talk(chat, "hi", "", "and then?")
    assert [message.role for message in chat.messages] == ["user", "assistant"] * 2
    assert chat.messages[1].text == "[bold]1: hi\n"
    assert chat.session.asked[1] == tuple(chat.messages[:3])
    assert "[bold]3: and then?" in shown  # an answer is text, not markup


def test_pictures_go_with_the_next_question_only(chat: Chat, picture: Path):
    shown = talk(chat, f"/image {picture}", "what?", "more")
    assert "with the next question: a picture.png" in shown
    assert chat.messages[0].parts == (ImageRef(picture), "\n", "what?")
    assert chat.messages[2].parts == ("more",)


def test_several_pictures_are_numbered():
    message = user_message("differ?", [Path("a"), Path("b")])
    assert message.parts == (
        "Image-1: ", ImageRef(Path("a")), "\n", "Image-2: ", ImageRef(Path("b")), "\n", "differ?"
    )  # fmt: skip


def test_reset_forgets_all_but_the_system_message(picture: Path):
    chat = Chat(Echo(), Console(file=io.StringIO()), system="be brief", images=[picture])
    talk(chat, "one", "/reset", "two")
    assert [message.text for message in chat.messages[:2]] == ["be brief", "two"]
    assert [message.role for message in chat.messages] == ["system", "user", "assistant"]
    assert chat.session.resets == 1


def test_an_answer_that_was_cut_off_is_told(chat: Chat):
    assert "cut off; a larger --max-new-tokens" not in talk(chat, "hi")
    shown = talk(chat, "a long story")
    assert "cut off; a larger --max-new-tokens" in shown
    assert chat.messages[-1].text == "[bold]3: a long story\n"  # it is part of the conversation


@dataclass
class Said(Reply):
    text: str = ""

    def __iter__(self) -> Iterator[str]:
        yield from (self.text[place : place + 2] for place in range(0, len(self.text), 2))


class Thinks:
    """Says what it is told to, two letters at a time."""

    resets = 0

    def __init__(self, text: str) -> None:
        self.text = text

    def ask(self, messages: Sequence[Message]) -> Reply:
        return Said(messages, text=self.text)

    def reset(self) -> None:
        self.resets += 1


@pytest.mark.parametrize("opening", ["", "<think>\n"])
def test_reasoning_goes_where_notes_go_and_stays_in_the_conversation(opening: str):
    out, notes = io.StringIO(), io.StringIO()
    said = "<think>\nI look.\n</think>\n\nIt is <red>.\n"
    chat = Chat(
        Thinks(said.removeprefix(opening)),
        Console(file=out),
        notes=Console(file=notes),
        opening=opening,
    )
    chat.ask("what?")
    assert out.getvalue() == "It is <red>.\n\n"
    assert notes.getvalue() == "I look.\n\n"
    assert chat.messages[-1].text == said


def test_reading_everything_again_with_a_smaller_increment_is_told(chat: Chat):
    chat.session.increments = (0.5,)
    assert "read again" not in talk(chat, "one", "two")
    chat.session.increments = (0.125, 0.125)
    shown = talk(chat, "three", "four")
    assert shown.count("it fits only with increment 1/8, no longer with 1/2") == 1
    talk(chat, "/reset")
    chat.session.increments = (1 / 256,)
    assert talk(chat, "five").count("read again") == 1


def test_quit_ends_and_later_lines_are_not_read(chat: Chat):
    talk(chat, "/quit", "never")
    assert chat.messages == []


def test_mistakes_are_told_and_the_conversation_goes_on(chat: Chat, tmp_path: Path):
    shown = talk(chat, f"/image {tmp_path / 'absent.png'}", "/imag x", "fail", "hi")
    assert "error: there is no picture" in shown
    assert "error: there is no command /imag" in shown
    assert "error: too long" in shown
    assert [message.text for message in chat.messages] == ["hi", "[bold]1: hi\n"]


def test_ctrl_c_ends_the_answer_but_not_the_conversation(chat: Chat):
    shown = talk(chat, "stop", "hi")
    assert "stopped" in shown
    assert len(chat.messages) == 2


def test_a_name_in_quotes_or_with_escapes_is_understood(chat: Chat, picture: Path):
    quoted, escaped = f"'{picture}'", str(picture).replace(" ", "\\ ")
    talk(chat, f"/image {quoted}", f"/image {escaped}")
    assert chat.images == [picture, picture]


def test_what_is_no_picture_is_refused_at_once(chat: Chat, tmp_path: Path):
    (tmp_path / "text.png").write_text("no picture")
    shown = talk(chat, f"/image {tmp_path / 'text.png'}", "/image", "/image it's.png", "hi")
    assert shown.count("error: ") == 3
    assert chat.images == []
    assert [message.text for message in chat.messages] == ["hi", "[bold]1: hi\n"]


def test_help_is_given(chat: Chat):
    assert "/image FILE" in talk(chat, "/help")


def test_ctrl_c_at_the_prompt_does_not_end_the_conversation(chat: Chat):
    lines = iter([KeyboardInterrupt(), "hi", EOFError()])

    def read() -> str:
        line = next(lines)
        if isinstance(line, BaseException):
            raise line
        return line

    chat.talk(read)
    assert len(chat.messages) == 2


def test_the_terminal_does_not_obey_an_answer(chat: Chat):
    shown = talk(chat, "a\x1b[2Jb\x07\tc")
    assert "a\ufffd[2Jb\ufffd" in shown
    assert "\x1b[2J" not in shown
    assert chat.messages[0].text == "a\x1b[2Jb\x07\tc"


def test_an_empty_question_and_an_unknown_device_are_refused(
    chat: Chat, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(RequestError, match="empty"):
        chat.ask("  ")
    for device in ("gpu", "cuda:99"):
        assert main(["chat", "anything", "--question", "?", "--device", device]) == 2
        assert f"--device {device} cannot be used" in capsys.readouterr().err


def test_a_missing_picture_is_told_before_the_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    words = ["chat", str(tmp_path / "no_model"), "--image", str(tmp_path / "no.png")]
    assert main(words) == 2
    assert "no.png" in capsys.readouterr().err


def test_a_missing_model_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["chat", str(tmp_path / "no_model"), "--question", "?"]) == 2
    assert "no_model" in capsys.readouterr().err


def test_a_real_model_is_asked_with_the_increment_and_the_limit_of_the_command(
    tmp_path: Path,
    picture: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    prepared = []
    prepare = engine.prepare
    monkeypatch.setattr(
        engine, "prepare", lambda *all_: prepared.append(prepare(*all_)) or prepared[-1]
    )
    model = make_checkpoints.write_github(tmp_path / "model", "qwen3")
    words = ["chat", str(model), "--image", str(picture), "--question", "What?"]
    assert main([*words, "--max-new-tokens", "3", "--increment", "1/4"]) == 0
    shown = capsys.readouterr()
    assert "cut off; a larger --max-new-tokens" in shown.err
    assert "cut off" not in shown.out  # what goes into a pipe is the answer alone
    assert prepared[0].increments == (0.25,)
    with pytest.raises(SystemExit):
        main([*words, "--increment", "2"])
    assert "2 is not above 0 and at most 1" in capsys.readouterr().err


def test_compressed_tiles_are_told_when_there_are_others(chat: Chat):
    assert isinstance(chat.session, Echo)
    shown = talk(chat, "one")
    assert "tiles compressed" not in shown
    chat.session.tiles = (13, 7)
    shown = talk(chat, "two", "three")
    assert shown.count("7 of 13 tiles compressed") == 1
    chat.session.tiles = (26, 9)
    assert "9 of 26 tiles compressed" in talk(chat, "four")


def test_a_flash_model_is_asked_with_the_budget_of_the_command(
    tmp_path: Path, picture: Path, capsys: pytest.CaptureFixture[str]
):
    PIL.Image.new("RGB", (180, 60)).save(picture)
    model = make_flash.write_flash(tmp_path / "model")
    words = ["chat", str(model), "--image", str(picture), "--question", "What?"]
    words += ["--max-new-tokens", "2", "--visual-budget"]
    assert main([*words, "compressed"]) == 0
    assert "4 of 4 tiles compressed" in capsys.readouterr().err
    assert main([*words, "50%"]) == 0
    assert "2 of 4 tiles compressed" in capsys.readouterr().err
    assert main([*words, "full"]) == 0
    assert "compressed" not in capsys.readouterr().err
    assert main([*words, "some"]) == 2
    assert "'some' is no visual budget" in capsys.readouterr().err
