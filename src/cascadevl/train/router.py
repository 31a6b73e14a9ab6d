"""Training the router: which tiles can do with fewer visual tokens (ViCO, stage 2).

InternVL3.5 report: vision tower, projectors and language model are frozen, the router alone learns,
a binary classifier under cross-entropy. Its labels come from the losses with and without each tile
compressed, which are measured once (`cascadevl.train.loss_journal`). Afterwards a threshold is
calibrated to a share of tiles that stay full, and written into the exported model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Float
from rich.console import Console
from torch import Tensor, nn

from cascadevl.data.mixture import Mixture, WeightedSource
from cascadevl.data.processor import CascadeVLProcessor
from cascadevl.data.source import Source
from cascadevl.errors import ConfigError
from cascadevl.losses.router import router_loss
from cascadevl.model.adapters import fingerprint
from cascadevl.model.modeling import CascadeVLForConditionalGeneration
from cascadevl.model.router import Router
from cascadevl.model.routing import calibrated
from cascadevl.model.v2pe import dynamic_limit
from cascadevl.scoring.metrics import area_under_roc
from cascadevl.train.config import FREE_KEYS, plain
from cascadevl.train.log import RunLog
from cascadevl.train.loop import TrainState, settled, train
from cascadevl.train.loss_journal import Drawn, TileLosses, measured_losses
from cascadevl.train.mixing import mixed
from cascadevl.train.objective import Objective, Terms
from cascadevl.train.optim import Optimiser, set_precision
from cascadevl.train.router_batch import LabelledRecord, TileBatch, TileFeatures, TileStream
from cascadevl.train.router_choice import BEST, BestRouter
from cascadevl.train.router_config import RouterConfig
from cascadevl.train.router_labels import faults, labelled, parted
from cascadevl.train.run import TrainResult, begin, export, open_log, saver, spare_older, take_up
from cascadevl.train.sources import collate_config, example_builder, sources_of_meta
from cascadevl.train.start import start_from
from cascadevl.train.tile_losses import Measure

LOSSES = "losses"
"""Folder of the measured losses within a run folder."""

FACTS = "router.json"
"""File of the run folder with what the labels are like, and what the router made of them."""


def router(
    config: RouterConfig,
    *,
    sources: Sequence[WeightedSource] | None = None,
    on_step: Callable[[TrainState[Any]], None] | None = None,
    console: Console | None = None,
) -> TrainResult:
    """Train the router of a model, everything else frozen, and calibrate its threshold.

    What is exported is the router that knew the held-out tiles best (`router.choose`).

    Args:
        config: The run.
        sources: Conversations, as in SFT; the configured meta files if None.
        on_step: Called every ``run.eval_interval`` steps and at the end, with a state whose model
            is the router alone.
        console: Where progress is shown; standard error if None.

    Raises:
        ConfigError: If the configuration cannot be used.
        DataError: If too many records cannot be used, or none has a tile.
        TrainingError: If the run breaks, or cannot be taken up again.
    """
    accelerator = begin(config.run.seed)
    processes = accelerator.num_processes
    run = settled(config.run, rows=config.batch.row_samples, num_processes=processes)
    spare_older(config)

    # The model after ViCO, all of it frozen but the router.
    model, processor = _start(config, accelerator)
    trained = model.model.router
    assert trained is not None, "a model with compressed tiles has a router"

    # Labels: the losses of single tiles, measured once and compared with a running percentile.
    sources = sources_of_meta(config.data.meta) if sources is None else sources
    drawn, losses = _measured(model, processor, sources, config, accelerator, console)
    records, facts = labelled(losses, config.router)
    taught, held_out = parted(records, config.router.held_out)

    # Training: cross-entropy on patch features that are computed once.
    features = TileFeatures(model, drawn, max_bytes=config.router.feature_bytes)
    named = ((f"model.router.{name}", p) for name, p in trained.named_parameters())
    state: TrainState[Any] = TrainState(
        model=trained,
        optimiser=Optimiser(named, config.optim),
        stream=TileStream(
            taught,
            features,
            seed=config.run.seed,
            num_records=config.batch.row_samples,
            rank=accelerator.process_index,
            world_size=processes,
            skipped=faults(losses, config.data.max_skipped_share),
        ),
        accelerator=accelerator,
    )
    take_up(state, config)
    best = _best(config, state)
    with open_log("router", config, state, console) as log:
        log.message(facts.words)
        exam = _Exam(features, held_out, log, best, on_step)
        finished = train(state, run, OBJECTIVE, log=log, save=saver(config), on_step=exam)

    # A threshold for single tiles, by what the best router thinks of tiles not trained on.
    if finished and accelerator.is_main_process:
        step = best.restore(trained) if best is not None else None
        found = calibrate(model, features, held_out, config.router.keep_share)
        chosen = {"chosen_step": state.step if step is None else step}
        text = json.dumps({"labels": asdict(facts), **chosen, **found}, indent=2) + "\n"
        (config.run.out / FACTS).write_text(text, encoding="utf-8")
    return export(state, model, processor, config, finished=finished, keeps_context=True)


def calibrate(
    model: CascadeVLForConditionalGeneration,
    features: Callable[[int], Tensor],
    records: Sequence[LabelledRecord],
    keep_share: float,
) -> dict[str, Any]:
    """Write into a model's configuration the threshold that keeps a share of some tiles.

    Args:
        model: A Flash model; only its configuration changes.
        features: The patch features of a draw.
        records: Whose tiles.
        keep_share: Share of the tiles that is to stay full.

    Returns:
        ``threshold``, ``keep_share``, and how well the router knows the labels: ``held_out``.
    """
    trained = model.model.router
    assert trained is not None, "a Flash model has a router"
    trained.train(False)
    probabilities = [p for each in records for p in compress_probability(trained, features, each)]
    budget = calibrated(probabilities, keep_share)
    model.config.flash_absolute_threshold = budget.absolute
    model.config.flash_relative_threshold = None
    return {
        "held_out": examined(trained, features, records),
        "keep_share": keep_share,
        "threshold": budget.absolute,
    }


def _start(
    config: RouterConfig, accelerator: Accelerator
) -> tuple[CascadeVLForConditionalGeneration, CascadeVLProcessor]:
    """The model to train the router of, and its processor.

    Raises:
        ConfigError: If there is none, or the run asks for what does not go with a router.
    """
    if config.model.path is None:
        raise ConfigError(
            "a router is trained in a model that has learned to do with compressed tiles; name the "
            "folder of what ViCO left with --model DIR (model.path)"
        )
    if config.lora is not None or config.run.compile:
        raise ConfigError(
            "the router is small and trained as a whole, alone: leave --lora and run.compile out"
        )
    if config.router.label == "ratio" and config.router.reference is None:
        raise ConfigError(
            "router.label is ratio, which divides by the loss with all tiles full, so it needs the "
            "model before ViCO; name it with --router.reference DIR, or take --router.label "
            "difference"
        )
    model, processor = start_from(config.model)
    if not model.config.flash_mode:
        raise ConfigError(
            f"{config.model.path} has no router and no compressed tiles; take the model that ViCO "
            "left, or a Flash model"
        )
    set_precision(model, config.model.precision)
    model.freeze(vision=True, projector=True, language=True, router=False)
    trained = model.model.router
    assert trained is not None, "checked"
    for number, layer in enumerate(trained.pooling):
        layer.requires_grad_(number in trained.order)  # what is never run stays as it is
    nn.Module.to(model, accelerator.device)
    model.train(False)
    return model, processor


def _best(config: RouterConfig, state: TrainState[Any]) -> BestRouter | None:
    """Where the best router is kept; None where the last is wanted, or another process keeps it."""
    if config.router.choose == "last" or not state.accelerator.is_main_process:
        return None
    config.run.out.mkdir(parents=True, exist_ok=True)
    return BestRouter(config.run.out / BEST, step=state.step)


def _measured(
    model: CascadeVLForConditionalGeneration,
    processor: CascadeVLProcessor,
    sources: Sequence[WeightedSource],
    config: RouterConfig,
    accelerator: Accelerator,
    console: Console | None,
) -> tuple[Drawn, list[TileLosses]]:
    """The draws of the run and their losses, those in the store not measured again.

    Raises:
        ConfigError: If a source is a stream, or the reference is another kind of model.
    """
    streamed = [one.source.name for one in sources if not isinstance(one.source, Source)]
    if streamed:
        raise ConfigError(
            f"data set {streamed[0]!r} is streamed, and its records cannot be read by number; "
            "write it to files"
        )
    section = config.router
    builder = example_builder(
        config.data, processor, config.run.seed, max_positions=dynamic_limit(model.config)
    )
    mixture = Mixture(mixed(sources, builder, config, accelerator), config.run.seed)
    reference = _reference(model, config, accelerator)
    data = {f"data.{name}": value for name, value in plain(config)["data"].items()}
    settings = {
        "model": fingerprint(model),
        "reference": fingerprint(reference),
        "precision": config.model.precision,
        "draws": mixture.fingerprint(),  # the seed is in it
        **{name: value for name, value in data.items() if name not in FREE_KEYS},
    }
    collate = collate_config(config.batch, processor, model.config)
    drawn = Drawn(mixture, builder)
    losses = measured_losses(
        drawn,
        Measure(model, reference, collate, row_tokens=config.batch.row_tokens),
        accelerator,
        folder=section.store or config.run.out / LOSSES,
        settings=settings,
        num_draws=section.records,
        chunk=section.chunk,
        console=console,
    )
    return drawn, losses


def _reference(
    model: CascadeVLForConditionalGeneration, config: RouterConfig, accelerator: Accelerator
) -> CascadeVLForConditionalGeneration:
    """The model before ViCO; the model itself where none is named."""
    if config.router.reference is None:
        return model
    reference, _ = start_from(replace(config.model, path=config.router.reference))
    ours, theirs = model.config, reference.config
    alike = {
        "visual tokens of a full tile": (ours.tokens_per_tile, theirs.tokens_per_tile),
        "pixels of a tile": (ours.tile_px, theirs.tile_px),
        "vocabulary": (ours.text_config.vocab_size, theirs.text_config.vocab_size),
        "image token": (ours.image_token_id, theirs.image_token_id),
    }
    if differing := [name for name, (one, other) in alike.items() if one != other]:
        one, other = alike[differing[0]]
        raise ConfigError(
            f"router.reference {config.router.reference} is no model that "
            f"{config.model.path} can have been made of: {differing[0]} {other} against {one}"
        )
    set_precision(reference, config.model.precision)
    nn.Module.to(reference, accelerator.device)
    reference.train(False)
    return reference


def _weigh(batch: TileBatch) -> float:
    return float(batch.weights.sum(dtype=torch.float64))


def _loss(model: nn.Module, batch: TileBatch, weight_sum: float) -> Terms:
    """Cross-entropy of the labels."""
    assert isinstance(model, Router), "the state's model is the router alone"
    terms = router_loss(model.logits(batch.patches), batch.keep, batch.weights, weight_sum)
    return Terms(terms.loss, {"accuracy": terms.accuracy, "kept": terms.kept})


OBJECTIVE: Objective[TileBatch] = Objective(weigh=_weigh, loss=_loss)
"""The objective of the router."""


class _Exam:
    """Examines the router on held-out records, keeps the best, and calls what the caller gave."""

    def __init__(
        self,
        features: TileFeatures,
        records: Sequence[LabelledRecord],
        log: RunLog,
        best: BestRouter | None,
        on_step: Callable[[TrainState[Any]], None] | None,
    ) -> None:
        self._features, self._records, self._log = features, records, log
        self._best, self._on_step = best, on_step

    def __call__(self, state: TrainState[Any]) -> None:
        found = examined(state.model, self._features, self._records)
        self._log.write(state.step, {f"held_out_{name}": x for name, x in found.items()})
        if self._best is not None:
            self._best.offer(state.step, state.model, found)
        if self._on_step is not None:
            self._on_step(state)


@torch.no_grad()
def examined(
    trained: nn.Module, features: Callable[[int], Tensor], records: Sequence[LabelledRecord]
) -> dict[str, float]:
    """How well the router knows the labels of some records, every tile counted alike.

    Args:
        trained: The router, in evaluation mode.
        features: The patch features of a draw.
        records: Whose labels.

    Returns:
        ``loss``, ``accuracy`` and ``kept`` at one half, and ``auc`` where both labels occur.
    """
    assert isinstance(trained, Router), "a router"
    device = trained.query.device
    logits = torch.cat([trained.logits(features(each.position).to(device)) for each in records])
    keep = torch.cat([each.keep for each in records])
    ones = torch.ones(len(keep))
    wide = logits.float().cpu()
    terms = router_loss(wide, keep, ones, float(len(keep)))
    found = {
        "loss": float(terms.loss),
        "accuracy": float(terms.accuracy),
        "kept": float(terms.kept),
        "auc": area_under_roc((wide[:, 1] - wide[:, 0]).tolist(), keep.tolist()),
    }
    return {name: value for name, value in found.items() if math.isfinite(value)}


@torch.no_grad()
def compress_probability(
    trained: Router, features: Callable[[int], Tensor], record: LabelledRecord
) -> list[float]:
    """The router's probability of compressing each tile of a record, as serving computes it."""
    found: Float[Tensor, " tiles"] = trained(features(record.position).to(trained.query.device))
    return found.float().tolist()
