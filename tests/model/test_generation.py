"""Answers: equal to transformers' generate, shared pictures, stopping, streams and seeds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import PIL.Image
import pytest
import torch
from tests.model.small import PX, TOKENS_PER_TILE, small_model
from transformers import DynamicCache

from cascadevl.data.processor import CascadeVLProcessor
from cascadevl.data.tiling import TilingConfig
from cascadevl.data.tokenizer import build_tokenizer
from cascadevl.errors import RequestError
from cascadevl.model import generation
from cascadevl.model.answer_text import Answer
from cascadevl.model.decoding import Decoder, Rows
from cascadevl.model.generation import answer, stream
from cascadevl.model.modeling import CascadeVLForConditionalGeneration
from cascadevl.model.sampling import Sampling, filtered, next_tokens
from cascadevl.types import ImageRef, Message

WORDS = ["what is this? one two three four", "the quick brown fox, über 東京 jumps"]


def build(template: str = "internvl2_5") -> CascadeVLProcessor:
    return CascadeVLProcessor(
        build_tokenizer(WORDS * 3, 420),
        template=template,
        system_message="",
        tiling=TilingConfig(tile_px=PX, max_tiles=4),
        tokens_per_tile=TOKENS_PER_TILE,
    )


@pytest.fixture(scope="module")
def processor() -> CascadeVLProcessor:
    return build()


def model_for(processor: CascadeVLProcessor, **config) -> CascadeVLForConditionalGeneration:
    text = {"vocab_size": len(processor.tokenizer)} | config.pop("text", {})
    model = small_model(text=text, image_token_id=processor.image_token_id, **config)
    model.generation_config.eos_token_id = None
    return model


def picture(seed: int, size: tuple[int, int] = (50, 30)) -> PIL.Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels)


def conversations() -> list[list[Message]]:
    first, second = picture(0), picture(1, (20, 70))
    return [
        [Message.of("user", ImageRef(first), "what is this?")],
        [Message.of("user", "one two")],
        [Message.of("user", ImageRef(second), "one")],
        [Message.of("user", ImageRef(first), "the quick brown fox jumps over")],
        [Message.of("user", ImageRef(first), ImageRef(second), "two")],
        [Message.of("user", ImageRef(first), "what is this?")],
    ]


WINDOWS = {"use_sliding_window": True, "sliding_window": 6}


@pytest.mark.parametrize("text", [{}, WINDOWS], ids=["full", "windows"])
@pytest.mark.parametrize("max_rows", [1, 4, 64])
def test_greedy_answers_equal_transformers_generate(
    processor: CascadeVLProcessor, text: dict, max_rows: int
) -> None:
    model = model_for(processor, increment=0.25, text=text)
    answers = answer(model, processor, conversations(), max_new_tokens=10, max_rows=max_rows)
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


def test_a_picture_is_encoded_once_and_its_tokens_pass_the_text_body_once(
    processor: CascadeVLProcessor,
) -> None:
    model = model_for(processor)
    tiles, widths = [], []
    model.model.vision_tower.register_forward_hook(
        lambda _, __, output: tiles.append(len(output.last_hidden_state))
    )
    model.model.language_model.layers[0].register_forward_hook(
        lambda _, __, output: widths.append(output.shape[1])
    )
    same = picture(0, (28, 28))
    asked = [[Message.of("user", ImageRef(same), q)] for q in ("one", "two", "three")]
    answer(model, processor, asked, max_new_tokens=1)
    assert tiles == [1]
    lengths = [len(processor.prompt(each).input_ids) - 1 for each in asked]
    beginning = processor.prompt(asked[0]).input_ids.tolist().index(processor.image_token_id)
    assert widths[0] == sum(lengths) - 2 * beginning + TOKENS_PER_TILE


class Scripted(Decoder):
    """A decoder that says prepared tokens instead of asking the model."""

    script: tuple[int, ...] = ()

    def prefill(self, prompts: Sequence) -> Rows:
        return Rows(
            numbers=[prompt.number for prompt in prompts],
            generators=[None] * len(prompts),
            logits=torch.zeros(len(prompts), 1),
            last_position=torch.zeros(len(prompts)),
            mask=torch.zeros(len(prompts), 1, dtype=torch.bool),
            cache=DynamicCache(),
        )

    def follow(self, rows: Rows, ended: set[int]):
        for token in self.script:
            for number in rows.numbers:
                if number not in ended:
                    yield number, token
            if len(ended) == len(rows.numbers):
                return
        raise AssertionError("the answer went on after its end")


def say(monkeypatch: pytest.MonkeyPatch, *tokens: int) -> None:
    monkeypatch.setattr(Scripted, "script", tokens)
    monkeypatch.setattr(generation, "Decoder", Scripted)


QUESTION = [Message.of("user", "one")]


def test_characters_of_several_bytes_come_out_whole(
    processor: CascadeVLProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_for(processor)
    text = "東京 über 🦊🦊 one"
    ids = processor.tokenizer(text, add_special_tokens=False).input_ids
    assert len(processor.tokenizer("🦊", add_special_tokens=False).input_ids) == 4  # bytes
    say(monkeypatch, *ids, processor.stop_token_ids()[0])
    pieces = list(stream(model, processor, QUESTION, max_new_tokens=100))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert len(pieces) > 5


def test_bytes_that_never_become_a_character_are_given_at_the_end(
    processor: CascadeVLProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_for(processor)
    ids = processor.tokenizer("🦊", add_special_tokens=False).input_ids
    say(monkeypatch, ids[0], processor.stop_token_ids()[0])
    assert "".join(stream(model, processor, QUESTION, max_new_tokens=9)) == "\ufffd"


@pytest.mark.parametrize("name", ["template", "configuration"])
def test_template_and_configuration_both_end_an_answer(
    processor: CascadeVLProcessor, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    model = model_for(processor)
    word = processor.tokenizer("one", add_special_tokens=False).input_ids
    other = processor.tokenizer("three", add_special_tokens=False).input_ids[0]
    model.generation_config.eos_token_id = other
    end = {"template": processor.stop_token_ids()[0], "configuration": other}[name]
    say(monkeypatch, *word, end, *word)
    assert (
        answer(model, processor, [QUESTION] * 2, max_new_tokens=20)
        == [Answer(text="one", token_ids=tuple(word), finish_reason="stop")] * 2
    )


def test_grounding_tokens_stay_in_the_text(
    processor: CascadeVLProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_for(processor)
    text = "<ref>fox</ref><box>[[1, 2, 3, 4]]</box>"
    ids = processor.tokenizer(text, add_special_tokens=False).input_ids
    say(monkeypatch, *ids, processor.stop_token_ids()[0])
    assert answer(model, processor, [QUESTION], max_new_tokens=90)[0].text == text


def test_a_stop_string_ends_the_answer_and_is_not_streamed(
    processor: CascadeVLProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_for(processor)
    ids = processor.tokenizer("one two three four", add_special_tokens=False).input_ids
    say(monkeypatch, *ids)
    (got,) = answer(model, processor, [QUESTION], max_new_tokens=90, stop=(" thr",))
    assert (got.text, got.finish_reason) == ("one two", "stop")
    pieces = list(stream(model, processor, QUESTION, max_new_tokens=90, stop=(" thr",)))
    assert "".join(pieces) == "one two"
    with pytest.raises(RequestError, match="stop string is empty"):
        answer(model, processor, [QUESTION], max_new_tokens=9, stop=("",))


def test_the_beginning_of_a_stop_string_that_does_not_come_is_given_back(
    processor: CascadeVLProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_for(processor)
    ids = processor.tokenizer("one two three", add_special_tokens=False).input_ids
    say(monkeypatch, *ids, processor.stop_token_ids()[0])
    pieces = list(stream(model, processor, QUESTION, max_new_tokens=90, stop=(" two four",)))
    assert "".join(pieces) == "one two three"


def test_the_limit_counts_tokens(
    processor: CascadeVLProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_for(processor)
    ids = processor.tokenizer("one two three four", add_special_tokens=False).input_ids
    say(monkeypatch, *ids)
    (got,) = answer(model, processor, [QUESTION], max_new_tokens=3)
    assert got.token_ids == tuple(ids[:3])
    assert got.finish_reason == "length"
    with pytest.raises(RequestError, match="at least 1"):
        answer(model, processor, [QUESTION], max_new_tokens=0)


def test_drawn_answers_depend_on_seed_and_place_alone(processor: CascadeVLProcessor) -> None:
    model = model_for(processor)
    asked = conversations()

    def draw(seed: int, prompts: list, **how: int) -> list[tuple[int, ...]]:
        answers = answer(
            model, processor, prompts, max_new_tokens=6, temperature=1.0, seed=seed, **how
        )
        return [each.token_ids for each in answers]

    together = draw(1, asked)
    assert draw(1, asked, max_rows=2) == together
    assert draw(1, asked[:3]) == together[:3]
    assert draw(2, asked) != together
    assert together[0] != together[5]  # the same question at two places


def test_a_stream_equals_the_answer(processor: CascadeVLProcessor) -> None:
    model = model_for(processor)
    for number, conversation in enumerate(conversations()[:3]):
        how = {"max_new_tokens": 8, "temperature": 0.7, "top_p": 0.9, "seed": number}
        (expected,) = answer(model, processor, [conversation], **how)
        assert "".join(stream(model, processor, conversation, **how)) == expected.text


def test_the_mode_of_the_model_is_left_as_it_was(processor: CascadeVLProcessor) -> None:
    model = model_for(processor, drop_path_rate=0.9)
    expected = answer(model, processor, conversations()[:1], max_new_tokens=4)
    model.train()
    assert answer(model, processor, conversations()[:1], max_new_tokens=4) == expected
    assert model.training
    assert not model.get_input_embeddings().weight.grad_fn


def test_a_prompt_that_does_not_fit_is_refused_before_anything_is_computed(
    processor: CascadeVLProcessor,
) -> None:
    model = model_for(processor, trained_context=30)
    model.model.vision_tower.register_forward_hook(lambda *_: pytest.fail("it was computed"))
    with pytest.raises(RequestError, match="trained for 30"):
        answer(model, processor, conversations()[:1], max_new_tokens=30)


def test_filtering_keeps_the_most_probable_tokens() -> None:
    logits = torch.tensor([[4.0, 3.0, 2.0, 1.0]]).log()  # probabilities 0.4 0.3 0.2 0.1

    def kept(**how: float) -> list[float]:
        return filtered(logits, Sampling(**{"temperature": 1.0} | how))[0].tolist()

    assert kept() == pytest.approx([0.4, 0.3, 0.2, 0.1])
    assert kept(top_k=2) == pytest.approx([4 / 7, 3 / 7, 0, 0])
    assert kept(top_p=0.65) == pytest.approx([4 / 7, 3 / 7, 0, 0])
    assert kept(top_p=0.75) == pytest.approx([4 / 9, 3 / 9, 2 / 9, 0])
    assert kept(top_p=0.01) == [1, 0, 0, 0]
    assert kept(temperature=0.5) == pytest.approx([16 / 30, 9 / 30, 4 / 30, 1 / 30])


def test_draws_follow_the_probabilities() -> None:
    logits = torch.tensor([[0.6, 0.3, 0.1]]).log().expand(3000, 3)
    sampling = Sampling(temperature=1.0, seed=0)
    generators = [sampling.generator(request, torch.device("cpu")) for request in range(3000)]
    counts = torch.bincount(next_tokens(logits, sampling, generators), minlength=3) / 3000
    # Three standard deviations of a share of 0.6 in 3,000 draws are 0.027.
    torch.testing.assert_close(counts, torch.tensor([0.6, 0.3, 0.1]), rtol=0, atol=0.03)


@pytest.mark.parametrize("how", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -1}])
def test_settings_that_mean_nothing_are_refused(how: dict) -> None:
    with pytest.raises(RequestError, match=next(iter(how))):
        Sampling(**how)
