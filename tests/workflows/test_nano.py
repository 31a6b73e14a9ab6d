"""The nano recipe in pieces: its mixtures, its tokenizer, its configurations, its questions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from tests.workflows.small_nano import tokenizer

from cascadevl.data.example import ExampleBuilder
from cascadevl.data.mixture import Mixture, WeightedSource
from cascadevl.data.processor import CascadeVLProcessor
from cascadevl.eval.suite import draw_row
from cascadevl.tasks.base import DESCRIBE_PROMPT, TaskSource
from cascadevl.train.config import ModelConfig
from cascadevl.train.sources import example_config
from cascadevl.train.start import from_scratch
from cascadevl.workflows import nano, nano_demo
from cascadevl.workflows.demonstration import EXAM_SEED

STAGES = {"pretrain": nano.pretrain_sources, "sft": nano.sft_sources}
NUM_DRAWS = 40


def task_sources(stage: str) -> list[TaskSource]:
    sources = [weighted.source for weighted in STAGES[stage]()]
    assert all(isinstance(source, TaskSource) for source in sources)
    return sources  # type: ignore[return-value]


def weights(sources: Sequence[WeightedSource]) -> list[float]:
    return [weighted.weight or 0.0 for weighted in sources]


@pytest.fixture(scope="module")
def processor() -> CascadeVLProcessor:
    return from_scratch(ModelConfig(preset="nano"), tokenizer(), seed=0)[1]


@pytest.mark.parametrize("stage", list(STAGES))
def test_weights_are_shares(stage: str) -> None:
    sources = STAGES[stage]()
    assert sum(weights(sources)) == pytest.approx(1.0)
    assert min(weights(sources)) > 0
    draws = [draw.source_name for draw in map(Mixture(sources, nano.SEED).draw, range(1000))]
    for weighted in sources:
        share = draws.count(weighted.source.name) / len(draws)
        assert share == pytest.approx(weighted.weight, abs=0.05)


@pytest.mark.parametrize("stage", list(STAGES))
def test_only_the_training_part_is_learned_from(stage: str) -> None:
    for source in task_sources(stage):
        assert source.split == "train"
        assert source.stage == stage
        assert all("/train/" in source[index].record_id for index in range(5))


def test_descriptions_belong_to_pretraining_alone() -> None:
    for stage in STAGES:
        for source in task_sources(stage):
            first = source[0].branches[0][0].text.strip()
            assert (first == DESCRIBE_PROMPT) == (stage == "pretrain")


def test_the_tokenizer_gives_every_text_back_and_knows_its_words() -> None:
    made = tokenizer()
    assert len(made) <= nano.VOCAB_SIZE
    texts = [
        turn.text
        for stage in STAGES
        for source in task_sources(stage)
        for index in range(1000, 1000 + NUM_DRAWS)
        for branch in source[index].branches
        for turn in branch
    ]
    assert len(texts) > 1000
    num_tokens = 0
    for text in texts:
        ids = made.encode(text, add_special_tokens=False)
        assert made.decode(ids) == text
        num_tokens += len(ids)
    words = sum(len(text.split()) for text in texts)
    assert num_tokens < 1.9 * words  # word-like tokens: punctuation and newlines count too


def test_the_suite_is_drawn_with_labels_for_a_narrow_terminal() -> None:
    rows = nano.suite(6)
    assert len({row.name for row in rows}) == len({row.label for row in rows}) == len(rows)
    assert max(len(row.label) for row in rows) <= 14
    for row in rows:
        drawn = draw_row(row, split="test", seed=EXAM_SEED)
        assert len(drawn) == 6
        assert all("/test/" in each.scene.scene_id for each in drawn)


def test_two_digit_numbers_are_asked_for_as_such() -> None:
    rows = {row.label: row for row in nano.suite(25)}
    answers = [a.question.answer for a in draw_row(rows["two digits"], split="test", seed=0)]
    assert all(len(answer) == 2 and answer.isdecimal() for answer in answers)
    answers = [a.question.answer for a in draw_row(rows["one digit"], split="test", seed=0)]
    assert all(len(answer) == 1 and answer.isdecimal() for answer in answers)


def test_every_answer_of_the_suite_fits_the_limit() -> None:
    """One token is for the end of the turn."""
    for row in nano.suite(60):
        for asked in draw_row(row, split="test", seed=EXAM_SEED):
            ids = tokenizer().encode(asked.question.response(), add_special_tokens=False)
            assert len(ids) < nano_demo.ANSWER_TOKENS


def test_no_row_is_easy_for_a_constant_answer() -> None:
    """The rows whose goal is chance + 15 points leave room for it."""
    for row in nano.suite(60):
        answers = [a.question.answer for a in draw_row(row, split="test", seed=EXAM_SEED)]
        assert max(answers.count(answer) for answer in answers) / 60 < 0.75


def test_pretraining_begins_with_a_preset_and_sft_with_its_model() -> None:
    first = nano.stage_config("pretrain", Path("out/pretrain"), num_steps=60, model=None)
    second = nano.stage_config("sft", Path("out/sft"), num_steps=90, model=Path("m"))
    assert (first.model.preset, first.model.path) == ("nano", None)
    assert (second.model.preset, second.model.path) == (None, "m")
    assert (first.run.num_steps, second.run.num_steps) == (60, 90)
    for config in (first, second):
        assert config.run.resume  # an interrupted demo goes on
        assert 0 < config.run.eval_interval < config.run.num_steps


@pytest.mark.parametrize("stage", list(STAGES))
def test_samples_fit(stage: str, processor: CascadeVLProcessor) -> None:
    """No record of the mixtures is left out for its length."""
    config = nano.stage_config(stage, Path("out"), num_steps=6, model=None)
    build = ExampleBuilder(
        processor.tokenizer,
        example_config(config.data, processor, nano.SEED),
        processor.tokens_per_tile,
    )
    for source in task_sources(stage):
        for index in range(8):
            example = build(source[index])
            assert example.num_tiles == 1
            assert example.trained.any()
