"""Thinking data from a responder: how it is asked, and which of its solutions are kept."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import PIL.Image
import pytest
from tests.eval.chat_server import Answered, Body, chat_server, said
from tests.workflows.some_solutions import (
    BOXED,
    SYSTEM,
    Scripted,
    Sums,
    records,
    right,
    values,
    write_questions,
)

from cascadevl.data.conversation import thinking_answer
from cascadevl.errors import ConfigError
from cascadevl.eval.responder import Reply
from cascadevl.eval.url_responder import UrlResponder
from cascadevl.tasks.handwriting import Handwriting
from cascadevl.tasks.problems import TaskProblems
from cascadevl.types import ImageRef, Message
from cascadevl.workflows.thinking_config import ThinkingConfig
from cascadevl.workflows.thinking_data import make_thinking_data


def test_the_responder_is_asked_as_the_model_will_be(tmp_path: Path) -> None:
    responder = Scripted(right)
    config = ThinkingConfig(out=tmp_path, num_samples=2, boxed=False, group=2)
    make_thinking_data(Sums(3), config, responder=responder)
    assert responder.asked == [
        (Message.of("system", SYSTEM), Message.of("user", f"What is {n} + 1?"))
        for n in (0, 0, 1, 1, 2, 2)
    ]
    assert len(set(responder.seeds)) == 2  # every group draws anew
    boxed = Scripted(right)
    config = ThinkingConfig(out=tmp_path / "boxed", num_samples=1, boxed=True)
    make_thinking_data(Sums(1), config, responder=boxed)
    assert boxed.asked[0][1].text == f"What is 0 + 1?\n{BOXED}"


FAULTY = {
    "wrong_answer": Reply(thinking_answer("one and one more is two", "3")),
    "no_thinking": Reply("2"),
    "unclosed_thinking": Reply("<think>\none and one more"),
    "several_blocks": Reply("<think>\na b c\n</think>\n<think>\nd\n</think>\n\n2"),
    "repetitive": Reply(thinking_answer("let me count all of them once more. " * 9, "2")),
    "cut_off": Reply(thinking_answer("one and one more is two", "2"), "length"),
    "mixed_languages": Reply(thinking_answer("一加一等于二", "2")),
    "other_answer": Reply(thinking_answer("one more, the answer is 4", "2")),
    "no_reply": Reply(""),
    "refused": Reply("", "refused"),
    "duplicate": Reply(thinking_answer("ONE more than  one is two", "2")),
    "surplus": Reply(thinking_answer("counting on from one we come to two", "2")),
}


def test_every_filter_is_counted(tmp_path: Path) -> None:
    best = Reply(thinking_answer("one more than one is two", "2"))
    script = [best, *FAULTY.values()]
    responder = Scripted(lambda _, place: script[place])
    problems = write_questions(tmp_path / "q.jsonl", [{"question": "One and one?", "answer": 2}])
    config = ThinkingConfig(out=tmp_path / "out", num_samples=len(script))
    report = make_thinking_data(problems, config, responder=responder)
    assert dict(report.dropped) == dict.fromkeys(FAULTY, 1)
    assert report.num_solutions == len(script)
    assert report.num_thinking + sum(report.dropped.values()) == report.num_solutions
    (kept,) = records(tmp_path / "out", "thinking")
    assert values(kept)[-1] == best.text
    written = json.loads((tmp_path / "out" / "report.json").read_text("utf-8"))
    assert written["dropped"] == dict(report.dropped)


def test_several_are_kept_if_wished(tmp_path: Path) -> None:
    def script(question: str, place: int) -> Reply:
        return Reply(thinking_answer(f"way number {['one', 'two', 'three'][place]} to it", "1"))

    config = ThinkingConfig(out=tmp_path, num_samples=3, keep=2, choice="diverse")
    report = make_thinking_data(Sums(1), config, responder=Scripted(script))
    assert (report.num_thinking, dict(report.dropped)) == (2, {"surplus": 1})
    names = [record["id"] for record in records(tmp_path, "thinking")]
    assert names == ["sum:0/think/0", "sum:0/think/1"]


def test_solutions_are_brought_to_one_form(tmp_path: Path) -> None:
    loose = Reply("  <think>zero and one more is one</think> It is 1 \n")
    config = ThinkingConfig(out=tmp_path, num_samples=1)
    make_thinking_data(Sums(1), config, responder=Scripted(lambda *_: loose))
    (kept,) = records(tmp_path, "thinking")
    assert values(kept)[-1] == "<think>\nzero and one more is one\n</think>\n\nIt is 1"


def test_own_and_sampled_solutions_compete(tmp_path: Path) -> None:
    line = {"question": "One and one?", "answer": "2"}
    line["solution"] = thinking_answer("one and then yet one more is two", "2")
    problems = write_questions(tmp_path / "q.jsonl", [line])
    shorter = Scripted(lambda *_: Reply(thinking_answer("both make two", "2")))
    make_thinking_data(
        problems, ThinkingConfig(out=tmp_path / "a", num_samples=1), responder=shorter
    )
    assert "both make two" in values(records(tmp_path / "a", "thinking")[0])[-1]
    make_thinking_data(problems, ThinkingConfig(out=tmp_path / "b"))
    assert "yet one more" in values(records(tmp_path / "b", "thinking")[0])[-1]
    with pytest.raises(ConfigError, match="neither"):
        make_thinking_data(problems, ThinkingConfig(out=tmp_path / "c", own=False))


def test_a_judge_has_the_last_word(tmp_path: Path) -> None:
    marks = {"0": "Score: 9", "1": "Score: 6.9", "2": "I cannot say.", "3": "Score: 7"}
    judge = Scripted(lambda question, _: Reply(marks[question.partition("What is ")[2][0]]))
    config = ThinkingConfig(out=tmp_path, num_samples=1)
    report = make_thinking_data(Sums(4), config, responder=Scripted(right), judge=judge)
    assert dict(report.dropped) == {"unclear": 1, "no_score": 1}
    names = [record["id"] for record in records(tmp_path, "thinking")]
    assert names == ["sum:0/think/0", "sum:3/think/0"]
    (asked,) = judge.asked[0]
    assert asked.role == "user"
    assert "What is 0 + 1?" in asked.text
    assert "<think>\n0 and one more is 1\n</think>\n\nIt is 1" in asked.text


def test_a_judge_sees_the_pictures(tmp_path: Path) -> None:
    judge = Scripted(lambda *_: Reply("8"))
    problems = TaskProblems(tasks=[Handwriting(difficulty="add_digits")], num_scenes=1)
    make_thinking_data(problems, ThinkingConfig(out=tmp_path), judge=judge)
    assert isinstance(judge.asked[0][0].parts[0], ImageRef)


def test_from_a_server(tmp_path: Path) -> None:
    """Over HTTP: pictures and system prompt are sent, the samples of a question differ."""
    PIL.Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    lines = [{"question": f"<image>\nWhat is {n} + 1?", "answer": str(n + 1), "image": "a.png"}
             for n in range(5)]  # fmt: skip
    problems = write_questions(tmp_path / "q.jsonl", lines)

    def answer(body: Body) -> Answered:
        system, user = body["messages"]
        assert system == {"role": "system", "content": SYSTEM}
        picture, text = user["content"]
        assert picture["image_url"]["url"].startswith("data:image/png;base64,")
        number = int(text["text"].split()[2])
        if body["seed"] % 2:
            return said("I do not know.", reasoning_content="Hm, hm, hm.")
        return said(f"{number + 1}", reasoning_content=f"{number} and one is {number + 1}")

    with chat_server(answer) as server:
        responder = UrlResponder(url=server.url, model="tiny", concurrency=4, timeout_s=20.0)
        config = ThinkingConfig(out=tmp_path / "out", num_samples=2, group=2)
        report = make_thinking_data(problems, config, responder=responder)
    assert (report.num_thinking, dict(report.dropped)) == (5, {"wrong_answer": 5})
    assert Counter(body["seed"] % 2 for body in server.bodies) == {0: 5, 1: 5}
    assert len({body["seed"] for body in server.bodies}) == 10
    first = records(tmp_path / "out", "thinking")[0]
    assert values(first)[1:] == ["<image>\nWhat is 0 + 1?", thinking_answer("0 and one is 1", "1")]
    assert Path(first["image"]) == tmp_path / "a.png"
