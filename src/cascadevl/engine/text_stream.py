"""From token ids to text, token by token: what is given out never has to be taken back.

Tokens are not characters: a character may take several, and bytes that never become one are shown
as U+FFFD. Joined, the pieces are what `CascadeVLProcessor.decode` gives for all ids at once with
``skip_special_tokens=True``. Each token costs the same, however long the answer is.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable
from functools import lru_cache

from tokenizers import decoders
from transformers import PreTrainedTokenizerBase

from cascadevl.data.conversation import Template
from cascadevl.data.processor import CascadeVLProcessor

_BYTE = re.compile(r"<0x[0-9A-F]{2}>\Z")


class TextStream:
    """The text of one answer, without control tokens, as its tokens come.

    ``<ref>``, ``<box>`` and ``<quad>`` belong to answers and stay. Where reasoning has a channel of
    its own (GPT-OSS) it is written between ``<think>`` and ``</think>``; of reasoning that was
    opened by the prompt, only the end is.
    """

    def __init__(self, processor: CascadeVLProcessor) -> None:
        """Begin an answer."""
        self._ids = _id_stage(processor.tokenizer)
        self._stages: list[Channels | Without] = []
        self._hidden = processor.hidden_ids
        template = processor.template
        if template.reasoning is not None:
            # Channels are told apart by control tokens, so these are left out afterwards.
            ids = processor.tokenizer.convert_tokens_to_ids(list(template.control_tokens))
            self._hidden -= set(ids)
            self._stages = [Channels(template), Without(template.control_tokens)]

    def push(self, token: int) -> str:
        """Take a token; give the text that has become certain with it."""
        if token in self._hidden:
            return ""
        text = self._ids.push(token)
        for stage in self._stages:
            text = stage.push(text)
        return text

    def flush(self) -> str:
        """The rest, when the answer has ended."""
        text = self._ids.flush()
        for stage in self._stages:
            text = stage.push(text) + stage.flush()
        return text


def token_bytes(tokenizer: PreTrainedTokenizerBase, token: int) -> bytes:
    """What a single token stands for, which may be a part of a character.

    Args:
        tokenizer: Knows the token; of one that it does not know, there are no bytes.
        token: Its id.
    """
    letters = tokenizer.backend_tokenizer.id_to_token(token)
    if letters is None:
        return b""
    if isinstance(tokenizer.backend_tokenizer.decoder, decoders.ByteLevel):
        return _bytes_of(letters)
    if _BYTE.match(letters):
        return bytes([int(letters[3:5], 16)])
    return str(letters).replace("\u2581", " ").encode()


def _id_stage(tokenizer: PreTrainedTokenizerBase) -> _Bytes | _Windows:
    if isinstance(tokenizer.backend_tokenizer.decoder, decoders.ByteLevel):
        return _Bytes(tokenizer)
    return _Windows(tokenizer)


class _Bytes:
    """Byte-level BPE (Qwen, GPT-OSS, our own): every token is some bytes of UTF-8."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._token_of = tokenizer.backend_tokenizer.id_to_token
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        letters = self._token_of(token)
        if letters is None:  # the vocabulary of a model may be wider than its tokenizer's
            return ""
        return self._decoder.decode(_bytes_of(letters))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


def _bytes_of(letters: str) -> bytes:
    """What a token of a byte-level vocabulary stands for."""
    table = _bytes_of_letters()
    if all(letter in table for letter in letters):
        return bytes(table[letter] for letter in letters)
    return letters.encode()  # an added token, written as it is


@lru_cache(maxsize=1)
def _bytes_of_letters() -> dict[str, int]:
    """The byte that each letter of a byte-level vocabulary stands for (GPT-2)."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(visible))
    return {chr(byte): byte for byte in visible} | {
        chr(256 + number): byte for number, byte in enumerate(others)
    }


class _Windows:
    """Any other tokenizer (sentencepiece with byte fallback: InternLM).

    A run of byte tokens is one thing: all of it becomes text, or none of it. After any other token
    the text is certain, and the next tokens are decoded behind that one, so that a space in front
    of them is not taken for the beginning of a text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._before: list[int] = []
        self._window: list[int] = []

    def push(self, token: int) -> str:
        self._window.append(token)
        letters = self._tokenizer.backend_tokenizer.id_to_token(token)
        if letters is None or _BYTE.match(letters):
            return ""
        return self.flush()

    def flush(self) -> str:
        known, text = (self._tokenizer.decode(ids) for ids in (self._before, self._all()))
        self._before, self._window = self._window[-1:], []
        return str(text)[len(known) :]

    def _all(self) -> list[int]:
        return [*self._before, *self._window]


class Scanner:
    """Finds the first of some strings in a text that comes piece by piece.

    An end that may be the beginning of one of them is held back until it is decided.
    """

    def __init__(self, wanted: Iterable[str]) -> None:
        """Begin a text; no string may be empty."""
        self._wanted = tuple(wanted)
        self._held = ""

    @property
    def held(self) -> str:
        """What is not certain yet: it may be the beginning of a string."""
        return self._held

    def push(self, text: str, *, search: bool = True) -> tuple[str, str | None]:
        """Take a piece.

        Args:
            text: The piece.
            search: False lets the strings pass as if they were text.

        Returns:
            What is certain, and the string found behind it, or None. The rest of the piece is then
            held: push an empty one to go on behind the string.
        """
        text = self._held + text
        found = [(place, each) for each in self._wanted if (place := text.find(each)) >= 0]
        if found and search:
            place, first = min(found, key=lambda one: (one[0], -len(one[1])))
            self._held = text[place + len(first) :]
            return text[:place], first
        start = min((self._beginning(text, each) for each in self._wanted), default=len(text))
        self._held = text[start:]
        return text[:start], None

    def flush(self) -> str:
        """What was held back, when no more comes."""
        rest, self._held = self._held, ""
        return rest

    @staticmethod
    def _beginning(text: str, wanted: str) -> int:
        """Where an end of the text begins that is a beginning of a string."""
        start = text.find(wanted[0], max(0, len(text) - len(wanted) + 1))
        while start >= 0:
            if wanted.startswith(text[start:]):
                return start
            start = text.find(wanted[0], start + 1)
        return len(text)


class Without:
    """Leaves strings out of a text."""

    def __init__(self, unwanted: Iterable[str]) -> None:
        """Begin a text."""
        self._scanner = Scanner(unwanted)

    def push(self, text: str) -> str:
        """What is certain with one more piece."""
        certain, found = self._scanner.push(text)
        while found is not None:
            more, found = self._scanner.push("")
            certain += more
        return certain

    def flush(self) -> str:
        """The rest, when no more comes."""
        return self._scanner.flush()


class Channels:
    """Writes reasoning that has a channel of its own as `Template.read_answer` does."""

    def __init__(self, template: Template) -> None:
        """Begin an answer."""
        assert template.reasoning is not None, "this template writes reasoning in the answer"
        self._opening, closing = template.reasoning
        self._answer_open = template.answer_open
        self._change: Scanner | None = Scanner([closing + template.answer_open])
        self._start: str | None = ""  # until it is known in which channel the answer begins

    def push(self, text: str) -> str:
        """What is certain with one more piece."""
        if self._start is None:
            return self._behind_start(text)
        start = self._start + text
        if start.startswith(self._opening):
            self._start = None
            return "<think>\n" + self._behind_start(start.removeprefix(self._opening))
        if start.startswith(self._answer_open):
            self._start = self._change = None
            return start.removeprefix(self._answer_open)
        if self._opening.startswith(start) or self._answer_open.startswith(start):
            self._start = start
            return ""
        self._start = None
        return self._behind_start(start)

    def flush(self) -> str:
        """The rest, when no more comes."""
        rest, self._start = self._start or "", None
        return rest + (self._change.flush() if self._change else "")

    def _behind_start(self, text: str) -> str:
        if self._change is None:
            return text
        reasoning, found = self._change.push(text)
        if found is None:
            return reasoning
        answer, self._change = self._change.flush(), None
        return f"{reasoning}\n</think>\n\n{answer}"
