"""Answers under a JSON schema: finished ones parse and fit, whatever the logits are."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
from transformers import (
    AddedToken,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
)

from cascadevl.data.tokenizer import SPECIAL_TOKENS, build_letter_tokenizer, build_tokenizer
from cascadevl.engine.constrained import Grammar, Grammars
from cascadevl.engine.sampler import sample
from cascadevl.engine.sampling import SamplingParams, SamplingTable
from cascadevl.errors import RequestError
from cascadevl.model.internlm import convert_sentencepiece

TEXTS = ['{"name": "fox", "count": 12, "found": true}', "the quick brown fox, über 東京"] * 3
VOCAB = 460  # wider than the tokenizers, as the logits of released models are
END, END_OF_TEXT = "<|im_end|>", "<|endoftext|>"


def of_our_own(folder: Path) -> PreTrainedTokenizerBase:
    return build_tokenizer(TEXTS, 420)


def of_letters(folder: Path) -> PreTrainedTokenizerBase:
    """Whole words and letters, as micro's: no merges."""
    return build_letter_tokenizer(TEXTS, 420)


def of_qwen(folder: Path) -> PreTrainedTokenizerBase:
    model = json.loads(build_tokenizer(TEXTS, 420).backend_tokenizer.to_str())["model"]
    added = {name: number for number, name in enumerate(SPECIAL_TOKENS)}
    plain = {name: number for name, number in model["vocab"].items() if name not in added}
    numbered = {name: number for number, name in enumerate(plain)}
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (folder / "vocab.json").write_text(json.dumps(numbered))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    tokenizer = Qwen2Tokenizer.from_pretrained(folder, local_files_only=True)
    tokenizer.add_tokens([AddedToken(name, special=True) for name in SPECIAL_TOKENS])
    return tokenizer


def of_internlm(folder: Path, add_dummy_prefix: bool = False) -> PreTrainedTokenizerBase:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 4),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=330,
        byte_fallback=True,
        add_dummy_prefix=add_dummy_prefix,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,  # as InternLM's
        minloglevel=2,
    )
    model = convert_sentencepiece(folder / "tokenizer.model")
    model.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(tokenizer_object=model)


def of_sentencepiece(folder: Path) -> PreTrainedTokenizerBase:
    """Whose texts begin with a space that is not there, as Llama's."""
    return of_internlm(folder, add_dummy_prefix=True)


OF_ALL_KINDS = (of_our_own, of_letters, of_qwen, of_internlm, of_sentencepiece)


class Setting:
    """A tokenizer with its grammars."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.ends = tokenizer.convert_tokens_to_ids([END, END_OF_TEXT])
        self.grammars = Grammars(tokenizer, VOCAB, self.ends)

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)


@pytest.fixture(scope="module", params=OF_ALL_KINDS)
def setting(request, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(request.param(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(of_our_own(tmp_path_factory.mktemp("tokenizer")))


def schema_of(**properties: dict[str, Any]) -> str:
    return json.dumps(
        {
            "type": "object",
            "properties": properties,
            "required": list(properties),
            "additionalProperties": False,
        }
    )


def is_box(value: Any) -> bool:
    box = value["box"]
    return list(value) == ["box"] and len(box) == 4 and all(0 <= each <= 1000 for each in box)


def is_person(value: Any) -> bool:
    return (
        list(value) == ["name", "kind", "adult"]
        and isinstance(value["name"], str)
        and len(value["name"]) <= 5
        and value["kind"] in ("a", "b\n", None)
        and isinstance(value["adult"], bool)
    )


INTEGER = {"type": "integer", "minimum": 0, "maximum": 1000}
BOX = {"type": "array", "items": INTEGER, "minItems": 4, "maxItems": 4}
SCHEMAS: dict[str, Callable[[Any], bool]] = {
    schema_of(box=BOX): is_box,
    schema_of(
        name={"type": "string", "maxLength": 5},
        kind={"enum": ["a", "b\n", None]},
        adult={"type": "boolean"},
    ): is_person,
    json.dumps({"type": "string", "pattern": "^[0-9]{3}-[a-z]$"}): (
        lambda value: re.fullmatch("[0-9]{3}-[a-z]", value) is not None
    ),
    json.dumps({"anyOf": [{"type": "null"}, {"const": [1, {"a": "東京"}]}]}): (
        lambda value: value in (None, [1, {"a": "東京"}])
    ),
}


class Answer:
    """One answer that is being sampled."""

    def __init__(self, setting: Setting, number: int, schema: str) -> None:
        self.setting, self.number, self.schema = setting, number, schema
        self.said: list[int] = []
        self.ended = False
        self.grammar: Grammar = setting.grammars.begin(schema)

    def interrupt(self) -> None:
        self.grammar = self.setting.grammars.begin(self.schema, self.said)

    def take(self, token: int) -> None:
        if token in self.setting.ends:
            self.ended = True
        else:
            self.said.append(token)
            self.grammar.take(token)


def say(setting: Setting, answers: list[Answer], steps: int, interrupted: bool = False) -> None:
    """Sample with random logits, some rows of each step unconstrained."""
    table = SamplingTable(VOCAB)
    rows = [
        table.add(f"answer {each.number}", SamplingParams(temperature=1.5, seed=each.number))
        for each in answers
    ]
    free = table.add("free", SamplingParams(temperature=1.0))
    for step in range(steps):
        going = [place for place, each in enumerate(answers) if not each.ended]
        if not going:
            return
        logits = torch.stack(
            [
                torch.randn(VOCAB, generator=torch.Generator().manual_seed(step * 1000 + place))
                for place in [999, *going]
            ]
        )
        logits[:, 450:] = 9.0  # ids without a token are the most probable
        grammars = {at: answers[place].grammar for at, place in enumerate(going, start=1)}
        now = np.array([free, *(rows[place] for place in going)])
        counters = np.full(len(now), step)
        got = sample(logits, table, now, counters, setting.grammars.allowed(grammars))
        for at, place in enumerate(going, start=1):
            answers[place].take(int(got.tokens[at]))
            if interrupted and step % 3 == 0:
                answers[place].interrupt()


def test_finished_answers_parse_and_fit(setting: Setting):
    answers = [
        Answer(setting, number * len(SCHEMAS) + kind, schema)
        for number in range(8)
        for kind, schema in enumerate(SCHEMAS)
    ]
    say(setting, answers, 200)
    assert sum(each.ended for each in answers) >= 30
    texts: dict[str, set[str]] = {schema: set() for schema in SCHEMAS}
    for each in answers:
        if each.ended:
            text = setting.tokenizer.decode(each.said)
            assert SCHEMAS[each.schema](json.loads(text)), text
            assert "\n" not in text
            texts[each.schema].add(text)
    assert all(len(texts[schema]) >= num for schema, num in zip(SCHEMAS, (6, 6, 6, 1), strict=True))


def test_an_interrupted_answer_goes_on_as_if_it_had_not_been(plain: Setting):
    schemas = list(SCHEMAS)
    whole = [Answer(plain, number, schemas[number % 4]) for number in range(8)]
    cut = [Answer(plain, number, schemas[number % 4]) for number in range(8)]
    say(plain, whole, 60)
    say(plain, cut, 60, interrupted=True)
    assert [each.said for each in cut] == [each.said for each in whole]


def test_samples_of_one_schema_go_their_own_ways(plain: Setting):
    schema = json.dumps({"enum": ["ab", "cd"]})
    one, other = plain.grammars.begin(schema), plain.grammars.begin(schema)
    for token in plain.ids('"ab"'):
        one.take(token)
    assert one.is_complete
    assert not other.is_complete
    assert np.flatnonzero(one.mask(VOCAB)).tolist() == sorted(plain.ends)
    assert not other.mask(VOCAB)[plain.ends].any()
    for token in plain.ids('"cd"'):
        other.take(token)
    assert other.is_complete


def test_a_value_that_can_go_on_may_also_end(plain: Setting):
    grammar = plain.grammars.begin(json.dumps({"type": "integer"}))
    assert not grammar.mask(VOCAB)[plain.ends].any()
    grammar.take(plain.ids("1")[0])
    mask = grammar.mask(VOCAB)
    assert mask[plain.ends].all()
    assert mask[plain.ids("7")].all()
    assert not mask[450:].any()


REFUSED = {
    "{": "json_schema is not a JSON object .*: {",
    "[1]": "json_schema is not a JSON object",
    '{"type": "foo"}': r"json_schema cannot be followed \(Invalid type: foo\): {\"type\"",
    '{"type": "array", "uniqueItems": true}': "cannot be followed .*uniqueItems",
    '{"$ref": "#/nowhere"}': "cannot be followed .*nowhere",
    '{"type": "integer", "minimum": 5, "maximum": 1}': "5.* is greater than maximum",
    '{"type": "string", "pattern": "("}': "(?s)cannot be followed .*unclosed group",
    '{"title": "' + "x" * 5000 + '", "type": "foo"}': r"x{180,190}\.\.\.$",
}


@pytest.mark.parametrize("schema", list(REFUSED))
def test_a_schema_that_cannot_be_followed_is_refused(plain: Setting, schema: str):
    with pytest.raises(RequestError, match=REFUSED[schema]):
        plain.grammars.begin(schema)


def test_a_token_that_is_not_allowed_is_an_error(plain: Setting):
    schema = json.dumps({"type": "boolean"})
    wrong = plain.ids("fox")[0]
    with pytest.raises(RequestError, match=f"cannot go on with token {wrong} under its json_sch"):
        plain.grammars.begin(schema, [wrong])
    assert not plain.grammars.begin(schema).is_complete  # the compiled schema is as it was


def test_schemas_are_compiled_once_and_the_oldest_are_forgotten():
    grammars = Grammars(build_tokenizer(TEXTS, 420), VOCAB, [2], max_schemas=2)
    compiled: list[str] = []
    original = grammars._matcher

    class Counting:
        grammar_from_json_schema = staticmethod(original.grammar_from_json_schema)

        def __new__(cls, tokenizer: Any, grammar: str, log_level: int) -> Any:
            compiled.append(grammar)
            return original(tokenizer, grammar, log_level=log_level)

    grammars._matcher = Counting
    one, two, three = (json.dumps({"const": number}) for number in (1, 2, 3))
    for schema in (one, one, two, one, three, one):
        grammars.begin(schema)
    assert len(compiled) == 3
    grammars.begin(two)
    assert len(compiled) == 4


def test_without_the_extra_the_error_names_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    with pytest.raises(RequestError, match=r"pip install 'cascadevl\[structured\]'"):
        Grammars(build_tokenizer(TEXTS, 420), VOCAB, [2])


def test_a_step_without_grammars_is_not_constrained(plain: Setting):
    assert plain.grammars.allowed({}) is None


def test_logprobs_under_a_grammar_are_the_models_own(plain: Setting):
    logits = torch.zeros(1, VOCAB)
    table = SamplingTable(VOCAB)
    row = table.add("one", SamplingParams(logprobs=0))
    allowed = plain.grammars.allowed({0: plain.grammars.begin(json.dumps({"const": None}))})
    got = sample(logits, table, np.array([row]), np.array([0]), allowed)
    assert got.logprobs[0] == pytest.approx(-math.log(VOCAB))
