"""Answers that follow a JSON schema: what each sample may say next, by its grammar.

llguidance compiles schemas and follows tokens (docs/decisions/0015); it comes with the extra
``structured``. JSON is written as ``json.dumps`` writes it, on one line: with free white space a
model could fill an answer with it and never close a bracket.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from transformers import PreTrainedTokenizerBase

from cascadevl.engine.sampler import Allowed
from cascadevl.errors import RequestError

_STYLE: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Grammar:
    """Where one answer stands in its grammar."""

    def __init__(self, matcher: Any) -> None:
        """Begin where a matcher of llguidance stands."""
        self._matcher = matcher

    def take(self, token: int) -> bool:
        """Go on by a token of the answer.

        Returns:
            Whether the answer can be followed any further; not where its grammar has grown beyond
            what llguidance will hold, as one of thousands of alternatives does.

        Raises:
            RequestError: If the grammar does not allow the token.
        """
        if self._matcher.consume_token(token):
            return True
        problem = self._matcher.get_error()
        # llguidance stops as too complex for a token that does not fit, too, and says so besides.
        fits = "doesn't satisfy the grammar" not in problem
        if fits and "TooComplex" in problem:
            return False
        reason = problem.partition("\n")[0]
        raise RequestError(
            f"the answer cannot go on with token {token} under its json_schema: {reason}"
        )

    @property
    def is_complete(self) -> bool:
        """Whether the answer is a whole JSON value; it may still be able to go on."""
        return bool(self._matcher.is_accepting())

    def mask(self, vocab_size: int) -> Bool[np.ndarray, " vocab"]:
        """Which tokens may come next; the ends of an answer where it is complete."""
        packed = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        return np.unpackbits(packed, count=vocab_size, bitorder="little").view(np.bool_)


class Grammars:
    """Makes grammars of schemas for one tokenizer, and remembers the latest ones compiled."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        vocab_size: int,
        end_ids: Sequence[int],
        max_schemas: int = 64,
    ) -> None:
        """Read the tokenizer, which takes about a second where it is large.

        Args:
            tokenizer: Byte-level BPE, or sentencepiece with byte fallback.
            vocab_size: Width of the logits; ids that no token has are never allowed.
            end_ids: Tokens that end an answer of the model.
            max_schemas: How many compiled schemas are kept.

        Raises:
            RequestError: If llguidance is not installed.
        """
        try:
            import llguidance
        except ImportError as error:
            raise RequestError(
                "json_schema needs the extra 'structured': pip install 'cascadevl[structured]'"
            ) from error
        backend = copy(tokenizer.backend_tokenizer)
        backend.no_padding()
        backend.no_truncation()
        self._matcher = llguidance.LLMatcher
        self._tokenizer = llguidance.LLTokenizer(
            backend.to_str(), n_vocab=vocab_size, eos_token=list(end_ids)
        )
        self._vocab_size, self._max_schemas = vocab_size, max_schemas
        self._compiled: OrderedDict[str, Any] = OrderedDict()

    def begin(self, schema: str, token_ids: Sequence[int] = ()) -> Grammar:
        """The grammar of an answer.

        Args:
            schema: A JSON schema, as JSON text.
            token_ids: What a sample that is taken up again has said already.

        Raises:
            RequestError: If the schema is not one, asks for something that cannot be followed, or
                does not allow these tokens.
        """
        grammar = Grammar(self._compile(schema).deep_copy())
        for token in token_ids:
            grammar.take(token)
        return grammar

    def allowed(self, grammars: Mapping[int, Grammar]) -> Allowed | None:
        """What the constrained rows of a step may say, for `cascadevl.engine.sampler.sample`.

        Args:
            grammars: By the place of the row among the logits.
        """
        if not grammars:
            return None
        masks = np.stack([each.mask(self._vocab_size) for each in grammars.values()])
        return Allowed(np.array(list(grammars), dtype=np.int64), torch.from_numpy(masks))

    def _compile(self, schema: str) -> Any:
        if schema in self._compiled:
            self._compiled.move_to_end(schema)
            return self._compiled[schema]
        try:
            grammar = self._matcher.grammar_from_json_schema(schema, overrides=_STYLE)
        except ValueError as error:
            raise RequestError(
                f"json_schema is not a JSON object ({error}): {_shortened(schema)}"
            ) from error
        matcher = self._matcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise RequestError(
                f"json_schema cannot be followed ({matcher.get_error()}): {_shortened(schema)}"
            )
        self._compiled[schema] = matcher
        if len(self._compiled) > self._max_schemas:
            self._compiled.popitem(last=False)
        return matcher


def _shortened(text: str, most: int = 200) -> str:
    return text if len(text) <= most else f"{text[:most]}..."
