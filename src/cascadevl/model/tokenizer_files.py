"""The tokenizer of a released checkpoint, opened without running code from outside.

``tokenizer.json`` is read where there is one, Qwen's vocabulary and merges by transformers' own
class, and InternLM's ``tokenizer.model`` through `cascadevl.model.internlm`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from cascadevl.data.conversation import (
    CONTENT_TOKENS,
    IMAGE_CONTEXT,
    IMAGE_END,
    IMAGE_START,
)
from cascadevl.data.tokenizer import NAMED_TOKENS
from cascadevl.errors import CheckpointError
from cascadevl.model.config_files import read_json
from cascadevl.model.internlm import convert_sentencepiece

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json"),
)
"""Names under which released repositories keep parts of a tokenizer."""

IMAGE_TOKENS = (IMAGE_START, IMAGE_END, IMAGE_CONTEXT, *CONTENT_TOKENS)
"""What the released tokenizers have beyond those of their language models, in this order."""


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint folder.

    Args:
        path: As for `read_tokenizer`.

    Raises:
        CheckpointError: As `read_tokenizer`, or if the token ``<IMG_CONTEXT>`` is missing.
    """
    tokenizer = read_tokenizer(path)
    if IMAGE_CONTEXT not in tokenizer.get_vocab():
        raise CheckpointError(
            f"{path}: the tokenizer has no token {IMAGE_CONTEXT}; it is not an InternVL tokenizer"
        )
    return tokenizer


def read_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint folder or of a language model, which knows no pictures.

    Args:
        path: A folder with ``tokenizer.json``, or ``vocab.json`` and ``merges.txt`` (Qwen), or
            ``tokenizer.model`` (InternLM).

    Raises:
        CheckpointError: If there is none of these, or the files contradict each other about the
            ids of added tokens.
    """
    settings, added = _settings(path), _added_tokens(path)
    if (path / "tokenizer.json").is_file():
        tokenizer: PreTrainedTokenizerBase = PreTrainedTokenizerFast(
            tokenizer_file=str(path / "tokenizer.json"), **settings
        )
    elif (path / "vocab.json").is_file() and (path / "merges.txt").is_file():
        tokenizer = transformers.Qwen2Tokenizer.from_pretrained(path, local_files_only=True)
    elif (path / "tokenizer.model").is_file():
        model = convert_sentencepiece(path / "tokenizer.model")
        for number in sorted(added):
            token = added[number]
            (model.add_special_tokens if token.special else model.add_tokens)([token])
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, **settings)
    else:
        raise CheckpointError(
            f"{path}: no tokenizer (tokenizer.json, vocab.json with merges.txt, or "
            "tokenizer.model); copy these files from the released repository"
        )
    vocab = tokenizer.get_vocab()
    for number, token in added.items():
        if vocab.get(token.content) != number:
            raise CheckpointError(
                f"{path}: token {token.content!r} should have id {number} but gets "
                f"{vocab.get(token.content)}; the tokenizer's files do not belong together"
            )
    return tokenizer


def add_image_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Add the tokens of the released tokenizers that are missing, in the released order.

    Args:
        tokenizer: Of a language model; changed in place.

    Returns:
        Ids of the tokens that are new.
    """
    vocab = tokenizer.get_vocab()
    new = [token for token in IMAGE_TOKENS if token not in vocab]
    tokenizer.add_tokens(
        [AddedToken(token, normalized=False, special=True) for token in new], special_tokens=True
    )
    vocab = tokenizer.get_vocab()
    return tuple(vocab[token] for token in new)


def _settings(path: Path) -> dict[str, Any]:
    """What tokenizer_config.json says that any tokenizer understands, no class and no code."""
    file = path / "tokenizer_config.json"
    if not file.is_file():
        return {}
    known = (
        *("bos_token", "eos_token", "pad_token", "unk_token", "additional_special_tokens"),
        *("extra_special_tokens", "model_max_length", "padding_side", "chat_template"),
    )
    config = read_json(file)
    settings = {key: _text(config[key]) for key in known if config.get(key) is not None}
    extra = settings.get("extra_special_tokens", {})
    if isinstance(extra, dict):
        names = {key: _text(config[key]) for key in NAMED_TOKENS if key in config}
        settings["extra_special_tokens"] = {**names, **extra}
    return {**settings, "clean_up_tokenization_spaces": False}


def _text(token: Any) -> Any:
    if isinstance(token, list):
        return [_text(each) for each in token]
    is_token = isinstance(token, dict) and "content" in token
    return token["content"] if is_token else token


def _added_tokens(path: Path) -> dict[int, AddedToken]:
    """The tokens that a repository's files add to the vocabulary, by id."""
    config, older = path / "tokenizer_config.json", path / "added_tokens.json"
    values = read_json(config).get("added_tokens_decoder", {}) if config.is_file() else {}
    contents = {int(number): value for number, value in values.items()}
    for content, number in (read_json(older) if older.is_file() else {}).items():
        contents.setdefault(number, {"content": content})
    return {
        number: AddedToken(
            value["content"], normalized=False, special=bool(value.get("special", True))
        )
        for number, value in contents.items()
    }
