"""Texts to ids, piece by piece, at little cost.

A tokenizer's call costs about as much as a whole short example, and most pieces are the same ones
again: headers of turns, ends of turns, common questions and answers. So short pieces are
remembered.
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from cascadevl.errors import ConfigError

_MAX_CHARACTERS = 200  # longer texts rarely come twice
_MAX_REMEMBERED = 50_000  # about 20 MB


class TextEncoder:
    """Tokenises pieces of text, each on its own and without anything added.

    Attributes:
        start_ids: What the tokenizer puts before a text: nothing for Qwen, a BOS token for
            InternLM.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Bind a tokenizer, whose vocabulary must not change afterwards."""
        self._tokenizer = tokenizer
        self._remembered: dict[str, list[int]] = {}
        before = tokenizer("", add_special_tokens=True).input_ids
        self.start_ids = [int(token) for token in before if token == tokenizer.bos_token_id]

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of every text.

        Args:
            texts: The pieces.
        """
        known = self._remembered
        new = [text for text in dict.fromkeys(texts) if text not in known]
        if not new:
            return [known[text] for text in texts]
        ids = self._tokenizer(new, add_special_tokens=False, verbose=False).input_ids
        found = {text: known[text] for text in texts if text in known}
        found.update(zip(new, ids, strict=True))
        if len(known) + len(new) > _MAX_REMEMBERED:
            known.clear()
        known.update((text, found[text]) for text in new if len(text) <= _MAX_CHARACTERS)
        return [found[text] for text in texts]

    def id_of(self, token: str) -> int:
        """The id of a token that must be there.

        Args:
            token: The token.

        Raises:
            ConfigError: If the tokenizer does not know it.
        """
        ids = self([token])[0]
        if len(ids) != 1:
            raise ConfigError(
                f"the tokenizer has no token {token!r} (it reads it as {len(ids)} tokens); "
                "use the tokenizer of the checkpoint, or another template"
            )
        return ids[0]
