"""From sources to the stream of batches a recipe trains on.

What a model was built with (template, tile size, tokens a tile) comes from its processor; what a
run chooses (limits, augmentation, packing, mixture) from its configuration.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from accelerate import Accelerator

from cascadevl.data.example import ExampleBuilder, ExampleConfig
from cascadevl.data.meta import read_meta
from cascadevl.data.mixture import Mixture, WeightedSource
from cascadevl.data.packing import FixedRows, Packer
from cascadevl.data.prefetch import Prefetcher
from cascadevl.data.processor import CascadeVLProcessor
from cascadevl.data.stream import (
    BatchStream,
    BatchT,
    Builder,
    Collate,
    CollateConfig,
    StreamConfig,
)
from cascadevl.errors import ConfigError
from cascadevl.model.configuration import CascadeVLConfig
from cascadevl.model.v2pe import dynamic_limit
from cascadevl.tasks.naming import weighted
from cascadevl.train.config import BatchConfig, DataConfig, TrainConfig
from cascadevl.train.mixing import mixed
from cascadevl.types import Batch, Example


def sources_of_meta(paths: Sequence[Path]) -> list[WeightedSource]:
    """The data sets of some meta files, each drawn as often as it has records.

    Raises:
        ConfigError: If there is no meta file, or a task is named that does not exist.
        DataError: If a meta file or an annotation cannot be read.
    """
    if not paths:
        raise ConfigError(
            "there is nothing to train on; name a meta file with --data.meta '[meta.json]'"
        )
    return [weighted(spec) for path in paths for spec in read_meta(path)]


def example_config(data: DataConfig, processor: CascadeVLProcessor, seed: int) -> ExampleConfig:
    """How records become examples for a model, in a run."""
    tiling = processor.tiling
    if data.max_tiles is not None:
        tiling = replace(
            tiling, max_tiles=data.max_tiles, min_tiles=min(tiling.min_tiles, data.max_tiles)
        )
    return ExampleConfig(
        template=processor.template.name,
        system=processor.system_message,
        tiling=tiling,
        max_tokens=data.max_tokens,
        jpeg=data.jpeg,
        increment=data.increment,
        seed=seed,
        min_frames=data.min_frames,
        max_frames=data.max_frames,
    )


def example_builder(
    data: DataConfig, processor: CascadeVLProcessor, seed: int, *, max_positions: int | None = None
) -> ExampleBuilder:
    """What makes the examples of a run.

    Args:
        data: What is trained on.
        processor: The model's processor.
        seed: Of what is drawn at random.
        max_positions: Most positions of an example, where the model's RoPE allows no more.
    """
    settings = replace(example_config(data, processor, seed), max_positions=max_positions)
    return ExampleBuilder(processor.tokenizer, settings, processor.tokens_per_tile)


def row_rule(batch: BatchConfig) -> Packer[Example] | FixedRows[Example]:
    """The rule by which samples share rows."""
    if batch.packing == "count":
        return FixedRows(batch.row_samples)
    return Packer(batch.row_tokens, batch.row_tiles, batch.buffer_rows)


def collate_config(
    batch: BatchConfig, processor: CascadeVLProcessor, model: CascadeVLConfig
) -> CollateConfig:
    """How rows become tensors in a run."""
    return CollateConfig(
        image_token_id=processor.image_token_id,
        pad_token_id=processor.tokenizer.pad_token_id,
        tokens_per_tile=processor.tokens_per_tile,
        averaging=batch.averaging,
        ceil_after_image=model.ceil_after_image,
        pad_to=batch.row_tokens if batch.fixed_rows else None,
    )


@contextmanager
def open_stream(
    sources: Sequence[WeightedSource],
    processor: CascadeVLProcessor,
    config: TrainConfig,
    accelerator: Accelerator,
    model: CascadeVLConfig,
) -> Iterator[BatchStream[Batch] | Prefetcher[Batch]]:
    """The batches of one process of a run; what makes them ahead ends with the context.

    Args:
        sources: What to draw from.
        processor: The model's processor.
        config: The run's.
        accelerator: Knows which process this is.
        model: The model's configuration.

    Raises:
        ConfigError: If the sources cannot be mixed as configured.
        DataError: If the tokens of a source cannot be estimated.
    """
    builder = example_builder(
        config.data, processor, config.run.seed, max_positions=dynamic_limit(model)
    )
    mixture = mixed(sources, builder, config, accelerator)
    collate = collate_config(config.batch, processor, model)
    with stream_of(mixture, builder, collate, config, accelerator) as stream:
        yield stream


@contextmanager
def stream_of(
    sources: Sequence[WeightedSource],
    builder: Builder,
    collate: Collate[BatchT],
    config: TrainConfig,
    accelerator: Accelerator,
) -> Iterator[BatchStream[BatchT] | Prefetcher[BatchT]]:
    """The same of any kind of batches.

    Args:
        sources: What to draw from, with the weights it is drawn by (`mixed`).
        builder: Makes examples of records.
        collate: Makes batches of rows.
        config: The run's.
        accelerator: Knows which process this is.
    """
    stream = BatchStream(
        Mixture(sources, config.run.seed),
        builder,
        row_rule(config.batch),
        collate,
        StreamConfig(
            rows_per_batch=config.batch.rows,
            level_rows=config.batch.level_rows if config.batch.packing == "fill" else 1,
            max_skipped_share=config.data.max_skipped_share,
        ),
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
    )
    if not config.data.prefetch:
        yield stream
        return
    with Prefetcher(stream, config.data.prefetch) as ahead:
        yield ahead
