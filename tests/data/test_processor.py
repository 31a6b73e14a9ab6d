"""The processor against transformers' own, its system messages, and decoding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.data.conftest import picture
from tests.data.some_messages import SMALL, TALK, TILING, image, text
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.internvl.processing_internvl import InternVLProcessor
from transformers.processing_utils import ProcessorMixin

from cascadevl.data.chat import jinja_template, to_messages
from cascadevl.data.conversation import TEMPLATES, thinking_answer
from cascadevl.data.example import ExampleBuilder, ExampleConfig
from cascadevl.data.inputs import check_filling
from cascadevl.data.processor import CascadeVLProcessor
from cascadevl.errors import DataError, RequestError
from cascadevl.types import Message, Record

RELEASED_JINJA = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n'}}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "{{ '<IMG_CONTEXT>\\n' }}{% elif content['type'] == 'video' %}{{ '<video>\\n' }}"
    "{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{'<|im_end|>\\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{'<|im_start|>assistant\\n' }}{% endif %}"
)


@pytest.fixture
def processor(tokenizer: PreTrainedTokenizerFast) -> CascadeVLProcessor:
    return CascadeVLProcessor(tokenizer, system_message="", **SMALL)


@pytest.fixture
def theirs(
    processor: CascadeVLProcessor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> InternVLProcessor:
    """Transformers' processor, opened from the files ours wrote, without its video half."""
    processor.save_pretrained(tmp_path)
    monkeypatch.setattr(InternVLProcessor, "check_argument_for_proper_class", lambda *_: None)
    settings = json.loads((tmp_path / "processor_config.json").read_text())
    return InternVLProcessor(
        GotOcr2ImageProcessorPil.from_pretrained(tmp_path),
        AutoTokenizer.from_pretrained(tmp_path),
        None,
        image_seq_length=settings["image_seq_length"],
        chat_template=(tmp_path / "chat_template.jinja").read_text(),
    )


def assert_equal(ours: Any, theirs: Any) -> None:
    assert set(ours) == {"input_ids", "attention_mask", "pixel_values"}
    assert torch.equal(ours["input_ids"], theirs["input_ids"])
    assert torch.equal(ours["attention_mask"], theirs["attention_mask"])
    torch.testing.assert_close(ours["pixel_values"], theirs["pixel_values"], rtol=0, atol=1e-6)


# As transformers does it


def test_a_call_equals_transformers(
    tokenizer: PreTrainedTokenizerFast, theirs: InternVLProcessor
) -> None:
    ours = CascadeVLProcessor(tokenizer, system_message="", share_tiles=False, **SMALL)
    images = [picture(60, 28), picture(28, 90, seed=1), picture(170, 30, seed=2)]
    prompts = [
        "<|im_start|>user\n<IMG_CONTEXT>\nHow <IMG_CONTEXT>?<|im_end|>\n",
        "<IMG_CONTEXT> 12",
    ]
    options: dict[str, Any] = {"text": prompts, "padding": True, "return_tensors": "pt"}
    expected = theirs(images=images, **options)
    assert_equal(ours(images=images, **options), expected)
    assert_equal(ours(images=[images[:2], images[2:]], **options), expected)


def test_a_limit_given_in_a_call_equals_transformers(
    processor: CascadeVLProcessor, theirs: InternVLProcessor
) -> None:
    options: dict[str, Any] = {"text": "<IMG_CONTEXT> <IMG_CONTEXT>", "return_tensors": "pt"}
    images = [picture(170, 30), picture(60, 28)]
    assert_equal(
        processor(images=images, max_patches=3, **options),
        theirs(images=images, max_patches=3, **options),
    )


@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_a_conversation_equals_transformers(
    processor: CascadeVLProcessor, theirs: InternVLProcessor, add_generation_prompt: bool
) -> None:
    options: dict[str, Any] = {
        "add_generation_prompt": add_generation_prompt,
        "tokenize": True,
        "return_dict": True,
        "return_tensors": "pt",
    }
    assert_equal(
        processor.apply_chat_template(TALK, **options), theirs.apply_chat_template(TALK, **options)
    )


def test_several_conversations_equal_transformers(
    processor: CascadeVLProcessor, theirs: InternVLProcessor
) -> None:
    talks = [TALK, [{"role": "user", "content": [image(3, 30, 90), text("12?")]}], TALK[:1]]
    ours = processor.apply_chat_template(
        talks,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        padding=True,
        return_tensors="pt",
    )
    expected = theirs.apply_chat_template(
        talks,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )
    assert_equal(ours, expected)


def test_the_rendered_text_in_a_call_gives_the_same_inputs(processor: CascadeVLProcessor) -> None:
    talk = [{"role": "user", "content": [image(), image(1, 30, 120), text("Compare.")]}]
    options: dict[str, Any] = {"add_generation_prompt": True}
    written = processor.apply_chat_template(talk, **options)
    assert written == (
        "<|im_start|>user\n<IMG_CONTEXT>\n<IMG_CONTEXT>\nCompare.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    images = [item["image"] for item in talk[0]["content"][:2]]
    places = [{"type": "image"}, {"type": "image"}, text("Compare.")]
    assert (
        processor.apply_chat_template([{"role": "user", "content": places}], **options) == written
    )
    assert_equal(
        processor(images=images, text=written, return_tensors="pt"),
        processor.apply_chat_template(
            talk, tokenize=True, return_dict=True, return_tensors="pt", **options
        ),
    )


def test_a_prompt_is_what_training_sees(
    processor: CascadeVLProcessor, tokenizer: PreTrainedTokenizerFast
) -> None:
    builder = ExampleBuilder(tokenizer, ExampleConfig(system="", tiling=TILING), 4)
    turns = (*to_messages(TALK), Message.of("assistant", "No."))
    trained = builder(Record(source="x", record_id="1", messages=turns))
    prompt = processor.prompt(TALK)
    assert trained.input_ids[: len(prompt.input_ids)].tolist() == prompt.input_ids.tolist()
    np.testing.assert_array_equal(trained.tiles, prompt.tiles)


def test_it_is_a_transformers_processor(processor: CascadeVLProcessor) -> None:
    assert isinstance(processor, ProcessorMixin)
    assert processor.model_input_names == ["input_ids", "attention_mask", "pixel_values"]
    assert "tile_px=28" in repr(processor)


# Padding


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_fills_one_side(processor: CascadeVLProcessor, side: str) -> None:
    out = processor(text=["1", "1234"], padding=True, padding_side=side, return_tensors="pt")
    digits = [processor.tokenizer(digit).input_ids[0] for digit in "1234"]
    row, mask = ([0] * 3 + digits[:1], [0, 0, 0, 1])
    if side == "right":
        row, mask = row[::-1], mask[::-1]
    assert out["input_ids"].tolist() == [row, digits]
    assert out["attention_mask"].tolist() == [mask, [1] * 4]
    assert "pixel_values" not in out


def test_padding_to_a_length_and_lists(processor: CascadeVLProcessor) -> None:
    out = processor(text=["1", "12"], padding="max_length", max_length=5)
    assert [len(row) for row in out["input_ids"]] == [5, 5]
    assert [len(row) for row in processor(text=["1", "12"])["input_ids"]] == [1, 2]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"max_length": 3}, "4 tokens, but max_length is 3"),
        ({"return_tensors": "pt"}, "pass padding=True"),
        ({"padding": "max_length"}, "needs max_length"),
        ({"padding": "sometimes"}, "padding is 'sometimes'"),
        ({"padding": True, "padding_side": "top"}, "padding_side is 'top'"),
    ],
)
def test_what_makes_no_array_is_refused(
    processor: CascadeVLProcessor, options: dict[str, Any], problem: str
) -> None:
    with pytest.raises(RequestError, match=problem):
        processor(text=["1", "1234"], **options)


def test_cutting_is_no_option() -> None:
    options: dict[str, Any] = {"truncation": True, "max_length": 3}
    with pytest.raises(RequestError, match=r"unknown options truncation.*never cut"):
        check_filling(options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("images", "prompts", "problem"),
    [
        (None, "<IMG_CONTEXT>", "1 placeholders in the text, but 0 pictures"),
        ([picture(9, 9)] * 2, "<IMG_CONTEXT>", "1 placeholders in the text, but 2 pictures"),
        ([[picture(9, 9)], []], ["", "<IMG_CONTEXT>"], r"\[0, 1\] placeholders"),
    ],
)
def test_pictures_and_placeholders_must_agree(
    processor: CascadeVLProcessor, images: Any, prompts: Any, problem: str
) -> None:
    with pytest.raises(DataError, match=problem) as caught:
        processor(images=images, text=prompts)
    assert caught.value.kind == "image_count"


def test_pictures_need_a_text(processor: CascadeVLProcessor) -> None:
    with pytest.raises(RequestError, match="no text"):
        processor(images=[picture(9, 9)])


# System messages and the Jinja template


def test_the_jinja_template_without_system_message_is_the_released_one() -> None:
    made = jinja_template(TEMPLATES["internvl2_5"], "")
    assert made.startswith("{% if tools %}")  # which the released one does not look at
    assert made.endswith("{% else %}" + RELEASED_JINJA + "{% endif %}")


@pytest.mark.parametrize("name", list(TEMPLATES))
@pytest.mark.parametrize("system", ["", None, 'Don\'t say "no"\nor {{ x }}.'])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("own_system", [True, False])
def test_the_jinja_template_writes_what_the_processor_writes(
    gpt_oss_tokenizer: PreTrainedTokenizerFast,
    name: str,
    system: str | None,
    add_generation_prompt: bool,
    own_system: bool,
) -> None:
    ours = CascadeVLProcessor(gpt_oss_tokenizer, template=name, system_message=system, **SMALL)
    talk = [{"role": "system", "content": "Be brief."}] * own_system + TALK
    if not add_generation_prompt:
        talk = [*talk, {"role": "assistant", "content": "No."}]
    options = {"add_generation_prompt": add_generation_prompt, "tokenize": False}
    written = ours.apply_chat_template(talk, **options)
    by_jinja = gpt_oss_tokenizer.apply_chat_template(
        talk, chat_template=ours.chat_template, **options
    )
    assert written == by_jinja
    assert ("Be brief." in written) == own_system


def test_system_message_and_thinking_can_be_chosen_for_one_call(
    processor: CascadeVLProcessor,
) -> None:
    render = processor.apply_chat_template
    assert render(TALK[2:], system="Hi.").startswith("<|im_start|>system\nHi.<|im_end|>\n<|im_st")
    assert "rigorously" in render(TALK[2:], thinking=True)
    forced = render(TALK[2:], thinking=True, force_thinking=True, add_generation_prompt=True)
    assert forced.endswith("<|im_start|>assistant\n<think>\n")


def test_official_chat_has_a_system_message_unless_told_otherwise(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    ours = CascadeVLProcessor(tokenizer, **SMALL)
    written = ours.apply_chat_template(TALK)
    assert written.startswith(f"<|im_start|>system\n{TEMPLATES['internvl2_5'].system}<|im_end|>")
    assert ours.apply_chat_template(TALK, system="").startswith("<|im_start|>user")


# Decoding


def test_answers_keep_what_belongs_to_them(processor: CascadeVLProcessor) -> None:
    said = "<think>\n12\n</think>\n\n<ref>dog</ref><box>[[1, 2, 3, 4]]</box>"
    ids = processor.tokenizer(f"{said}<|im_end|><|endoftext|>").input_ids
    assert processor.decode(ids, skip_special_tokens=True) == said
    assert processor.decode(ids) == f"{said}<|im_end|><|endoftext|>"
    assert processor.batch_decode(torch.tensor([ids, ids]), skip_special_tokens=True) == [said] * 2
    assert processor.decode(ids[0]) == "<think>"
    # Transformers would delete the box's tags.
    assert "<box>" not in processor.tokenizer.decode(ids, skip_special_tokens=True)


def test_reasoning_in_a_channel_is_decoded_as_thinking(
    gpt_oss_tokenizer: PreTrainedTokenizerFast,
) -> None:
    ours = CascadeVLProcessor(gpt_oss_tokenizer, template="internvl3_5_gpt_oss", **SMALL)
    raw = (
        "<|channel|>analysis<|message|>12 + 30<|end|>"
        "<|start|>assistant<|channel|>final<|message|><box>42</box><|return|>"
    )
    ids = gpt_oss_tokenizer(raw).input_ids
    said = thinking_answer("12 + 30", "<box>42</box>")
    assert ours.decode(ids, skip_special_tokens=True) == said
    assert ours.decode(ids) == raw


def test_stop_tokens_are_the_turns_end_and_the_configs(
    processor: CascadeVLProcessor, gpt_oss_tokenizer: PreTrainedTokenizerFast
) -> None:
    assert processor.stop_token_ids() == (2,)
    assert processor.stop_token_ids(0) == (2, 0)
    assert processor.stop_token_ids([2, 9]) == (2, 9)
    ours = CascadeVLProcessor(gpt_oss_tokenizer, template="internvl3_5_gpt_oss", **SMALL)
    expected = gpt_oss_tokenizer.convert_tokens_to_ids(["<|return|>", "<|call|>"])
    assert ours.stop_token_ids() == tuple(expected)
