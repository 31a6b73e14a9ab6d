"""A run's ratio of text to multimodal data: reached in tokens, written down, kept on resuming."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from tests.train.run_folders import crashing_at
from tests.train.small_run import QUIET, small_config, tokenizer

from cascadevl.data.example import ExampleBuilder
from cascadevl.data.mixture import Mixture, WeightedSource
from cascadevl.errors import ConfigError, TrainingError
from cascadevl.sequence import expand
from cascadevl.tasks.base import TaskSource
from cascadevl.tasks.handwriting import Handwriting
from cascadevl.tasks.shapes import Shapes
from cascadevl.tasks.text import Text
from cascadevl.train import mixing
from cascadevl.train.config import ModelConfig, TrainConfig
from cascadevl.train.mixing import FACTS, mixed, with_weights
from cascadevl.train.pretrain import pretrain
from cascadevl.train.sources import example_builder
from cascadevl.train.start import from_scratch

TEXT = ("sums", "words")
NUM_DRAWS = 2000


def source(label: str, task: Any, length: int, **more: Any) -> WeightedSource:
    made = TaskSource(task=task, length=length, stage="pretrain", label=label)
    return WeightedSource(source=made, **more)


def sources() -> list[WeightedSource]:
    """Two text and two multimodal families, whose records differ much in length."""
    return [
        source("sums", Text(), 3000),
        source("words", Text(difficulty="full", num_questions=2), 500, repeat=2.0),
        source("digits", Handwriting(difficulty="one", num_questions=1), 2000),
        source("shapes", Shapes(num_questions=4), 4000, repeat=0.5),
    ]


def config(out: Path, **values: Any) -> TrainConfig:
    return small_config(out, **{"data__mixture": "internvl3", "data__max_tokens": 600, **values})


@pytest.fixture(scope="module")
def builder() -> ExampleBuilder:
    _, processor = from_scratch(ModelConfig(preset="nano"), tokenizer(), seed=0)
    return example_builder(config(Path("unused")).data, processor, 42)


def length_by_hand(builder: ExampleBuilder, mixture: Mixture, number: int) -> tuple[str, int]:
    """Tokens of a draw as the model sees them: its image slots expanded."""
    draw = mixture.draw(number)
    example = builder(mixture.record(draw), epoch=draw.epoch)
    placed = expand(
        example.input_ids,
        example.trained,
        example.segments,
        example.parents,
        image_token_id=builder.image_token_id,
        tokens_per_image=[n * builder.tokens_per_tile for n in example.tiles_per_image],
        increments=example.increments,
    )
    return draw.source_name, len(placed.input_ids)


@pytest.mark.parametrize(
    ("mixture", "wanted"), [("internvl3", 3.0), ("internvl3_5", 2.5), ("1:1", 1.0)]
)
def test_tokens_of_the_draws_are_in_the_ratio(
    builder: ExampleBuilder, tmp_path: Path, mixture: str, wanted: float
) -> None:
    run = config(tmp_path, data__mixture=mixture)
    drawn = Mixture(mixed(sources(), builder, run, Accelerator(cpu=True)), seed=5)
    tokens: Counter[str] = Counter()
    draws: Counter[str] = Counter()
    for number in range(NUM_DRAWS):
        name, length = length_by_hand(builder, drawn, number)
        tokens[name] += length
        draws[name] += 1
    text = sum(tokens[name] for name in TEXT)
    multimodal = tokens.total() - text
    assert multimodal / text == pytest.approx(wanted, rel=0.05)
    # in draws the ratio is another one, and within a side it is that of records and repeats
    text_draws = sum(draws[name] for name in TEXT)
    assert (draws.total() - text_draws) / text_draws != pytest.approx(wanted, rel=0.3)
    assert draws["sums"] / draws["words"] == pytest.approx(3000 / 1000, rel=0.25)
    assert draws["digits"] / draws["shapes"] == pytest.approx(2000 / 2000, rel=0.25)


def test_the_run_folder_says_what_was_assumed(builder: ExampleBuilder, tmp_path: Path) -> None:
    mixed(sources(), builder, config(tmp_path), Accelerator(cpu=True))
    facts = json.loads((tmp_path / FACTS).read_text("utf-8"))
    assert (facts["mixture"], facts["unit"], facts["seed"]) == ("internvl3", "tokens", 42)
    by_name = {known["name"]: known for known in facts["sources"]}
    assert [by_name[name]["modality"] for name in by_name] == ["text"] * 2 + ["multimodal"] * 2
    assert sum(by_name[name]["share_of_tokens"] for name in TEXT) == pytest.approx(0.25, rel=2e-3)
    assert by_name["sums"]["tokens"]["num_records"] >= 64
    assert by_name["shapes"]["tokens"]["mean"] > 2 * by_name["sums"]["tokens"]["mean"]


def test_a_ratio_of_samples_builds_nothing(builder: ExampleBuilder, tmp_path: Path) -> None:
    run = config(tmp_path, data__mixture_unit="samples", data__mixture="1:3")
    shares = Mixture(mixed(sources(), builder, run), seed=0).shares
    assert sum(shares[name] for name in TEXT) == pytest.approx(0.25, rel=2e-3)
    assert not (tmp_path / FACTS).exists()  # nobody trains: nothing is written


def test_modality_of_the_entry_goes_before_what_is_found(
    builder: ExampleBuilder, tmp_path: Path
) -> None:
    """A set of pictures may be counted to the text side by saying so."""
    said = [replace(one, modality="text") for one in sources()[:3]]
    given = [*said, sources()[3]]
    run = config(tmp_path, data__mixture_unit="samples", data__mixture="1:3")
    shares = Mixture(mixed(given, builder, run), seed=0).shares
    assert shares["shapes"] == pytest.approx(0.75, rel=2e-3)
    with pytest.raises(ConfigError, match="none of the data sets sums, words, digits is multimod"):
        mixed(said, builder, run)


def test_weights_by_name_take_the_place_of_record_counts(tmp_path: Path) -> None:
    weights = {"sums": 1.0, "words": 3.0, "digits": 1.0, "shapes": 2.0}
    data = config(tmp_path, data__weights=weights).data
    found = with_weights(sources(), data)
    assert [float(one.draws) for one in found] == [1.0, 3.0, 1.0, 2.0]  # repeats are in them
    some = {name: weights[name] for name in ("sums", "digits")}
    with pytest.raises(ConfigError, match=r"names 2 of 4 data sets; give .* to words, shapes too"):
        with_weights(sources(), replace(data, weights=some))
    with pytest.raises(ConfigError, match=r"'shape', .* did you mean 'shapes'\?"):
        with_weights(sources(), replace(data, weights={**weights, "shape": 1.0}))
    assert with_weights(sources(), replace(data, weights={})) == sources()


def test_a_ratio_that_is_none_is_refused_with_the_key(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the mixture is '1/3'"):
        config(tmp_path, data__mixture="1/3")
    with pytest.raises(ConfigError, match=r"data\.mixture_examples is 0"):
        config(tmp_path, data__mixture_examples=0)


def draws_of(out: Path) -> list[str]:
    checkpoint = max((out / "checkpoints").iterdir())
    stream = json.loads((checkpoint / "rank-00000.json").read_text("utf-8"))["stream"]
    return [stream["mixture"], stream["cursor"], stream["rows"]["rows"]]


def test_a_resumed_run_keeps_what_was_estimated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(out: Path, on_step: Any = None, **values: Any) -> Any:
        run = config(out, run__num_steps=4, run__eval_interval=1, **values)
        return pretrain(
            run, sources=sources(), tokenizer=tokenizer(), on_step=on_step, console=QUIET
        )

    start(tmp_path / "whole")
    with pytest.raises(MemoryError):
        start(tmp_path / "run", crashing_at(3))
    facts = (tmp_path / "run" / FACTS).read_bytes()

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("estimated again")

    # An older run that is refused keeps its facts, whatever the new one is set up with.
    with pytest.raises(TrainingError, match="older run"):
        start(tmp_path / "run", data__mixture="1:1")
    assert (tmp_path / "run" / FACTS).read_bytes() == facts
    with monkeypatch.context() as patch:
        patch.setattr(mixing, "profile_sources", never)
        assert start(tmp_path / "run", run__resume=True).finished
    assert (tmp_path / "run" / FACTS).read_bytes() == facts
    assert draws_of(tmp_path / "run") == draws_of(tmp_path / "whole")


def test_facts_of_another_setting_are_not_taken(
    builder: ExampleBuilder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that stopped before its first checkpoint may begin anew with other settings."""
    accelerator = Accelerator(cpu=True)
    mixed(sources(), builder, config(tmp_path), accelerator)
    asked: list[int] = []
    profile = mixing.profile_sources
    monkeypatch.setattr(
        mixing, "profile_sources", lambda s, *a, **k: asked.append(len(s)) or profile(s, *a, **k)
    )
    mixed(sources(), builder, config(tmp_path, run__resume=True, data__prefetch=2), accelerator)
    assert asked == []
    few = config(tmp_path, run__resume=True, data__mixture_examples=70)
    mixed(sources(), builder, few, accelerator)
    mixed(sources()[1:], builder, few, accelerator)
    assert asked == [4, 3]
