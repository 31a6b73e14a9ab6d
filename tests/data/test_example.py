"""Examples: released tokens and targets, shared beginnings, prompts, refusals."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.data.conftest import TEXTS
from tests.data.some_records import (
    MESSAGES,
    SQUARE,
    WIDE,
    answer,
    builder_of,
    record,
    segment,
    user,
)
from tests.reference import conversation_by_hand
from transformers import AddedToken, PreTrainedTokenizerFast

from cascadevl.data.example import ExampleConfig
from cascadevl.data.parsing import parse_record
from cascadevl.data.spans import Span, describe
from cascadevl.data.tokenizer import build_tokenizer
from cascadevl.errors import ConfigError, DataError
from cascadevl.types import NO_PARENT, ImageRef, Message

TURNS = [
    ("user", "Image-1: <image>\nImage-2: <image>\nHow many red squares?"),
    ("assistant", "There are 3."),
    ("user", "And <ref>dog</ref>?"),
    ("assistant", "No."),
]


@pytest.mark.parametrize("system", ["", "Be brief.", None])
def test_tokens_and_targets_are_those_of_released_code(
    tokenizer: PreTrainedTokenizerFast, system: str | None
) -> None:
    builder = builder_of(tokenizer, system=system)
    example = builder(record(*MESSAGES))
    text = builder.template.system if system is None else system
    ids, trained = conversation_by_hand.qwen(tokenizer, TURNS, text)
    assert example.input_ids.tolist() == ids
    assert example.trained.tolist() == trained
    assert example.tiles_per_image == (3, 1)
    assert example.parents == (NO_PARENT,)
    assert not example.segments.any()
    assert example.increments == (1.0, 1.0)


def test_a_record_as_released_goes_through(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    for name, ref in (("a.png", WIDE), ("b.png", SQUARE)):
        ref.source.save(tmp_path / name)  # type: ignore[union-attr]
    names = {"user": "human", "assistant": "gpt"}
    fields = {
        "id": 0,
        "image": ["a.png", "b.png"],
        "conversations": [{"from": names[role], "value": text} for role, text in TURNS],
    }
    example = builder_of(tokenizer)(parse_record(fields, source="set.jsonl:8", root=tmp_path))
    ids, trained = conversation_by_hand.qwen(tokenizer, TURNS, "")
    assert example.input_ids.tolist() == ids
    assert example.trained.tolist() == trained
    np.testing.assert_array_equal(example.tiles, builder_of(tokenizer)(record(*MESSAGES)).tiles)


def test_gpt_oss_tokens_and_targets_are_those_of_released_code(
    gpt_oss_tokenizer: PreTrainedTokenizerFast,
) -> None:
    builder = builder_of(gpt_oss_tokenizer, template="internvl3_5_gpt_oss", system=None)
    example = builder(record(*MESSAGES))
    ids, trained = conversation_by_hand.gpt_oss(gpt_oss_tokenizer, TURNS, builder.template.system)
    assert example.input_ids.tolist() == ids
    assert example.trained.tolist() == trained


def test_a_document_is_trained_but_for_its_pictures_and_ends(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    example = builder_of(tokenizer)(record(Message.of("pretrain", "A dog ", SQUARE, " is 3.")))
    assert list(describe(example, tokenizer)) == [
        Span("A dog ", True, 0, len(tokenizer("A dog ").input_ids)),
        Span("<img><IMG_CONTEXT></img>", False, 0, 3),
        Span(" is 3.<|im_end|>", True, 0, len(tokenizer(" is 3.").input_ids) + 1),
    ]
    assert example.input_ids[-1] == tokenizer.eos_token_id


def test_a_beginning_of_sentence_token_stands_once_at_the_start() -> None:
    tokenizer = build_tokenizer(TEXTS, 400)
    tokenizer.add_tokens([AddedToken("<s>", special=True)])
    tokenizer.bos_token = "<s>"
    tokenizer.add_bos_token = True
    tokenizer.update_post_processor()
    example = builder_of(tokenizer)(record(*MESSAGES))
    assert example.input_ids.tolist().count(tokenizer.bos_token_id) == 1
    assert example.input_ids[0] == tokenizer.bos_token_id
    assert not example.trained[0]


# One picture, several questions


def test_questions_about_one_picture_share_it(tokenizer: PreTrainedTokenizerFast) -> None:
    builder = builder_of(tokenizer)
    branches = tuple(
        (user(f"\n{question}"), answer(text))
        for question, text in (("How many red squares?", "3"), ("A dog?", "No."))
    )
    example = builder(record(user(WIDE), branches=branches))
    assert example.parents == (NO_PARENT, 0, 0)
    assert example.tiles_per_image == (3,)
    assert [(span.text, span.trained, span.segment) for span in describe(example, tokenizer)] == [
        ("<|im_start|>user\n<img><IMG_CONTEXT></img>", False, 0),
        ("\nHow many red squares?<|im_end|>\n<|im_start|>assistant\n", False, 1),
        ("3<|im_end|>", True, 1),
        ("\n", False, 1),
        ("\nA dog?<|im_end|>\n<|im_start|>assistant\n", False, 2),
        ("No.<|im_end|>", True, 2),
        ("\n", False, 2),
    ]


texts = st.text(alphabet="ab.\n 12", max_size=6)
questions = st.tuples(st.booleans(), texts, texts)


@settings(max_examples=60)
@given(
    beginning=st.lists(st.one_of(texts, st.just(SQUARE), st.just(WIDE)), max_size=4),
    told=st.booleans(),
    asked=st.lists(questions, min_size=1, max_size=3),
    system=st.sampled_from(["", "Be brief."]),
    document=st.booleans(),
)
def test_shared_and_branch_together_are_the_conversation_alone(
    tokenizer: PreTrainedTokenizerFast,
    beginning: list[str | ImageRef],
    told: bool,
    asked: list[tuple[bool, str, str]],
    system: str,
    document: bool,
) -> None:
    builder = builder_of(tokenizer, system=system)
    shared: list[Message] = [user(*beginning)]
    branches: list[tuple[Message, ...]] = []
    alone: list[list[Message]] = []
    for continues, question, text in asked:
        if document:
            shared = [Message.of("pretrain", *beginning)]
            branches.append((Message.of("pretrain", question),))
            alone.append([Message.of("pretrain", *beginning, question)])
        elif told:  # the shared part ends with an answer, which a branch may go on writing
            shared = [user(*beginning), answer("So")]
            if continues:
                branches.append((answer(text),))
                alone.append([shared[0], answer(f"So{text}")])
            else:
                branches.append((user(question), answer(text)))
                alone.append([*shared, user(question), answer(text)])
        elif continues:
            branches.append((user(question), answer(text)))
            alone.append([user(*beginning, question), answer(text)])
        else:
            branches.append((answer(text),))
            alone.append([*shared, answer(text)])
    example = builder(record(*shared, branches=tuple(branches)))
    num_shared = len(example.parents) - len(branches)
    ids, trained = segment(example, 0) if num_shared else ([], [])
    for number, messages in enumerate(alone):
        own_ids, own_trained = segment(example, number + num_shared)
        expected = builder(record(*messages))
        assert ids + own_ids == expected.input_ids.tolist()
        assert trained + own_trained == expected.trained.tolist()
        assert example.tiles_per_image == expected.tiles_per_image
        np.testing.assert_array_equal(example.tiles, expected.tiles)


def test_gpt_oss_branches_end_as_last_turns_and_the_shared_turn_does_not(
    gpt_oss_tokenizer: PreTrainedTokenizerFast,
) -> None:
    builder = builder_of(gpt_oss_tokenizer, template="internvl3_5_gpt_oss")
    branches = ((user("Sure?"), answer("Yes.")),)
    example = builder(record(user(SQUARE), answer("3"), branches=branches))
    assert [(span.text, span.trained) for span in describe(example, gpt_oss_tokenizer)] == [
        ("<|start|>user<|message|><img><IMG_CONTEXT></img><|end|><|start|>assistant", False),
        ("<|channel|>final<|message|>3<|end|>", True),
        ("<|start|>user<|message|>Sure?<|end|><|start|>assistant", False),
        ("<|channel|>final<|message|>Yes.<|return|>", True),
    ]
    assert example.segments.max() == 1


def test_branches_with_nothing_in_common_start_anew(tokenizer: PreTrainedTokenizerFast) -> None:
    branches = ((user(" 12?"), answer("3")), (user(" 30?"), answer("4")))
    example = builder_of(tokenizer)(record(user("Add"), branches=branches))
    assert example.parents == (NO_PARENT, NO_PARENT)
    assert set(example.segments.tolist()) == {0, 1}


# Prompts


def test_a_prompt_is_the_beginning_of_what_training_saw(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    builder = builder_of(tokenizer)
    trained = builder(record(*MESSAGES))
    prompt = builder.prompt(MESSAGES[:3])
    count = len(prompt.input_ids)
    assert trained.input_ids[:count].tolist() == prompt.input_ids.tolist()
    assert trained.trained[count:].any()
    assert not prompt.trained.any()
    np.testing.assert_array_equal(prompt.tiles, trained.tiles)
    drawing = builder_of(tokenizer, jpeg=True, increment="random", seed=3)
    calm = drawing.prompt(MESSAGES[:3])
    np.testing.assert_array_equal(calm.tiles, trained.tiles)
    assert calm.increments == ()  # the model's configuration decides


def test_a_prompt_can_force_thinking(tokenizer: PreTrainedTokenizerFast) -> None:
    builder = builder_of(tokenizer)
    prompt = builder.prompt([user("12?")], thinking=False, force_thinking=True)
    text = "".join(span.text for span in describe(prompt, tokenizer))
    assert text == ("<|im_start|>user\n12?<|im_end|>\n<|im_start|>assistant\n<think>\n</think>\n")
    thinking = builder.prompt([user("12?")], thinking=True)
    assert "rigorously" in next(describe(thinking, tokenizer)).text


# What is refused


def test_too_long_names_both_numbers_after_expansion(tokenizer: PreTrainedTokenizerFast) -> None:
    sample = record(user(WIDE, "\nHow?"), answer("3"))
    fitting = builder_of(tokenizer)(sample)
    num_text = len(fitting.input_ids) - 1
    size = num_text + 3 * 4
    builder_of(tokenizer, max_tokens=size)(sample)
    with pytest.raises(DataError) as caught:
        builder_of(tokenizer, max_tokens=size - 1)(sample)
    assert caught.value.kind == "too_long"
    assert str(caught.value).startswith(
        f"set.jsonl:8: {size} tokens ({num_text} of text and 3 tiles of 4), "
        f"but max_tokens is {size - 1}"
    )


@pytest.mark.parametrize(
    ("messages", "kind"),
    [
        ((user("How?"),), "no_target"),
        ((), "no_target"),
        ((user("<IMG_CONTEXT>"), answer("3")), "control_token"),
        ((user("How?"), answer("3<|im_end|>")), "control_token"),
        ((user("<image>\nHow?"), answer("3")), "image_count"),
        ((user(ImageRef(b"no picture")), answer("3")), "unsupported_image"),
        ((Message.of("tool", "7"), answer("3")), "roles"),
    ],
)
def test_bad_records_are_refused_with_their_place(
    tokenizer: PreTrainedTokenizerFast, messages: tuple[Message, ...], kind: str
) -> None:
    with pytest.raises(DataError, match=r"set\.jsonl:8") as caught:
        builder_of(tokenizer)(record(*messages))
    assert caught.value.kind == kind


scraps = st.sampled_from(
    ["How", "\n", "<img>", "<ref>", "\ud800", "<think>", "</think>", "<image>", "\x00", "e\u0301"]
)
parts = st.one_of(scraps, st.just(SQUARE), st.just(ImageRef(b"")), st.just(ImageRef(Path("no"))))
Talk: TypeAlias = list[tuple[str, list[str | ImageRef]]]
roles = st.sampled_from(["system", "user", "assistant", "tool", "pretrain"])
talks = st.lists(st.tuples(roles, st.lists(parts, max_size=3)), max_size=3)


@given(
    talk=talks,
    branches=st.lists(talks, max_size=2),
    template=st.sampled_from(["internvl2_5", "internvl3_5_gpt_oss"]),
)
def test_whatever_comes_in_only_data_errors_come_out(
    gpt_oss_tokenizer: PreTrainedTokenizerFast,
    talk: Talk,
    branches: list[Talk],
    template: str,
) -> None:
    def messages(turns: Talk) -> tuple[Message, ...]:
        return tuple(Message(role, tuple(shown)) for role, shown in turns)  # type: ignore[arg-type]

    builder = builder_of(gpt_oss_tokenizer, template=template, max_tokens=40)
    sample = record(*messages(talk), branches=tuple(map(messages, branches)))
    try:
        example = builder(sample)
    except DataError:
        return
    assert (example.input_ids == builder.image_token_id).sum() == len(example.tiles_per_image)
    assert len(example.parents) == example.segments.max() + 1
    assert len(example.input_ids) + 3 * len(example.tiles_per_image) <= 40


@pytest.mark.parametrize("branch", [(), (user("Sure?"),)])
def test_a_branch_that_trains_nothing_is_refused(
    tokenizer: PreTrainedTokenizerFast, branch: tuple[Message, ...]
) -> None:
    sample = record(user(SQUARE), answer("3"), branches=((user("12?"), answer("4")), branch))
    with pytest.raises(DataError, match="nothing in branch 2 is trained") as caught:
        builder_of(tokenizer)(sample)
    assert caught.value.kind == "no_target"


def test_a_tokenizer_without_the_tokens_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError, match=r"no token '<\|return\|>'"):
        builder_of(tokenizer, template="internvl3_5_gpt_oss")


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"template": "phi3-chat"}, "phi3-chat"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"min_frames": 9, "max_frames": 8}, "min_frames is 9"),
        ({"increment": 2.0}, "increment is 2.0"),
        ({"increment": 0.0}, "increment is 0.0"),
    ],
)
def test_configs_out_of_range_are_refused(values: dict[str, object], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        ExampleConfig(**values)  # type: ignore[arg-type]


def test_a_builder_crosses_process_borders(tokenizer: PreTrainedTokenizerFast) -> None:
    builder = builder_of(tokenizer)
    copied = pickle.loads(pickle.dumps(builder))
    sample = record(*MESSAGES)
    assert copied(sample).input_ids.tolist() == builder(sample).input_ids.tolist()


def test_remembered_pieces_give_the_same_ids_when_memory_is_full(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cascadevl.data.encoding._MAX_REMEMBERED", 8)
    builder, sample = builder_of(tokenizer), record(*MESSAGES)
    ids, _ = conversation_by_hand.qwen(tokenizer, TURNS, "")
    for number in range(5):
        builder(record(user(f"How {number}?"), answer(str(number))))
        assert builder(sample).input_ids.tolist() == ids
