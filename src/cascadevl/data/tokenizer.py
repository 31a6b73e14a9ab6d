"""A small tokenizer for models trained from scratch, in the style of the released ones.

The released checkpoints bring their own. The presets nano and micro need one that is small, made
in moments from the text they will see, and otherwise like Qwen's, so that templates, special tokens
and everything above them are the same for models of 3 million and of 241 billion parameters.
"""

from __future__ import annotations

import re
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
    if vocab_size < MIN_VOCAB_SIZE:
        raise ConfigError(
            f"vocab_size is {vocab_size}, but {len(SPECIAL_TOKENS)} special tokens, 256 bytes and "
            f"{len(THINKING_TOKENS)} thinking tokens need at least {MIN_VOCAB_SIZE}"
        )
    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=vocab_size - len(THINKING_TOKENS),
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_plain(texts), trainer)
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
