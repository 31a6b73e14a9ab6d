"""Conversations through the engine: text, stops, JSON, turns and the increments of V2PE."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tests.engine.small_talk import build, conversations, model_for, picture
from tests.model.small import TOKENS_PER_TILE

from cascadevl.data.processor import CascadeVLProcessor
from cascadevl.engine.conversation import answer
from cascadevl.engine.engine import Engine
from cascadevl.engine.requests import EngineConfig, Request
from cascadevl.engine.sampling import SamplingParams
from cascadevl.errors import RequestError
from cascadevl.model.modeling import CascadeVLForConditionalGeneration
from cascadevl.model.v2pe import increment_of
from cascadevl.types import ImageRef, Message

WINDOWS = {"use_sliding_window": True, "sliding_window": 6}


@pytest.fixture(scope="module")
def processor() -> CascadeVLProcessor:
    return build()


def engine_for(
    model: CascadeVLForConditionalGeneration, processor: CascadeVLProcessor | None, **config: Any
) -> Engine:
    return Engine(model, processor, EngineConfig(**{"num_pages": 300, "page_tokens": 4} | config))


def asked(
    processor: CascadeVLProcessor, talk: Sequence[Message], sampling: SamplingParams, **more: Any
) -> Request:
    return Request(prompt=processor.prompt(talk), sampling=sampling, **more)


def say(model: CascadeVLForConditionalGeneration, *tokens: int) -> None:
    """Make a model say these tokens, one a call of its head."""
    script = iter(tokens)

    def scripted(_: object, __: object, output: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros_like(output)
        logits[:, next(script)] = 1
        return logits

    model.lm_head.register_forward_hook(scripted)


def ids(processor: CascadeVLProcessor, text: str) -> list[int]:
    found: list[int] = processor.tokenizer(text, add_special_tokens=False).input_ids
    return found


QUESTION = [Message.of("user", "one")]


@pytest.mark.parametrize("ceil", [False, True], ids=["as printed", "ceil"])
@pytest.mark.parametrize("text", [{}, WINDOWS], ids=["full", "windows"])
def test_greedy_answers_equal_transformers_generate(
    processor: CascadeVLProcessor, text: dict[str, Any], ceil: bool
) -> None:
    model = model_for(processor, increment=0.125, ceil_after_image=ceil, text=text)
    answers = answer(model, processor, conversations(), max_new_tokens=10)
    ends = list(processor.stop_token_ids())
    for conversation, got in zip(conversations(), answers, strict=True):
        inputs = processor.batch([processor.prompt(conversation)], return_tensors="pt")
        settings = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": ends}
        output = model.generate(**inputs, **settings, pad_token_id=ends[0])
        expected = output[0, inputs["input_ids"].shape[1] :].tolist()
        if expected[-1] in ends:
            assert got.finish_reason == "stop"
            expected.pop()
        else:
            assert got.finish_reason == "length"
        assert list(got.token_ids) == expected


def test_auto_gives_every_request_the_largest_increment_that_fits(
    processor: CascadeVLProcessor,
) -> None:
    talks = conversations()
    longest = max(len(processor.prompt(talk).input_ids) for talk in talks)
    model = model_for(processor, increment="auto", trained_context=longest + 12)
    together = answer(model, processor, talks, max_new_tokens=6)
    assert len({each.increments[:1] for each in together}) > 2
    for talk, found in zip(talks, together, strict=True):
        assert answer(model, processor, [talk], max_new_tokens=6) == [found]
        example = processor.prompt(talk)
        tokens = [tiles * TOKENS_PER_TILE for tiles in example.tiles_per_image]
        if tokens:
            text = len(example.input_ids) - len(tokens)
            expected = increment_of(model.config, text, tokens, 6)
            assert found.increments == (expected,) * len(tokens)


def test_given_increments_are_taken_and_must_be_as_many_as_pictures(
    processor: CascadeVLProcessor,
) -> None:
    model = model_for(processor, increment="auto", trained_context=4096)
    talk = [Message.of("user", ImageRef(picture(0)), ImageRef(picture(1)), "two")]
    engine, how = engine_for(model, processor), SamplingParams(max_tokens=4)
    both = [(0.25, 1 / 64), (1 / 64, 0.25)]
    (first,), (second,) = engine.generate(
        asked(processor, talk, how, increments=each) for each in both
    )
    assert [first.increments, second.increments] == both
    inputs = processor.batch([processor.prompt(talk)], return_tensors="pt")
    settings = {"max_new_tokens": 4, "do_sample": False, "increments": both[0]}
    output = model.generate(**inputs, **settings, eos_token_id=list(processor.stop_token_ids()))
    said = output[0, inputs["input_ids"].shape[1] :].tolist()
    assert list(first.token_ids) == said[: len(first.token_ids)]
    with pytest.raises(RequestError, match="3 increments for 2 images"):
        engine.add(asked(processor, talk, how, increments=(1.0, 1.0, 1.0)))


def test_a_next_turn_finds_the_pages_of_the_first_and_answers_as_if_it_were_read_anew(
    processor: CascadeVLProcessor,
) -> None:
    model = model_for(processor, increment=0.25)
    engine, how = engine_for(model, processor), SamplingParams(max_tokens=5)
    talk = [Message.of("user", ImageRef(picture(0)), "what is this?")]
    for question in ("and this?", "one two", "three"):
        request = asked(processor, talk, how)
        ((found,),) = engine.generate([request])
        ((anew,),) = engine_for(model, processor).generate([request])
        assert (found.text, found.token_ids) == (anew.text, anew.token_ids)
        if len(talk) > 1:
            assert found.usage.cached_tokens > 0.5 * found.usage.prompt_tokens
        talk += [Message.of("assistant", found.text), Message.of("user", question)]
    assert engine.stats().encoded_tiles == processor.prompt(talk).num_tiles


def test_another_increment_or_picture_is_not_taken_for_the_same(
    processor: CascadeVLProcessor,
) -> None:
    model, how = model_for(processor), SamplingParams(max_tokens=6)
    engine = engine_for(model, processor)
    for seed, increment in ((0, 1.0), (0, 0.25), (1, 0.25), (0, 1.0)):
        talk = [Message.of("user", ImageRef(picture(seed)), "what is this?")]
        request = asked(processor, talk, how, increments=increment)
        ((found,),) = engine.generate([request])
        ((anew,),) = engine_for(model, processor).generate([request])
        assert found.token_ids == anew.token_ids


@pytest.mark.parametrize("name", ["template", "configuration", "request"])
def test_template_configuration_and_request_end_an_answer(
    processor: CascadeVLProcessor, name: str
) -> None:
    model = model_for(processor)
    word, other = ids(processor, "one"), ids(processor, "three")[0]
    if name == "configuration":
        model.generation_config.eos_token_id = other
    end = processor.stop_token_ids()[0] if name == "template" else other
    say(model, *word, end, *word)
    stops = (other,) if name == "request" else ()
    how = SamplingParams(max_tokens=20, stop_token_ids=stops)
    ((found,),) = engine_for(model, processor).generate([asked(processor, QUESTION, how)])
    assert (found.text, found.token_ids, found.finish_reason) == ("one", tuple(word), "stop")
    assert found.usage.completion_tokens == len(word) + 1


def test_a_stop_string_ends_the_answer_and_is_not_streamed(processor: CascadeVLProcessor) -> None:
    said = ids(processor, "one two three four")
    for as_stream in (False, True):
        model = model_for(processor)
        say(model, *said)
        engine, how = engine_for(model, processor), SamplingParams(max_tokens=90, stop=(" thr",))
        request = asked(processor, QUESTION, how)
        if as_stream:
            tokens = list(engine.stream(request))
            assert "".join(token.text for token in tokens) == "one two"
            assert tokens[-1].finish_reason == "stop"
        else:
            ((found,),) = engine.generate([request])
            assert (found.text, found.finish_reason) == ("one two", "stop")


def test_characters_of_several_bytes_come_out_whole(processor: CascadeVLProcessor) -> None:
    model, text = model_for(processor), "東京 über 🦊🦊 one"
    say(model, *ids(processor, text), processor.stop_token_ids()[0])
    how = SamplingParams(max_tokens=100)
    pieces = [t.text for t in engine_for(model, processor).stream(asked(processor, QUESTION, how))]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_the_limit_counts_tokens(processor: CascadeVLProcessor) -> None:
    model = model_for(processor)
    said = ids(processor, "one two three four")
    say(model, *said)
    how = SamplingParams(max_tokens=3)
    ((found,),) = engine_for(model, processor).generate([asked(processor, QUESTION, how)])
    assert (found.token_ids, found.finish_reason) == (tuple(said[:3]), "length")


def test_answers_follow_a_json_schema_each_its_own(processor: CascadeVLProcessor) -> None:
    model = model_for(processor)
    schemas = [
        {"enum": ["one", "two", "three"]},
        {
            "type": "object",
            "properties": {"a": {"enum": [1, 2]}},
            "required": ["a"],
            "additionalProperties": False,
        },
    ]
    how = {"temperature": 1.0, "max_tokens": 60, "seed": 3}
    requests = [
        asked(processor, QUESTION, SamplingParams(**how, json_schema=text), num_samples=3)
        for text in map(json.dumps, schemas)
    ] + [asked(processor, QUESTION, SamplingParams(**how))]
    words, objects, (free,) = engine_for(model, processor).generate(requests)
    assert {json.loads(each.text) for each in words} <= {"one", "two", "three"}
    assert {json.loads(each.text)["a"] for each in objects} <= {1, 2}
    ((alone,),) = engine_for(model, processor).generate(requests[2:])
    assert free.token_ids == alone.token_ids
    tiny = engine_for(model, processor, num_pages=24, max_running=3, prefix_cache=False)
    again = tiny.generate(requests)  # taken up again in the middle of an object
    assert [[e.token_ids for e in each] for each in again[:2]] == [
        [e.token_ids for e in each] for each in (words, objects)
    ]


def test_wishes_that_speak_of_text_need_a_processor(processor: CascadeVLProcessor) -> None:
    engine = engine_for(model_for(processor), None)
    for how in ({"stop": ("x",)}, {"json_schema": "{}"}):
        with pytest.raises(RequestError, match="the engine has no processor"):
            engine.add(asked(processor, QUESTION, SamplingParams(**how)))
    with pytest.raises(RequestError, match="json_schema"):
        engine_for(model_for(processor), processor).add(
            asked(processor, QUESTION, SamplingParams(json_schema='{"type": "nonsense"}'))
        )


def test_an_asynchronous_stream_gives_text(processor: CascadeVLProcessor) -> None:
    model = model_for(processor)
    say(model, *ids(processor, "one two"), processor.stop_token_ids()[0])
    engine = engine_for(model, processor)

    async def listen() -> list[str]:
        request = asked(processor, QUESTION, SamplingParams(max_tokens=30))
        return [token.text async for token in engine.astream(request)]

    assert "".join(asyncio.run(listen())) == "one two"


def test_usage_counts_visual_tokens(processor: CascadeVLProcessor) -> None:
    model = model_for(processor)
    talk = [Message.of("user", ImageRef(picture(0)), "one")]
    example = processor.prompt(talk)
    ((found,),) = engine_for(model, processor).generate(
        [Request(prompt=example, sampling=SamplingParams(max_tokens=2))]
    )
    visual = example.num_tiles * TOKENS_PER_TILE
    assert found.usage.visual_tokens == visual
    assert found.usage.prompt_tokens == len(example.input_ids) - 1 + visual


# Many conversations in one call


def test_drawn_answers_depend_on_seed_and_place_alone(processor: CascadeVLProcessor) -> None:
    model = model_for(processor)
    talks = conversations()

    def draw(seed: int, prompts: list[Any], **config: int) -> list[tuple[int, ...]]:
        answers = answer(
            model,
            processor,
            prompts,
            max_new_tokens=6,
            temperature=1.0,
            seed=seed,
            config=EngineConfig(**{"num_pages": 100} | config),
        )
        return [each.token_ids for each in answers]

    together = draw(1, talks)
    assert draw(1, talks, max_running=2) == together
    assert draw(1, talks[:3]) == together[:3]
    assert draw(2, talks) != together
    assert together[0] != together[5]  # the same question at two places


def test_a_prompt_that_does_not_fit_is_refused_before_anything_is_computed(
    processor: CascadeVLProcessor,
) -> None:
    model = model_for(processor, trained_context=30)
    model.model.vision_tower.register_forward_hook(lambda *_: pytest.fail("it was computed"))
    with pytest.raises(RequestError, match="trained for 30"):
        answer(model, processor, conversations()[:1], max_new_tokens=30)


def test_a_picture_that_several_show_is_encoded_once(processor: CascadeVLProcessor) -> None:
    model = model_for(processor)
    tiles: list[int] = []
    model.model.vision_tower.register_forward_hook(
        lambda _, __, output: tiles.append(len(output.last_hidden_state))
    )
    same = picture(0, (28, 28))
    talks = [[Message.of("user", ImageRef(same), q)] for q in ("one", "two", "three")]
    answer(model, processor, talks, max_new_tokens=1)
    assert tiles == [1]
