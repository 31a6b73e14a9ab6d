from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.train.small_gspo import small_config

from cascadevl.data.stream import merge_states, skipped_of
from cascadevl.errors import ConfigError, DataError, TrainingError
from cascadevl.tasks.problems import Problem
from cascadevl.train.gspo_config import ProblemsConfig
from cascadevl.train.questions import Asked, QuestionStream, problems_of
from cascadevl.types import NO_PARENT, Example, Message

PROMPT = Example(
    source="",
    record_id="",
    input_ids=np.zeros(1, dtype=np.int64),
    trained=np.zeros(1, dtype=np.bool_),
    segments=np.zeros(1, dtype=np.int64),
    parents=(NO_PARENT,),
    tiles=np.empty((0, 2, 2, 3), dtype=np.uint8),
    tiles_per_image=(),
    increments=(),
)


class Numbers:
    """Groups of one to three questions; every fifth group cannot be read."""

    def __init__(self, length: int = 11) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int, /) -> list[Problem]:
        if index % 5 == 4:
            raise DataError("no such file", kind="missing_image", source=f"{index}")
        return [
            Problem(
                problem_id=f"{index}/{order}",
                prompt=Message.of("user", "?"),
                reference="",
                check=lambda _: False,
            )
            for order in range(1 + index % 3)
        ]

    def settings(self) -> dict[str, Any]:
        return {"length": self.length}


def ask(problem: Problem, number: int) -> Asked:
    if problem.problem_id == "5/1":
        raise DataError("much too long", kind="too_long", source=problem.problem_id)
    return Asked(number, problem, (problem.prompt,), PROMPT)


def stream(**more: Any) -> QuestionStream:
    return QuestionStream(Numbers(), ask, **{"num_prompts": 4, "seed": 7, **more})


def names(batch: list[Asked]) -> list[str]:
    return [each.problem.problem_id for each in batch]


EVERY = [f"{i}/{order}" for i in range(11) if i % 5 != 4 for order in range(1 + i % 3)]
EVERY.remove("5/1")


def test_every_question_comes_once_an_epoch_in_another_order_each_time():
    questions = stream(num_prompts=len(EVERY))
    first, second = names(next(questions)), names(next(questions))
    assert sorted(first) == sorted(second) == sorted(EVERY)
    assert first != second
    other = stream(num_prompts=len(EVERY), seed=8)
    assert names(next(other)) != first


def test_questions_are_numbered_through_the_run():
    questions = stream()
    numbers = [each.number for _ in range(3) for each in next(questions)]
    assert numbers == list(range(12))


def test_a_stream_goes_on_where_it_stood():
    whole = stream()
    before = [names(next(whole)) for _ in range(3)]
    place = whole.state_dict()
    after = [names(next(whole)) for _ in range(4)]
    again = stream()
    again.load_state_dict(place)
    assert [names(next(again)) for _ in range(4)] == after
    assert len({name for batch in before for name in batch}) == 12
    assert again.state_dict() == whole.state_dict()


def test_the_shares_of_processes_make_the_batch_of_one():
    one = stream()
    shares = [stream(rank=rank, world_size=2) for rank in range(2)]
    for _ in range(5):
        whole = names(next(one))
        first, second = (names(next(share)) for share in shares)
        assert first == whole[::2]
        assert second == whole[1::2]
    state = merge_states([share.state_dict() for share in shares])
    three = stream()
    three.load_state_dict(state)
    assert names(next(three)) == names(next(one))


def test_what_is_left_out_is_counted_by_kind_once():
    questions = stream(num_prompts=len(EVERY))
    next(questions)
    found = skipped_of(questions.state_dict())
    assert {kind: each.count for (_, kind), each in found.items()} == {
        "missing_image": 2,
        "too_long": 1,
    }
    assert "much too long" in found["questions", "too_long"].first
    assert stream(rank=1, world_size=2).state_dict()["skipped"] == []


def test_questions_that_cannot_be_used_at_all_stop_the_run():
    def refuse(problem: Problem, number: int) -> Asked:
        raise DataError("too long", kind="too_long", source=problem.problem_id)

    questions = QuestionStream(Numbers(), refuse, num_prompts=2, seed=0)
    with pytest.raises(DataError, match=r"11 groups of questions in a row.*too_long"):
        next(questions)


def test_other_questions_cannot_be_gone_on_with():
    place = stream().state_dict()
    other = QuestionStream(Numbers(12), ask, num_prompts=4, seed=7)
    with pytest.raises(TrainingError, match=r"questions were .*11.* and are .*12"):
        other.load_state_dict(place)


def test_nothing_to_ask_is_refused():
    with pytest.raises(ConfigError, match="no questions to ask"):
        QuestionStream(Numbers(0), ask, num_prompts=4, seed=0)
    with pytest.raises(ConfigError, match="3 processes cannot share"):
        stream(world_size=3)
    with pytest.raises(ConfigError, match="--questions"):
        problems_of(ProblemsConfig())
    with pytest.raises(ConfigError, match="no task 'handwritng'"):
        problems_of(ProblemsConfig(tasks=("handwritng",)))
    with pytest.raises(ConfigError, match="give one of them"):
        ProblemsConfig(file=Path("a.jsonl"), tasks=("shapes",))


def test_tasks_are_named_with_their_difficulty():
    problems = problems_of(ProblemsConfig(tasks=("handwriting:add", "shapes"), scenes=3))
    assert len(problems) == 6
    assert "add" in problems.settings()["tasks"][0]
    assert len(problems[0]) > 0


def test_the_smallest_setting_holds():
    config = small_config(Path("unused"), Path("unused"))
    assert config.rollout.max_prompt_tokens + config.rollout.max_answer_tokens <= 128
