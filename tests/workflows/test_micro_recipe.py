"""Micro's recipe: how it writes, what it is trained on, and what it is asked."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

from cascadevl.tasks.base import to_prompt
from cascadevl.tasks.text import spelled
from cascadevl.tasks.words import load_words
from cascadevl.workflows import micro

SPACE = "\u0120"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return micro.tokenizer()


def test_printed_words_are_letters(tokenizer: PreTrainedTokenizerFast) -> None:
    """All but the few that prompts and fixed answers are made of."""
    for split in ("train", "test"):
        words = load_words(split)
        alone = [word for word in words if tokenizer.tokenize(word) == list(word)]
        behind = [word for word in words if tokenizer.tokenize(f" {word}") == [SPACE, *word]]
        assert len(alone) > 0.99 * len(words)
        assert len(behind) > 0.94 * len(words)
        assert all(tokenizer.tokenize(spelled(word)) == list(spelled(word)) for word in words)


def test_questions_are_words(tokenizer: PreTrainedTokenizerFast) -> None:
    """A question about a picture takes about as many tokens as it has words and signs."""
    for row in micro.suite(1):
        if row.short in ("axis value", "printed value", "chart value", "text sums"):
            continue  # these name labels, or hold numbers
        for index in range(5):
            for question in row.task.draw("train", 0, index).questions:
                text = to_prompt(row.task.draw("train", 0, index), question)[0].text
                words = text.replace("?", " ?").replace(".", " .").replace(":", " :").split()
                digits = sum(character.isdigit() for character in text)
                assert len(tokenizer.tokenize(text)) <= len(words) + 2 * digits + 3, text


def test_months_are_words_and_other_labels_letters(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.tokenize("Jan 12, Feb 7") == [
        *("Jan", SPACE, "1", "2", ",", f"{SPACE}Feb", SPACE, "7")
    ]
    assert tokenizer.tokenize("Waseca") == list("Waseca")


def test_shares_of_every_stage_add_up() -> None:
    for stage in micro.STAGES:
        if stage in micro.VISION_STAGES:
            continue
        sources = micro.sources(stage)
        assert sum(each.weight or 0.0 for each in sources) == pytest.approx(1.0)
        families = {each.source.name.split()[0] for each in sources}
        assert not families & {"grounding", "needle"}


def test_no_stage_sees_what_another_saw() -> None:
    assert len(set(micro.SEEDS.values())) == len(micro.SEEDS) == len(micro.STAGES)
