"""A small tokenizer for models trained from scratch, in the style of the released ones.

The released checkpoints bring their own. The presets nano and micro need one that is small, made
in moments from the text they will see, and otherwise like Qwen's, so that templates, special tokens
and everything above them are the same for models of 3 million and of 241 billion parameters.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from cascadevl.data.conversation import (
    CONTENT_TOKENS,
    IMAGE_CONTEXT,
    IMAGE_END,
    IMAGE_START,
)
from cascadevl.data.parsing import VIDEO_MARK
from cascadevl.errors import ConfigError

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

SPECIAL_TOKENS = (
    *(END_OF_TEXT, TURN_START, TURN_END),
    *(IMAGE_START, IMAGE_END, IMAGE_CONTEXT),
    *CONTENT_TOKENS,
    VIDEO_MARK,
)
"""Special tokens, with ids from 0 upwards, in the released order; -HF brings ``<video>``."""

THINKING_TOKENS = ("<think>", "</think>")
"""One token each, but ordinary text: they stay visible in decoded answers, as in Qwen3."""

NAMED_TOKENS = {
    "start_image_token": IMAGE_START,
    "end_image_token": IMAGE_END,
    "context_image_token": IMAGE_CONTEXT,
    "video_token": VIDEO_MARK,
}
"""Attributes of the tokenizer by which transformers' InternVL processor finds these tokens."""

MIN_VOCAB_SIZE = len(SPECIAL_TOKENS) + 256 + len(THINKING_TOKENS)

_WHOLE = re.compile(r"\u0120?[A-Za-z]{2,}|\u0120[^\w\s]")
"""What may be one token of a letter tokenizer: words, and signs behind a space (U+0120, where bytes
are written as letters)."""

# Qwen's: contractions, words with their leading space, digits one by one, punctuation, spaces.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def build_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE tokenizer.

    The same texts in any order give the same tokenizer. Every string can be encoded and comes
    back unchanged up to Unicode normalisation (NFC, as Qwen's).

    Args:
        texts: What the model will read and write; special tokens in it are left out.
        vocab_size: Most tokens, special and thinking tokens included; there are fewer if the
            texts do not hold that many different pairs.

    Returns:
        A tokenizer that ends a turn with ``<|im_end|>`` and fills rows with ``<|endoftext|>``.

    Raises:
        ConfigError: If ``vocab_size`` has no room for the bytes and the special tokens.
    """
    _check_size(vocab_size)
    tokenizer = _splitting(Tokenizer(BPE()))
    trainer = BpeTrainer(
        vocab_size=vocab_size - len(THINKING_TOKENS),
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_plain(texts), trainer)
    return _finished(tokenizer)


def build_letter_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of whole words and single letters, with nothing between them.

    The words of the texts are one token each, with and without a space before them as they
    occur. Every other word is written letter by letter, so that a model can write any word that it
    can read, without having met its pieces. Otherwise as `build_tokenizer`.

    Args:
        texts: Holds the words that become tokens, the most frequent ones where there are too many.
        vocab_size: Most tokens, special and thinking tokens included.

    Raises:
        ConfigError: If ``vocab_size`` has no room for the bytes and the special tokens.
    """
    _check_size(vocab_size)
    splitter = _splitter()
    counts = Counter(
        piece
        for text in _plain(texts)
        for piece, _ in splitter.pre_tokenize_str(unicodedata.normalize("NFC", text))
        if _WHOLE.fullmatch(piece)
    )
    whole = sorted(counts, key=lambda piece: (-counts[piece], piece))
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*SPECIAL_TOKENS, *letters, *whole[: vocab_size - MIN_VOCAB_SIZE]]
    ids = {token: number for number, token in enumerate(tokens)}
    # Without merges a piece is one token if it is in the vocabulary, and otherwise its bytes.
    tokenizer = _splitting(Tokenizer(BPE(vocab=ids, merges=[], ignore_merges=True)))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    return _finished(tokenizer)


def _check_size(vocab_size: int) -> None:
    if vocab_size < MIN_VOCAB_SIZE:
        raise ConfigError(
            f"vocab_size is {vocab_size}, but {len(SPECIAL_TOKENS)} special tokens, 256 bytes and "
            f"{len(THINKING_TOKENS)} thinking tokens need at least {MIN_VOCAB_SIZE}"
        )


def _splitter() -> pre_tokenizers.Sequence:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _splitting(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer, set to normalise and split as Qwen's."""
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _splitter()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _finished(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """With the thinking tokens, as transformers takes it."""
    tokenizer.add_tokens([AddedToken(token, special=False) for token in THINKING_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        extra_special_tokens=NAMED_TOKENS,
        clean_up_tokenization_spaces=False,
    )


def _plain(texts: Iterable[str]) -> Iterator[str]:
    """The texts without special tokens, whose letters would otherwise be learned as words.

    Each comes with the roles of a question and an answer, which it will stand beside in a
    conversation: so the header of a turn takes three tokens and not one a letter.
    """
    special = re.compile("|".join(map(re.escape, (*SPECIAL_TOKENS, *THINKING_TOKENS))))
    for text in texts:
        yield from filter(None, special.split(text))
        yield from ("user\n", "assistant\n")
