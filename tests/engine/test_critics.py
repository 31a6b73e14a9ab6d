"""A judge that is an adapter of the model that answers: one set of weights, one look at them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engine.small_backend import checkpoint, picture

import cascadevl
from cascadevl.engine.best_of_n import BestOfConfig, ByReward, ByVotes
from cascadevl.engine.critics import Critics, adapter_critics, critics_of
from cascadevl.engine.engine import Engine
from cascadevl.engine.packed_weights import pack
from cascadevl.engine.process_reward import ProcessRewardConfig, ProcessRewardModel
from cascadevl.engine.requests import EngineConfig, Request
from cascadevl.engine.sampling import SamplingParams
from cascadevl.errors import CheckpointError, ConfigError
from cascadevl.model.adapter_files import is_adapter_of, save_adapter, with_adapter
from cascadevl.model.adapters import adapter_parameters, adapts_only_language
from cascadevl.train.lora import LoraConfig, add_adapters
from cascadevl.types import Message

ASKED = [Message.of("user", picture(0), "\nWhat is written on the door?")]
SOLUTIONS = ["The door is red.\n\nAnswer: red", "It says:\n\none\n\ntwo", "Answer: 4"]
SMALL = EngineConfig(num_pages=600, page_tokens=4)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("checkpoint") / "github")


def adapter(base: Path, folder: Path, **config: Any) -> Path:
    """An adapter of the base that changes what it says, with settings of its own."""
    model, _ = cascadevl.load(base)
    add_adapters(model, LoraConfig(rank=4, **config), seed=1)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.normal_(std=0.3)
    model.config.process_prompt = "short"
    save_adapter(model, folder, base=base)
    return folder


def engine_of(base: Path) -> Engine:
    model, processor = cascadevl.load(base)
    return Engine(model, processor, SMALL)


def answer(engine: Engine) -> tuple[int, ...]:
    assert engine.processor is not None
    sampling = SamplingParams(max_tokens=12, ignore_eos=True)
    request = Request(prompt=engine.processor.prompt(ASKED), sampling=sampling)
    return engine.generate([request])[0][0].token_ids


def test_scores_are_those_of_the_adapter_opened_alone(base: Path, tmp_path: Path) -> None:
    folder, engine = adapter(base, tmp_path / "judge"), engine_of(base)
    before, trained = answer(engine), [p.requires_grad for p in engine.model.parameters()]
    encoded = engine.stats().encoded_tiles
    assert encoded > 1
    critics = adapter_critics(engine, folder)
    assert critics.process is not None
    found = critics.process(ASKED, SOLUTIONS)
    assert engine.stats().encoded_tiles == encoded, "the picture was seen already"
    alone = ProcessRewardModel(*cascadevl.load(folder))(ASKED, SOLUTIONS)
    for one, other in zip(found, alone, strict=True):
        assert one.step_scores == pytest.approx(other.step_scores, abs=1e-5)
    plain = ProcessRewardModel(engine.model, engine.processor)(ASKED, SOLUTIONS)  # type: ignore[arg-type]
    assert found[0].step_scores != pytest.approx(plain[0].step_scores, abs=1e-3)
    engine.forget()
    assert answer(engine) == before, "who answers is as before"
    assert [p.requires_grad for p in engine.model.parameters()] == trained
    assert engine.model.config.process_prompt == "released"


def test_the_weights_are_one_set(base: Path, tmp_path: Path) -> None:
    model, _ = cascadevl.load(base)
    second = with_adapter(model, adapter(base, tmp_path / "judge"))
    own = {p.data_ptr() for p in model.parameters()}
    new = [p for p in second.parameters() if p.data_ptr() not in own]
    assert {id(p) for p in new} == {id(p) for p in adapter_parameters(second).values()}
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert not second.lm_head.weight.any()


def test_an_adapter_of_the_vision_half_looks_for_itself(base: Path, tmp_path: Path) -> None:
    folder = adapter(base, tmp_path / "judge", parts=("vision", "language"))
    engine = engine_of(base)
    critics = adapter_critics(engine, folder)
    assert isinstance(critics.process, ProcessRewardModel)
    assert not adapts_only_language(critics.process.model)
    found = critics.process(ASKED, SOLUTIONS)
    alone = ProcessRewardModel(*cascadevl.load(folder))(ASKED, SOLUTIONS)
    assert [e.score for e in found] == pytest.approx([e.score for e in alone], abs=1e-5)
    assert engine.stats().encoded_tiles == 0


def test_an_engine_that_is_stepped_elsewhere_is_not_asked_for_features(
    base: Path, tmp_path: Path
) -> None:
    """The judge looks at a picture once, however many rounds it judges."""
    folder, engine = adapter(base, tmp_path / "judge"), engine_of(base)
    critics = adapter_critics(engine, folder, shares_features=False)
    assert isinstance(critics.process, ProcessRewardModel)
    calls = list[int]()
    tower = critics.process.model.model.vision_tower
    tower.register_forward_hook(lambda _, __, output: calls.append(len(output[0])))
    shared = adapter_critics(engine_of(base), folder).process
    assert shared is not None
    for texts in (SOLUTIONS[:1], SOLUTIONS[1:]):
        found, other = critics.process(ASKED, texts), shared(ASKED, texts)
        assert [e.score for e in found] == pytest.approx([e.score for e in other], abs=1e-5)
    assert len(calls) == 1
    assert engine.stats().encoded_tiles == 0


def test_an_adapter_knows_its_base(base: Path, tmp_path: Path) -> None:
    folder, model = adapter(base, tmp_path / "judge"), cascadevl.load(base)[0]
    assert is_adapter_of(model, folder)
    with torch.no_grad():
        model.lm_head.weight.add_(1.0)
    assert not is_adapter_of(model, folder)


def test_what_cannot_be_shared_is_refused(base: Path, tmp_path: Path) -> None:
    folder = adapter(base, tmp_path / "judge")
    model, processor = cascadevl.load(base)
    packed = Engine(pack(model, "packed"), processor, SMALL)
    with pytest.raises(ConfigError, match="weights are packed"):
        adapter_critics(packed, folder)
    with pytest.raises(CheckpointError, match="beside the adapter that the model has already"):
        with_adapter(cascadevl.load(folder)[0], folder)
    other = engine_of(base)
    with torch.no_grad():
        other.model.lm_head.weight.add_(1.0)
    with pytest.raises(CheckpointError, match="other weights"):
        adapter_critics(other, folder)


def test_what_is_chosen_by(base: Path) -> None:
    model, processor = cascadevl.load(base)
    critics = critics_of(model, processor, ProcessRewardConfig(aggregate="min", chunk=2))
    assert critics.has_reward_model
    chosen_by = {
        select: critics.selection(BestOfConfig(select=select, round_size=2, stop_score=0.7))  # type: ignore[arg-type]
        for select in ("prm", "outcome")
    }
    for select, number in (("prm", 2), ("outcome", 1)):
        selection = chosen_by[select]
        assert isinstance(selection, ByReward)
        assert selection.stop_score == 0.7
        assert len(selection.scorer(ASKED, SOLUTIONS[:1])[0].steps) == number
    votes = Critics().selection(BestOfConfig(select="vote"))
    assert isinstance(votes, ByVotes)
    with pytest.raises(ConfigError, match="no reward model"):
        Critics().selection(BestOfConfig())


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"num_samples": 0}, "num_samples is 0"),
        ({"round_size": 0}, "round_size is 0"),
        ({"stop_score": 0.5}, "all answers are drawn at once"),
        ({"stop_score": 0.5, "round_size": 2, "select": "vote"}, "a vote has no scores"),
    ],
)
def test_wishes_that_mean_nothing_are_refused(values: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        BestOfConfig(**values)
