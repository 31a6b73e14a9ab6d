"""Templates letter by letter, loss spans, thinking, and what nobody may write."""

from __future__ import annotations

import hashlib

import PIL.Image
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascadevl.data.conversation import (
    TEMPLATES,
    Piece,
    Template,
    check_text,
    control_pattern,
    render,
    split_thinking,
    template_named,
    thinking_answer,
)
from cascadevl.data.prompts import (
    GPT_OSS_SYSTEM,
    GPT_OSS_THINKING,
    INTERNVL_SYSTEM,
    PROCESS_REWARD_SYSTEM,
    THINKING_PROMPT,
)
from cascadevl.errors import ConfigError, DataError
from cascadevl.types import ImageRef, Message

QWEN, GPT_OSS = TEMPLATES["internvl2_5"], TEMPLATES["internvl3_5_gpt_oss"]
IMAGE = ImageRef(PIL.Image.new("RGB", (2, 2)))
TALK = [
    Message.of("user", IMAGE, "\nHow many?"),
    Message.of("assistant", "Three."),
    Message.of("user", "Sure?"),
    Message.of("assistant", "Yes."),
]


def written(pieces: list[Piece]) -> str:
    """Pieces as one text; what is trained stands between arrows."""
    return "".join(
        ("→{}←" if piece.trained else "{}").format(
            piece.content if isinstance(piece.content, str) else "[]"
        )
        for piece in pieces
    )


def test_qwen_writes_and_trains_as_released() -> None:
    assert written(render(TALK, QWEN)) == (
        f"<|im_start|>system\n{INTERNVL_SYSTEM}<|im_end|>\n"
        "<|im_start|>user\n[]\nHow many?<|im_end|>\n"
        "<|im_start|>assistant\n→Three.<|im_end|>←\n"
        "<|im_start|>user\nSure?<|im_end|>\n"
        "<|im_start|>assistant\n→Yes.<|im_end|>←\n"
    )


def test_gpt_oss_writes_and_trains_as_released() -> None:
    turns = [*TALK[:2], Message.of("tool", "7"), TALK[3]]
    assert written(render(turns, GPT_OSS)) == (
        f"<|start|>system<|message|>{GPT_OSS_SYSTEM}<|end|>"
        "<|start|>user<|message|>[]\nHow many?<|end|>"
        "<|start|>assistant→<|channel|>final<|message|>Three.<|end|>←"
        "<|start|>tool<|message|>7<|end|>"
        "<|start|>assistant→<|channel|>final<|message|>Yes.<|return|>←"
    )


def test_gpt_oss_reasons_in_its_own_channel() -> None:
    turns = [TALK[2], Message.of("assistant", thinking_answer("Count again.", "Yes."))]
    assert written(render(turns, GPT_OSS)) == (
        f"<|start|>system<|message|>{GPT_OSS_THINKING}<|end|>"
        "<|start|>user<|message|>Sure?<|end|>"
        "<|start|>assistant→<|channel|>analysis<|message|>Count again.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>Yes.<|return|>←"
    )
    assert "Reasoning: high\n\n# Valid channels: analysis, final." in GPT_OSS_THINKING


def test_qwen_writes_reasoning_as_it_stands() -> None:
    turns = [TALK[2], Message.of("assistant", thinking_answer("Count again.", "Yes."))]
    assert written(render(turns, QWEN, system="")).endswith(
        "<|im_start|>assistant\n→<think>\nCount again.\n</think>\n\nYes.<|im_end|>←\n"
    )


@pytest.mark.parametrize(
    ("arguments", "beginning"),
    [
        ({}, f"<|im_start|>system\n{INTERNVL_SYSTEM}<|im_end|>\n<|im_start|>user"),
        ({"system": "Be brief."}, "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user"),
        ({"system": ""}, "<|im_start|>user\n[]"),
        ({"thinking": True}, f"<|im_start|>system\n{THINKING_PROMPT}<|im_end|>\n"),
        ({"thinking": True, "system": ""}, f"<|im_start|>system\n{THINKING_PROMPT}<|im_end|>\n"),
        ({"thinking": False}, f"<|im_start|>system\n{INTERNVL_SYSTEM}<|im_end|>\n"),
    ],
)
def test_system_message(arguments: dict[str, object], beginning: str) -> None:
    assert written(render(TALK, QWEN, **arguments)).startswith(beginning)


def test_a_system_turn_of_the_conversation_goes_before_every_default() -> None:
    turns = [Message.of("system", "Own."), TALK[2]]
    text = written(render(turns, QWEN, system="Other.", thinking=True))
    assert text.startswith("<|im_start|>system\nOwn.<|im_end|>\n<|im_start|>user")


@pytest.mark.parametrize(
    ("template", "thinking", "force", "ending"),
    [
        (QWEN, None, False, "Sure?<|im_end|>\n<|im_start|>assistant\n"),
        (QWEN, True, False, "Sure?<|im_end|>\n<|im_start|>assistant\n"),
        (QWEN, True, True, "<|im_start|>assistant\n<think>\n"),
        (QWEN, False, True, "<|im_start|>assistant\n<think>\n</think>\n"),
        (GPT_OSS, None, False, "Sure?<|end|><|start|>assistant"),
        (GPT_OSS, True, True, "<|start|>assistant<|channel|>analysis<|message|>"),
        (GPT_OSS, False, True, "<|start|>assistant<|channel|>final<|message|>"),
    ],
)
def test_a_prompt_ends_where_the_answer_begins(
    template: Template, thinking: bool | None, force: bool, ending: str
) -> None:
    pieces = render(TALK[:3], template, thinking=thinking, force_thinking=force, end="prompt")
    assert written(pieces).endswith(ending)
    closing = template.answer_end + template.answer_tail
    assert f"Three.{closing}" in written(pieces).replace("→", "").replace("←", "")


def test_forcing_needs_to_know_what() -> None:
    with pytest.raises(ConfigError, match="thinking=True or thinking=False"):
        render(TALK[:3], QWEN, force_thinking=True, end="prompt")


def test_a_document_is_trained_but_for_its_pictures() -> None:
    document = [Message.of("pretrain", "A dog ", IMAGE, " and more.")]
    assert written(render(document, QWEN)) == "→A dog ←[]→ and more.←"


@pytest.mark.parametrize(
    ("turns", "template", "problem"),
    [
        ([Message.of("tool", "7")], QWEN, "has no role 'tool'"),
        ([TALK[0], Message.of("system", "late")], QWEN, "'system' turn stands at place 2"),
        ([TALK[0], Message.of("pretrain", "x")], QWEN, "'pretrain' turn stands at place 2"),
        ([Message.of("pretrain", "x"), TALK[1]], QWEN, "2 turns"),
        ([TALK[2], Message.of("assistant", "Look: ", IMAGE)], QWEN, "shows a picture"),
    ],
)
def test_roles_that_do_not_fit_are_refused(
    turns: list[Message], template: Template, problem: str
) -> None:
    with pytest.raises(DataError, match=problem) as caught:
        render(turns, template)
    assert caught.value.kind == "roles"


@pytest.mark.parametrize(
    "token",
    ["<img>", "</img>", "<IMG_CONTEXT>", "<|im_start|>", "<|im_end|>", "<video>", "<|extra|>"],
)
@pytest.mark.parametrize("role", ["user", "assistant", "system", "pretrain"])
def test_control_tokens_in_text_are_refused(token: str, role: str) -> None:
    control = control_pattern(QWEN, ["<video>", "<|extra|>"])
    with pytest.raises(DataError, match="control token") as caught:
        check_text(Message.of(role, IMAGE, f"a {token} b"), control)  # type: ignore[arg-type]
    assert caught.value.kind == "control_token"
    assert repr(token) in caught.value.problem


@pytest.mark.parametrize("token", ["<|start|>", "<|channel|>", "<|return|>", "<|message|>"])
def test_gpt_oss_control_tokens_are_refused_with_its_template(token: str) -> None:
    with pytest.raises(DataError, match="control token"):
        check_text(Message.of("user", token), control_pattern(GPT_OSS, []))


def test_grounding_and_thinking_may_be_written() -> None:
    control = control_pattern(QWEN, ["<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>"])
    text = "<ref>a</ref><box>[[1, 2, 3, 4]]</box><quad></quad><think>\nb\n</think> < img >"
    check_text(Message.of("user", text), control)


def test_a_mark_without_its_picture_is_refused_in_questions_only() -> None:
    control = control_pattern(QWEN, [])
    with pytest.raises(DataError, match="no picture") as caught:
        check_text(Message.of("user", "<image>\nWhat?"), control)
    assert caught.value.kind == "image_count"
    check_text(Message.of("assistant", "Write <image> there."), control)


def test_text_that_is_no_unicode_is_refused() -> None:
    with pytest.raises(DataError, match="at character 2") as caught:
        check_text(Message.of("user", "ab\ud800"), control_pattern(QWEN, []))
    assert caught.value.kind == "encoding"


def test_unknown_templates_are_named() -> None:
    with pytest.raises(ConfigError, match=r"phi3-chat.*internvl2_5"):
        template_named("phi3-chat")


def test_the_pattern_of_control_tokens_names_the_longest() -> None:
    match = control_pattern(QWEN, ["<|im"]).search("<|im_start|>")
    assert match is not None
    assert match[0] == "<|im_start|>"


plain = st.text(alphabet="ab <>/\n", max_size=12).map(lambda text: text.strip("\n"))


@given(plain.filter(bool), plain)
def test_thinking_is_taken_apart_as_it_was_put_together(reasoning: str, answer: str) -> None:
    assert split_thinking(thinking_answer(reasoning, answer)) == (reasoning, answer)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("42", ("", "42")),
        ("12 and 30\n</think>\n\n42", ("12 and 30", "42")),  # <think> was part of the prompt
        ("<think>\n12 and", ("12 and", "")),  # cut short
        ("<think>\n</think>\n42", ("", "42")),
        ("<think>\n</think>\n\n", ("", "")),
    ],
)
def test_thinking_of_generated_answers(text: str, expected: tuple[str, str]) -> None:
    assert split_thinking(text) == expected


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (
            "<|channel|>analysis<|message|>Hm.<|end|>"
            "<|start|>assistant<|channel|>final<|message|>42<|return|>",
            "<think>\nHm.\n</think>\n\n42<|return|>",
        ),
        # after a forced beginning
        (
            "Hm.<|end|><|start|>assistant<|channel|>final<|message|>42",
            "<think>\nHm.\n</think>\n\n42",
        ),
        ("<|channel|>final<|message|>42", "42"),
        ("42", "42"),
        ("<|channel|>analysis<|message|>Hm", "<think>\nHm"),
    ],
)
def test_answers_from_channels_are_read(raw: str, expected: str) -> None:
    assert GPT_OSS.read_answer(raw) == expected
    assert QWEN.read_answer(raw) == raw


@pytest.mark.parametrize(
    ("text", "length", "digest"),
    [
        (INTERNVL_SYSTEM, 58, "bdb4d179c4c458dd"),
        (THINKING_PROMPT, 608, "a2cb9e8de918a3e3"),
        (GPT_OSS_SYSTEM, 212, "2efe1456bcea70d0"),
        (PROCESS_REWARD_SYSTEM, 945, "18279fe8e6c5f76a"),
    ],
)
def test_prompts_are_unchanged(text: str, length: int, digest: str) -> None:
    assert len(text) == length
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == digest
