"""Questions and scripted answers for tests of thinking data, and what is written of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cascadevl.data.conversation import thinking_answer
from cascadevl.eval.responder import Reply
from cascadevl.tasks.problems import FileProblems, Problem
from cascadevl.types import Message

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
