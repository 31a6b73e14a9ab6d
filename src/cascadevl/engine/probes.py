"""Questions that yes or no answers, and how probable a yes is: P(yes) of the very first token.

Nothing is generated: one step of the engine reads the prompt and gives the log-probabilities of
what would come next. Probes about the same pictures share their beginning, which is read once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import PIL.Image
from transformers import PreTrainedTokenizerBase

from cascadevl.data.processor import CascadeVLProcessor
from cascadevl.engine.requests import Completion, Request
from cascadevl.engine.sampling import SamplingParams
from cascadevl.errors import ConfigError
from cascadevl.types import Example, ImageRef, Message, Part

NUM_TOP = 20
"""Most probable tokens that are looked at for a yes or a no; what vLLM gives at most by default."""

_SPELLINGS = ("{}", " {}")


@dataclass(frozen=True, slots=True)
class YesNo:
    """The tokens by which a model begins to say yes and no.

    Attributes:
        yes: All spellings of yes that are one token.
        no: All spellings of no.
    """

    yes: frozenset[int]
    no: frozenset[int]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> YesNo:
        """Find them.

        Args:
            tokenizer: Of the model.

        Raises:
            ConfigError: If it has no token for one of the two.
        """
        yes, no = (_tokens_of(tokenizer, word) for word in ("yes", "no"))
        if not yes or not no or yes & no:
            raise ConfigError(
                "the model's tokenizer has no single tokens for yes and no, so that it cannot be "
                "asked whether something is so; check answers with another model"
            )
        return cls(yes, no)


def _tokens_of(tokenizer: PreTrainedTokenizerBase, word: str) -> frozenset[int]:
    texts = (
        spelling.format(form)
        for spelling in _SPELLINGS
        for form in (word, word.capitalize(), word.upper())
    )
    found = (tokenizer(text, add_special_tokens=False).input_ids for text in texts)
    return frozenset(ids[0] for ids in found if len(ids) == 1)


def yes_probability(top: Sequence[tuple[int, float]], words: YesNo) -> float | None:
    """P(yes) among yes and no; None if neither is among the most probable tokens.

    Of the two, one that is not among them is taken to be as probable as the last that is: a little
    too much, so that the result is never surer than the model.

    Args:
        top: The most probable tokens with their log-probabilities.
        words: The tokens of yes and no.
    """
    yes = [math.exp(logprob) for token, logprob in top if token in words.yes]
    no = [math.exp(logprob) for token, logprob in top if token in words.no]
    if not yes and not no:
        return None
    least = min(math.exp(logprob) for _, logprob in top)
    share = sum(yes) if yes else least
    total = share + (sum(no) if no else least)
    return share / total if total else None


def first_top(completion: Completion) -> tuple[tuple[int, float], ...]:
    """The most probable first tokens of an answer.

    Args:
        completion: The answer, asked for with log-probabilities.
    """
    known = completion.logprobs[0] if completion.logprobs else completion.end_logprobs
    return () if known is None else known.top


def probe(
    processor: CascadeVLProcessor, question: str, about: Request, *, shows: bool = True
) -> Request:
    """A request for the first token of the answer to a question.

    Args:
        processor: Makes the prompt.
        question: What yes or no answers.
        about: What was asked before, by an example from the processor: its pictures are shown, all
            of them before the question, with its increments and its visual budget.
        shows: Whether the pictures are shown.

    Raises:
        DataError: If the question holds control tokens.
    """
    assert isinstance(about.prompt, Example), "asked for with an example"
    asked = about.prompt
    number = len(asked.tiles_per_image) if shows else 0
    # The pictures are cut already: the prompt is made with others of the same number, and gets
    # their tiles.
    stand_in = ImageRef(PIL.Image.new("RGB", (1, 1)))
    text = f"\n{question}" if number else question
    parts: tuple[Part, ...] = (*[stand_in] * number, text)
    example = processor.prompt([Message("user", parts)])
    empty = asked.tiles[:0] if len(asked.tiles) else np.zeros_like(example.tiles[:0])
    example = replace(
        example,
        tiles=asked.tiles if number else empty,
        tiles_per_image=asked.tiles_per_image if number else (),
        increments=asked.increments if number else (),
        tokens_per_tile=asked.tokens_per_tile if number else (),
    )
    return replace(
        about,
        prompt=example,
        sampling=SamplingParams(max_tokens=1, logprobs=NUM_TOP),
        num_samples=1,
        increments=about.increments if number or _is_number(about.increments) else None,
        stream=False,
    )


def _is_number(increments: object) -> bool:
    return isinstance(increments, int | float)
