"""A budget of reasoning: after so many tokens of it an answer has to say what it comes to.

A thinking model reasons as long as it likes, and one that is cut off has said nothing. With a
budget, the tokens that close the reasoning are put in the model's mouth when the budget is spent,
and it goes on with its answer (docs/decisions/0032). Until then nothing is changed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Int64

from cascadevl.data.conversation import split_thinking
from cascadevl.data.encoding import TextEncoder
from cascadevl.data.processor import CascadeVLProcessor
from cascadevl.engine.sampler import Allowed
from cascadevl.engine.text_stream import Scanner, TextStream

THINK, THINK_END = "<think>", "</think>"
"""What stands around reasoning in the text of an answer."""


class Reasoning:
    """The reasoning of one answer while it is written, and the tokens that end it in time.

    Attributes:
        num_tokens: Tokens of the reasoning that were drawn. What opens it is not counted, and what
            closes it only where the model wrote that itself.
    """

    def __init__(self, processor: CascadeVLProcessor, budget: int, *, is_open: bool) -> None:
        """Begin an answer.

        Args:
            processor: Writes the text, and knows how reasoning is closed.
            budget: Most tokens of reasoning.
            is_open: The prompt has opened the reasoning (`opens_reasoning`).
        """
        self.num_tokens = 0
        self._processor, self._budget = processor, budget
        self._text, self._end = TextStream(processor), Scanner([THINK_END])
        self._start: str | None = None if is_open else ""  # until it is known how it begins
        self._forced: deque[int] = deque()
        self._is_over = False
        if is_open:
            self._close_if_spent("")

    @property
    def forced(self) -> int | None:
        """The token that must come next, if one must."""
        return self._forced[0] if self._forced else None

    def take(self, token: int) -> None:
        """Go on by a token of the answer.

        Args:
            token: The one that was drawn, or the forced one.
        """
        if self._forced:
            forced = self._forced.popleft()
            assert token == forced, "no other token was allowed"
            self._is_over = not self._forced
        elif not self._is_over:
            self._read(self._text.push(token))

    def _read(self, text: str) -> None:
        if self._start is None:
            self.num_tokens += 1
        else:
            shown = (self._start + text).lstrip()
            if not shown.startswith(THINK):
                self._start += text
                self._is_over = not THINK.startswith(shown)
                return
            self._start, text = None, shown.removeprefix(THINK)
        _, found = self._end.push(text)
        self._is_over = found is not None
        if not self._is_over:
            # A token that made no text certain is part of a character: that stands in between.
            self._close_if_spent(self._end.held if text else "")

    def _close_if_spent(self, held: str) -> None:
        if self.num_tokens >= self._budget:
            self._forced.extend(closing_ids(self._processor, held))


def closing_ids(processor: CascadeVLProcessor, held: str = "") -> list[int]:
    """Tokens that close the reasoning and lead to the answer, as training writes them.

    Args:
        processor: Of the model.
        held: A beginning of ``</think>`` that stands there already, which is then completed.
    """
    template = processor.template
    if template.reasoning is not None:
        text = template.reasoning[1] + template.answer_open
    else:
        text = f"{THINK_END.removeprefix(held)}\n\n" if held else f"\n{THINK_END}\n\n"
    return TextEncoder(processor.tokenizer)([text])[0]


def opens_reasoning(processor: CascadeVLProcessor, ids: Int64[np.ndarray, " tokens"]) -> bool:
    """Whether a prompt ends with the beginning of an answer that is sure to reason.

    Args:
        processor: Of the model.
        ids: The prompt.
    """
    start = TextEncoder(processor.tokenizer)([processor.template.start_thinking])[0]
    return bool(ids[-len(start) :].tolist() == start)


def num_reasoning_tokens(
    processor: CascadeVLProcessor, ids: Sequence[int], *, is_begun: bool = False
) -> int:
    """Tokens of an answer up to the end of its reasoning, the marks around it included.

    What is left is what the answer says. Of an answer that ended while it reasoned, all are.

    Args:
        processor: Of the model.
        ids: The answer.
        is_begun: The prompt has opened the reasoning.

    Returns:
        How many; 0 if it does not reason.
    """
    text, end = TextStream(processor), Scanner([THINK_END])
    start: str | None = None if is_begun else ""  # until it is known how it begins
    for number, token in enumerate(ids, start=1):
        piece = text.push(token)
        if start is not None:
            start = (start + piece).lstrip()
            if not start.startswith(THINK):
                if not THINK.startswith(start):
                    return 0
                continue
            piece, start = start.removeprefix(THINK), None
        if end.push(piece)[1] is not None:
            return number
    return len(ids) if start is None else 0


def with_forced(
    allowed: Allowed | None, forced: Mapping[int, int], vocab_size: int
) -> Allowed | None:
    """What may be said next, where some rows must say a certain token.

    Args:
        allowed: What grammars allow other rows.
        forced: The token by the place of its row among the logits.
        vocab_size: Width of the logits.
    """
    if not forced:
        return allowed
    places = np.array(list(forced), dtype=np.int64)
    tokens = torch.zeros(len(forced), vocab_size, dtype=torch.bool)
    tokens[torch.arange(len(forced)), torch.tensor(list(forced.values()))] = True
    if allowed is None:
        return Allowed(places, tokens)
    return Allowed(
        np.concatenate([allowed.places, places]), torch.cat([allowed.tokens.cpu(), tokens])
    )


def parted(text: str, *, is_begun: bool = False) -> tuple[str, str]:
    """Reasoning and content of a whole answer.

    Args:
        text: The answer.
        is_begun: The prompt has opened the reasoning.

    Returns:
        The reasoning, empty if there is none, and what is said, empty if it was not reached.
    """
    if is_begun and not text.lstrip().startswith(THINK):
        text = THINK + text
    return split_thinking(text)
