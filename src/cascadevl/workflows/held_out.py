"""How well a model predicts data it was not trained on, data set by data set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from cascadevl.data.collate import collate, num_tokens
from cascadevl.data.example import ExampleBuilder
from cascadevl.data.permutation import named_key, permuted
from cascadevl.data.processor import CascadeVLProcessor
from cascadevl.data.source import Source, StreamedSource, readable_by_number
from cascadevl.errors import DataError
from cascadevl.model.modeling import CascadeVLForConditionalGeneration
from cascadevl.train.config import DataConfig
from cascadevl.train.objective import NEXT_TOKEN
from cascadevl.train.sources import example_builder
from cascadevl.types import Example


@torch.no_grad()
def held_out_losses(
    model: CascadeVLForConditionalGeneration,
    processor: CascadeVLProcessor,
    sources: Mapping[str, Source | StreamedSource],
    data: DataConfig,
    *,
    num_examples: int,
    seed: int,
) -> dict[str, float]:
    """Mean negative log-likelihood of a target token, in nats, of every source.

    Pictures are not degraded, and increments that training draws at random are 1. All targets
    count the same, whatever the averaging of the training.

    Args:
        model: The model; it is in evaluation mode afterwards.
        processor: Its processor.
        sources: What it is measured on.
        data: How records become examples in training.
        num_examples: Usable records of each source, if it has so many.
        seed: Which of them.

    Raises:
        DataError: Of kind ``no_sample`` if no record of a source can be used.
    """
    increment = 1.0 if data.increment == "random" else data.increment
    builder = example_builder(replace(data, jpeg=False, increment=increment), processor, seed)
    model.train(False)
    losses = {}
    for name, source in sources.items():
        examples = _examples(name, source, builder, num_examples, seed)
        total, count = 0.0, 0
        for row in _rows(examples, builder.tokens_per_tile, data.max_tokens):
            batch = collate(
                [row],
                image_token_id=processor.image_token_id,
                pad_token_id=processor.tokenizer.pad_token_id,
                tokens_per_tile=builder.tokens_per_tile,
                averaging="token",
                ceil_after_image=model.config.ceil_after_image,
            ).to(model.device)
            total += float(NEXT_TOKEN.loss(model, batch, 1.0).loss)
            count += len(batch.target_ids)
        losses[name] = total / count
    return losses


def _examples(
    name: str,
    source: Source | StreamedSource,
    builder: ExampleBuilder,
    wanted: int,
    seed: int,
) -> list[Example]:
    reader = readable_by_number(source, wanted)
    key = named_key(seed, f"held out of {name}")
    found: list[Example] = []
    for number in range(min(len(reader), 10 * wanted)):
        try:
            found.append(builder(reader[permuted(number, len(reader), key)]))
        except DataError:
            continue
        if len(found) == wanted:
            break
    if not found:
        raise DataError(
            f"no held-out record of {name!r} can be used",
            kind="no_sample",
            source=name,
            remedy="run `cascadevl data check` on the held-out meta file",
        )
    return found


def _rows(
    examples: Sequence[Example], tokens_per_tile: int, max_tokens: int
) -> Iterator[list[Example]]:
    """Neighbours that fit into one row together."""
    row: list[Example] = []
    filled = 0
    for example in examples:
        size = num_tokens(example, tokens_per_tile)
        if row and filled + size > max_tokens:
            yield row
            row, filled = [], 0
        row.append(example)
        filled += size
    if row:
        yield row
