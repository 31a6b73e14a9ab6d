"""Preference pairs in the released format: read, written, and what is wrong with others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.data.conftest import picture
from transformers import PreTrainedTokenizerFast

from cascadevl.data.check import check
from cascadevl.data.example import ExampleBuilder, ExampleConfig
from cascadevl.data.hub import open_source
from cascadevl.data.meta import read_meta
from cascadevl.data.parsing import parse_record
from cascadevl.data.source import Source
from cascadevl.data.spans import describe
from cascadevl.data.tiling import TilingConfig
from cascadevl.data.writing import preference_fields, problem_fields
from cascadevl.errors import DataError
from cascadevl.types import ImageRef, Message, Record, VideoRef

PAIR = {"question": "<image>\nHow many?", "image": "a.png", "chosen": "3", "rejected": "4"}


def read(fields: dict[str, Any], **more: Any) -> Record:
    return parse_record(fields, source="f:1", **more)


def test_a_released_line() -> None:
    record = read({"id": 7, **PAIR, "answer_gt": "3", "chosen_meta": {}}, root=Path("r"))
    assert record.messages == (Message.of("user", ImageRef(Path("r/a.png")), "\nHow many?"),)
    assert record.branches == ((Message.of("assistant", "3"),), (Message.of("assistant", "4"),))
    assert record.record_id == "7"


def test_pictures_without_a_mark_several_of_them_none_and_a_video() -> None:
    text = {"chosen": "3", "rejected": "4", "question": "How many?"}
    assert read({**text, "image": "a.png"}).messages[0].parts[1] == "\nHow many?"
    two = read({**text, "question": "<image> and <image>?", "image": ["a.png", "b.png"]})
    assert two.messages[0].parts == (
        *(ImageRef(Path("a.png")), " and ", ImageRef(Path("b.png"))),
        "?",
    )
    assert read(text).messages == (Message.of("user", "How many?"),)
    film = read({**text, "video": "a.mp4"}).messages[0].parts[0]
    assert film == VideoRef(source=Path("a.mp4"))


def test_a_system_prompt_comes_first_and_an_empty_one_does_not() -> None:
    first = read({**PAIR, "system_prompt": "Think."}).messages
    assert first[0] == Message.of("system", "Think.")
    assert [turn.role for turn in first] == ["system", "user"]
    for nothing in ("", None):
        assert [turn.role for turn in read({**PAIR, "system_prompt": nothing}).messages] == ["user"]


def test_a_question_that_waits_for_its_answer() -> None:
    record = read({"question": "How many?"}, answered=False)
    assert (record.messages, record.branches) == ((Message.of("user", "How many?"),), ())
    assert read(PAIR, answered=False).branches == ()


@pytest.mark.parametrize(
    ("change", "kind", "field"),
    [
        ({"chosen": None}, "bad_field", "chosen"),
        ({"rejected": 4}, "bad_field", "rejected"),
        ({"rejected": " \n"}, "bad_field", "rejected"),
        ({"rejected": "3"}, "bad_field", "rejected"),
        ({"question": None}, "bad_field", "question"),
        ({"question": ["How?"]}, "bad_field", "question"),
        ({"question": "How \ud800?"}, "bad_field", "question"),
        ({"system_prompt": 5}, "bad_field", "system_prompt"),
        ({"question": "<image><image>"}, "image_count", "question"),
        ({"image": None}, "image_count", "question"),
        ({"image": "http://a/b.png"}, "unsupported_source", "image"),
        ({"video": "a.mp4"}, "bad_field", "video"),
    ],
)
def test_what_is_no_pair_is_named(change: dict[str, Any], kind: str, field: str) -> None:
    with pytest.raises(DataError) as caught:
        read({**PAIR, **change})
    assert (caught.value.kind, caught.value.field) == (kind, field)
    assert caught.value.source == "f:1"


# -- written


def test_a_pair_letter_by_letter() -> None:
    prompt = [
        Message.of("system", "Think."),
        Message.of("user", ImageRef(b"x"), "\nHow many?"),
    ]
    fields = preference_fields(prompt, "3", "4", record_id="a/0", images=["a.png"], reference="3")
    assert list(fields.items()) == [
        ("id", "a/0"),
        ("image", "a.png"),
        ("system_prompt", "Think."),
        ("question", "<image>\nHow many?"),
        ("chosen", "3"),
        ("rejected", "4"),
        ("answer_gt", "3"),
    ]


plain = st.text(min_size=1).filter(lambda text: "<image>" not in text and "<video>" not in text)
words = plain.filter(lambda text: bool(text.strip()))


@given(words, words, words, st.one_of(st.just(""), words), st.lists(plain, max_size=3))
def test_what_is_written_is_read_back(
    question: str, chosen: str, rejected: str, system: str, between: list[str]
) -> None:
    parts: list[Any] = []
    for text in between:
        parts += [ImageRef(b"x"), text]
    images = [f"{number}.png" for number in range(len(between))]
    turn = Message("user", (*parts, ImageRef(b"x"), question))
    images.append("last.png")
    prompt = [*([Message.of("system", system)] if system else []), turn]
    if chosen == rejected:
        with pytest.raises(DataError):
            preference_fields(prompt, chosen, rejected, record_id="x", images=images)
        return
    fields = preference_fields(prompt, chosen, rejected, record_id="x", images=images)
    record = read(json.loads(json.dumps(fields)))
    assert [each.role for each in record.messages] == [each.role for each in prompt]
    assert [each.text for each in record.messages] == [each.text for each in prompt]
    shown = [part if isinstance(part, str) else None for part in record.messages[-1].parts]
    assert shown == [part if isinstance(part, str) else None for part in turn.parts]
    assert [branch[0].text for branch in record.branches] == [chosen, rejected]


def test_prompts_of_several_turns_are_refused() -> None:
    talk = [Message.of("user", "a"), Message.of("assistant", "b"), Message.of("user", "c")]
    with pytest.raises(DataError, match="the turns user, assistant, user") as caught:
        preference_fields(talk, "3", "4", record_id="x")
    assert caught.value.kind == "bad_turns"


def test_marks_that_no_picture_belongs_to_are_refused() -> None:
    for fields in (
        lambda turn: preference_fields([turn], "3", "4", record_id="x"),
        lambda turn: problem_fields(turn, "3", record_id="x", metric="exact", choices={}),
    ):
        with pytest.raises(DataError) as caught:
            fields(Message.of("user", "What is <image>?"))
        assert caught.value.kind == "image_count"


# -- trained on


def test_a_meta_file_that_names_pairs_gives_examples_that_share_the_picture(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """The prompt once, and each branch token by token what the conversation alone would be."""
    picture(40, 20).save(tmp_path / "a.png")
    pair = {**PAIR, "chosen": "There are 3.", "rejected": "It is 1407."}
    (tmp_path / "p.jsonl").write_text(json.dumps(pair) + "\n")
    entry = {"root": "", "annotation": "p.jsonl", "repeat_time": 1, "length": 1}
    (tmp_path / "meta.json").write_text(json.dumps({"mmpr": entry}))
    (spec,) = read_meta(tmp_path / "meta.json")
    source = open_source(spec)
    assert isinstance(source, Source)
    tiling = TilingConfig(tile_px=28, max_tiles=4)
    builder = ExampleBuilder(tokenizer, ExampleConfig(tiling=tiling), 4)
    example = builder(source[0])
    assert example.parents == (-1, 0, 0)
    trained = [span.text for span in describe(example, tokenizer) if span.trained]
    assert trained == ["There are 3.<|im_end|>", "It is 1407.<|im_end|>"]
    for branch, said in ((1, pair["chosen"]), (2, pair["rejected"])):
        turns = [
            {"from": "human", "value": pair["question"]},
            {"from": "gpt", "value": said},
        ]
        alone = builder(
            parse_record({"image": "a.png", "conversations": turns}, source="x", root=tmp_path)
        )
        mine = (example.segments == 0) | (example.segments == branch)
        np.testing.assert_array_equal(example.input_ids[mine], alone.input_ids)
        np.testing.assert_array_equal(example.trained[mine], alone.trained)
        np.testing.assert_array_equal(example.tiles, alone.tiles)


def test_the_check_reads_pairs(tmp_path: Path) -> None:
    picture(40, 20).save(tmp_path / "a.png")
    lines = [PAIR, {**PAIR, "rejected": ""}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "meta.json").write_text(json.dumps({"mmpr": {"annotation": "p.jsonl"}}))
    report = check(tmp_path / "meta.json", tiling=TilingConfig())
    assert report.num_bad == 1
    assert "p.jsonl:2: field 'rejected'" in report.datasets[0].problems[0].messages[0]


def test_rows_of_a_data_set_may_be_pairs(tmp_path: Path) -> None:
    import datasets

    rows = {key: [PAIR[key]] for key in ("question", "chosen", "rejected")}
    rows["question"] = ["How many?"]
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "p.parquet")
    (tmp_path / "meta.json").write_text(json.dumps({"mmpr": {"annotation": "p.parquet"}}))
    (spec,) = read_meta(tmp_path / "meta.json")
    source = open_source(spec)
    assert isinstance(source, Source)
    assert [branch[0].text for branch in source[0].branches] == ["3", "4"]
