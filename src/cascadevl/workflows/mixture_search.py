"""The two-stage search for a mixture: first within each modality, then between them.

InternVL3 report, section 2.2: separate models are trained on text and on multimodal data to fix
the shares of data sets within each; then, at a fixed budget of tokens, the ratio between the two
is searched. Every candidate is trained by the `pretrain` recipe from the same weights on the same
budget and measured on held-out data. A finished candidate is not trained again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from rich.console import Console

from cascadevl.config import dump_config
from cascadevl.data.mixture import Mixture, WeightedSource
from cascadevl.data.modality import MODALITIES, Modality
from cascadevl.data.packing import Fill
from cascadevl.data.ratios import parse_ratio
from cascadevl.errors import ConfigError, DataError, TrainingError
from cascadevl.eval.responder import ModelResponder
from cascadevl.eval.runner import run_suite
from cascadevl.model.loading import load
from cascadevl.train.checkpoint import check_same_run
from cascadevl.train.config import FREE_KEYS, TrainConfig, plain
from cascadevl.train.loop import settled
from cascadevl.train.mixing import in_ratio, with_weights
from cascadevl.train.pretrain import pretrain
from cascadevl.train.run import CHECKPOINTS, MODEL
from cascadevl.train.sources import row_rule
from cascadevl.workflows.held_out import held_out_losses
from cascadevl.workflows.mixture_config import MixtureSearchConfig
from cascadevl.workflows.mixture_report import Candidate, Outcome, Trial, best, write_tables
from cascadevl.workflows.mixture_setup import EXAM_SEED, Search, prepare

RESULT = "result.json"
"""File of a candidate's folder with its scores; with it the candidate is done."""

FORESEEN_ROWS, MOST_FORESEEN_DRAWS = 100, 50_000
"""Rows that are filled beforehand to know the tokens of a step, and draws for that at most."""

CHOSEN = "mixture.yaml"
"""File with the configuration of a run on the mixture that was chosen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    """What a search found.

    Attributes:
        weights: Weights of all data sets, each modality's chosen in the first stage.
        ratio: Text to multimodal.
        outcomes: Every candidate with its trials.
        table: The table for people.
        config: Configuration of a run on the chosen mixture.
    """

    weights: dict[str, float]
    ratio: str
    outcomes: Sequence[Outcome]
    table: Path
    config: Path


def search(config: MixtureSearchConfig, *, console: Console | None = None) -> SearchResult:
    """Search the mixture and leave table and configuration in the folder.

    Args:
        config: The search.
        console: Where progress is shown; standard error if None.

    Raises:
        ConfigError: If there is nothing to choose from, or a data set has no held-out part.
        DataError: If a data set cannot be used.
        TrainingError: If a run was asked to stop (the same call goes on), or the folder holds
            candidates of another search.
    """
    shared = prepare(config, console or Console(stderr=True))
    outcomes: list[Outcome] = []

    # Stage 1: one modality at a time fixes the shares of its data sets.
    weights: dict[str, float] = {}
    for modality in MODALITIES:
        candidates = _within(shared, modality)
        if len(candidates) > 1:
            tried = [_try(shared, candidate, config.stage1_tokens) for candidate in candidates]
            outcomes += tried
            weights |= best(tried, config.choose_by).candidate.weights
        else:
            weights |= candidates[0].weights

    # Stage 2: with these, the ratio of text to multimodal data at a fixed budget.
    tried = [
        _try(shared, _between(shared, weights, ratio), config.stage2_tokens)
        for ratio in config.ratios
    ]
    outcomes += tried
    chosen = best(tried, config.choose_by).candidate
    return _finish(shared, outcomes, weights, chosen)


def _within(shared: Search, modality: Modality) -> list[Candidate]:
    """The first stage's candidates for one modality."""
    sources = shared.of(modality)
    if not sources:
        raise ConfigError(
            f"none of the data sets is {modality}, so there is no ratio to search; add one, or "
            'correct "modality" in the meta file'
        )
    names = [one.source.name for one in sources]
    given = shared.config.text if modality == "text" else shared.config.multimodal
    if given:
        listed = {f"given-{number}": dict(each) for number, each in enumerate(given, start=1)}
    else:
        equal = dict.fromkeys(names, 1.0)
        boost = shared.config.boost
        listed = {"equal": equal, "by-size": {s.source.name: float(s.draws) for s in sources}}
        listed |= {f"more-{name}": {**equal, name: boost} for name in names}
    candidates: list[Candidate] = []
    for label, weights in listed.items():
        shares = _shares(shared, with_weights(sources, replace(shared.train.data, weights=weights)))
        if shares not in [candidate.shares for candidate in candidates]:
            made = Candidate(stage=modality, name=label, weights=weights, shares=shares)
            candidates.append(made)
    return candidates


def _between(shared: Search, weights: Mapping[str, float], ratio: str) -> Candidate:
    """A candidate of the second stage."""
    data = replace(shared.train.data, weights=weights)
    parts = parse_ratio(ratio)
    assert parts is not None, "the configuration has checked it"
    profiles = list(shared.profiles.values())
    if data.mixture_unit == "samples":
        profiles = [replace(profile, tokens=None) for profile in profiles]
    mixed = in_ratio(with_weights(shared.sources, data), profiles, parts)
    return Candidate(
        stage="ratio", name=ratio, weights=dict(weights), ratio=ratio, shares=_shares(shared, mixed)
    )


def _shares(shared: Search, sources: Sequence[WeightedSource]) -> dict[str, float]:
    return {name: round(share, 6) for name, share in Mixture(sources, EXAM_SEED).shares.items()}


def _try(shared: Search, candidate: Candidate, budget: int) -> Outcome:
    """Train a candidate with every seed and measure it."""
    trials = [_trial(shared, candidate, budget, seed) for seed in shared.config.seeds]
    outcome = Outcome(candidate=candidate, trials=trials, modalities=_modalities(shared))
    shared.console.print(
        f"{candidate.stage} {candidate.name}: geometric mean of held-out losses {outcome.loss:.4f}",
        highlight=False,
    )
    return outcome


def _modalities(shared: Search) -> dict[str, Modality]:
    return {name: profile.modality for name, profile in shared.profiles.items()}


def _trial(shared: Search, candidate: Candidate, budget: int, seed: int) -> Trial:
    """One run of the recipe and its scores, from the disk if it is done."""
    label = candidate.name.replace(":", "-to-").replace("/", "_")
    folder = shared.config.out / candidate.stage / label / f"seed-{seed}"
    train = _run_config(shared, candidate, budget, folder, seed)
    settings = {"train": plain(train), **shared.facts}
    done = folder / RESULT
    if done.is_file():
        known: dict[str, Any] = json.loads(done.read_text("utf-8"))
        free = [f"train.{key}" for key in FREE_KEYS]
        check_same_run(known["settings"], settings, free=free, path=done)
        return Trial(**known["trial"])
    names = list(candidate.shares)
    result = pretrain(
        train,
        sources=[one for one in shared.sources if one.source.name in names],
        console=shared.console,
    )
    if result.model_path is None:
        raise TrainingError(
            f"the search was stopped in {folder} after step {result.steps}; the same command goes "
            "on with it"
        )
    trial = _examine(shared, names, result.model_path, seed, result.counters, result.steps)
    if Accelerator().is_main_process:
        partial = done.with_suffix(".partial")
        content = {"settings": settings, "trial": asdict(trial)}
        partial.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
        partial.replace(done)
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
        if not shared.config.keep_models:
            shutil.rmtree(folder / MODEL)
    return trial


def _run_config(
    shared: Search, candidate: Candidate, budget: int, folder: Path, seed: int
) -> TrainConfig:
    train = shared.train
    num_steps = max(1, round(budget / _tokens_per_step(shared, candidate)))
    mixture = candidate.ratio or "as_given"
    data = replace(train.data, weights=candidate.weights, mixture=mixture)
    run = replace(train.run, num_steps=num_steps, seed=seed, out=folder, resume=True)
    return replace(train, data=data, run=run)


def _tokens_per_step(shared: Search, candidate: Candidate) -> float:
    """Tokens that an optimiser step will take, found by filling rows with samples of known size."""
    batch = shared.train.batch
    rows: Any = row_rule(batch)  # of sizes alone, without the samples
    sources = [s for s in shared.sources if s.source.name in candidate.shares]
    weights = candidate.shares
    mixture = Mixture([replace(s, weight=weights[s.source.name], repeat=1.0) for s in sources], 0)
    for position in range(MOST_FORESEEN_DRAWS):
        sizes = shared.sizes[mixture.draw(position).source_name]
        with suppress(DataError):  # larger than a row: the run will leave it out as well
            rows.add(None, sizes[position % len(sizes)], position)
        if rows.fill.rows == FORESEEN_ROWS:
            break
    filled: Fill = rows.fill
    tokens = filled.tokens / filled.rows if filled.rows else float(batch.row_tokens)
    num_processes: int = Accelerator().num_processes
    run = settled(shared.train.run, rows=batch.rows, num_processes=num_processes)
    return tokens * batch.rows * (run.accumulation or 1) * num_processes


def _examine(
    shared: Search,
    names: Sequence[str],
    model_path: Path,
    seed: int,
    counters: Mapping[str, int],
    steps: int,
) -> Trial:
    """Held-out losses, and right answers where there are questions."""
    config = shared.config
    model, processor = load(model_path, device=Accelerator().device)
    losses = held_out_losses(
        model,
        processor,
        {name: shared.held_out[name] for name in names},
        shared.train.data,
        num_examples=config.examples,
        seed=EXAM_SEED,
    )
    rows = [shared.rows[name] for name in names if name in shared.rows]
    responder = ModelResponder(
        model=model, processor=processor, max_new_tokens=config.answer_tokens
    )
    scores = run_suite(responder, rows, seed=EXAM_SEED) if rows else []
    return Trial(
        seed=seed,
        steps=steps,
        tokens=counters["tokens"],
        losses=losses,
        accuracies={score.row: score.estimate.value for score in scores},
    )


def _finish(
    shared: Search, outcomes: Sequence[Outcome], weights: dict[str, float], chosen: Candidate
) -> SearchResult:
    """Write the tables and the configuration of a run on the chosen mixture."""
    assert chosen.ratio is not None
    train = shared.train
    ready = replace(
        train,
        data=replace(train.data, weights=weights, mixture=chosen.ratio),
        run=replace(train.run, out=shared.config.out / "run"),
    )
    path = shared.config.out / CHOSEN
    table = shared.config.out / "table.md"
    if Accelerator().is_main_process:
        path.write_text(dump_config(ready), "utf-8")
        write_tables(outcomes, table, shared.config.choose_by)
    return SearchResult(
        weights=weights, ratio=chosen.ratio, outcomes=outcomes, table=table, config=path
    )
