from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import sentencepiece
import torch
from transformers import PreTrainedTokenizerFast

from cascadevl.errors import CheckpointError
from cascadevl.model.internlm import (
    FusedAttention,
    convert_sentencepiece,
    join_wqkv,
    split_wqkv,
)
from cascadevl.model.tokenizer_files import load_tokenizer

CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "hello world  with two spaces, and (brackets)",
    "你好，世界。今天天气很好，我们去公园。",  # noqa: RUF001
    "def f(x):\n    return x + 12345",
    "El niño comió una manzana",
] * 10
TEXTS = [
    "hello world",
    "",
    " ",
    "   three spaces in front and behind   ",
    "你好 世界，今天",  # noqa: RUF001
    "🙂🙃 and 👩‍👩‍👧",
    "x = 1\n\n\ty",
    "naïve ß Ω unseen 龘",
    "the  lazy   dog\u3000ideographic",
]
IMAGE_TOKENS = ["<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>"]


def train(folder: Path, *, add_dummy_prefix: bool = False, **options: object) -> Path:
    settings = {
        "model_type": "bpe",
        "vocab_size": 400,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "character_coverage": 0.99,
        "user_defined_symbols": ["[UNUSED_TOKEN_1]"],
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_prefix=str(folder / "tokenizer"),
        add_dummy_prefix=add_dummy_prefix,
        **(settings | options),
    )
    return folder / "tokenizer.model"


def write_repository(folder: Path, *, first_id: int | None = None) -> Path:
    """The tokenizer files of an InternLM repository: no tokenizer.json, a class as remote code."""
    size = sentencepiece.SentencePieceProcessor(model_file=str(train(folder))).vocab_size()
    first = size if first_id is None else first_id
    added = {
        str(first + number): {"content": token, "special": True, "normalized": False}
        for number, token in enumerate(IMAGE_TOKENS)
    }
    config = {
        "tokenizer_class": "InternLM2Tokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]},
        "added_tokens_decoder": added,
        "bos_token": "<s>",
        "eos_token": {"content": "</s>", "special": True},
        "pad_token": "</s>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "tokenization_internlm2.py").write_text("raise SystemExit('remote code was run')")
    return folder


@pytest.mark.parametrize("add_dummy_prefix", [False, True])
def test_converted_tokenizer_gives_sentencepieces_ids_and_the_text_back(
    tmp_path: Path, add_dummy_prefix: bool
) -> None:
    file = train(tmp_path, add_dummy_prefix=add_dummy_prefix)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(file))
    converted = convert_sentencepiece(file)
    generator = random.Random(0)
    alphabet = "abcdehlor 你好世界天 \n1234().,é🙂"
    drawn = ["".join(generator.choices(alphabet, k=generator.randint(1, 40))) for _ in range(200)]
    for text in TEXTS + CORPUS[:5] + drawn:
        ids = converted.encode(text, add_special_tokens=False).ids
        assert ids == reference.encode(text), text
        assert converted.decode(ids, skip_special_tokens=False) == text


def test_extra_spaces_and_character_maps_are_normalised_as_sentencepiece_does(
    tmp_path: Path,
) -> None:
    file = train(tmp_path, normalization_rule_name="nmt_nfkc", remove_extra_whitespaces=True)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(file))
    converted = convert_sentencepiece(file)
    for text in ("  hello   world  ", "\uff48\uff45llo \u2460", "the quick"):
        assert converted.encode(text).ids == reference.encode(text), text


def test_repository_with_only_a_sentencepiece_model_opens_without_its_code(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_repository(tmp_path))
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    first = reference.vocab_size()
    assert [tokenizer.convert_tokens_to_ids(token) for token in IMAGE_TOKENS] == [
        *range(first, first + len(IMAGE_TOKENS))
    ]
    ids = tokenizer("你好<IMG_CONTEXT>the dog", add_special_tokens=False).input_ids
    assert ids == [*reference.encode("你好"), first + 2, *reference.encode("the dog")]
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")


def test_saved_again_it_is_a_plain_fast_tokenizer_with_the_same_ids(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    tokenizer = load_tokenizer(write_repository(source))
    tokenizer.save_pretrained(target)
    again = load_tokenizer(target)
    assert isinstance(again, PreTrainedTokenizerFast)
    for text in [*TEXTS, "a<img><IMG_CONTEXT></img>b"]:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert again(text, add_special_tokens=False).input_ids == ids


def test_added_tokens_that_do_not_follow_the_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="'<img>' should have id 9000"):
        load_tokenizer(write_repository(tmp_path, first_id=9000))


@pytest.mark.parametrize(
    ("content", "message"), [(b"\xff\xfenothing", "not a sentencepiece"), (None, "another type")]
)
def test_what_is_no_bpe_model_is_refused(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    file = tmp_path / "tokenizer.model"
    if content is None:
        train(tmp_path, model_type="unigram", vocab_size=320)
    else:
        file.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        convert_sentencepiece(file)


def test_folder_without_a_tokenizer_says_which_files_to_bring(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer \(tokenizer\.json, vocab\.json"):
        load_tokenizer(tmp_path)


def test_wqkv_rows_go_group_by_group_to_queries_keys_and_values() -> None:
    fused = FusedAttention(num_key_value_heads=2, num_groups=3)
    head_dim, hidden = 2, 5
    wqkv = torch.arange(2 * (3 + 2) * head_dim).float()[:, None].expand(-1, hidden)
    q, k, v = (split_wqkv(wqkv, part, fused)[:, 0].int().tolist() for part in "qkv")
    assert q == [0, 1, 2, 3, 4, 5, 10, 11, 12, 13, 14, 15]
    assert k == [6, 7, 16, 17]
    assert v == [8, 9, 18, 19]


@pytest.mark.parametrize("trailing", [(), (5,)])
def test_joining_undoes_splitting(trailing: tuple[int, ...]) -> None:
    fused = FusedAttention(num_key_value_heads=4, num_groups=2)
    wqkv = torch.randn(4 * (2 + 2) * 8, *trailing)
    q, k, v = (split_wqkv(wqkv, part, fused) for part in ("q", "k", "v"))
    assert torch.equal(join_wqkv(q, k, v, fused), wqkv)
