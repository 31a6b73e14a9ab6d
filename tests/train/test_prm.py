"""The recipe of process reward models: it learns what scores then say, and resumes exactly."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from tests.reference import process_reward_by_hand as by_hand
from tests.train.run_folders import logged
from tests.train.small_run import QUIET, small_config

import cascadevl
from cascadevl.data.collate import collate
from cascadevl.data.mixture import WeightedSource
from cascadevl.data.process_records import (
    JudgedSolution,
    StepBuilder,
    conversation_of,
    read_judged,
)
from cascadevl.data.processor import CascadeVLProcessor
from cascadevl.data.tokenizer import build_tokenizer
from cascadevl.engine.process_reward import ProcessRewardModel
from cascadevl.errors import ConfigError, DataError
from cascadevl.losses.process_reward import LabelTokens, plus_probability
from cascadevl.model.loading import save
from cascadevl.train.checkpoint import latest, load
from cascadevl.train.config import ModelConfig, TrainConfig
from cascadevl.train.lora import LoraConfig
from cascadevl.train.prm import PRMConfig, PRMSection, prm, process_reward_objective
from cascadevl.train.start import from_scratch
from cascadevl.types import Batch, ImageRef, Message, Record

NUM_STEPS = 4
COLOURS = ("red", "green", "blue", "yellow")
BRIEF = Message.of("system", "Judge.")


class Solutions:
    """Solution number i says what it sees; a step is wrong from where it says "wrong"."""

    name = "solutions"

    def __init__(self, *, brief: bool, length: int = 16) -> None:
        self.brief, self.length = brief, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int, /) -> Record:
        colour = COLOURS[index % 4]
        shown: tuple[Any, ...] = ("Which color?",)
        if index % 3 == 0:
            shown = (ImageRef(PIL.Image.new("RGB", (60, 60), colour)), "\nWhich color?")
        words = [f"it is {colour}", "wrong" if index % 2 else "right", "so"][: 1 + index % 3]
        labels = ["wrong" not in words[: n + 1] for n in range(len(words))]
        judged = JudgedSolution(
            question=Message("user", shown), steps=tuple(words), labels=tuple(labels)
        )
        turns = conversation_of(judged)
        messages = (BRIEF, *turns[1:]) if self.brief else turns
        return Record(source=f"s:{index}", record_id=str(index), messages=messages, dataset="s")


def solutions(*, brief: bool = True) -> tuple[WeightedSource, ...]:
    return (WeightedSource(source=Solutions(brief=brief)),)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prm_start(tmp_path_factory.mktemp("prm") / "start")


def prm_start(folder: Path) -> Path:
    records = [Solutions(brief=False)[number] for number in range(8)]
    texts = [turn.text for record in records for turn in record.messages]
    tokenizer = build_tokenizer(texts, 700)
    model, processor = from_scratch(ModelConfig(preset="nano"), tokenizer, seed=3)
    save(model, processor, folder)
    return folder


def prm_config(out: Path, start: Path, **values: Any) -> PRMConfig:
    own = {key.removeprefix("prm__"): values.pop(key) for key in list(values) if "prm__" in key}
    base = small_config(
        out,
        **{
            "model__preset": None,
            "model__path": str(start),
            "data__max_tokens": 2000,
            "batch__packing": "count",
            "batch__row_samples": 4,
            "batch__averaging": "token",
            "run__num_steps": NUM_STEPS,
            **values,
        },
    )
    sections = {each.name: getattr(base, each.name) for each in fields(TrainConfig)}
    return PRMConfig(**sections, prm=PRMSection(**own))


def run(out: Path, start: Path, *, brief: bool = True, on_step: Any = None, **v: Any) -> Any:
    config = prm_config(out, start, **v)
    return prm(config, sources=solutions(brief=brief), on_step=on_step, console=QUIET)


def batch_of(processor: CascadeVLProcessor, *numbers: int) -> tuple[Batch, LabelTokens]:
    """Some solutions in one row."""
    build = StepBuilder(processor.builder)
    batch = collate(
        [[build(Solutions(brief=True)[number]) for number in numbers]],
        image_token_id=processor.image_token_id,
        pad_token_id=processor.tokenizer.pad_token_id,
        tokens_per_tile=processor.tokens_per_tile,
        averaging="square",
    )
    return batch, build.tokens


def test_it_learns_what_scores_then_say(start: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    values = {"run__num_steps": 30, "batch__row_samples": 8, "prm__form": "two_tokens"}
    result = run(out, start, **values)
    assert result.finished
    first, *_, last = logged(out)
    assert last["loss"] < 0.1 < 0.4 < first["loss"]
    assert last["accuracy"] == pytest.approx(1.0)
    assert last["minus_found"] == pytest.approx(last["minus_share"])
    model, processor = cascadevl.load(result.model_path, dtype=torch.float32)
    batch, tokens = batch_of(processor, 0, 1, 5, 8, 11)
    with torch.no_grad():
        scores = model(batch=batch, head_fn=lambda logits, _: plus_probability(logits, tokens))
    is_plus = batch.target_ids == tokens.plus
    assert scores[is_plus].min() > 0.9
    assert scores[~is_plus].max() < 0.1


@pytest.mark.parametrize("form", ["vocabulary", "two_tokens"])
def test_the_loss_is_that_of_the_loops(form: str, start: Path, tmp_path: Path) -> None:
    """Of a whole row, pictures and uneven solutions included."""
    model, processor = cascadevl.load(start, dtype=torch.float32)
    batch, tokens = batch_of(processor, 0, 1, 5, 11)
    logits: list[torch.Tensor] = []

    def keep(scores: torch.Tensor, where: slice) -> torch.Tensor:
        logits.append(scores.detach().double())
        return scores[:, 0]

    with torch.no_grad():
        model(batch=batch, head_fn=keep)
    plus, minus = tokens.plus, tokens.minus
    labels = [token == plus for token in batch.target_ids.tolist()]
    assert labels == [True, True, False, True, False, False, True, False, False]
    steps = list(
        zip(torch.cat(logits).tolist(), labels, batch.target_weights.tolist(), strict=True)
    )
    section = PRMSection(form=form, minus_weight=3.0)  # type: ignore[arg-type]
    objective = process_reward_objective(section, tokens)
    with torch.no_grad():
        terms = objective.loss(model, batch, objective.weigh(batch))
    wanted = by_hand.loss(steps, plus, minus, 3.0, pair=form == "two_tokens")
    assert terms.loss.item() == pytest.approx(wanted, rel=1e-5)
    assert terms.metrics["minus_share"].item() == pytest.approx(
        sum(3 * w for _, label, w in steps if not label) / objective.weigh(batch), rel=1e-5
    )


def test_it_can_read_what_scores_read(start: Path) -> None:
    """With "+" before every step the loss is that of the scores; with the labels it is another."""
    model, processor = cascadevl.load(start, dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight *= 20  # so that a label before a step matters
    solution = Solutions(brief=False)[5]
    judged = read_judged(solution)
    assert judged.labels == (True, False, False)
    batch = collate(
        [[StepBuilder(processor.builder)(solution)]],
        image_token_id=processor.image_token_id,
        pad_token_id=processor.tokenizer.pad_token_id,
        tokens_per_tile=processor.tokens_per_tile,
        averaging="token",
    )
    tokens = StepBuilder(processor.builder).tokens
    (scored,) = ProcessRewardModel(model, processor)([judged.question], ["\n\n".join(judged.steps)])
    chances = [
        score if label else 1 - score
        for score, label in zip(scored.step_scores, judged.labels, strict=True)
    ]
    losses = {}
    for before in ("plus", "labels"):
        section = PRMSection(form="two_tokens", before=before)  # type: ignore[arg-type]
        objective = process_reward_objective(section, tokens)
        with torch.no_grad():
            losses[before] = objective.loss(model, batch, objective.weigh(batch)).loss.item()
    assert losses["plus"] == pytest.approx(-np.log(chances).mean(), rel=1e-5)
    assert losses["labels"] != pytest.approx(losses["plus"], rel=1e-3)


def test_a_run_that_was_stopped_goes_on_bit_for_bit(start: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(whole, start)

    class Stop(BaseException):
        pass

    def stop(state: Any) -> None:
        if state.step == 3:
            raise Stop

    with pytest.raises(Stop):
        run(parts, start, run__eval_interval=1, on_step=stop)
    result = run(parts, start, run__resume=True)
    assert result.finished
    one, other = (load(latest(out / "checkpoints")) for out in (whole, parts))  # type: ignore[arg-type]
    assert one.step == other.step == NUM_STEPS
    for name, tensor in one.weights.items():
        assert torch.equal(tensor, other.weights[name]), name


def test_other_data_are_left_out_and_named(start: Path, tmp_path: Path) -> None:
    class Chat(Solutions):
        name = "chat"

        def __getitem__(self, index: int, /) -> Record:
            turns = (Message.of("user", "Which color?"), Message.of("assistant", "red"))
            return Record(source="c", record_id="c", messages=turns, dataset="chat")

    mixed = (*solutions(), WeightedSource(source=Chat(brief=True, length=4)))
    result = prm(prm_config(tmp_path / "run", start), sources=mixed, console=QUIET)
    assert {key for key, count in result.skipped.items() if count} <= {("chat", "bad_turns")}
    only = (WeightedSource(source=Chat(brief=True)),)
    with pytest.raises(DataError, match=r"x bad_turns of chat.*no solution with judged steps"):
        prm(prm_config(tmp_path / "other", start), sources=only, console=QUIET)


def test_the_prompt_is_kept_with_the_model_and_with_its_adapter(
    start: Path, tmp_path: Path
) -> None:
    """A judge trained as an adapter of the model that answers, with one short line."""
    config = prm_config(tmp_path / "run", start, prm__prompt="short", run__num_steps=2)
    config = replace(config, lora=LoraConfig(rank=2))
    result = prm(config, sources=solutions(), console=QUIET)
    assert result.adapter_path is not None
    for folder in (result.model_path, result.adapter_path):
        assert cascadevl.load(folder)[0].config.process_prompt == "short"
    assert cascadevl.load(start)[0].config.process_prompt == "released"


def test_what_cannot_be_trained_is_refused(start: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="starts from a fine-tuned model"):
        prm(PRMConfig(), sources=solutions(), console=QUIET)
    with pytest.raises(ConfigError, match=r"prm\.minus_weight is 0"):
        PRMSection(minus_weight=0.0)
