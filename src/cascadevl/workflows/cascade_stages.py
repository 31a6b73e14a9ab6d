"""The stages of a cascade: each takes a model or data of those before it, and leaves the same."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from cascadevl.data.meta import read_meta
from cascadevl.engine.engine import Engine
from cascadevl.engine.engine_backend import EngineBackend
from cascadevl.engine.packed_weights import pack
from cascadevl.engine.sampling import SamplingParams
from cascadevl.errors import DataError, TrainingError
from cascadevl.model.checkpoint import configuration, open_checkpoint
from cascadevl.model.configuration import CascadeVLConfig
from cascadevl.model.cost import Work, forward_flops, router_flops, step_flops
from cascadevl.model.loading import load
from cascadevl.train.config import TrainConfig
from cascadevl.train.gspo import gspo
from cascadevl.train.gspo_config import GSPOConfig
from cascadevl.train.mpo import MPOConfig, mpo
from cascadevl.train.pretrain import pretrain
from cascadevl.train.questions import problems_of
from cascadevl.train.router import FACTS, router
from cascadevl.train.router_config import RouterConfig
from cascadevl.train.run import TrainResult
from cascadevl.train.sft import sft
from cascadevl.train.vico import ViCOConfig, vico
from cascadevl.workflows.cascade_config import CascadeConfig, StageName
from cascadevl.workflows.preference_config import PreferenceConfig
from cascadevl.workflows.preference_data import make_preferences
from cascadevl.workflows.query_filter import filter_queries
from cascadevl.workflows.rollouts import RolloutConfig, sample_rollouts

ConfigT = TypeVar("ConfigT", bound=TrainConfig)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a cascade stands when a stage begins.

    Attributes:
        model: The model of the stages before; None before the first.
        reference: The model that visual consistency began with; None before that stage.
        store: Folder of the sampled answers.
        pairs: Meta file of the pairs.
        questions: File of the chosen questions.
    """

    model: str | None = None
    reference: str | None = None
    store: Path | None = None
    pairs: Path | None = None
    questions: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """What a stage has left.

    Attributes:
        place: Where the cascade stands now.
        facts: Numbers worth a line of the summary.
        flops: Floating point operations of the bodies, by formula (`cascadevl.model.cost`); what
            attention compares and the head computes is left out.
    """

    place: Place
    facts: Mapping[str, float]
    flops: float


def run_stage(config: CascadeConfig, stage: StageName, place: Place, console: Console) -> Done:
    """Go through one stage, or on with it.

    Args:
        config: The cascade.
        stage: Which.
        place: Where it begins.
        console: Where progress is shown.

    Raises:
        CascadeVLError: Whatever the stage refuses.
        TrainingError: If it was asked to stop before its end; the same call goes on.
    """
    return STAGES[stage](config, place, console)


def _pretrain(config: CascadeConfig, place: Place, console: Console) -> Done:
    run = _placed(config.pretrain, config, "pretrain", place)
    return _trained(pretrain(run, console=console), run, "pretrain", place)


def _sft(config: CascadeConfig, place: Place, console: Console) -> Done:
    run = _placed(config.sft, config, "sft", place)
    return _trained(sft(run, console=console), run, "sft", place)


def _rollouts(config: CascadeConfig, place: Place, console: Console) -> Done:
    assert place.model is not None
    section, store = config.rollouts, config.out / "rollouts" / "store"
    model, processor = load(place.model)
    shape = model.config
    packed = None if section.precision is None else pack(model, section.precision, release=True)
    engine = Engine(packed or model, processor)
    sampling = SamplingParams(
        temperature=section.temperature, max_tokens=section.max_tokens, seed=section.seed
    )
    with console.status("sampling answers") as status:
        report = sample_rollouts(
            problems_of(config.problems),
            RolloutConfig(
                out=store,
                num_samples=section.num_samples,
                sampling=sampling,
                thinking=section.thinking,
                boxed=section.boxed,
                chunk=section.chunk,
            ),
            processor,
            EngineBackend(engine=engine),
            facts={"model": place.model, "weights": section.precision},
            on_progress=lambda done, total: status.update(f"sampling answers: {done} of {total}"),
            before_chunk=engine.forget,
        )
    if report.failures and not report.num_before + report.num_answered:
        raise DataError(
            f"none of the {len(report.failures)} questions could be answered; the first: "
            f"{report.failures[0]}",
            kind="no_sample",
            source=str(store),
            remedy="mend the questions, or raise rollouts.max_tokens",
        )
    stats = engine.stats()
    facts = {
        "questions": report.num_before + report.num_answered,
        "answers": report.num_answers,
        "right": report.num_correct / max(report.num_answers, 1),
        "failed": len(report.failures),
    }
    work = Work(tokens=stats.prompt_tokens + stats.decoded_tokens, tiles=stats.encoded_tiles)
    return Done(
        place=replace(place, store=store),
        facts=_numbers(facts),
        flops=forward_flops(shape, work).total,
    )


def _pairs(config: CascadeConfig, place: Place, console: Console) -> Done:
    assert place.store is not None
    report = make_preferences(
        PreferenceConfig(
            store=place.store,
            out=config.out / "pairs" / "data",
            max_pairs=config.pairs.max_pairs,
            seed=config.pairs.seed,
        )
    )
    if report.meta is None:
        raise DataError(
            f"the sampled answers gave no pair; outcomes of questions: {dict(report.outcomes)}",
            kind="no_sample",
            source=str(place.store),
            remedy="sample questions that the model answers rightly now and then",
        )
    console.print(f"{report.num_pairs:,} pairs", highlight=False)
    facts = {"pairs": report.num_pairs, **dict(report.outcomes)}
    return Done(place=replace(place, pairs=report.meta), facts=_numbers(facts), flops=0.0)


def _mpo(config: CascadeConfig, place: Place, console: Console) -> Done:
    assert place.pairs is not None
    run = placed_mpo(config, place)
    result = mpo(run, console=console)
    done = _trained(result, run, "mpo", place)
    # The reference reads every pair once.
    shape, work = _work(run, result)
    seen = max(result.counters.get("samples", 0), 1)
    once = min(1.0, _num_pairs(place.pairs) / seen)
    return replace(done, flops=done.flops + once * forward_flops(shape, work).total)


def _filter(config: CascadeConfig, place: Place, console: Console) -> Done:
    assert place.store is not None
    out = config.out / "filter" / "questions.jsonl"
    report = filter_queries(place.store, out, least=config.filter.least, most=config.filter.most)
    if not report.num_kept:
        raise DataError(
            f"no question has between {config.filter.least:.0%} and {config.filter.most:.0%} right "
            f"answers: {report.num_too_hard} have fewer, {report.num_too_easy} more",
            kind="no_sample",
            source=str(place.store),
            remedy="widen filter.least and filter.most, or sample other questions",
        )
    console.print(
        f"{report.num_kept:,} questions kept, {report.num_too_hard:,} too hard, "
        f"{report.num_too_easy:,} too easy",
        highlight=False,
    )
    facts = {
        "kept": report.num_kept,
        "too_hard": report.num_too_hard,
        "too_easy": report.num_too_easy,
    }
    return Done(place=replace(place, questions=out), facts=_numbers(facts), flops=0.0)


def _gspo(config: CascadeConfig, place: Place, console: Console) -> Done:
    run = placed_gspo(config, place)
    result = gspo(run, console=console)
    done = _trained(result, run, "gspo", place)
    # Answers are drawn, and scored once more before the updates.
    shape, work = _work(run, result)
    drawn = Work(
        tokens=result.counters.get("rollout_tokens", 0),
        tiles=result.counters.get("rollout_tiles", 0),
    )
    flops = done.flops + forward_flops(shape, work).total + forward_flops(shape, drawn).total
    return replace(done, flops=flops)


def _vico(config: CascadeConfig, place: Place, console: Console) -> Done:
    run = placed_vico(config, place)
    result = vico(run, console=console)
    done = _trained(result, run, "vico", place)
    # The reference reads every sample, or every record once, with full tiles.
    shape, work = _work(run, result)
    share, saved = run.vico.compressed_share, shape.tokens_per_tile - shape.compressed_tokens
    seen = replace(work, tokens=work.tokens + round(share * work.tiles * saved))
    return replace(
        done,
        place=replace(done.place, reference=place.model),
        flops=done.flops + forward_flops(shape, seen).total,
    )


def _router(config: CascadeConfig, place: Place, console: Console) -> Done:
    run = placed_router(config, place)
    result = router(run, console=console)
    done = _trained(result, run, "router", place)
    # Both models read what was measured; then patch features go through the router, both ways.
    found = json.loads((run.run.out / FACTS).read_text("utf-8"))
    labels = found["labels"]
    shape, work = _work(run, result)
    measured = Work(tokens=labels["tokens"], tiles=2 * labels["tiles"])
    flops = forward_flops(shape, measured).total + 3 * router_flops(shape, work.tiles)
    facts = {
        "labelled": labels["tiles"],
        "within": labels["within"],
        "chosen_step": found["chosen_step"],
        "threshold": found["threshold"],
        **{f"held_out_{name}": value for name, value in found["held_out"].items()},
    }
    return replace(done, facts={**done.facts, **_numbers(facts)}, flops=flops)


STAGES: dict[StageName, Callable[[CascadeConfig, Place, Console], Done]] = {
    "pretrain": _pretrain,
    "sft": _sft,
    "rollouts": _rollouts,
    "pairs": _pairs,
    "mpo": _mpo,
    "filter": _filter,
    "gspo": _gspo,
    "vico": _vico,
    "router": _router,
}


def placed_mpo(config: CascadeConfig, place: Place) -> MPOConfig:
    """The run of MPO on the pairs that are there."""
    assert place.pairs is not None
    run = _placed(config.mpo, config, "mpo", place)
    return replace(run, data=replace(run.data, meta=(place.pairs,)))


def placed_gspo(config: CascadeConfig, place: Place) -> GSPOConfig:
    """The run of GSPO on the chosen questions, or on those of the cascade."""
    run = _placed(config.gspo, config, "gspo", place)
    if place.questions is not None:
        return replace(run, problems=replace(run.problems, file=place.questions, tasks=()))
    if config.problems.file is not None or config.problems.tasks:
        return replace(run, problems=config.problems)
    return run


def placed_vico(config: CascadeConfig, place: Place) -> ViCOConfig:
    """The run of visual consistency on its own data, or on those of SFT."""
    return _on_sft_data(_placed(config.vico, config, "vico", place), config)


def placed_router(config: CascadeConfig, place: Place) -> RouterConfig:
    """The run of the router, its reference the model that visual consistency began with."""
    run = _on_sft_data(_placed(config.router, config, "router", place), config)
    if place.reference is None:
        return run
    return replace(run, router=replace(run.router, reference=place.reference))


def _placed(run: ConfigT, config: CascadeConfig, stage: StageName, place: Place) -> ConfigT:
    """A stage's configuration in its place: the model before, its folder, and going on."""
    out = config.out / stage / "run"
    model = run.model
    if place.model is not None:
        model = replace(model, path=place.model, preset=None, tokenizer=None)
    return replace(run, model=model, run=replace(run.run, out=out, resume=True))


def _on_sft_data(run: ConfigT, config: CascadeConfig) -> ConfigT:
    """A run that names no data is given those of SFT, as in the report."""
    if run.data.meta:
        return run
    return replace(run, data=replace(run.data, meta=config.sft.data.meta))


def _trained(result: TrainResult, run: TrainConfig, stage: StageName, place: Place) -> Done:
    if not result.finished or result.model_path is None:
        raise TrainingError(
            f"the cascade was stopped in {stage} after step {result.steps} of {run.run.num_steps}; "
            "everything is saved, and the same command goes on"
        )
    shape, work = _work(run, result)
    facts: dict[str, Any] = {"steps": result.steps, **result.counters}
    flops = step_flops(shape, work, frozen=run.model.frozen).total
    return Done(
        place=replace(place, model=str(result.model_path)), facts=_numbers(facts), flops=flops
    )


def _work(run: TrainConfig, result: TrainResult) -> tuple[CascadeVLConfig, Work]:
    assert result.model_path is not None
    shape = configuration(open_checkpoint(result.model_path))
    counters = result.counters
    return shape, Work(tokens=counters.get("tokens", 0), tiles=counters.get("tiles", 0))


def _numbers(facts: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in facts.items()}


def _num_pairs(meta: Path) -> int:
    return sum(spec.length or 0 for spec in read_meta(meta))
