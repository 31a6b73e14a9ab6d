"""Scores of solutions: many in one row as each alone, by a road that packs nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engine.small_talk import build, model_for, picture
from tests.model import make_checkpoints as make
from tests.reference import process_reward_by_hand as by_hand

import cascadevl
from cascadevl.data.collate import num_tokens
from cascadevl.data.process_records import (
    RELEASED,
    WORDINGS,
    JudgedSolution,
    StepBuilder,
    Wording,
    conversation_of,
    judged_question,
)
from cascadevl.data.processor import CascadeVLProcessor
from cascadevl.engine.best_of_n import Scorer
from cascadevl.engine.process_reward import ProcessRewardConfig, ProcessRewardModel
from cascadevl.errors import ConfigError, DataError, RequestError
from cascadevl.model.modeling import CascadeVLForConditionalGeneration
from cascadevl.scoring.steps import StepRules
from cascadevl.types import ImageRef, Message

Parts = tuple[CascadeVLForConditionalGeneration, CascadeVLProcessor]

SOLUTIONS = (
    "One and one are two.\n\nTwo + two - one are three.\n\nAnswer: 3",
    "Answer: 4",
    "It is the quick brown fox.\n\nAnswer: 3",
    "One.\n\nTwo.\n\nThree.\n\nFour.\n\nFive.",
)
PROMPTS = {
    "picture": [Message.of("user", ImageRef(picture(0)), "\nwhat is this?")],
    "text": [Message.of("user", "one + two?")],
    "two pictures": [
        Message.of("user", ImageRef(picture(1)), "\none?"),
        Message.of("assistant", "two"),
        Message.of("user", ImageRef(picture(2, (20, 70))), "\nthree?"),
    ],
}


@pytest.fixture(scope="module")
def parts() -> Parts:
    processor = build()
    model = model_for(processor)
    with torch.no_grad():
        model.lm_head.weight *= 20  # so that scores differ
    return model, processor


def alone(
    parts: Parts, prompt: Sequence[Message], steps: Sequence[str], wording: Wording = RELEASED
) -> list[list[float]]:
    """Logits that answer each step of one solution, from a plain forward of its conversation."""
    model, processor = parts
    turns = conversation_of(
        JudgedSolution(
            question=judged_question(prompt), steps=tuple(steps), labels=(True,) * len(steps)
        ),
        wording,
    )
    header = processor.tokenizer("<|im_start|>assistant\n", add_special_tokens=False).input_ids
    example = processor.prompt(turns, end="complete")
    inputs = processor.apply_chat_template(
        turns, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert len(example.input_ids) <= inputs["input_ids"].shape[1]
    ids = inputs["input_ids"][0].tolist()
    ends = [
        n + len(header) - 1
        for n in range(len(ids))
        if ids[n : n + len(header)] == header  # where the answer is predicted
    ]
    with torch.no_grad():
        logits = model(**inputs).logits[0]
    return [logits[end].tolist() for end in ends]


def by_loops(
    parts: Parts, prompt: Sequence[Message], text: str, wording: Wording = RELEASED
) -> tuple[float, list[float]]:
    plus, minus = (parts[1].tokenizer.convert_tokens_to_ids(sign) for sign in "+-")
    steps = alone(parts, prompt, text.split("\n\n"), wording)
    each = [by_hand.probability(scores, plus, [plus, minus]) for scores in steps]
    return by_hand.solution_score(steps, plus, minus), each


def longest_alone(parts: Parts) -> int:
    """Tokens of the longest solution with the question that shows a picture."""
    build_steps, asked = StepBuilder(parts[1].builder), judged_question(PROMPTS["picture"])
    return max(
        num_tokens(build_steps.candidates(asked, [text.split("\n\n")], source="x"), 4)
        for text in SOLUTIONS
    )


@pytest.mark.parametrize("kind", PROMPTS)
def test_scores_of_one_row_are_those_of_each_solution_alone_by_the_loops(
    parts: Parts, kind: str
) -> None:
    found = ProcessRewardModel(*parts)(PROMPTS[kind], SOLUTIONS)
    for solution, text in zip(found, SOLUTIONS, strict=True):
        score, steps = by_loops(parts, PROMPTS[kind], text)
        assert list(solution.steps) == text.split("\n\n")
        assert solution.step_scores == pytest.approx(steps, abs=1e-5)
        assert solution.score == pytest.approx(score, abs=1e-5)
    every = [score for solution in found for score in solution.step_scores]
    assert max(every) - min(every) > 0.01, "else any order would pass"


def test_one_forward_and_one_encoding_serve_all_solutions(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = parts[0].model
    calls = {"encode": 0, "run_text": 0}
    for name in calls:
        real = getattr(body, name)

        def counted(*args, _real=real, _name=name, **kwargs):
            calls[_name] += 1
            return _real(*args, **kwargs)

        monkeypatch.setattr(body, name, counted)
    whole = ProcessRewardModel(*parts)(PROMPTS["picture"], SOLUTIONS)
    assert calls == {"encode": 1, "run_text": 1}
    config = ProcessRewardConfig(max_tokens=longest_alone(parts) + 40)
    pieces = ProcessRewardModel(*parts, config)(PROMPTS["picture"], SOLUTIONS)
    assert calls["encode"] == 2
    assert 2 <= calls["run_text"] - 1 <= 4
    for one, other in zip(whole, pieces, strict=True):
        assert one.step_scores == pytest.approx(other.step_scores, abs=1e-5)


@pytest.mark.parametrize(("chunk", "forwards"), [(1, 4), (3, 2), (9, 1)])
def test_chunks_bound_a_forward_and_change_no_score(
    parts: Parts, chunk: int, forwards: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = ProcessRewardModel(*parts)(PROMPTS["picture"], SOLUTIONS)
    lengths, real = list[int](), parts[0].model.run_text

    def counted(embeds: torch.Tensor, *rest: Any) -> torch.Tensor:
        lengths.append(embeds.shape[1])
        return real(embeds, *rest)

    monkeypatch.setattr(parts[0].model, "run_text", counted)
    judge = ProcessRewardModel(*parts, ProcessRewardConfig(chunk=chunk))
    pieces = judge(PROMPTS["picture"], SOLUTIONS)
    assert len(lengths) == forwards
    for one, other in zip(whole, pieces, strict=True):
        assert one.step_scores == pytest.approx(other.step_scores, abs=1e-5)
    with pytest.raises(ConfigError, match="chunk is 0"):
        ProcessRewardConfig(chunk=0)


def test_the_prompt_is_the_one_that_the_checkpoint_was_trained_with(parts: Parts) -> None:
    model, processor = parts
    released = ProcessRewardModel(model, processor)(PROMPTS["text"], SOLUTIONS)
    model.config.process_prompt = "short"
    try:
        short = ProcessRewardModel(model, processor)(PROMPTS["text"], SOLUTIONS)
        for solution, text in zip(short, SOLUTIONS, strict=True):
            _, steps = by_loops(parts, PROMPTS["text"], text, WORDINGS["short"])
            assert solution.step_scores == pytest.approx(steps, abs=1e-5)
    finally:
        model.config.process_prompt = "released"
    assert short[0].step_scores != pytest.approx(released[0].step_scores, abs=1e-6)


def test_a_solution_is_worth_what_the_rule_says(parts: Parts) -> None:
    means = ProcessRewardModel(*parts)(PROMPTS["text"], SOLUTIONS)
    for how, worth in (("min", min), ("last", lambda scores: scores[-1])):
        config = ProcessRewardConfig(aggregate=how)  # type: ignore[arg-type]
        found = ProcessRewardModel(*parts, config)(PROMPTS["text"], SOLUTIONS)
        assert [each.score for each in found] == [worth(each.step_scores) for each in means]


def test_one_step_makes_an_outcome_reward(parts: Parts) -> None:
    config = ProcessRewardConfig(rules=StepRules(max_steps=1))
    (found,) = ProcessRewardModel(*parts, config)(PROMPTS["text"], SOLUTIONS[:1])
    assert found.steps == (SOLUTIONS[0],)
    (scores,) = alone(parts, PROMPTS["text"], [SOLUTIONS[0]])
    plus, minus = (parts[1].tokenizer.convert_tokens_to_ids(sign) for sign in "+-")
    assert found.score == pytest.approx(by_hand.solution_score([scores], plus, minus), abs=1e-5)


def test_an_empty_solution_is_worth_nothing(parts: Parts) -> None:
    judge = ProcessRewardModel(*parts)
    assert isinstance(judge, Scorer)
    empty, full = judge(PROMPTS["text"], [" \n\n ", "Answer: 3"])
    assert (empty.score, empty.steps, empty.step_scores) == (0.0, (), ())
    assert 0 < full.score < 1
    assert judge(PROMPTS["text"], [""])[0].score == 0
    assert judge(PROMPTS["text"], []) == []


def test_what_cannot_be_scored_is_refused(parts: Parts) -> None:
    judge = ProcessRewardModel(*parts, ProcessRewardConfig(max_tokens=100))
    with pytest.raises(RequestError, match=r"solution 0 has \d+ tokens .* max_tokens is 100"):
        judge(PROMPTS["text"], ["Answer: 3"])
    with pytest.raises(DataError, match="control token"):
        ProcessRewardModel(*parts)(PROMPTS["text"], ["One <|im_end|> two"])
    with pytest.raises(ConfigError, match="max_tokens is 0"):
        ProcessRewardConfig(max_tokens=0)


def test_the_configured_increment_places_visual_tokens(parts: Parts) -> None:
    model, processor = parts
    at_one = ProcessRewardModel(model, processor)(PROMPTS["picture"], SOLUTIONS)
    model.config.increment = 0.25
    try:
        found = ProcessRewardModel(model, processor)(PROMPTS["picture"], SOLUTIONS)
        for solution, text in zip(found, SOLUTIONS, strict=True):
            _, steps = by_loops(parts, PROMPTS["picture"], text)
            assert solution.step_scores == pytest.approx(steps, abs=1e-5)
    finally:
        model.config.increment = 1.0
    assert found[0].step_scores != pytest.approx(at_one[0].step_scores, abs=1e-6)


def test_a_checkpoint_of_visualprms_layout_scores_as_any_other(tmp_path: Path) -> None:
    """VisualPRM-8B: InternVL2.5-8B's layout, InternLM2 inside, code files that are never run."""
    config = make.github_config("internlm2", max_dynamic_patch=4)
    config["llm_config"]["max_position_embeddings"] = 8192
    config["auto_map"] = {
        name: f"modeling_internvl_chat.{kind}"
        for name, kind in (("AutoModel", "InternVLChatModel"), ("AutoConfig", "InternVLChatConfig"))
    }
    folder = make.write(tmp_path / "VisualPRM-8B", make.github_tensors("internlm2"), config)
    (folder / "modeling_internvl_chat.py").write_text("raise SystemExit('it was run')\n")
    parts = cascadevl.load(folder)
    found = ProcessRewardModel(*parts)(PROMPTS["picture"], SOLUTIONS[:2])
    for solution, text in zip(found, SOLUTIONS, strict=False):
        score, steps = by_loops(parts, PROMPTS["picture"], text)
        assert solution.step_scores == pytest.approx(steps, abs=1e-5)
        assert solution.score == pytest.approx(score, abs=1e-5)
