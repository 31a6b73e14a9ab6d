"""What a training run will see, without training: the first samples it draws, made in full."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice

from cascadevl.data.mixture import Mixture
from cascadevl.data.process_records import StepBuilder
from cascadevl.data.processor import CascadeVLProcessor
from cascadevl.data.spans import Span, describe
from cascadevl.data.stream import Builder
from cascadevl.errors import ConfigError, DataError
from cascadevl.model.loading import find
from cascadevl.model.repository_files import load_processor
from cascadevl.sequence import expand
from cascadevl.train.config import TrainConfig
from cascadevl.train.gspo_config import GSPOConfig
from cascadevl.train.mixing import mixed
from cascadevl.train.prm import PRMConfig
from cascadevl.train.questions import Asker, QuestionStream, problems_of
from cascadevl.train.sources import example_builder, sources_of_meta
from cascadevl.train.start import from_scratch
from cascadevl.types import Example

MAX_DRAWS = 100
"""Draws after which a dry run gives up looking for samples that can be used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SeenImage:
    """One image of a sample.

    Attributes:
        num_tiles: Its tiles, thumbnail included.
        num_tokens: Its visual tokens.
        increment: Position step of each.
        first_position: Position of the first of them.
        last_position: Position of the last.
    """

    num_tiles: int
    num_tokens: int
    increment: float
    first_position: float
    last_position: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SeenSample:
    """One sample as the model will see it.

    Attributes:
        source: Place of the record.
        dataset: Data set it was drawn from.
        spans: Its text with special tokens, trained and untrained stretches apart.
        images: Its images, in the order of their slots.
        num_tokens: Tokens, visual ones included.
        num_trained: Tokens that are prediction targets.
        last_position: Largest position.
    """

    source: str
    dataset: str
    spans: tuple[Span, ...]
    images: tuple[SeenImage, ...]
    num_tokens: int
    num_trained: int
    last_position: float


def first_samples(config: TrainConfig, count: int) -> Iterator[SeenSample | DataError]:
    """The first samples that a run draws; a record that cannot be used gives its error instead.

    Of a run of reinforcement learning, the first questions it asks; others are left out.

    Args:
        config: The run.
        count: Usable samples wanted.

    Raises:
        ConfigError: If the run has no model or data to begin with.
    """
    processor = _processor(config)
    builder = example_builder(config.data, processor, config.run.seed)
    if isinstance(config, GSPOConfig):
        asker, problems = Asker(builder, config), problems_of(config.problems)
        questions = QuestionStream(problems, asker, num_prompts=1, seed=config.run.seed)
        for (asked,) in islice(questions, count):
            steps = (1.0,) * len(asked.prompt.tiles_per_image)  # the engine may choose others
            yield _seen(replace(asked.prompt, increments=steps), "questions", processor)
        return
    sources = mixed(sources_of_meta(config.data.meta), builder, config)
    mixture = Mixture(sources, config.run.seed)
    build: Builder = builder
    if isinstance(config, PRMConfig):
        build = StepBuilder(builder, config.prm.prompt)
    found = 0
    for draw in islice(mixture.draws(), MAX_DRAWS):
        try:
            example = build(mixture.record(draw), epoch=draw.epoch)
        except DataError as error:
            yield error
            continue
        yield _seen(example, draw.source_name, processor)
        found += 1
        if found == count:
            return


def _processor(config: TrainConfig) -> CascadeVLProcessor:
    if config.model.path is not None:
        return load_processor(find(config.model.path, weights=False))
    if config.model.preset is not None:
        return from_scratch(config.model, None, seed=config.run.seed)[1]
    raise ConfigError(
        "there is no model to see the samples: model.path is not set; give --model DIR"
    )


def _seen(example: Example, dataset: str, processor: CascadeVLProcessor) -> SeenSample:
    per_image = [number * processor.tokens_per_tile for number in example.tiles_per_image]
    placed = expand(
        example.input_ids,
        example.trained,
        example.segments,
        example.parents,
        image_token_id=processor.image_token_id,
        tokens_per_image=per_image,
        increments=example.increments,
        source=example.source,
    )
    visual = placed.position_ids[placed.is_visual].tolist()
    images, start = [], 0
    for num_tiles, num_tokens, increment in zip(
        example.tiles_per_image, per_image, example.increments, strict=True
    ):
        images.append(
            SeenImage(
                num_tiles=num_tiles,
                num_tokens=num_tokens,
                increment=increment,
                first_position=visual[start],
                last_position=visual[start + num_tokens - 1],
            )
        )
        start += num_tokens
    return SeenSample(
        source=example.source,
        dataset=dataset,
        spans=tuple(describe(example, processor.tokenizer)),
        images=tuple(images),
        num_tokens=len(placed.input_ids),
        num_trained=int(placed.trained.sum()),
        last_position=float(placed.position_ids.max()),
    )
