"""The guard: probes are what the model thinks, pictures are read once, verdicts follow."""

from __future__ import annotations

import math
import re
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from tests.engine.small_talk import build

import cascadevl
from cascadevl.data.documents import Documents, Passage
from cascadevl.engine.backends import Capabilities, Outcome
from cascadevl.engine.engine import Engine
from cascadevl.engine.engine_backend import EngineBackend
from cascadevl.engine.guard import Guard, GuardConfig, Said, verify
from cascadevl.engine.probes import YesNo, first_top, probe, yes_probability
from cascadevl.engine.requests import Completion, Request, TokenLogprobs, TokenOutput, Usage
from cascadevl.errors import ConfigError, RequestError
from cascadevl.scoring.verdicts import Limits, Verification
from cascadevl.tasks.base import to_prompt
from cascadevl.tasks.shapes import Shapes
from cascadevl.types import ImageRef, Message

MODEL, PROCESSOR = cascadevl.load("micro")
WORDS = YesNo.of(PROCESSOR.tokenizer)
YES, NO = min(WORDS.yes), min(WORDS.no)


def about(*parts: Any, question: str = "What do you see?") -> Request:
    shown = [ImageRef(each) for each in parts]
    return Request(prompt=PROCESSOR.prompt([Message("user", (*shown, f"\n{question}"))]))


def scene(index: int = 0) -> Any:
    return Shapes(px=224, difficulty="full").draw("test", 3, index)


# P(yes).


def test_the_tokens_of_yes_and_no():
    spelled = {PROCESSOR.tokenizer.decode([token]).strip().lower() for token in WORDS.yes}
    assert spelled == {"yes"}
    with pytest.raises(ConfigError, match="no single tokens for yes and no"):
        YesNo.of(build().tokenizer)


@pytest.mark.parametrize(
    ("top", "expected"),
    [
        ({1: 0.6, 2: 0.2, 9: 0.1}, 0.75),
        ({1: 0.3, 3: 0.3, 2: 0.2}, 0.75),
        ({1: 0.9, 9: 0.05, 8: 0.01}, 0.9 / 0.91),  # no is as probable as the last, at most
        ({2: 0.9, 9: 0.1}, 0.1),
        ({9: 0.9, 8: 0.1}, None),
        ({}, None),
    ],
)
def test_yes_among_yes_and_no(top: dict[int, float], expected: float | None):
    words = YesNo(yes=frozenset((1, 3)), no=frozenset((2,)))
    found = yes_probability([(token, math.log(p)) for token, p in top.items()], words)
    assert found == (None if expected is None else pytest.approx(expected))


def test_a_probe_is_what_the_model_says_first_to_the_question_alone():
    picture = scene().image
    question = "Is there a red circle?"
    asked = probe(PROCESSOR, question, about(picture, question="List all shapes."))
    alone = PROCESSOR.prompt([Message.of("user", ImageRef(picture), f"\n{question}")])
    assert asked.prompt.input_ids.tolist() == alone.input_ids.tolist()
    assert (asked.prompt.tiles == alone.tiles).all()
    assert asked.prompt.tiles_per_image == alone.tiles_per_image
    (completion,) = Engine(MODEL, PROCESSOR).generate([asked])[0]
    found = yes_probability(first_top(completion), WORDS)
    inputs = PROCESSOR.apply_chat_template(
        [{"role": "user", "content": [{"type": "image", "image": picture}, _text(question)]}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    )
    with torch.no_grad():
        chances = MODEL(**inputs).logits[0, -1].float().softmax(-1)
    yes, no = (float(chances[sorted(each)].sum()) for each in (WORDS.yes, WORDS.no))
    assert found == pytest.approx(yes / (yes + no), abs=2e-2)  # bfloat16, and what is not seen


def _text(question: str) -> dict[str, str]:
    return {"type": "text", "text": f"\n{question}"}


def test_pictures_are_read_once_for_the_answer_and_all_of_its_claims():
    engine = Engine(MODEL, PROCESSOR)
    asked = about(scene().image)
    engine.generate([asked])
    before = engine.stats()
    claims = ", ".join(f"a {colour} circle" for colour in ("red", "blue", "green", "black"))
    guard = Guard(processor=PROCESSOR)
    said = Said(about=asked, question="What do you see?", answer=f"There is {claims}.")
    (found,) = verify(EngineBackend(engine=engine), guard, [said])
    assert len(found.checks) == 4
    after = engine.stats()
    assert after.encoded_tiles == before.encoded_tiles
    computed = after.prompt_tokens - before.prompt_tokens
    visual = asked.prompt.num_tiles * PROCESSOR.tokens_per_tile
    assert computed < visual  # four prompts with the picture in each
    assert after.cached_tokens - before.cached_tokens > 3 * visual


def test_micro_withdraws_what_is_not_there():
    drawn = Shapes(px=224, difficulty="full", num_questions=8)
    right = wrong = 0
    backend, guard = EngineBackend(engine=Engine(MODEL, PROCESSOR)), Guard(processor=PROCESSOR)
    for index in range(12):
        one = drawn.draw("test", 5, index)
        listed = one.description.split(": ")[1].rstrip(".").split(", ")
        there = " ".join(listed[0].split()[:2])
        absent = next(
            f"{colour} {shape}"
            for colour in ("purple", "green", "yellow", "black", "red", "blue")
            for shape in ("star", "triangle", "circle", "square")
            if f"{colour} {shape}" not in one.description
        )
        answer = f"There is a {there}. There is a {absent}."
        (conversation,) = (to_prompt(one, one.questions[0]),)
        said = Said(
            about=Request(prompt=PROCESSOR.prompt(conversation)), question="", answer=answer
        )
        (found,) = verify(backend, guard, [said])
        right += found.checks[0].verdict == "kept"
        wrong += found.checks[1].verdict == "withdrawn"
        if found.checks[0].verdict == "kept" and found.checks[1].verdict == "withdrawn":
            assert found.text == f"There is a {there}."
    assert right >= 9
    assert wrong >= 9


# What is asked, by a model that says what a rule wants.


@dataclass
class Oracle:
    """Says yes as probably as a rule says, or a text."""

    rule: Callable[[str], float | str | None]
    asked: list[str] = field(default_factory=list)

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(increments=True, logprobs=True, constrained=False, weight_refresh=False)

    def answer(self, requests: Iterable[Request]) -> Iterator[Outcome]:
        for number, request in enumerate(requests):
            text = PROCESSOR.tokenizer.decode(request.prompt.input_ids)
            question = re.findall(r"user\n(.*?)<\|im_end\|>", text, re.DOTALL)[-1]
            self.asked.append(question)
            yield number, (_said(self.rule(question)),)

    def stream(self, request: Request) -> AsyncIterator[TokenOutput]:
        raise AssertionError("nobody streams")

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        raise AssertionError("nobody loads")


def _said(what: float | str | None) -> Completion:
    top = ((99, 0.0),) if what is None or isinstance(what, str) else (
        (YES, math.log(what)), (NO, math.log(1 - what)),
    )  # fmt: skip
    return Completion(
        request_id=0,
        sample=0,
        text=what if isinstance(what, str) else "",
        token_ids=(top[0][0],),
        finish_reason="length",
        usage=Usage(prompt_tokens=1, visual_tokens=0, cached_tokens=0, completion_tokens=1),
        logprobs=(TokenLogprobs(top[0][1], top),),
    )


LIBRARY = Documents(
    [
        Passage("cats.md:1-3", "Cats purr when the red button is pressed."),
        Passage("towers.md:1-9", "The tower was built in 1889."),
        Passage("towers.md:11-19", "The tower was painted in 1899, and built of iron."),
    ]
)


def checked(
    oracle: Oracle, answer: str, *, asked: str = "", shows: bool = True, **guard: Any
) -> Verification:
    pictures = [scene().image] if shows else []
    said = Said(about=about(*pictures, question=asked), question=asked, answer=answer)
    return verify(oracle, Guard(processor=PROCESSOR, **guard), [said])[0]


def test_wordings_are_averaged_and_no_supports_what_is_denied():
    def rule(question: str) -> float:
        return 0.9 if question.endswith("Look again.") else 0.7

    config = GuardConfig(wordings=("{question}", "{question} Look again."))
    oracle = Oracle(rule)
    found = checked(oracle, "There is a dog. There is no cat.", config=config)
    assert [each.probability for each in found.checks] == [pytest.approx(0.8), pytest.approx(0.2)]
    assert [each.verdict for each in found.checks] == ["kept", "withdrawn"]
    asked = [question.rpartition("\n")[2] for question in oracle.asked]
    assert asked == [
        *("Is there a dog?", "Is there a dog? Look again."),
        *("Is there a cat?", "Is there a cat? Look again."),
    ]
    assert all("<IMG_CONTEXT>" in each for each in oracle.asked)


def test_a_reply_that_the_probe_contradicts_is_turned_round():
    found = checked(Oracle(lambda _: 0.1), "Yes.", asked="Is there a dog?")
    assert found.text == "No."
    strict = GuardConfig(limits=Limits(keep=0.05, withdraw=0.05))
    assert (
        checked(Oracle(lambda _: 0.1), "Yes.", asked="Is there a dog?", config=strict).text
        == "Yes."
    )


def test_a_model_that_says_neither_decides_nothing():
    (check,) = checked(Oracle(lambda _: None), "There is a dog.").checks
    assert (check.verdict, check.probability) == ("flagged", None)
    assert check.reason == "picture gives no clear answer"


def test_documents_are_asked_whether_they_have_something_to_say_and_then_what():
    def rule(question: str) -> float:
        if "Does this text answer" in question:
            return 0.9 if "1889" in question.partition("\n")[0] else 0.2
        assert "According to this text: " in question
        return 0.95 if "built in 1889?" in question else 0.1

    oracle = Oracle(rule)
    answer = "The tower was built in 1889. The tower was built in 1899. Dogs bark."
    found = checked(oracle, answer, shows=False, documents=LIBRARY)
    assert [each.verdict for each in found.checks] == ["kept", "withdrawn", "flagged"]
    evidence = found.checks[0].evidence[0]
    assert (evidence.source, evidence.passage) == ("towers.md:1-9", "The tower was built in 1889.")
    assert found.checks[1].reason == "towers.md:1-9 contradicts it (0.10)"
    assert found.checks[2].reason == "documents gives no clear answer"
    assert not any("<IMG_CONTEXT>" in each or "Cats" in each for each in oracle.asked)


def test_pictures_and_documents_may_disagree():
    def rule(question: str) -> float:
        return 0.05 if "<IMG_CONTEXT>" in question else 0.95

    (check,) = checked(Oracle(rule), "The tower was built in 1889.", documents=LIBRARY).checks
    assert check.verdict == "flagged"
    assert check.reason.endswith("they disagree")
    assert [each.finding for each in check.evidence] == ["contradicts", "supports"]


def test_a_model_may_find_the_claims():
    def rule(question: str) -> float | str:
        if question.startswith("Write down everything"):
            assert question.endswith("Question: Who is it?\nAnswer: A dog, barking.")
            return "There is a dog.\nThe dog is barking."
        return 0.9 if "barking" not in question else 0.1

    config = GuardConfig(extractor="model")
    found = checked(Oracle(rule), "A dog, barking.", asked="Who is it?", config=config)
    assert [each.claim.question for each in found.checks] == [
        *("Is there a dog?", "Is the dog barking?"),
    ]
    assert [each.verdict for each in found.checks] == ["kept", "withdrawn"]
    assert found.text == "A dog, barking."  # its words are others


def test_claims_beyond_the_limit_are_not_checked_and_marks_cannot_be_asked_about():
    config = GuardConfig(max_claims=2)
    found = checked(Oracle(lambda _: 0.9), "A is b. C is d. E is f.", config=config)
    assert len(found.checks) == 2
    library = Documents([Passage("a.md:1-1", "A dog <img> barks.")])
    for answer, more in (("The <img> is red", {}), ("There is a dog.", {"documents": library})):
        (check,) = checked(Oracle(lambda _: 0.9), answer, shows=not more, **more).checks
        assert (check.verdict, check.probability) == ("flagged", None)


def test_nothing_to_hold_an_answer_against_is_refused():
    with pytest.raises(RequestError, match="nothing to verify an answer against"):
        checked(Oracle(lambda _: 0.9), "There is a dog.", shows=False)


@pytest.mark.parametrize(
    "wrong",
    [
        {"wordings": ()},
        {"wordings": ("Really?",)},
        {"reads": "{question}"},
        {"max_claims": 0},
        {"min_overlap": 1.5},
    ],
)
def test_settings_that_mean_nothing_are_refused(wrong: dict[str, Any]):
    with pytest.raises(ConfigError):
        GuardConfig(**wrong)
