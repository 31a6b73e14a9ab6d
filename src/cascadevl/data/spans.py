"""An example as people read it: stretches of text, with what is trained of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

from transformers import PreTrainedTokenizerBase

from cascadevl.types import Example


@dataclass(frozen=True, slots=True)
class Span:
    """Neighbouring tokens of one segment that are all trained or all not.

    Attributes:
        text: What they say; an image slot stands as one ``<IMG_CONTEXT>``.
        trained: Whether they are prediction targets.
        segment: Their segment.
        num_tokens: How many tokens.
    """

    text: str
    trained: bool
    segment: int
    num_tokens: int


def describe(example: Example, tokenizer: PreTrainedTokenizerBase) -> Iterator[Span]:
    """Show an example as the model will see it, with what is trained.

    Args:
        example: The example.
        tokenizer: The one that made it.
    """
    keys = zip(example.segments.tolist(), example.trained.tolist(), strict=True)
    for (segment, trained), run in groupby(
        zip(keys, example.input_ids.tolist(), strict=True), key=lambda item: item[0]
    ):
        ids = [token for _, token in run]
        text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        yield Span(text, trained, segment, len(ids))
