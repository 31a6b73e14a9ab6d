"""A conversation that goes on: one increment, only new tokens computed, and the same answers."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
import torch
from tests.data.conftest import TEXTS, picture
from tests.model.small import PX, TOKENS_PER_TILE, small_model

from cascadevl.data.processor import CascadeVLProcessor
from cascadevl.data.tiling import TilingConfig
from cascadevl.data.tokenizer import build_tokenizer
from cascadevl.engine.conversation import Session, answer
from cascadevl.engine.engine import Engine
from cascadevl.engine.requests import EngineConfig, Request
from cascadevl.engine.sampling import SamplingParams
from cascadevl.errors import RequestError
from cascadevl.model.modeling import CascadeVLForConditionalGeneration
from cascadevl.types import ImageRef, Message

PAGE = 2
WINDOWS = {"use_sliding_window": True, "sliding_window": 6}


@pytest.fixture(scope="module")
def processor() -> CascadeVLProcessor:
    return CascadeVLProcessor(
        build_tokenizer(TEXTS, 400),
        system_message="",
        tiling=TilingConfig(tile_px=PX, max_tiles=4),
        tokens_per_tile=TOKENS_PER_TILE,
        share_tiles=False,  # or a second picture would change how the first is cut
    )


def model_for(
    processor: CascadeVLProcessor, text: dict[str, Any] | None = None, **config: Any
) -> CascadeVLForConditionalGeneration:
    text = {"vocab_size": len(processor.tokenizer)} | (text or {})
    model = small_model(text=text, image_token_id=processor.image_token_id, **config)
    model.generation_config.eos_token_id = None
    return model


class Counts:
    """Tokens that pass the text body and tiles that pass the vision tower."""

    def __init__(self, model: CascadeVLForConditionalGeneration) -> None:
        self.tokens: list[int] = []
        self.tiles = 0
        model.model.language_model.layers[0].register_forward_hook(
            lambda _, __, output: self.tokens.append(output.shape[1])
        )
        model.model.vision_tower.register_forward_hook(self._count_tiles)

    def _count_tiles(self, _: object, __: object, output: Any) -> None:
        self.tiles += len(output.last_hidden_state)

    def take(self) -> tuple[int, int]:
        """Tokens read (not those said) and tiles encoded since the last look."""
        read = sum(count for count in self.tokens if count > 1)
        tiles, self.tokens, self.tiles = self.tiles, [], 0
        return read, tiles


def text_before(processor: CascadeVLProcessor, talk: list[Message]) -> int:
    """Tokens before the first picture."""
    return processor.prompt(talk).input_ids.tolist().index(processor.image_token_id)


def user(*parts: str | ImageRef) -> Message:
    return Message.of("user", *parts)


def said(text: str) -> Message:
    return Message.of("assistant", text)


LARGE, WIDE, SMALL, TALL = (
    ImageRef(picture(60, 60, seed=3)),  # 5 tiles
    ImageRef(picture(60, 28)),  # 3 tiles
    ImageRef(picture(28, 28, seed=1)),
    ImageRef(picture(28, 60, seed=2)),
)


def session_for(
    model: CascadeVLForConditionalGeneration,
    processor: CascadeVLProcessor,
    *,
    max_step_tokens: int = 512,
    max_tokens: int = 5,
    **settings: Any,
) -> Session:
    config = EngineConfig(num_pages=2000, page_tokens=PAGE, max_step_tokens=max_step_tokens)
    settings = {"sampling": SamplingParams(max_tokens=max_tokens)} | settings
    return Session(engine=Engine(model, processor, config), **settings)


@pytest.mark.parametrize("ceil", [False, True], ids=["as printed", "ceil"])
@pytest.mark.parametrize("text", [{}, WINDOWS], ids=["full", "windows"])
@pytest.mark.parametrize("piece", [1, 3, 512])
def test_every_turn_is_answered_as_if_it_were_read_anew(
    processor: CascadeVLProcessor,
    text: dict[str, Any],
    ceil: bool,
    piece: int,
) -> None:
    model = model_for(processor, text, increment=0.125, ceil_after_image=ceil)
    session = session_for(model, processor, max_step_tokens=piece)
    talk: list[Message] = []
    for turn in (user("How many?"), user(WIDE, "\nAnd here?"), user("3?"), user(SMALL, TALL, "?")):
        talk.append(turn)
        got = session.ask(talk).answer()
        (anew,) = answer(model, processor, [talk], max_new_tokens=5)
        assert got == anew
        talk.append(said(got.text))


def test_logits_of_a_continued_conversation_equal_those_of_one_read_anew(
    processor: CascadeVLProcessor,
) -> None:
    model = model_for(processor, WINDOWS, increment=1 / 16)
    seen: list[torch.Tensor] = []
    model.lm_head.register_forward_hook(lambda _, __, output: seen.append(output))
    session = session_for(model, processor, max_tokens=1)
    talk = [user(WIDE, "\nHow many?")]
    talk.append(said(session.ask(talk).answer().text))
    talk.append(user(SMALL, "\nAnd here?"))
    seen.clear()
    session.ask(talk).answer()
    answer(model, processor, [talk], max_new_tokens=1)
    continued, anew = seen
    torch.testing.assert_close(continued, anew, rtol=0, atol=1e-5)


def test_only_what_is_new_is_computed(processor: CascadeVLProcessor) -> None:
    model = model_for(processor, increment=0.25)
    counts, session = Counts(model), session_for(model, processor)
    talk = [user(WIDE, "\nHow many?")]
    first = session.ask(talk).answer()
    length = processor.prompt(talk).input_ids.size + 11
    assert counts.take() == (length, 3)
    # What is sent back is the text: where it has the tokens that were said, they are known.
    talk += [said(first.text), user("And the number?")]
    example = processor.prompt(talk)
    session.ask(talk).answer()
    new = example.input_ids.size + 11 - length
    read, tiles = counts.take()
    assert new - 5 <= read <= new
    assert tiles == 0
    talk += [said("3"), user(SMALL, "\nAnd this?")]
    session.ask(talk).answer()
    read, tiles = counts.take()
    assert read < 60
    assert tiles == 1


def test_a_turn_taken_back_or_changed_is_not_remembered(processor: CascadeVLProcessor) -> None:
    model = model_for(processor, increment=0.25)
    session = session_for(model, processor)
    first, other = [user(WIDE, "\nHow many?")], [user(TALL, "\nHow many?")]
    again = [user(WIDE, "\nHow many dogs?")]
    for talk in (first, other, first, again, again, [*first, said("3"), user("?")], first):
        assert session.ask(talk).answer() == answer(model, processor, [talk], max_new_tokens=5)[0]
    counts = Counts(model)
    session.ask(first).answer()  # the very same question: only its last token is computed again
    assert counts.take()[1] == 0
    assert len(counts.tokens) == 0


@pytest.mark.parametrize("when", range(1, 8))
def test_an_interrupted_answer_leaves_nothing_wrong_behind(
    processor: CascadeVLProcessor, when: int
) -> None:
    """Ctrl-C in the middle of a forward pass: some layers have the new tokens, others do not."""
    model = model_for(processor, increment=0.25)
    session = session_for(model, processor, max_step_tokens=7)
    talk = [user(WIDE, "\nHow many?")]
    calls = 0

    def interrupt(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == when:
            raise KeyboardInterrupt

    for question in (user("And?"), user(SMALL, "\nOr here?")):
        calls = 0
        handle = model.model.language_model.layers[-1].register_forward_pre_hook(interrupt)
        answered = 0
        with suppress(KeyboardInterrupt):
            answered = len(session.ask(talk).answer().token_ids)
        handle.remove()
        assert (calls == when) == (answered == 0)
        got = session.ask(talk).answer()
        assert got == answer(model, processor, [talk], max_new_tokens=5)[0]
        talk += [said(got.text), question]


def test_an_unfinished_answer_is_given_up_when_the_next_question_comes(
    processor: CascadeVLProcessor,
) -> None:
    model = model_for(processor)
    model.train()
    session = session_for(model, processor)
    talk = [user(WIDE, "\nHow many?")]
    left = session.ask(talk)
    next(left)
    expected = answer(model, processor, [talk], max_new_tokens=5)[0]
    assert session.ask(talk).answer() == expected
    assert left.finish_reason is None
    assert list(left) == []
    assert model.training


# The increment of a conversation


def test_the_increment_stays_until_the_conversation_no_longer_fits(
    processor: CascadeVLProcessor,
) -> None:
    talk = [user(LARGE, "\nHow many?")]  # 20 visual tokens
    longer = [*talk, said("3"), user("?")]
    first, second = (processor.prompt(each).input_ids.size - 1 for each in (talk, longer))
    context = second + 5 + 5  # the second turn fits with 1/4
    assert first + 5 + 10 <= context < first + 5 + 20  # the first with 1/2
    model = model_for(processor, increment="auto", trained_context=context)
    counts, session = Counts(model), session_for(model, processor)
    reply = session.ask(talk)
    assert reply.increments == (0.5,)
    reply.answer()
    assert counts.take() == (first + 20, 5)
    reply = session.ask(longer)
    assert reply.increments == (0.25,)
    assert reply.answer() == answer(model, processor, [longer], max_new_tokens=5)[0]
    known = text_before(processor, talk) // PAGE * PAGE  # sits where it did before
    assert counts.take()[0] == 2 * (second + 20) - known  # all else was read anew, twice
    reply = session.ask(talk)  # it would fit with 1/2 again, but the conversation has begun
    assert reply.increments == (0.25,)
    session.reset()
    assert session.ask(talk).increments == (0.5,)


def test_reading_again_encodes_no_picture_again(processor: CascadeVLProcessor) -> None:
    model = model_for(processor)
    counts, session = Counts(model), session_for(model, processor, increments=0.5)
    talk = [user(LARGE, "\nHow many?")]
    session.ask(talk).answer()
    read = counts.take()
    session.increments = 0.25
    session.ask(talk).answer()
    assert counts.take() == (read[0] - text_before(processor, talk) // PAGE * PAGE, 0)


def test_where_it_still_fits_a_later_picture_gets_the_same_increment(
    processor: CascadeVLProcessor,
) -> None:
    talk = [user("Add 12 and 30.")]
    model = model_for(processor, increment="auto", trained_context=4096)
    session = session_for(model, processor)
    assert session.ask(talk).increments == ()
    talk += [said("42"), user(WIDE, "\nHow many?")]
    assert session.ask(talk).increments == (1.0,)
    model.config.trained_context = processor.prompt(talk).input_ids.size + 5 + 4
    assert session.ask(talk).increments == (0.25,)
    model.config.trained_context = 4096
    assert session.ask([*talk, said("3"), user(SMALL, "?")]).increments == (0.25, 0.25)


def test_a_conversation_that_fits_with_no_increment_is_refused_and_the_session_lives_on(
    processor: CascadeVLProcessor,
) -> None:
    talk = [user(WIDE, "\nHow many?")]
    size = processor.prompt(talk).input_ids.size
    model = model_for(processor, increment="auto", trained_context=size + 10)
    session = session_for(model, processor)
    session.ask(talk).answer()
    with pytest.raises(RequestError, match=rf"needs \d+ positions .*trained for {size + 10}"):
        session.ask([*talk, said("3"), user("Add 12 and 30 and describe the picture.")])
    assert session.ask(talk).answer() == answer(model, processor, [talk], max_new_tokens=5)[0]


def test_given_increments_are_taken_and_may_differ_between_pictures(
    processor: CascadeVLProcessor,
) -> None:
    talk = [user(WIDE, SMALL, "\nSame?")]
    model = model_for(processor, increment="auto", trained_context=4096)
    session = session_for(model, processor, increments=[0.25, 1 / 64])
    assert session.ask(talk).increments == (0.25, 1 / 64)
    session.increments = 1 / 16
    assert session.ask(talk).increments == (1 / 16, 1 / 16)


# How an answer ended


def test_an_answer_says_how_it_ended_while_it_comes_and_afterwards(
    processor: CascadeVLProcessor,
) -> None:
    model = model_for(processor)
    talk = [user(WIDE, "\nHow many?")]
    session = session_for(model, processor, max_tokens=7)
    pieces = session.ask(talk)
    assert pieces.finish_reason is None
    text = "".join(pieces)
    assert pieces.finish_reason == "length"
    whole = pieces.answer()
    assert (whole.text, len(whole.token_ids), whole.finish_reason) == (text, 7, "length")
    # Whatever token comes third is made the end of a turn.
    model.generation_config.eos_token_id = whole.token_ids[2]
    pieces = session.ask(talk)
    assert "".join(pieces) == processor.decode(whole.token_ids[:2], skip_special_tokens=True)
    assert pieces.finish_reason == "stop"


def test_drawn_answers_of_a_session_are_those_of_its_request(processor: CascadeVLProcessor) -> None:
    model = model_for(processor)
    talk = [user(WIDE, "\nHow many?")]
    how = SamplingParams(temperature=0.9, top_p=0.95, seed=3, max_tokens=5)
    session = session_for(model, processor, sampling=how)
    request = Request(prompt=processor.prompt(talk), sampling=how)
    ((expected,),) = Engine(model, processor).generate([request])
    for _ in range(2):
        assert session.ask(talk).answer().token_ids == expected.token_ids
