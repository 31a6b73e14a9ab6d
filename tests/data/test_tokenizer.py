"""The small tokenizer: order of tokens, Qwen's splitting, nothing lost, saved and loaded."""

from __future__ import annotations

import json
import random
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.data.conftest import TEXTS
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

from cascadevl.data.processor import CascadeVLProcessor
from cascadevl.data.tokenizer import (
    MIN_VOCAB_SIZE,
    SPECIAL_TOKENS,
    build_letter_tokenizer,
    build_tokenizer,
)
from cascadevl.errors import ConfigError

RELEASED_ORDER = (
    "<|endoftext|> <|im_start|> <|im_end|> <img> </img> <IMG_CONTEXT> "
    "<quad> </quad> <ref> </ref> <box> </box> <video>"
)


def test_special_tokens_have_the_first_ids_in_the_released_order(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    assert tokenizer.convert_ids_to_tokens(list(range(13))) == RELEASED_ORDER.split()
    assert all(tokenizer.added_tokens_decoder[number].special for number in range(13))
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert tokenizer.context_image_token == "<IMG_CONTEXT>"
    assert tokenizer.bos_token is None


def test_thinking_tokens_are_one_token_each_and_visible(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer("<think>12</think>", add_special_tokens=False).input_ids
    assert len(ids) == 4
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think>12</think>"


def test_the_headers_of_turns_are_three_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    for role in ("user", "assistant"):
        assert len(tokenizer(f"<|im_start|>{role}\n").input_ids) == 3


def test_same_texts_in_any_order_give_the_same_tokenizer() -> None:
    shuffled = random.Random(0).sample(TEXTS * 3, k=3 * len(TEXTS))
    one, other = build_tokenizer(TEXTS * 3, 400), build_tokenizer(shuffled, 400)
    assert one.backend_tokenizer.to_str() == other.backend_tokenizer.to_str()


def test_the_size_asked_for_is_the_most_and_reached_where_the_text_suffices() -> None:
    rich = [f"w{chr(97 + i % 26)}{chr(97 + i // 26 % 26)}x" for i in range(600)]
    assert len(build_tokenizer(rich, 320)) == 320
    assert len(build_tokenizer(["a"], 320)) < 320


def test_too_small_a_vocabulary_is_refused_with_the_number_needed() -> None:
    with pytest.raises(ConfigError, match=f"at least {MIN_VOCAB_SIZE}"):
        build_tokenizer(TEXTS, MIN_VOCAB_SIZE - 1)
    assert len(build_tokenizer(TEXTS, MIN_VOCAB_SIZE)) == MIN_VOCAB_SIZE


def test_special_tokens_in_the_texts_teach_no_words() -> None:
    tokenizer = build_tokenizer(["<ref>dog</ref><|im_end|>"] * 50, 400)
    words = {token for token in tokenizer.get_vocab() if len(token) > 1}
    assert not {"ref", "im", "end", "im_end"} & (words - set(SPECIAL_TOKENS))
    assert "dog" in words


@given(st.text())
def test_every_text_comes_back_in_its_normal_form(
    tokenizer: PreTrainedTokenizerFast, text: str
) -> None:
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == unicodedata.normalize("NFC", text)


@pytest.mark.parametrize(
    "text",
    ["I'LL add 1407 and 30.", "  two\n\n lines \r\n", "e\u0301t\u00e9 <ref>dog</ref>", "?!\n a\tb"],
)
def test_splits_as_qwen_does(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    qwen = Qwen2Tokenizer(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]])
    for token in SPECIAL_TOKENS:
        qwen.add_tokens([token], special_tokens=True)
    assert tokenizer(text).input_ids == qwen(text).input_ids


def test_digits_stand_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    many = build_tokenizer(["1407 1407 1407"] * 100, 400)
    assert many.tokenize("1407") == list("1407")


@pytest.mark.parametrize("model_type", [None, "internvl", "qwen3"])
def test_saved_and_loaded_by_transformers(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, model_type: str | None
) -> None:
    tokenizer.save_pretrained(tmp_path)
    if model_type:
        config = {"model_type": model_type, "architectures": ["X"]}
        (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "<|im_start|>user\nI'LL add 12 <ref>red</ref><think>e\u0301</think><|im_end|>"
    assert loaded(text).input_ids == tokenizer(text).input_ids
    assert (loaded.eos_token_id, loaded.pad_token_id) == (2, 0)
    assert loaded.context_image_token_id == 5
    assert len(loaded) == len(tokenizer)


WORDINGS = ["Is there a red star?\nyes", "What is 1 + 2?\n1 + 2 = 3"]


@pytest.fixture(scope="module")
def by_letters() -> PreTrainedTokenizerFast:
    return build_letter_tokenizer(WORDINGS, 400)


def test_words_of_the_texts_are_whole_and_others_are_letters(
    by_letters: PreTrainedTokenizerFast,
) -> None:
    tokens = by_letters.tokenize("Is there a red cart?")
    assert tokens == ["Is", "\u0120there", "\u0120", "a", "\u0120red", "\u0120", *"cart", "?"]
    # A whole word is no piece of a longer one, nor of itself without its space.
    assert by_letters.tokenize("yes yesterday") == ["yes", "\u0120", *"yesterday"]
    assert by_letters.tokenize("red") == list("red")
    assert by_letters.tokenize("r-e-d") == list("r-e-d")
    assert by_letters.tokenize("12 + 7") == ["1", "2", "\u0120+", "\u0120", "7"]


def test_by_letters_everything_else_is_as_before(by_letters: PreTrainedTokenizerFast) -> None:
    assert by_letters.convert_ids_to_tokens(list(range(13))) == RELEASED_ORDER.split()
    assert all(by_letters.added_tokens_decoder[number].special for number in range(13))
    for role in ("user", "assistant"):
        assert len(by_letters(f"<|im_start|>{role}\n").input_ids) == 3
    assert len(by_letters("<think>12</think>").input_ids) == 4
    assert sorted(by_letters.get_vocab().values()) == list(range(len(by_letters)))


def test_the_most_frequent_words_get_the_room_there_is() -> None:
    texts = ["often often often", "twice twice", "once"]
    small = build_letter_tokenizer(texts * 2, MIN_VOCAB_SIZE + 4)
    whole = {token for token in small.get_vocab() if token.strip("\u0120").isalpha()}
    assert {token for token in whole if len(token) > 2} == {
        *("user", "assistant", "\u0120often", "often"),
    }
    with pytest.raises(ConfigError, match=f"at least {MIN_VOCAB_SIZE}"):
        build_letter_tokenizer(texts, MIN_VOCAB_SIZE - 1)


@given(st.text())
def test_by_letters_every_text_comes_back(by_letters: PreTrainedTokenizerFast, text: str) -> None:
    ids = by_letters(text, add_special_tokens=False).input_ids
    assert by_letters.decode(ids) == unicodedata.normalize("NFC", text)


@pytest.mark.parametrize("model_type", [None, "internvl", "qwen3"])
def test_by_letters_saved_and_loaded_by_transformers(
    by_letters: PreTrainedTokenizerFast, tmp_path: Path, model_type: str | None
) -> None:
    by_letters.save_pretrained(tmp_path)
    if model_type:
        config = {"model_type": model_type, "architectures": ["X"]}
        (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "<|im_start|>user\nIs there a red cart?<think>e\u0301</think><|im_end|>"
    assert loaded(text).input_ids == by_letters(text).input_ids
    assert (loaded.eos_token_id, loaded.pad_token_id) == (2, 0)


def test_by_letters_through_our_processor(
    by_letters: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    processor = CascadeVLProcessor(by_letters, system_message="")
    processor.save_pretrained(tmp_path)
    loaded = CascadeVLProcessor.from_pretrained(tmp_path)
    turns = [{"role": "user", "content": [{"type": "text", "text": "Is there a red cart?"}]}]
    made = [
        each.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        for each in (processor, loaded)
    ]
    assert made[0] == made[1]
    ids = loaded.tokenizer(made[0]).input_ids
    assert ids == by_letters(made[0]).input_ids
    # Three for each header, eleven for the question, two for the end of the turn.
    assert len(ids) == 19
