"""From messages to the exact text a model was trained on, and to which of it is trained.

Each released family has a template; wrong newlines or loss spans do not fail, they only make a
model worse. So the templates are data, one function renders all of them, and training,
inference and the transformers-style processor call it.

A template gives pieces. A piece of text is tokenised on its own; pieces end at special tokens, or
where what is trained begins, so that a turn has the same tokens whatever surrounds it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from cascadevl.data.parsing import IMAGE_MARK
from cascadevl.data.prompts import (
    GPT_OSS_SYSTEM,
    GPT_OSS_THINKING,
    INTERNVL_SYSTEM,
    THINKING_PROMPT,
)
from cascadevl.errors import ConfigError, DataError
from cascadevl.types import ImageRef, Message, Part

IMAGE_START, IMAGE_END, IMAGE_CONTEXT = "<img>", "</img>", "<IMG_CONTEXT>"
"""What stands around an image, and its slot."""

CONTENT_TOKENS = ("<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>")
"""Special tokens that belong to questions and answers: a person may write them."""

_THINKING = re.compile(r"\A\s*(?:<think>)?(.*?)</think>(.*)\Z", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of a rendered conversation.

    Attributes:
        content: Text, tokenised on its own, or a picture.
        trained: Whether its tokens are prediction targets.
    """

    content: str | ImageRef
    trained: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Template:
    """How a family of models writes a conversation.

    Attributes:
        name: Name in a checkpoint's ``template`` key.
        system: System message where none is given.
        thinking_system: System message that asks for reasoning before the answer.
        around: Text before and after the content of a turn, by role; never trained.
        answer_start: Header of an assistant turn, not trained: what a prompt ends with.
        answer_open: Beginning of the answer that is trained.
        answer_end: End of an assistant turn that others follow; trained.
        last_answer_end: End of the last assistant turn; trained.
        answer_tail: What follows the end, not trained.
        reasoning: Text before and after the reasoning where it has a channel of its own;
            None where it is written in the answer, between ``<think>`` and ``</think>``.
        start_thinking: Beginning of an answer that is sure to reason.
        start_plain: Beginning of an answer that is sure not to.
        stop_tokens: Tokens that end a generated answer.
        control_tokens: Tokens that nobody may write in a message.
    """

    name: str
    system: str
    thinking_system: str
    around: Mapping[str, tuple[str, str]]
    answer_start: str
    answer_open: str = ""
    answer_end: str
    last_answer_end: str
    answer_tail: str = ""
    reasoning: tuple[str, str] | None = None
    start_thinking: str
    start_plain: str
    stop_tokens: tuple[str, ...]
    control_tokens: tuple[str, ...]

    def read_answer(self, text: str) -> str:
        """Bring a generated answer, control tokens included, to the form of messages.

        Reasoning in a channel of its own becomes ``<think>...</think>``; nothing else changes.

        Args:
            text: What the model wrote after the prompt.
        """
        if self.reasoning is None:
            return text
        opening, closing = self.reasoning
        before, found, after = text.partition(closing + self.answer_open)
        if found:
            return thinking_answer(before.removeprefix(opening), after)
        if text.startswith(opening):  # stopped while still reasoning
            return f"<think>\n{text.removeprefix(opening)}"
        return text.removeprefix(self.answer_open)


TEMPLATES: Mapping[str, Template] = {
    # InternVL2.5, 3 and 3.5 on Qwen and InternLM
    "internvl2_5": Template(
        name="internvl2_5",
        system=INTERNVL_SYSTEM,
        thinking_system=THINKING_PROMPT,
        around={
            "system": ("<|im_start|>system\n", "<|im_end|>\n"),
            "user": ("<|im_start|>user\n", "<|im_end|>\n"),
        },
        answer_start="<|im_start|>assistant\n",
        answer_end="<|im_end|>",
        last_answer_end="<|im_end|>",
        answer_tail="\n",
        start_thinking="<think>\n",
        start_plain="<think>\n</think>\n",
        stop_tokens=("<|im_end|>",),
        control_tokens=("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
    ),
    # InternVL3.5-20B-A4B
    "internvl3_5_gpt_oss": Template(
        name="internvl3_5_gpt_oss",
        system=GPT_OSS_SYSTEM,
        thinking_system=GPT_OSS_THINKING,
        around={
            "system": ("<|start|>system<|message|>", "<|end|>"),
            "user": ("<|start|>user<|message|>", "<|end|>"),
            "tool": ("<|start|>tool<|message|>", "<|end|>"),
        },
        answer_start="<|start|>assistant",
        answer_open="<|channel|>final<|message|>",
        answer_end="<|end|>",
        last_answer_end="<|return|>",
        reasoning=("<|channel|>analysis<|message|>", "<|end|><|start|>assistant"),
        start_thinking="<|channel|>analysis<|message|>",
        start_plain="<|channel|>final<|message|>",
        stop_tokens=("<|return|>", "<|call|>"),
        control_tokens=(
            *("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>"),
            *("<|constrain|>", "<|startoftext|>", "<|endoftext|>"),
        ),
    ),
}
"""The only list of templates, by the name checkpoints carry."""


def template_named(name: str) -> Template:
    """The template of a checkpoint.

    Args:
        name: The checkpoint's ``template`` key.

    Raises:
        ConfigError: If it is not one of `TEMPLATES`.
    """
    if name not in TEMPLATES:
        known = ", ".join(TEMPLATES)
        raise ConfigError(f"unknown conversation template {name!r}; known are {known}")
    return TEMPLATES[name]


def thinking_answer(reasoning: str, answer: str) -> str:
    """An answer with worked reasoning, in the form messages hold it.

    Args:
        reasoning: How the answer is found.
        answer: The answer alone.
    """
    return f"<think>\n{reasoning}\n</think>\n\n{answer}"


def split_thinking(text: str) -> tuple[str, str]:
    """Take an answer apart into its reasoning and what is said in the end.

    A missing ``<think>`` (it was part of the prompt) and a missing ``</think>`` (the answer was
    cut short, so nothing is said) are understood.

    Args:
        text: An answer.

    Returns:
        The reasoning, empty if there is none, and the answer, empty if it was not reached.
    """
    if match := _THINKING.match(text):
        return match[1].strip("\n"), match[2].lstrip("\n")
    if text.lstrip().startswith("<think>"):
        return text.lstrip().removeprefix("<think>").strip("\n"), ""
    return "", text


def control_pattern(template: Template, special_tokens: Sequence[str]) -> re.Pattern[str]:
    """What nobody may write in a message.

    Args:
        template: Its control tokens count.
        special_tokens: Special tokens of the tokenizer; those for grounding are allowed.
    """
    tokens = {IMAGE_START, IMAGE_END, IMAGE_CONTEXT, *template.control_tokens, *special_tokens}
    # Longest first, so that an error names `<|im_start|>` and not a token that is part of it.
    ordered = sorted(tokens - set(CONTENT_TOKENS) - {""}, key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, ordered)))


def check_text(message: Message, control: re.Pattern[str]) -> None:
    """Refuse text that would be read as control tokens, or that cannot be encoded.

    Args:
        message: The turn to check.
        control: From `control_pattern`.

    Raises:
        DataError: Of kind ``control_token``, ``image_count`` (a mark without its picture) or
            ``encoding``.
    """
    for part in message.parts:
        if not isinstance(part, str):
            continue
        match = control.search(part)
        if match:
            raise DataError(
                f"the {message.role} text contains the control token {match[0]!r}",
                kind="control_token",
                remedy="remove it; pictures are parts of a message, not text",
            )
        if message.role != "assistant" and IMAGE_MARK in part:
            raise DataError(
                f"the {message.role} text contains the mark {IMAGE_MARK!r}, but no picture for it",
                kind="image_count",
                remedy="give as many pictures as there are marks",
            )
        if not part.isascii():
            try:
                part.encode("utf-8")
            except UnicodeEncodeError as error:
                raise DataError(
                    f"the {message.role} text is not valid Unicode "
                    f"({part[error.start]!r} at character {error.start})",
                    kind="encoding",
                    remedy="remove the lone surrogate",
                ) from error


def system_text(
    messages: Sequence[Message],
    template: Template,
    *,
    system: str | None = None,
    thinking: bool | None = None,
) -> str:
    """The system message of a conversation that has none of its own.

    Args:
        messages: The turns; where answers reason in a channel of their own, the default system
            message lists that channel.
        template: Source of the defaults.
        system: None for the template's; empty for no system turn.
        thinking: True asks for reasoning, whatever ``system`` says.

    Returns:
        The text, empty if the turn is left out.
    """
    if thinking:
        return template.thinking_system
    if system is not None:
        return system
    if thinking is None and template.reasoning is not None:
        answers = (split_thinking(turn.text) for turn in messages if turn.role == "assistant")
        if any(reasoning for reasoning, _ in answers):
            return template.thinking_system
    return template.system


End: TypeAlias = Literal["complete", "prompt", "followed", "open"]
"""How a rendered conversation ends: finished; with the header of the answer to come; with a
finished turn that others follow; or within its last turn, which goes on."""


def render(
    messages: Sequence[Message],
    template: Template,
    *,
    system: str | None = None,
    thinking: bool | None = None,
    force_thinking: bool = False,
    end: End = "complete",
) -> list[Piece]:
    """Write a conversation as its model was trained on it.

    Trained are the assistant turns without their header, with their end token. A ``pretrain``
    message is trained throughout; pictures never are. Texts are taken as checked (`check_text`).

    Args:
        messages: The turns. A leading system turn stands instead of any other system message.
        template: The form.
        system: System message; None for the template's, empty for no system turn.
        thinking: True asks for reasoning in the system message.
        force_thinking: Also begin the answer so that it does reason (``thinking=True``) or does
            not (``False``). Only for prompts.
        end: How it ends; see `End`.

    Raises:
        DataError: Of kind ``roles``, if a turn has a role the template does not know or that may
            not stand there, or an answer shows a picture.
        ConfigError: If the thinking mode is forced but not named.
    """
    if force_thinking and thinking is None:
        raise ConfigError("force_thinking needs thinking=True or thinking=False")
    if messages and messages[0].role == "pretrain":
        return _document(messages)
    _check_roles(messages, template)
    pieces: list[Piece] = []
    if not messages or messages[0].role != "system":
        text = system_text(messages, template, system=system, thinking=thinking)
        if text:
            messages = [Message.of("system", text), *messages]
    for number, message in enumerate(messages):
        is_last = number == len(messages) - 1
        is_open = is_last and end == "open"
        if message.role == "assistant":
            is_final = is_last and end == "complete"
            closing = template.last_answer_end if is_final else template.answer_end
            pieces += _answer(message, template, None if is_open else closing)
            continue
        before, after = template.around[message.role]
        pieces += _turn(before, message.parts, "" if is_open else after)
    if end == "prompt":
        pieces.append(Piece(template.answer_start))
        if force_thinking:
            pieces.append(Piece(template.start_thinking if thinking else template.start_plain))
    return pieces


def _document(messages: Sequence[Message]) -> list[Piece]:
    if len(messages) != 1:
        raise DataError(
            f"a pre-training sample has {len(messages)} turns",
            kind="roles",
            remedy="give exactly one turn of role 'pretrain'",
        )
    return _turn("", messages[0].parts, "", trained=True)


def _turn(before: str, parts: Sequence[Part], after: str, *, trained: bool = False) -> list[Piece]:
    """One turn: text as long as it goes, cut only where a picture stands."""
    pieces: list[Piece] = []
    text = before
    for part in parts:
        if isinstance(part, str):
            text += part
            continue
        assert isinstance(part, ImageRef), "videos are taken apart into frames before rendering"
        if text:
            pieces.append(Piece(text, trained))
        pieces.append(Piece(part))
        text = ""
    if text + after:
        pieces.append(Piece(text + after, trained))
    return pieces


def _answer(message: Message, template: Template, closing: str | None) -> list[Piece]:
    """An assistant turn; without a closing it goes on."""
    if not all(isinstance(part, str) for part in message.parts):
        raise DataError(
            "an assistant turn shows a picture",
            kind="roles",
            remedy="pictures belong to user turns",
        )
    text = template.answer_open + message.text
    if template.reasoning is not None:
        reasoning, answer = split_thinking(message.text)
        if reasoning:
            opening, between = template.reasoning
            text = opening + reasoning + between + template.answer_open + answer
    pieces = [Piece(template.answer_start)]
    if closing is None:
        return [*pieces, Piece(text, trained=True)] if text else pieces
    pieces.append(Piece(text + closing, trained=True))
    return [*pieces, Piece(template.answer_tail)] if template.answer_tail else pieces


def _check_roles(messages: Sequence[Message], template: Template) -> None:
    for number, message in enumerate(messages, start=1):
        if message.role in ("system", "pretrain") and number > 1:
            raise DataError(
                f"a {message.role!r} turn stands at place {number}",
                kind="roles",
                remedy="it may only come first",
            )
        if message.role not in (*template.around, "assistant"):
            raise DataError(
                f"the template {template.name!r} has no role {message.role!r}",
                kind="roles",
                remedy=f"use {', '.join((*template.around, 'assistant'))}",
            )
