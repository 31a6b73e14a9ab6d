"""The page of judged steps: what is said, escaped, coloured by its score, and nothing fetched."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from tests.data.conftest import picture

from cascadevl.cli.main import main
from cascadevl.errors import ConfigError, DataError
from cascadevl.workflows.step_view import read_solutions, write_page

NASTY = "<script>alert('1 < 2')</script> & \"so\""
ANSWER: dict[str, Any] = {
    "id": "q<1>",
    "line": 2,
    "text": "...",
    "score": 0.475,
    "num_drawn": 8,
    "steps": ["One\nand one.", NASTY, "So 3.", "Half."],
    "step_scores": [1.0, 0.25, 0.0, 0.5],
}
JUDGED = {
    "id": "solution 7",
    "image": "a.png",
    "mc": [0.5, 0.0],
    "conversations": [
        {"from": "human", "value": "### Question:\n<image>\nMany?\n\n### Solution Process:\nA."},
        {"from": "gpt", "value": "+"},
        {"from": "human", "value": "B."},
        {"from": "gpt", "value": "-"},
    ],
}


def written(folder: Path, *rows: Any, name: str = "rows.jsonl") -> Path:
    file = folder / name
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return file


class Page(HTMLParser):
    """Steps of a page as a browser reads them, and every tag and address in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.steps: list[dict[str, str]] = []
        self.tags: set[str] = set()
        self.addresses: list[str] = []
        self.words, self._span = "", ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attributes}
        self.tags.add(tag)
        self.addresses += [values[name] for name in ("src", "href") if name in values]
        if tag == "li":
            self.steps.append({"class": values["class"], "style": values["style"]})
        self._span = values.get("class", "") if tag == "span" else ""

    def handle_data(self, data: str) -> None:
        self.words += data
        if self._span and self.steps:
            self.steps[-1][self._span] = data

    def handle_endtag(self, tag: str) -> None:
        self._span = ""


def test_every_step_is_shown_as_it_is_with_its_score(tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    assert write_page(read_solutions(written(tmp_path, ANSWER)), out, title="A & B") == 1
    text = out.read_text("utf-8")
    page = Page(text)
    assert [step["text"] for step in page.steps] == ANSWER["steps"]
    assert [step["score"] for step in page.steps] == ["1.00", "0.25", "0.00", "0.50"]
    assert [step["class"] for step in page.steps] == ["high", "low", "low", "high"]
    shares = [re.findall(r"--(\w+): ([\d.]+)%", step["style"]) for step in page.steps]
    assert [dict(each) for each in shares] == [
        {"score": "100.0", "share": "100.0"},
        {"score": "25.0", "share": "50.0"},
        {"score": "0.0", "share": "0.0"},
        {"score": "50.0", "share": "0.0"},
    ]
    assert "script" not in page.tags
    assert "q<1>" in page.words
    assert "A & B" in page.words
    assert "score 0.47, the best of 8" in page.words
    assert "0, wrong by then" in page.words
    assert page.addresses == []
    assert "prefers-color-scheme: dark" in text


def test_questions_and_pictures_of_answers_are_shown(tmp_path: Path) -> None:
    picture(900, 40).save(tmp_path / "a.png")
    part = {"type": "image_url", "image_url": {"url": "a.png"}}
    asked = [
        {"messages": [{"role": "user", "content": "other"}]},
        {"messages": [{"role": "user", "content": [part, {"type": "text", "text": NASTY}]}]},
    ]
    questions = written(tmp_path, *asked, name="q.jsonl")
    rows = written(tmp_path, ANSWER)
    assert main(["show", str(rows), "--steps", "--questions", str(questions)]) == 0
    page = Page((tmp_path / "rows.steps.html").read_text("utf-8"))
    assert NASTY in page.words
    (address,) = page.addresses
    assert address.startswith("data:image/png;base64,")
    with pytest.raises(DataError, match=r"answers line 9, which .* does not have"):
        list(read_solutions(written(tmp_path, ANSWER | {"line": 9}), questions=questions))


def test_training_data_are_shown_with_the_shares_of_right_continuations(tmp_path: Path) -> None:
    picture(60, 40).save(tmp_path / "a.png")
    without = {**JUDGED, "mc": None}
    first, second = read_solutions(written(tmp_path, JUDGED, without))
    assert [step.score for step in first.steps] == [0.5, 0.0]
    assert [step.score for step in second.steps] == [1.0, 0.0], "labels where shares are missing"
    assert first.question is not None
    assert first.question.text.strip() == "Many?"
    assert first.total == "1 of 2 steps labelled wrong"
    assert write_page(iter([first]), tmp_path / "page.html", title="t") == 1
    assert len(Page((tmp_path / "page.html").read_text("utf-8")).addresses) == 1


def test_a_page_is_bounded_and_says_what_it_leaves_out(tmp_path: Path) -> None:
    rows = written(tmp_path, *[ANSWER] * 7)
    out = tmp_path / "page.html"
    assert write_page(read_solutions(rows), out, title="t", max_solutions=3) == 3
    assert "4 more are in the file." in out.read_text("utf-8")


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"id": 1, "text": "no steps"}, "no judged steps"),
        (ANSWER | {"step_scores": [0.5]}, "4 steps have 1 scores"),
        (ANSWER | {"step_scores": [0.5, 2.0, 0.0, 0.0]}, "from 0 to 1"),
    ],
)
def test_what_is_not_judged_is_refused(row: Any, problem: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=problem):
        list(read_solutions(written(tmp_path, row)))


def test_an_empty_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no solutions to show"):
        write_page(read_solutions(written(tmp_path)), tmp_path / "p.html", title="t")
