"""Thinking data from end to end: what is asked, filtered, written, resumed, and trained on."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from tests.eval.chat_server import Answered, Body, chat_server, said

from cascadevl.data.conversation import thinking_answer
from cascadevl.data.example import ExampleBuilder, ExampleConfig
from cascadevl.data.hub import open_source
from cascadevl.data.meta import read_meta
from cascadevl.data.spans import describe
from cascadevl.data.tokenizer import build_tokenizer
from cascadevl.errors import ConfigError, RequestError
from cascadevl.eval.responder import Reply
from cascadevl.eval.url_responder import UrlResponder
from cascadevl.tasks.handwriting import Handwriting
from cascadevl.tasks.problems import FileProblems, Problem, TaskProblems
from cascadevl.tasks.text import Text
from cascadevl.types import ImageRef, Message, Record
from cascadevl.workflows.thinking_config import ThinkingConfig
from cascadevl.workflows.thinking_data import make_thinking_data

# As released, typed off the facts and not taken from the package.
SYSTEM = """You are an AI assistant that rigorously follows this response protocol:

1. First, conduct a detailed analysis of the question. Consider different angles, potential \
solutions, and reason through the problem step-by-step. Enclose this entire thinking process \
within <think> and </think> tags.

2. After the thinking section, provide a clear, concise, and direct answer to the user's \
question. Separate the answer from the think section with a newline.

Ensure that the thinking process is thorough but remains focused on the query. The final answer \
should be standalone and not reference the thinking section."""

BOXED = "Please answer the question and put the final answer within \\boxed{}."


def records(out: Path, name: str) -> list[dict[str, Any]]:
    lines = (out / f"{name}.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


def values(record: dict[str, Any]) -> list[str]:
    return [turn["value"] for turn in record["conversations"]]


def write_questions(path: Path, lines: Sequence[dict[str, Any]]) -> FileProblems:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return FileProblems(path)


class Sums:
    """So many sums, one a group; some of them may be broken."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> list[Problem]:
        prompt, answer = Message.of("user", f"What is {index} + 1?"), str(index + 1)
        return [
            Problem(
                problem_id=f"sum:{index}",
                prompt=prompt,
                reference=answer,
                check=lambda text: text.endswith(answer),
            )
        ]

    def settings(self) -> dict[str, Any]:
        return {"count": self._count}


class Scripted:
    """Answers by a script, and remembers what was asked with which seed."""

    def __init__(self, script: Any) -> None:
        self.script = script
        self.asked: list[tuple[Message, ...]] = []
        self.seeds: list[int] = []

    def __call__(self, conversations: Sequence[Sequence[Message]]) -> list[str]:
        return [reply.text for reply in self.sample(conversations, seed=0)]

    def sample(self, conversations: Sequence[Sequence[Message]], *, seed: int) -> list[Reply]:
        self.asked += [tuple(each) for each in conversations]
        self.seeds.append(seed)
        return [self.script(each[-1].text, place) for place, each in enumerate(conversations)]


def right(question: str, _: int) -> Reply:
    """Solves "What is N + 1?"."""
    number = int(question.split()[2])
    steps = f"{number} and one more is {number + 1}"
    return Reply(thinking_answer(steps, f"It is {number + 1}"))


# -- from tasks


def test_worked_reasoning_of_tasks_becomes_both_modes(tmp_path: Path) -> None:
    task = Handwriting(difficulty="add_digits", num_questions=3)
    problems = TaskProblems(tasks=[Text(num_questions=2), task], num_scenes=20)
    report = make_thinking_data(problems, ThinkingConfig(out=tmp_path))

    # By hand: every question with steps, scene by scene, the tasks in turn.
    expected, pictures = [], []
    for number in range(20):
        for each in (Text(num_questions=2), task):
            scene = each.draw("train", 0, number)
            for order, question in enumerate(scene.questions):
                if question.reasoning is not None:
                    expected.append((f"{scene.scene_id}#{order}", scene, question))
    thinking, direct = records(tmp_path, "thinking"), records(tmp_path, "direct")
    assert [record["id"] for record in thinking] == [f"{name}/think/0" for name, _, _ in expected]
    assert [record["id"] for record in direct] == [f"{name}/direct" for name, _, _ in expected]
    for (_, scene, question), with_steps, without in zip(expected, thinking, direct, strict=True):
        shown = "<image>\n" if scene.images else ""
        steps = f"<think>\n{question.reasoning}\n</think>\n\n{question.answer}"
        assert values(with_steps) == [SYSTEM, shown + question.prompt, steps]
        assert values(without) == [shown + question.prompt, question.answer]
        assert [turn["from"] for turn in with_steps["conversations"]] == ["system", "human", "gpt"]
        assert with_steps.get("image") == without.get("image")
        if scene.images:
            pictures.append(with_steps["image"])
            seen = PIL.Image.open(tmp_path / with_steps["image"])
            np.testing.assert_array_equal(np.asarray(seen), np.asarray(scene.images[0]))
    assert len(set(pictures)) > 5
    assert (report.num_problems, report.num_unsolved) == (len(expected), 0)
    assert (report.num_thinking, report.num_direct, report.dropped) == (
        len(expected),
        len(expected),
        {},
    )


def test_what_is_written_trains_the_thinking_and_the_answer_and_no_more(tmp_path: Path) -> None:
    """From the meta file to the tokens: the released template letter by letter, and the targets."""
    task = Handwriting(difficulty="add_digits", num_questions=3)
    problems = TaskProblems(tasks=[task], num_scenes=4)
    report = make_thinking_data(problems, ThinkingConfig(out=tmp_path))
    assert report.meta is not None
    tokenizer = build_tokenizer([SYSTEM, "What is the sum of the two numbers? 1 + 2 = 3"], 600)
    builder = ExampleBuilder(tokenizer, ExampleConfig(system=""), 256)
    seen = {}
    for spec in read_meta(report.meta):
        record = open_source(spec)[0]  # type: ignore[index]
        assert isinstance(record, Record)
        example = builder(record)
        seen[spec.name] = [
            (span.text, span.trained) for span in describe(example, tokenizer) if span.text
        ]
    question = next(q for q in task.draw("train", 0, 0).questions if q.reasoning)
    asked = (
        "<|im_start|>user\n<img><IMG_CONTEXT></img>\n"
        f"{question.prompt}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert seen["thinking"] == [
        (f"<|im_start|>system\n{SYSTEM}<|im_end|>\n{asked}", False),
        (f"<think>\n{question.reasoning}\n</think>\n\n{question.answer}<|im_end|>", True),
        ("\n", False),
    ]
    assert seen["direct"] == [(asked, False), (f"{question.answer}<|im_end|>", True), ("\n", False)]


def test_an_answer_in_a_box_is_asked_for_and_given(tmp_path: Path) -> None:
    problems = TaskProblems(tasks=[Text()], num_scenes=10)
    make_thinking_data(problems, ThinkingConfig(out=tmp_path, boxed=True))
    for record in records(tmp_path, "thinking"):
        _, asked, answer = values(record)
        assert asked.endswith(f"\n{BOXED}")
        assert answer.rpartition("</think>\n\n")[2].startswith("\\boxed{")
        assert answer.endswith("}")
    for record in records(tmp_path, "direct"):
        assert "boxed" not in "".join(values(record))


def test_gpt_oss_and_own_system_prompts(tmp_path: Path) -> None:
    problems = TaskProblems(tasks=[Text()], num_scenes=4)
    for name, settings, expected in (
        ("oss", {"template": "internvl3_5_gpt_oss"}, "Reasoning: high\n\n# Valid channels: anal"),
        ("own", {"system": "Think first."}, "Think first."),
    ):
        make_thinking_data(problems, ThinkingConfig(out=tmp_path / name, **settings))
        assert expected in values(records(tmp_path / name, "thinking")[0])[0]


# -- from a responder


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


# -- the ratio of modes


@pytest.mark.parametrize(
    ("ratio", "num_direct", "repeats"),
    [(0.0, 0, None), (0.25, 2, 1.0), (0.5, 4, 1.0), (1.0, 8, 1.0), (3.0, 8, 3.0)],
)
def test_direct_answers_come_in_their_ratio(
    tmp_path: Path, ratio: float, num_direct: int, repeats: float | None
) -> None:
    config = ThinkingConfig(out=tmp_path, num_samples=1, direct_ratio=ratio, group=3)
    report = make_thinking_data(Sums(8), config, responder=Scripted(right))
    assert (report.num_thinking, report.num_direct) == (8, num_direct)
    meta = json.loads((tmp_path / "meta.json").read_text("utf-8"))
    assert meta.get("direct", {}).get("repeat_time") == repeats
    if ratio == 0.5:  # spread over the questions, not the first half of them
        names = [record["id"] for record in records(tmp_path, "direct")]
        assert names == [f"sum:{n}/direct" for n in (0, 2, 4, 6)]


def test_nothing_kept_writes_no_meta_file(tmp_path: Path) -> None:
    config = ThinkingConfig(out=tmp_path, num_samples=1)
    report = make_thinking_data(Sums(2), config, responder=Scripted(lambda *_: Reply("")))
    assert (report.meta, report.num_unsolved) == (None, 2)
    assert not (tmp_path / "meta.json").exists()


# -- interruptions


def test_interrupted_work_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    """The server dies in the third group, twice; what comes out is what one attempt writes."""

    class Dying(Scripted):
        def __init__(self, lives: int) -> None:
            super().__init__(right)
            self.lives = lives

        def sample(self, conversations: Sequence[Sequence[Message]], *, seed: int) -> list[Reply]:
            if len(self.seeds) == self.lives:
                raise RequestError("the server is gone")
            return super().sample(conversations, seed=seed)

    settings: dict[str, Any] = {"num_samples": 2, "group": 2, "direct_ratio": 0.5}
    whole = ThinkingConfig(out=tmp_path / "whole", **settings)
    first = Scripted(right)
    expected = make_thinking_data(Sums(9), whole, responder=first)

    parts = ThinkingConfig(out=tmp_path / "parts", resume=True, **settings)
    seeds = []
    for lives in (2, 0, 1):
        dying = Dying(lives)
        with pytest.raises(RequestError):
            make_thinking_data(Sums(9), parts, responder=dying)
        seeds += dying.seeds
        with (tmp_path / "parts" / "thinking.jsonl").open("a") as file:
            file.write('{"id": "half a rec')  # what a crash in the middle of writing leaves
    last = Scripted(right)
    report = make_thinking_data(Sums(9), parts, responder=last)
    assert seeds + last.seeds == first.seeds  # nothing was asked twice
    assert replace(report, meta=None) == replace(expected, meta=None)
    for name in ("thinking.jsonl", "direct.jsonl", "meta.json"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()

    # Finished work is only reported again.
    again = make_thinking_data(Sums(9), parts, responder=Dying(0))
    assert again == report
    with pytest.raises(ConfigError, match="resume"):
        make_thinking_data(Sums(9), replace(parts, resume=False), responder=last)
    with pytest.raises(ConfigError, match=r"num_samples = 2 and cannot go on with 3"):
        make_thinking_data(Sums(9), replace(parts, num_samples=3), responder=last)
    with pytest.raises(ConfigError, match="model"):
        make_thinking_data(Sums(9), parts, responder=last, facts={"model": "other"})


def test_broken_questions_are_left_out_and_counted(tmp_path: Path) -> None:
    lines = [
        {"question": "One and one?", "answer": 2},
        {"question": "No answer?"},
        {"question": "<image>\nWhich?", "answer": "2", "image": "absent.png"},
        {"question": "Two and two?", "answer": "4"},
    ]
    problems = write_questions(tmp_path / "q.jsonl", lines)
    replies = {"One": "2", "Two": "4"}
    responder = Scripted(
        lambda text, _: Reply(thinking_answer("adding both up gives it", replies[text[:3]]))
    )
    config = ThinkingConfig(out=tmp_path / "out", num_samples=1)
    report = make_thinking_data(problems, config, responder=responder)
    assert dict(report.skipped) == {"bad_field": 1, "missing_image": 1}
    assert (report.num_problems, report.num_thinking) == (2, 2)


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


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"num_samples": 0}, "num_samples"),
        ({"keep": 0}, "keep"),
        ({"group": 0}, "group"),
        ({"direct_ratio": -1.0}, "direct_ratio"),
        ({"system": " "}, "empty"),
        ({"template": "llama"}, "llama"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        ThinkingConfig(out=Path("x"), **settings)
