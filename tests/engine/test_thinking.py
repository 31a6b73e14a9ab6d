"""Reasoning within a budget: obeyed to the token, changed nowhere else, told from the answer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.engine.small_backend import checkpoint
from tests.engine.small_talk import picture
from tests.model import make_checkpoints as make
from tests.serving.small_server import small_pair

import cascadevl
from cascadevl.data.processor import CascadeVLProcessor
from cascadevl.engine.backends import generate
from cascadevl.engine.engine import Engine
from cascadevl.engine.engine_backend import EngineBackend
from cascadevl.engine.requests import Completion, EngineConfig, Request, TextIds
from cascadevl.engine.sampler import Allowed
from cascadevl.engine.sampling import SamplingParams
from cascadevl.engine.thinking import (
    Reasoning,
    num_reasoning_tokens,
    opens_reasoning,
    parted,
    with_forced,
)
from cascadevl.engine.transformers_backend import TransformersBackend
from cascadevl.errors import RequestError
from cascadevl.types import Example, ImageRef, Message

MODEL, PROCESSOR = small_pair()
CLOSING = "\n</think>\n\n"
GREEDY = SamplingParams(max_tokens=30, ignore_eos=True)


def ids_of(text: str, processor: CascadeVLProcessor = PROCESSOR) -> tuple[int, ...]:
    return tuple(processor.tokenizer(text, add_special_tokens=False).input_ids)


def asked(processor: CascadeVLProcessor = PROCESSOR, **how: Any) -> Example:
    question = Message.of("user", ImageRef(picture(0)), "\nwhat is this?")
    return processor.prompt([question], **how)


def forced(processor: CascadeVLProcessor = PROCESSOR) -> Example:
    return asked(processor, thinking=True, force_thinking=True)


def reasons() -> tuple[TextIds, ...]:
    """A short prompt that has opened the reasoning."""
    question = PROCESSOR.prompt([Message.of("user", "one")])
    return TextIds(tuple(question.input_ids.tolist())), TextIds(ids_of("<think>\n"))


def engine(**config: Any) -> Engine:
    return Engine(MODEL, PROCESSOR, EngineConfig(**{"num_pages": 500, "page_tokens": 4} | config))


def answer(
    prompt: Example | tuple[TextIds, ...], sampling: SamplingParams = GREEDY, **more: Any
) -> Completion:
    (found,) = engine().generate([Request(prompt=prompt, sampling=sampling, **more)])[0]
    return found


@pytest.mark.parametrize("budget", [0, 1, 2, 7, 20])
def test_a_budget_is_obeyed_to_the_token_and_changes_nothing_before(budget: int) -> None:
    prompt = forced() if budget == 7 else reasons()
    free = answer(prompt)
    held = answer(prompt, thinking_budget=budget)
    assert held.token_ids[:budget] == free.token_ids[:budget]
    closing = ids_of(CLOSING)
    assert held.token_ids[budget : budget + len(closing)] == closing
    assert len(held.token_ids) == 30, "the answer goes on"
    assert held.text.count("</think>") == 1
    reasoning, content = parted(held.text, is_begun=True)
    assert content == held.text.partition("</think>")[2].lstrip("\n")
    assert bool(reasoning) == (budget > 0)


def test_the_answer_is_what_the_model_says_after_its_reasoning_and_the_end() -> None:
    held = answer(reasons(), thinking_budget=5)
    number = 5 + len(ids_of(CLOSING))
    before = (*reasons(), TextIds(held.token_ids[:number]))
    wishes = replace(GREEDY, max_tokens=30 - number)
    assert held.token_ids[number:] == answer(before, wishes).token_ids


def test_a_stream_says_the_same_token_by_token() -> None:
    wishes = SamplingParams(temperature=1.5, seed=3, max_tokens=30, ignore_eos=True)
    whole = answer(reasons(), wishes, thinking_budget=6)
    request = Request(prompt=reasons(), sampling=wishes, thinking_budget=6)
    tokens = list(engine().stream(request))
    assert tuple(token.token_id for token in tokens) == whole.token_ids
    assert "".join(token.text for token in tokens) == whole.text


def test_answers_beside_it_and_little_room_change_nothing() -> None:
    """Drawn answers with and without a budget, alone and together, where pages run out."""
    wishes = SamplingParams(temperature=1.2, seed=5, max_tokens=24, ignore_eos=True, logprobs=0)
    requests = [
        Request(prompt=reasons(), sampling=wishes, num_samples=3, thinking_budget=budget)
        for budget in (None, 4, 9)
    ]
    alone = [engine(batch_invariant=True).generate([each])[0] for each in requests]
    tight = engine(batch_invariant=True, num_pages=24)
    together = tight.generate(requests)
    assert tight.stats().preemptions > 0
    assert [[e.token_ids for e in each] for each in together] == [
        [e.token_ids for e in each] for each in alone
    ]
    (end,), num_forced = ids_of("</think>"), 0
    for completions, budget in zip(together[1:], (4, 9), strict=True):
        for each in completions:
            closed = each.token_ids.index(end)
            assert closed <= budget + 1, "it may be drawn before"
            num_forced += closed == budget + 1
            assert each.logprobs is not None
            assert all(np.isfinite(known.chosen) for known in each.logprobs)
    assert num_forced >= 4


def test_a_prompt_without_reasoning_is_left_alone() -> None:
    for how in ({}, {"thinking": False, "force_thinking": True}):
        assert answer(asked(**how)) == answer(asked(**how), thinking_budget=2)


def processor_of(template: str) -> CascadeVLProcessor:
    if template == "internvl2_5":
        return PROCESSOR
    return CascadeVLProcessor(make.tokenizer("gpt_oss"), template=template, tokens_per_tile=4)


def says(text: str, budget: int, *, is_open: bool = False, template: str = "internvl2_5") -> str:
    """What an answer becomes that would say a text, token by token, and then the letter x."""
    processor = processor_of(template)
    reasoning = Reasoning(processor, budget, is_open=is_open)
    spoken, rest = list[int](), list(ids_of(text, processor))
    x = ids_of("x", processor)[0]
    while rest or reasoning.forced is not None or len(spoken) < 60:
        token = reasoning.forced
        if token is None:
            token = rest.pop(0) if rest else x
        reasoning.take(token)
        spoken.append(token)
    return processor.decode(spoken, skip_special_tokens=True)


def test_reasoning_that_the_model_opens_itself_is_counted_from_there() -> None:
    word = "quick brown fox"
    number = len(ids_of(f"\n{word}"))
    said = says(f"<think>\n{word} jumps over", number)
    assert said.startswith(f"<think>\n{word}{CLOSING}")
    assert says(" \n<think>\n", 0).startswith(f" \n<think>{CLOSING}")


def test_reasoning_that_ends_in_time_and_answers_without_any_are_not_touched() -> None:
    for text in ("<think>\none\n</think>\n\ntwo <think>\n", "one <think> two", "<thin one"):
        assert says(text, 12).startswith(text)
    assert says("one\n</think>\n\ntwo", 12, is_open=True).startswith("one\n</think>\n\ntwo")


@given(st.integers(0, 12), st.sampled_from(["one</thi three", "one <two", "ü</th東"]))
def test_wherever_the_budget_ends_there_is_one_end_of_reasoning(budget: int, text: str) -> None:
    said = says(text, budget, is_open=True)
    assert said.count("</think>") == 1
    reasoning, content = parted(said, is_begun=True)
    assert "</think" not in reasoning
    if text.isascii():
        assert content.rstrip("x") in {text[place:] for place in range(len(text) + 1)}


def test_a_channel_of_reasoning_is_closed_as_its_template_writes_it() -> None:
    template = "internvl3_5_gpt_oss"
    said = says("one two three", 2, is_open=True, template=template)
    processor = processor_of(template)
    first = processor.decode(list(ids_of("one two three", processor)[:2]))
    assert said.startswith(f"<think>\n{first}{CLOSING}")
    opened = says("<|channel|>analysis<|message|>one two three", 2, template=template)
    assert opened.startswith(f"<think>\n{first}{CLOSING}")


def test_forced_prompts_are_recognised() -> None:
    for template in ("internvl2_5", "internvl3_5_gpt_oss"):
        processor = processor_of(template)
        assert opens_reasoning(processor, forced(processor).input_ids)
        for how in ({}, {"thinking": True}, {"thinking": False, "force_thinking": True}):
            assert not opens_reasoning(processor, asked(processor, **how).input_ids)


def test_what_must_be_said_stands_beside_what_may_be() -> None:
    grammar = Allowed(np.array([2]), torch.tensor([[True, True, False]]))
    both = with_forced(grammar, {0: 1, 3: 2}, 3)
    assert both is not None
    assert both.places.tolist() == [2, 0, 3]
    assert both.tokens.int().tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 1]]
    assert with_forced(grammar, {}, 3) is grammar
    assert with_forced(None, {}, 3) is None


def test_the_parts_of_a_whole_answer() -> None:
    assert parted("<think>\na\n</think>\n\nb") == ("a", "b")
    assert parted("a\n</think>\n\nb", is_begun=True) == ("a", "b")
    assert parted("a\nb", is_begun=True) == ("a\nb", "")
    assert parted("a\nb") == ("", "a\nb")


@pytest.mark.parametrize(
    ("budget", "sampling", "problem"),
    [
        (-1, GREEDY, "thinking_budget is -1"),
        (30, GREEDY, "at most 30 tokens"),
        (3, SamplingParams(json_schema="{}"), "does not reason"),
    ],
)
def test_budgets_that_mean_nothing_are_refused(
    budget: int, sampling: SamplingParams, problem: str
) -> None:
    with pytest.raises(RequestError, match=problem):
        Request(prompt=reasons(), sampling=sampling, thinking_budget=budget)


def test_who_cannot_end_reasoning_says_so(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = checkpoint(tmp_path_factory.mktemp("checkpoint") / "github")
    model, processor = cascadevl.load(folder)
    ids = ids_of("<think>\n", processor)
    request = Request(prompt=(TextIds(ids),), sampling=GREEDY, thinking_budget=3)
    with pytest.raises(RequestError, match="cannot end reasoning"):
        generate(TransformersBackend(model=model, processor=processor), [request])
    with pytest.raises(RequestError, match="no processor"):
        Engine(model).add(request)
    backend = EngineBackend(engine=Engine(model, processor, EngineConfig(num_pages=300)))
    assert backend.capabilities.thinking_budget
    ((found,),) = generate(backend, [request])
    assert "</think>" in found.text


@pytest.mark.parametrize(
    ("text", "is_begun", "reasoning"),
    [
        ("one two", False, ""),
        ("one <think>two</think> three", False, ""),
        ("<think>\none\n</think>\n\ntwo", False, "<think>\none\n</think>"),
        ("\n<think>one</think>two</think>", False, "\n<think>one</think>"),
        ("one\n</think>\n\ntwo", True, "one\n</think>"),
        ("</think>two", True, "</think>"),
        ("<think>\none two", False, "<think>\none two"),
        ("one two", True, "one two"),
        ("<thi", False, ""),
    ],
)
def test_tokens_of_reasoning_are_those_up_to_its_end(
    text: str, is_begun: bool, reasoning: str
) -> None:
    number = num_reasoning_tokens(PROCESSOR, ids_of(text), is_begun=is_begun)
    assert number == len(ids_of(reasoning))


def test_tokens_of_reasoning_in_a_channel_of_its_own() -> None:
    processor = processor_of("internvl3_5_gpt_oss")
    template = processor.template
    assert template.reasoning is not None
    opening, closing = template.reasoning
    thought = ids_of(f"{opening}one two{closing}{template.answer_open}", processor)
    answer_ids = ids_of("three", processor)
    assert num_reasoning_tokens(processor, (*thought, *answer_ids)) == len(thought)
    direct = ids_of(f"{template.answer_open}three", processor)
    assert num_reasoning_tokens(processor, direct) == 0
