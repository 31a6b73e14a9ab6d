"""Best of N: the choice is that of the rule, by hand; and drawing stops when it is settled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.engine.small_talk import build, conversations, model_for
from tests.reference import process_reward_by_hand as by_hand
from tests.workflows.some_problems import Scripted

from cascadevl.engine.backends import Backend
from cascadevl.engine.best_of_n import BestOfN, ByReward, ByVotes, Selection, chosen
from cascadevl.engine.engine import Engine
from cascadevl.engine.engine_backend import EngineBackend
from cascadevl.engine.process_reward import ProcessRewardModel, SolutionScore
from cascadevl.engine.requests import Completion, EngineConfig
from cascadevl.engine.sampling import SamplingParams
from cascadevl.errors import ConfigError, DataError
from cascadevl.eval.best_of_n import BestOfNResponder
from cascadevl.eval.responder import Responder, Sampler
from cascadevl.scoring.voting import ballot
from cascadevl.types import Message

QUESTION = [Message.of("user", "one two?")]
WARM = SamplingParams(temperature=0.7, max_tokens=8)
PROCESSOR = build()


class Script(Scripted):
    """Says its lines one after the other; a line that begins with "..." was cut off."""

    def __init__(self, lines: Sequence[str]) -> None:
        super().__init__(says=lambda request, sample: lines[self.num_said + sample])
        self.num_said = 0

    def answer(self, requests):  # type: ignore[no-untyped-def]
        for number, request in enumerate(requests):
            ((_, outcome),) = super().answer([request])
            assert isinstance(outcome, tuple)
            self.num_said += request.num_samples
            yield number, tuple(map(_ended, outcome))


def _ended(completion: Completion) -> Completion:
    was_cut = completion.text.startswith("...")
    return replace(completion, finish_reason="length" if was_cut else "stop")


class ByLength:
    """Scores a text by its length; counts what it was asked, and knows what it cannot judge."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def __call__(self, prompt: Sequence[Message], solutions: Sequence[str]) -> list[SolutionScore]:
        self.asked.append(list(solutions))
        if any("<image>" in text for text in solutions):
            raise DataError("a mark", kind="image_count")
        if prompt[-1].role != "user":
            raise DataError("no question", kind="bad_turns")
        return [
            SolutionScore(score=len(text) / 100, steps=(text,), step_scores=(len(text) / 100,))
            for text in solutions
        ]


def best_of(lines: Sequence[str], selection: Selection, **values: object) -> BestOfN:
    settings = {"num_samples": len(lines), "sampling": WARM, **values}
    return BestOfN(
        backend=Script(lines),
        processor=PROCESSOR,
        selection=selection,
        **settings,  # type: ignore[arg-type]
    )


def test_the_highest_score_wins_the_first_of_equals_and_unfinished_ones_last() -> None:
    judge = ByLength()
    lines = ["aa", "bbbb", "cccc", "...a long one that was cut", "d"]
    (found,) = best_of(lines, ByReward(scorer=judge)).choose([QUESTION], seed=0)
    assert found.index == 1
    assert [each.completion.text for each in found.candidates] == lines
    assert [each.score for each in found.candidates] == [len(line) / 100 for line in lines]
    assert judge.asked == [lines]
    cut = ["...a", "...abc", "...ab"]
    (found,) = best_of(cut, ByReward(scorer=judge)).choose([QUESTION], seed=0)
    assert found.index == 1, "if none ended, the best of the others"


def test_an_answer_that_cannot_be_judged_is_worth_nothing() -> None:
    lines = ["aa", "<image> and much more", "b"]
    (found,) = best_of(lines, ByReward(scorer=ByLength())).choose([QUESTION], seed=0)
    assert [each.score for each in found.candidates] == [0.02, 0.0, 0.01]
    assert found.index == 0


def test_a_question_that_cannot_be_judged_is_an_error() -> None:
    drawn = best_of(["aa", "b"], ByReward(scorer=ByLength()))
    with pytest.raises(DataError, match="no question"):
        drawn.choose([[*QUESTION, Message.of("assistant", "three")]], seed=0)


def test_drawing_stops_at_a_good_score() -> None:
    judge = ByLength()
    lines = ["aa", "a", "bbbbb", "c", "dddddddd", "e"]
    drawn = best_of(lines, ByReward(scorer=judge, stop_score=0.05), round_size=2)
    (found,) = drawn.choose([QUESTION], seed=0)
    assert [each.completion.text for each in found.candidates] == lines[:4]
    assert found.index == 2
    assert judge.asked == [lines[:2], lines[2:4]], "no answer is judged twice"
    (found,) = best_of(lines, ByReward(scorer=judge), round_size=2).choose([QUESTION], seed=0)
    assert len(found.candidates) == 6
    cut = ["...much too long", "a", "bbbbb", "c"]
    (found,) = best_of(cut, ByReward(scorer=judge, stop_score=0.05), round_size=2).choose(
        [QUESTION], seed=0
    )
    assert found.index == 2, "an answer that was cut off is no reason to stop"


@given(
    st.lists(st.sampled_from(["1", "2", "3", "...1", ""]), min_size=1, max_size=9),
    st.integers(1, 4),
)
def test_a_vote_in_rounds_chooses_what_all_votes_choose(lines: list[str], size: int) -> None:
    ballots = [ballot(line) if not line.startswith("...") else None for line in lines]
    wanted = by_hand.majority(ballots)
    (found,) = best_of(lines, ByVotes(), round_size=size).choose([QUESTION], seed=0)
    if wanted is not None:
        assert ballot(found.best.completion.text) == wanted
        assert found.best.completion.finish_reason == "stop"
    texts = [each.completion.text for each in found.candidates]
    assert texts == lines[: len(texts)]
    (whole,) = best_of(lines, ByVotes()).choose([QUESTION], seed=0)
    shares = [ballots.count(vote) / len(lines) if vote else 0.0 for vote in ballots]
    assert [each.score for each in whole.candidates] == shares


def test_a_vote_that_is_settled_draws_no_more() -> None:
    lines = ["7", "7", "7", "1", "2", "3", "4", "5"]
    (found,) = best_of(lines, ByVotes(), round_size=2).choose([QUESTION], seed=0)
    assert [each.completion.text for each in found.candidates] == lines[:6]  # 3 of 8, 2 to come


def test_open_questions_alone_are_asked_again() -> None:
    lines = ["7", "7", "1", "2", "3", "3"]  # the first question is settled, the second is not
    drawn = best_of(lines, ByVotes(), num_samples=4, round_size=2)
    first, second = drawn.choose([QUESTION, QUESTION], seed=3)
    assert [each.completion.text for each in first.candidates] == ["7", "7"]
    assert [each.completion.text for each in second.candidates] == ["1", "2", "3", "3"]
    assert ballot(second.best.completion.text) == "3"
    backend = drawn.backend
    assert isinstance(backend, Script)
    seeds = [request.sampling.seed for request in backend.asked]
    assert len(set(seeds)) == 3, "every question and round draws from a stream of its own"


@pytest.fixture(scope="module")
def backend() -> Backend:
    model = model_for(PROCESSOR)
    config = EngineConfig(num_pages=2000, page_tokens=8, batch_invariant=True)
    return EngineBackend(engine=Engine(model, PROCESSOR, config))


def test_with_a_real_model_and_judge_it_is_a_responder(backend: Backend) -> None:
    assert isinstance(backend, EngineBackend)
    judge = ProcessRewardModel(backend.engine.model, PROCESSOR)
    drawn = BestOfN(
        backend=backend,
        processor=PROCESSOR,
        selection=ByReward(scorer=judge),
        num_samples=3,
        sampling=replace(WARM, seed=5),
    )
    asked = conversations()[:3]
    every = drawn.choose(asked, seed=5)
    for conversation, one in zip(asked, every, strict=True):
        texts = [each.completion.text for each in one.candidates]
        scores = [judge(conversation, [text])[0].score for text in texts]
        assert [each.score for each in one.candidates] == pytest.approx(scores, abs=1e-5)
        assert chosen(one.candidates) == one
        assert len(set(texts)) > 1
    responder = BestOfNResponder(drawn)
    assert isinstance(responder, Responder)
    assert isinstance(responder, Sampler)
    assert isinstance(drawn, Responder)
    texts = [one.best.completion.text for one in every]
    assert responder(asked) == drawn(asked) == texts
    replies = responder.sample(asked, seed=5)
    assert [each.text for each in replies] == texts
    assert [each.finish for each in replies] == [e.best.completion.finish_reason for e in every]
    assert [each.text for each in responder.sample(asked, seed=6)] != texts


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"num_samples": 0}, "num_samples is 0"),
        ({"round_size": 0}, "round_size is 0"),
        ({"sampling": SamplingParams()}, "would be the same"),
    ],
)
def test_what_draws_nothing_new_is_refused(values: dict[str, object], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        best_of(["a", "b"], ByVotes(), **values)
