"""The best of several answers where people ask: turn by turn, and for a file of questions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.engine.small_talk import build, conversations, model_for
from tests.workflows.some_problems import Scripted

from cascadevl.engine.best_of_n import BestOfConfig, ByReward, ByVotes, Selection
from cascadevl.engine.best_session import BestSession
from cascadevl.engine.conversation import Session
from cascadevl.engine.draws import stream_of
from cascadevl.engine.engine import Engine
from cascadevl.engine.offline import OfflineConfig, OfflineReport, answer_file, seed_of
from cascadevl.engine.process_reward import SolutionScore
from cascadevl.engine.requests import EngineConfig, Request
from cascadevl.engine.sampling import SamplingParams
from cascadevl.errors import ConfigError, RequestError
from cascadevl.types import Message

PROCESSOR = build()
WARM = SamplingParams(temperature=1.5, max_tokens=8, seed=4)


class ByLength:
    """Scores a text by its length in hundredths; what it cannot judge is "unfair"."""

    def __call__(self, prompt: Sequence[Message], solutions: Sequence[str]) -> list[SolutionScore]:
        if "unfair" in prompt[-1].text:
            raise RequestError("it is too long to be judged")
        scores = [min(len(text) / 100, 1.0) for text in solutions]
        return [
            SolutionScore(score=score, steps=(text,), step_scores=(score,))
            for text, score in zip(solutions, scores, strict=True)
        ]


def test_a_conversation_gets_the_best_of_each_turn() -> None:
    engine = Engine(model_for(PROCESSOR), PROCESSOR, EngineConfig(num_pages=900, page_tokens=4))
    session = BestSession(
        session=Session(engine=engine, sampling=WARM),
        config=BestOfConfig(num_samples=5, round_size=3),
        selection=ByReward(scorer=ByLength()),
    )
    asked = conversations()[0]
    reply = session.ask(asked)
    texts = []
    for first, size in ((0, 3), (3, 2)):
        sampling = replace(WARM, seed=stream_of(4, first))
        request = Request(prompt=PROCESSOR.prompt(asked), sampling=sampling, num_samples=size)
        texts += [each.text for each in engine.generate([request])[0]]
    assert [each.completion.text for each in reply.drawn.candidates] == texts
    ended = [each.completion.finish_reason == "stop" for each in reply.drawn.candidates]
    best = max(zip(ended, map(len, texts), texts, strict=True))[2]
    assert "".join(reply) == best
    assert reply.num_tiles > 0
    assert reply.increments == (1.0,)
    assert reply.num_compressed == 0
    assert reply.finish_reason == reply.drawn.best.completion.finish_reason
    assert reply.note.startswith("the best of 5, score by prm 0.")
    session.reset()


def test_drawing_greedily_is_refused() -> None:
    engine = Engine(model_for(PROCESSOR), PROCESSOR, EngineConfig(num_pages=90))
    with pytest.raises(ConfigError, match="would be the same"):
        BestSession(session=Session(engine=engine), config=BestOfConfig(), selection=ByVotes())
    with pytest.raises(ConfigError, match="would be the same"):
        OfflineConfig(questions=Path("a"), out=Path("b"), best_of=BestOfConfig())


def answered(
    folder: Path, backend: Scripted, selection: Selection, best_of: BestOfConfig
) -> tuple[OfflineReport, list[dict[str, Any]]]:
    config = OfflineConfig(
        questions=folder / "q.jsonl",
        out=folder / "out.jsonl",
        sampling=replace(WARM, seed=9),
        best_of=best_of,
    )
    report = answer_file(config, PROCESSOR, backend, facts={}, selection=selection)
    lines = (folder / "out.jsonl").read_text().splitlines()
    return report, sorted(map(json.loads, lines), key=lambda row: row["line"])


def ask(folder: Path, *texts: str) -> None:
    lines = [
        {"id": f"q{place}", "messages": [{"role": "user", "content": text}]}
        for place, text in enumerate(texts)
    ]
    (folder / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_file_of_questions_gets_the_best_answers_drawn_in_rounds(tmp_path: Path) -> None:
    ask(tmp_path, "easy one", "hard two")
    says = {
        (1, 0): ["x" * 90, "b"],  # good enough at once
        (2, 0): ["a", "bb"],
        (2, 2): ["ccc", "<think>\nhm\n</think>\n\n" + "d" * 4],
        (2, 4): ["e"],
    }
    by_seed = {stream_of(seed_of(9, line), first): texts for (line, first), texts in says.items()}
    backend = Scripted(says=lambda request, n: by_seed[request.sampling.seed][n])
    selection = ByReward(scorer=ByLength(), stop_score=0.8)
    config = BestOfConfig(num_samples=5, round_size=2, stop_score=0.8)
    report, rows = answered(tmp_path, backend, selection, config)
    assert [request.num_samples for request in backend.asked] == [2, 2, 2, 1]
    assert [row["num_drawn"] for row in rows] == [2, 5]
    assert [row["sample"] for row in rows] == [0, 3]
    assert rows[0]["score"] == pytest.approx(0.9)
    assert rows[0]["step_scores"] == [rows[0]["score"]]
    assert rows[0]["steps"] == ["x" * 90]
    assert (rows[1]["reasoning_content"], rows[1]["content"]) == ("hm", "dddd")
    assert "reasoning_content" not in rows[0]
    assert report.num_tokens == 14  # two of each answer that was drawn
    again = Scripted(says=lambda request, n: "never")
    report, same = answered(tmp_path, again, selection, config)
    assert (report.num_before, again.asked, same) == (2, [], rows)
    other = BestOfConfig(num_samples=6, round_size=2, stop_score=0.8)
    with pytest.raises(ConfigError, match="best_of"):
        answered(tmp_path, again, selection, other)


def test_a_vote_over_a_file_and_a_question_that_cannot_be_judged(tmp_path: Path) -> None:
    ask(tmp_path, "one", "unfair", "two")
    lines = iter(["7", "7", "7", "1", "2", "3"])
    backend = Scripted(says=lambda request, n: next(lines))
    _, rows = answered(
        tmp_path, backend, ByVotes(), BestOfConfig(num_samples=2, select="vote", round_size=1)
    )
    assert [row["text"] for row in rows] == ["7", "7", "7"]
    assert {row["score"] for row in rows} <= {0.5, 1.0}
    assert "steps" not in rows[0]
    (tmp_path / "out.jsonl").unlink()
    (tmp_path / "out.jsonl.journal").unlink()
    backend = Scripted(says=lambda request, n: "abc")
    report, rows = answered(tmp_path, backend, ByReward(scorer=ByLength()), BestOfConfig())
    assert [row["line"] for row in rows] == [1, 3]
    (failure,) = report.failures
    assert (failure.line, "too long to be judged" in str(failure.error)) == (2, True)
