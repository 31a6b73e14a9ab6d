"""What the model thinks of every token with full tiles: the reference of ViCO.

It is the model that training starts from. Either it is kept beside the model in training, as a
second copy of what training changes; or it is asked about all records before the first step, and
its most probable tokens are stored (`cascadevl.train.reference_pass`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeAlias

import torch
from accelerate import Accelerator
from jaxtyping import Float
from rich.console import Console
from safetensors import safe_open
from torch import Tensor, nn

from cascadevl.data.consistency import ConsistencyCollate, targets_of, with_full_tiles
from cascadevl.data.mixture import WeightedSource
from cascadevl.data.pairs import digest
from cascadevl.data.stream import Builder, CollateConfig
from cascadevl.errors import TrainingError
from cascadevl.losses.vico import TopTokens, top_tokens
from cascadevl.model.adapters import adapters_off
from cascadevl.model.modeling import CascadeVLForConditionalGeneration
from cascadevl.train.config import TrainConfig
from cascadevl.train.reference_pass import rows_of, stored_parts
from cascadevl.types import Batch, Example, Record

Asking: TypeAlias = Callable[[Batch], TopTokens]
"""How the reference is asked about rows with full tiles, where it is asked at every step."""


@torch.no_grad()
def asked(model: nn.Module, batch: Batch, k: int) -> TopTokens:
    """What a model thinks of every target of packed rows, its adapters off.

    Args:
        model: The model.
        batch: The rows, with full tiles.
        k: Tokens kept of each distribution.
    """
    parts: list[TopTokens] = []

    def head(logits: Float[Tensor, "chunk vocab"], where: slice) -> Float[Tensor, " chunk"]:
        del where  # chunks come in order
        parts.append(top_tokens(logits, k))
        return parts[-1].rest

    with adapters_off(model):
        model(batch=batch, head_fn=head)
    return TopTokens.joined(parts)


def frozen_copy(model: CascadeVLForConditionalGeneration) -> CascadeVLForConditionalGeneration:
    """A second model that stays as the first is now; what is frozen in both is there once.

    It has neither the second projector nor the router, because it only ever sees full tiles.

    Args:
        model: The model that is to be trained, with the parts frozen that stay.
    """
    memo: dict[int, Any] = {id(p): p for p in model.parameters() if not p.requires_grad}
    for unused in (model.model.compressed_projector, model.model.router):
        if unused is not None:
            memo[id(unused)] = None
    copied = copy.deepcopy(model, memo)
    nn.Module.eval(copied)
    copied.requires_grad_(False)
    return copied


@dataclass(frozen=True, slots=True)
class StoredTokens:
    """What was stored of every example, read from its file when it is asked for.

    Attributes:
        places: By the digest of an example its file, and the targets in it.
    """

    places: dict[bytes, tuple[Path, int, int]]

    @classmethod
    def of(cls, files: Iterable[Path]) -> StoredTokens:
        """Those of some parts; only digests and numbers of targets are read.

        Args:
            files: The parts.
        """
        places = {}
        for file in files:
            with safe_open(file, framework="pt") as stored:
                keys = stored.get_tensor("keys").tolist()
                ends = stored.get_tensor("ends").tolist()
            for key, first, last in zip(keys, [0, *ends], ends, strict=False):
                places[bytes(key)] = (file, first, last)
        return cls(places)

    def __call__(self, example: Example) -> TopTokens | None:
        """Of the targets of an example; None if it is not known."""
        place = self.places.get(digest(example))
        if place is None:
            return None
        file, first, last = place
        with safe_open(file, framework="pt") as stored:
            ids, logprobs, rest = (
                stored.get_slice(name)[first:last] for name in ("ids", "logprobs", "rest")
            )
        return TopTokens(ids=ids.long(), logprobs=logprobs, rest=rest)


def stored_tokens(
    model: nn.Module,
    sources: Sequence[WeightedSource],
    build: Builder,
    collate: ConsistencyCollate,
    config: TrainConfig,
    accelerator: Accelerator,
    *,
    k: int,
    part_size: int,
    console: Console | None = None,
) -> StoredTokens:
    """What the model as it is now thinks of the targets of all records, its adapters off.

    Parts that an earlier attempt has written are read, all others are computed and written: eight
    bytes for each of k tokens and four more, for every target.

    Args:
        model: The model in its state before training; nothing may be dropped at random.
        sources: The records.
        build: Makes their examples, but for the compression the same ones in every epoch.
        collate: Makes their batches.
        config: The run's.
        accelerator: Device and processes, which share the parts.
        k: Tokens kept of each distribution.
        part_size: Records of a part.
        console: Where progress is shown; standard error if None.

    Raises:
        ConfigError: If a source is a stream, which has no end.
        TrainingError: If the folder holds those of another model or of other settings, or a
            log-probability is not finite.
    """
    # A sample that fits a row of the run compressed must find one here with full tiles.
    row_tokens = max(config.batch.row_tokens, config.data.max_tokens)
    roomy = replace(config, batch=replace(config.batch, row_tokens=row_tokens))
    packed = replace(collate.packed, pad_to=None)

    def compute(records: Iterator[Record]) -> dict[str, Tensor]:
        rows = rows_of(records, _full(build), collate.tokens_per_tile, roomy)
        return _tensors(_known(model, rows, packed, accelerator.device, k))

    files = stored_parts(
        model,
        sources,
        compute,
        config,
        accelerator,
        part_size=part_size,
        remedy="keep the reference as a copy with --vico.reference copy",
        more={"top_tokens": k},
        console=console,
    )
    return StoredTokens.of(files)


def _full(build: Builder) -> Builder:
    """The same examples with full tiles."""

    def built(record: Record, *, epoch: int = 0) -> Example:
        return with_full_tiles(build(record, epoch=epoch))

    return built


def _known(
    model: nn.Module,
    batches: Iterable[list[list[Example]]],
    collate: CollateConfig,
    device: torch.device,
    k: int,
) -> list[tuple[bytes, TopTokens]]:
    """What the model thinks of some examples."""
    known: list[tuple[bytes, TopTokens]] = []
    for rows in batches:
        examples = [example for row in rows for example in row]
        batch = collate(rows)
        numbers = targets_of(examples, batch)
        found = asked(model, batch.to(device), k).to("cpu")
        for example, last, number in zip(examples, accumulate(numbers), numbers, strict=True):
            part = found.at(slice(last - number, last))
            if not part.logprobs.isfinite().all():
                raise TrainingError(
                    f"{example.source}: the model gives a token a log-probability that is not "
                    "finite before any training; look at the model and this sample"
                )
            known.append((digest(example), part))
    return known


def _tensors(known: Sequence[tuple[bytes, TopTokens]]) -> dict[str, Tensor]:
    keys = torch.tensor([list(key) for key, _ in known], dtype=torch.uint8).view(-1, 16)
    ends = torch.tensor([len(part) for _, part in known], dtype=torch.int64).cumsum(0)
    if not known:
        return {"keys": keys, "ends": ends}
    joined = TopTokens.joined([part for _, part in known])
    return {
        "keys": keys,
        "ends": ends,
        "ids": joined.ids.int(),
        "logprobs": joined.logprobs.float(),
        "rest": joined.rest.float(),
    }
