"""The recipe of ViCO's first stage: it learns, resumes exactly, and says what is wrong."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from tests.reference import vico_by_hand as by_hand
from tests.train.run_folders import crashing_at, differing, logged, timeless
from tests.train.small_run import QUIET, Given
from tests.train.small_vico import Stripes, read_stripes, stripes, vico_config

import cascadevl
from cascadevl.data.consistency import VIEWS, ConsistencyBatch, ConsistencyCollate
from cascadevl.errors import ConfigError, TrainingError
from cascadevl.model.modeling import CascadeVLForConditionalGeneration
from cascadevl.train.loop import TrainState, update
from cascadevl.train.lora import LoraConfig
from cascadevl.train.optim import OptimConfig, Optimiser
from cascadevl.train.run import TrainResult
from cascadevl.train.sources import collate_config
from cascadevl.train.start import start_from
from cascadevl.train.vico import asking, heads_for, make_compressible, sample_builder, vico
from cascadevl.train.vico_objective import by_view, consistency_objective
from cascadevl.train.vico_reference import asked, frozen_copy

NUM_STEPS = 6


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return read_stripes(tmp_path_factory.mktemp("vico") / "start")


def run(out: Path, start: Path, on_step: Any = None, **values: Any) -> TrainResult:
    settings = {"run__num_steps": NUM_STEPS, "run__eval_interval": 1, **values}
    config = vico_config(out, start, **settings)
    return vico(config, sources=stripes(), on_step=on_step, console=QUIET)


def mean(lines: list[dict[str, float]], name: str) -> float:
    values = [line[name] for line in lines if name in line]
    return sum(values) / len(values)


def test_it_learns_to_say_with_fewer_tokens_what_it_says_with_all(
    start: Path, tmp_path: Path
) -> None:
    calm = {"optim__lr": 6e-4, "optim__warmup_ratio": 0.1}  # the first steps shake a small model
    result = run(tmp_path / "run", start, run__num_steps=30, batch__row_samples=8, **calm)
    first, *_ = seen = logged(tmp_path / "run")
    assert first["kl_full"] < 1e-5  # the model is its own reference before the first step
    assert first["same_full"] == pytest.approx(1.0)
    assert first["kl_compressed"] > 0.1
    last = seen[-6:]
    assert mean(last, "kl_compressed") < 0.5 * first["kl_compressed"]
    assert mean(last, "kl_full") < 0.25 * first["kl_compressed"]
    assert mean(last, "same_compressed") > first["same_compressed"]
    assert 0.2 < mean(seen, "share_compressed") < 0.65  # a half of the pictures, five sixths
    assert result.counters["samples"] == 30 * 8
    model, _ = cascadevl.load(str(result.model_path))
    assert model.config.flash_mode
    assert model.config.flash_absolute_threshold is None  # stage 2 calibrates it


def test_tiles_of_an_image_are_mixed_where_it_is_asked_for(start: Path, tmp_path: Path) -> None:
    config = vico_config(tmp_path / "run", start, run__num_steps=2, vico__mixed=1.0)
    vico(config, sources=stripes(tiles=2, text_every=24), console=QUIET)
    assert replace(config.vico, compress=0.2, mixed=0.5).compressed_share == pytest.approx(0.35)
    for line in logged(tmp_path / "run"):
        assert line["share_mixed"] > 0.1
        assert line["kl_mixed"] > 1e-3  # of full ones it begins at 1e-5


def test_the_whole_model_is_trained_but_for_the_router(start: Path, tmp_path: Path) -> None:
    result = run(tmp_path / "run", start, optim__lr=1e-3)
    after, _ = cascadevl.load(str(result.model_path))
    config = vico_config(tmp_path / "run", start)
    before, _ = start_from(config.model)
    make_compressible(before, config)
    changed = {
        name: not torch.equal(tensor, after.state_dict()[name])
        for name, tensor in before.state_dict().items()
    }
    for part in ("vision_tower", "multi_modal_projector", "compressed_projector", "language_model"):
        assert any(value for name, value in changed.items() if part in name), part
    assert not any(value for name, value in changed.items() if ".router." in name)


@pytest.mark.parametrize("frozen", [("vision",), ("language", "projector")])
def test_frozen_parts_stay_and_are_there_once(
    start: Path, tmp_path: Path, frozen: tuple[str, ...]
) -> None:
    parts = {
        "vision": "vision_tower",
        "projector": "multi_modal_projector",
        "language": "language_model",
    }
    result = run(tmp_path / "run", start, model__frozen=frozen, optim__lr=1e-3)
    after, _ = cascadevl.load(str(result.model_path))
    before, _ = cascadevl.load(str(start))
    for part, name in parts.items():
        tensors = {key: value for key, value in before.state_dict().items() if name in key}
        same = all(torch.equal(value, after.state_dict()[key]) for key, value in tensors.items())
        assert same == (part in frozen), part
    before.freeze(**dict.fromkeys(frozen, True))
    copied = dict(frozen_copy(before).named_parameters())
    for name, parameter in before.named_parameters():
        assert (copied[name] is parameter) == (not parameter.requires_grad), name


def test_the_copy_never_learns_and_has_no_second_projector(start: Path, tmp_path: Path) -> None:
    model, batch = setting(vico_config(tmp_path, start))
    model.freeze()
    copied = frozen_copy(model)
    assert copied.model.compressed_projector is None
    assert copied.model.router is None
    assert not any(p.requires_grad for p in copied.parameters())
    assert batch.full is not None
    before = asked(copied, batch.full, 16)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05)
    again = asked(copied, batch.full, 16)
    assert torch.equal(before.logprobs, again.logprobs)
    assert not torch.equal(asked(model, batch.full, 16).logprobs, before.logprobs)


def test_a_stored_reference_takes_the_same_steps_as_a_copy(start: Path, tmp_path: Path) -> None:
    for reference in ("copy", "stored"):
        run(tmp_path / reference, start, vico__reference=reference)
    copied, stored = (timeless(logged(tmp_path / name)) for name in ("copy", "stored"))
    assert not (tmp_path / "copy" / "reference").exists()
    for first, second in zip(copied, stored, strict=True):
        assert first.keys() == second.keys()
        for name in first:
            assert first[name] == pytest.approx(second[name], rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize("reference", ["copy", "stored"])
def test_a_run_that_crashed_goes_on_as_if_nothing_happened(
    start: Path, tmp_path: Path, reference: str
) -> None:
    values = {"vico__reference": reference, "model__precision": "bfloat16"}
    run(tmp_path / "whole", start, **values)
    crash = crashing_at(random.Random(reference).randrange(3, NUM_STEPS))
    with pytest.raises(MemoryError):
        run(tmp_path / "run", start, on_step=crash, **values)
    assert run(tmp_path / "run", start, run__resume=True, **values).finished
    assert differing(tmp_path / "whole", tmp_path / "run", NUM_STEPS) == []
    kept = [timeless(logged(tmp_path / name)) for name in ("whole", "run")]
    assert kept[0] == kept[1]


def setting(
    config: Any, numbers: tuple[int, ...] = (0, 1, 2, 3, 7)
) -> tuple[CascadeVLForConditionalGeneration, ConsistencyBatch]:
    """The model before its first step, and a batch of some records."""
    model, processor = start_from(config.model)
    make_compressible(model, config)
    build = sample_builder(config, processor, model.config)
    packed = collate_config(config.batch, processor, model.config)
    examples = [build(Stripes()[number]) for number in numbers]
    return model, ConsistencyCollate(packed=packed)([examples])


def test_the_step_equals_the_report_by_hand(start: Path, tmp_path: Path) -> None:
    """From the models' scores on: every token's divergence, its mean, and the mean over answers."""
    config = vico_config(tmp_path, start, vico__top_tokens=10_000)
    model, batch = setting(config)
    assert batch.full is not None
    scores: dict[str, list[torch.Tensor]] = {"full": [], "packed": []}
    with torch.no_grad():
        for name, seen in (("full", batch.full), ("packed", batch.packed)):
            found = scores[name]

            def head(logits: torch.Tensor, where: slice, found: Any = found) -> torch.Tensor:
                found.append(logits.double())
                return logits[:, 0]

            model.eval()(batch=seen, head_fn=head)
    samples = batch.packed.target_samples.tolist()
    pairs = list(
        zip(torch.cat(scores["full"]).tolist(), torch.cat(scores["packed"]).tolist(), strict=True)
    )
    answers = [
        [pair for pair, n in zip(pairs, samples, strict=True) if n == number]
        for number in sorted(set(samples))
    ]
    with model.no_drop_path():
        optimiser = Optimiser(model.named_parameters(), OptimConfig(max_grad_norm=0.0))
        optimiser.zero_grad()
        state: TrainState[ConsistencyBatch] = TrainState(
            model=model.train(),
            optimiser=optimiser,
            stream=Given([]),
            accelerator=Accelerator(cpu=True),
        )
        update(state, [batch], consistency_objective(asking(model, config)))
    assert state.metrics["loss"] == pytest.approx(by_hand.loss(answers), rel=1e-3)
    assert state.metrics["loss"] > 1e-3


def test_what_is_recorded_is_a_mean_over_the_targets_of_each_view() -> None:
    """Kills: a mean over all targets, or over views that did not occur."""
    sums = dict.fromkeys((f"{n}_{v}" for n in ("share", "kl", "same") for v in VIEWS), 0.0)
    sums |= {"share_full": 0.75, "kl_full": 0.3, "same_full": 0.6, "outside_top": 0.1}
    sums |= {"share_compressed": 0.25, "kl_compressed": 0.5, "same_compressed": 0.05}
    assert by_view(sums) == pytest.approx(
        {
            "share_full": 0.75, "kl_full": 0.4, "same_full": 0.8,
            "share_compressed": 0.25, "kl_compressed": 2.0, "same_compressed": 0.2,
            "outside_top": 0.1,
        }
    )  # fmt: skip


def test_adapters_need_a_projector_to_adapt(start: Path, tmp_path: Path) -> None:
    values = {"lora": LoraConfig(rank=4, parts=("language", "projector")), "optim__lr": 1e-2}
    with pytest.raises(ConfigError, match="train without --lora first"):
        run(tmp_path / "plain", start, **values)
    whole = run(tmp_path / "whole", start)
    result = run(tmp_path / "run", Path(str(whole.model_path)), **values)
    seen = logged(tmp_path / "run")
    assert seen[0]["kl_full"] < 1e-5
    assert mean(seen[-2:], "loss") != pytest.approx(mean(seen[:2], "loss"), rel=1e-3)
    assert result.adapter_path is not None


def test_a_model_that_compresses_already_keeps_its_projector(start: Path, tmp_path: Path) -> None:
    first = run(tmp_path / "first", start)
    config = vico_config(tmp_path / "second", Path(str(first.model_path)))
    model, _ = start_from(config.model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    make_compressible(model, config)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_width_that_sixteen_heads_do_not_divide_gets_fewer(start: Path) -> None:
    model, _ = cascadevl.load(str(start))
    assert heads_for(model.config) == 16
    model.config.vision_config.hidden_size = 180  # of micro 192: 16
    assert heads_for(model.config) == 15


def test_what_cannot_work_is_refused(start: Path, tmp_path: Path) -> None:
    for words, values in (
        ("leave it out", {"model__drop_path": 0.1}),
        ("vico.compress is 0", {"vico__compress": 0.0}),
        ("vico.compress is 1.5", {"vico__compress": 1.5}),
        ("vico.mixed is 2", {"vico__mixed": 2.0}),
        ("vico.top_tokens is 0", {"vico__top_tokens": 0}),
        ("vico.reference_part is 0", {"vico__reference_part": 0}),
    ):
        with pytest.raises(ConfigError, match=words):
            vico_config(tmp_path, start, **values)
    nowhere = vico_config(tmp_path / "run", start)
    nowhere = replace(nowhere, model=replace(nowhere.model, path=None))
    with pytest.raises(ConfigError, match=r"model\.path"):
        vico(nowhere, sources=stripes(), console=QUIET)


def test_an_older_run_is_spared_before_anything_is_computed(start: Path, tmp_path: Path) -> None:
    run(tmp_path / "run", start, run__num_steps=2)
    with pytest.raises(TrainingError, match="older run"):
        run(tmp_path / "run", start, run__num_steps=2)
