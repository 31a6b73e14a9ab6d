"""Judged solutions: the released multi-turn form, read and written, and what of it is trained."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
from tests.engine.small_talk import build
from tests.model import make_checkpoints as make
from transformers import PreTrainedTokenizerBase

from cascadevl.data.example import ExampleBuilder, ExampleConfig
from cascadevl.data.parsing import parse_record
from cascadevl.data.process_records import (
    WORDINGS,
    JudgedSolution,
    StepBuilder,
    conversation_of,
    judged_question,
    label_tokens,
    process_fields,
    read_judged,
)
from cascadevl.data.prompts import PROCESS_REWARD_SYSTEM
from cascadevl.data.spans import describe
from cascadevl.errors import ConfigError, DataError
from cascadevl.types import ImageRef, Message, Record

RELEASED = {
    "id": 7,
    "image": "a.png",
    "conversations": [
        {"from": "system", "value": PROCESS_REWARD_SYSTEM},
        {
            "from": "human",
            "value": "### Question:\n<image>\nHow many?\n\n### Solution Process:\nI see three.",
        },
        {"from": "gpt", "value": "+"},
        {"from": "human", "value": "Three and one\nare five."},
        {"from": "gpt", "value": "-"},
        {"from": "human", "value": "Answer: 5"},
        {"from": "gpt", "value": "-"},
    ],
}
"""A line as the public script writes it, typed from its description."""


def parsed(fields: dict[str, Any], root: Path | None = None) -> Record:
    return parse_record(fields, source="x.jsonl:1", root=root)


def builder_of(template: str, tokenizer: PreTrainedTokenizerBase) -> ExampleBuilder:
    return ExampleBuilder(tokenizer, ExampleConfig(template=template, system=""), 4)


def test_the_released_form_is_read() -> None:
    judged = read_judged(parsed(RELEASED))
    (shown, text) = judged.question.parts
    assert shown == ImageRef(Path("a.png"))
    assert text == "\nHow many?"
    assert judged.steps == ("I see three.", "Three and one\nare five.", "Answer: 5")
    assert judged.labels == (True, False, False)


def test_what_is_written_is_the_released_form_and_reads_back() -> None:
    judged = read_judged(parsed(RELEASED))
    row = process_fields(judged, record_id="7", images=["a.png"], mc=[0.5, 0.0, 0.0])
    assert row == {**RELEASED, "id": "7", "mc": [0.5, 0.0, 0.0]}
    assert read_judged(parsed(json.loads(json.dumps(row)))) == judged
    text_alone = replace(judged, question=Message.of("user", "2 + 2?"))
    again = parsed(process_fields(text_alone, record_id="8", mc=[1.0] * 3))
    assert read_judged(again) == text_alone
    written = conversation_of(text_alone)
    assert [(t.role, t.text) for t in again.messages] == [(t.role, t.text) for t in written]


def test_a_question_that_speaks_of_solutions_is_read_up_to_the_last_heading() -> None:
    question = Message.of("user", "What follows\n\n### Solution Process:\n?")
    judged = JudgedSolution(question=question, steps=("A step.",), labels=(True,))
    assert read_judged(parsed(process_fields(judged, record_id="1", mc=[1.0]))) == judged


@pytest.mark.parametrize(
    ("turn", "value", "problem"),
    [
        (2, "yes", "answered with 'yes'"),
        (2, "+-", r"answered with '\+-'"),
        (1, "How many?", "no '### Solution Process:'"),
    ],
)
def test_other_conversations_are_refused(turn: int, value: str, problem: str) -> None:
    turns = [dict(each) for each in RELEASED["conversations"]]  # type: ignore[attr-defined]
    turns[turn]["value"] = value
    fields = {"id": 1, "conversations": turns}
    fields |= {"image": "a.png"} if "<image>" in turns[1]["value"] else {}
    with pytest.raises(DataError, match=problem) as caught:
        read_judged(parsed(fields))
    assert caught.value.kind == "bad_turns"
    assert "x.jsonl:1" in str(caught.value)


@pytest.mark.parametrize("family", ["qwen3", "gpt_oss"])
def test_exactly_the_labels_are_targets_one_a_step(family: str, tmp_path: Path) -> None:
    PIL.Image.new("RGB", (40, 40), "red").save(tmp_path / "a.png")
    template = "internvl3_5_gpt_oss" if family == "gpt_oss" else "internvl2_5"
    build_steps = StepBuilder(builder_of(template, make.tokenizer(family)))
    example = build_steps(parsed(RELEASED, tmp_path))
    spans = [s for s in describe(example, make.tokenizer(family)) if s.trained]
    assert [span.text for span in spans] == ["+", "-", "-"]
    assert [span.num_tokens for span in spans] == [1, 1, 1]
    ids = example.input_ids[example.trained].tolist()
    assert ids == [build_steps.tokens.plus, build_steps.tokens.minus, build_steps.tokens.minus]


def test_signs_in_steps_are_no_targets_and_a_missing_system_message_is_put_in_front() -> None:
    processor = build()
    turns = [
        {"from": "human", "value": "### Question:\n2 + 2 - 1?\n\n### Solution Process:\n+"},
        {"from": "gpt", "value": "-"},
    ]
    with_system = [RELEASED["conversations"][0], *turns]  # type: ignore[index]
    build_steps = StepBuilder(processor.builder)
    bare, whole = (build_steps(parsed({"conversations": each})) for each in (turns, with_system))
    assert bare.input_ids.tolist() == whole.input_ids.tolist()
    assert int(bare.trained.sum()) == 1
    assert bare.input_ids[bare.trained].tolist() == [build_steps.tokens.minus]
    with pytest.raises(DataError, match="no solution with judged steps"):
        build_steps(parsed({"conversations": [turns[0], {"from": "gpt", "value": "4"}]}))


def test_a_tokenizer_without_the_two_tokens_is_refused() -> None:
    processor = build()
    tokenizer = processor.tokenizer
    assert label_tokens(processor.builder).plus == tokenizer.convert_tokens_to_ids("+")
    both = {"additional_special_tokens": ["+<|im_end|>"]}  # an answer and its end are one token
    tokenizer.add_special_tokens(both, replace_extra_special_tokens=False)
    with pytest.raises(ConfigError, match="no single tokens"):
        label_tokens(builder_of("internvl2_5", tokenizer))


def test_the_last_question_is_judged_with_all_pictures() -> None:
    first, second = (ImageRef(PIL.Image.new("RGB", (9, 9), c)) for c in ("red", "blue"))
    prompt = [
        Message.of("system", "Be brief."),
        Message.of("user", first, "\nWhat?"),
        Message.of("assistant", "A door."),
        Message.of("user", second, "\nAnd here?"),
    ]
    assert judged_question(prompt).parts == (first, second, "\nAnd here?")
    with pytest.raises(DataError, match="does not end with a question"):
        judged_question(prompt[:3])


def test_the_short_prompt_says_one_line_and_trains_the_same_labels(tmp_path: Path) -> None:
    PIL.Image.new("RGB", (40, 40), "red").save(tmp_path / "a.png")
    processor = build()
    long, short = (
        StepBuilder(processor.builder, prompt)(parsed(RELEASED, tmp_path))
        for prompt in ("released", "short")
    )
    assert short.input_ids[short.trained].tolist() == long.input_ids[long.trained].tolist()
    assert len(long.input_ids) > 3 * len(short.input_ids)
    text = "".join(span.text for span in describe(short, processor.tokenizer))
    assert text.startswith("<|im_start|>system\nRight so far? + or -<|im_end|>\n")
    assert "\nHow many?\n\nI see three.<|im_end|>" in text
    assert "Solution Process" not in text
    turns = [{"from": "human", "value": "2 + 2?\n\nFour."}, {"from": "gpt", "value": "+"}]
    build_steps = StepBuilder(processor.builder, "short")
    with pytest.raises(DataError, match="no '### Solution Process:'"):
        build_steps(parsed({"conversations": turns}))


def test_solutions_are_scored_with_the_prompt_that_was_trained() -> None:
    judged = read_judged(parsed({**RELEASED, "image": ["a.png"]}))
    asked = replace(judged.question, parts=("How many?",))
    for prompt, wording in WORDINGS.items():
        build_steps = StepBuilder(build().builder, prompt)
        scored = build_steps.candidates(asked, [judged.steps], source="x")
        one = replace(judged, question=asked, labels=(True,) * 3)
        record = Record(source="x", record_id="x", messages=conversation_of(one, wording))
        trained = StepBuilder(build().builder)(record)
        assert scored.input_ids.tolist() == trained.input_ids.tolist()
        assert scored.trained.tolist() == trained.trained.tolist()
