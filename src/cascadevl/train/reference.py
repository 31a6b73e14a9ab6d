"""What the model thought of every pair before it was trained: the reference of MPO, kept on disk.

The reference is the model that training starts from, so its log-probabilities are computed before
the first step and stored in the run folder, two numbers a pair (`cascadevl.train.reference_pass`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import safetensors.torch
import torch
from accelerate import Accelerator
from rich.console import Console
from torch import Tensor, nn

from cascadevl.data.mixture import WeightedSource
from cascadevl.data.pairs import PairBatch, PairBuilder, PairCollate, digest
from cascadevl.errors import TrainingError
from cascadevl.model.adapters import adapters_off
from cascadevl.train.config import TrainConfig
from cascadevl.train.logprobs import answer_logprobs
from cascadevl.train.reference_pass import rows_of, stored_parts
from cascadevl.types import Example, Record


def stored_reference(
    model: nn.Module,
    sources: Sequence[WeightedSource],
    build: PairBuilder,
    collate: PairCollate,
    config: TrainConfig,
    accelerator: Accelerator,
    *,
    part_size: int,
    console: Console | None = None,
) -> dict[bytes, tuple[float, float]]:
    """Log-probabilities of all pairs under the model as it is now, its adapters off.

    Parts that an earlier attempt has written are read, all others are computed and written.

    Args:
        model: The model in its state before training; nothing may be dropped at random.
        sources: The pairs.
        build: Makes their examples.
        collate: Makes their batches.
        config: The run's.
        accelerator: Device and processes, which share the parts.
        part_size: Records of a part.
        console: Where progress is shown; standard error if None.

    Returns:
        Of the chosen and the rejected answer, by the digest of the pair's example.

    Raises:
        ConfigError: If a source is a stream, which has no end.
        TrainingError: If the folder holds those of another model or of other settings, or a
            log-probability is not finite.
    """

    def compute(records: Iterator[Record]) -> dict[str, Tensor]:
        rows = rows_of(records, build, collate.tokens_per_tile, config)
        return _tensors(_scores(model, rows, collate, accelerator.device))

    files = stored_parts(
        model,
        sources,
        compute,
        config,
        accelerator,
        part_size=part_size,
        remedy="train adapters with --lora --mpo.reference adapters_off",
        console=console,
    )
    return {key: value for file in files for key, value in _read(file).items()}


def _scores(
    model: nn.Module,
    batches: Iterable[list[list[Example]]],
    collate: PairCollate,
    device: torch.device,
) -> dict[bytes, tuple[float, float]]:
    """Log-probabilities of the answers of some pairs, packed as training packs them."""
    scores: dict[bytes, tuple[float, float]] = {}
    for rows in batches:
        batch = collate(rows)
        keys = [digest(example) for row in rows for example in row]
        values = _pair_logprobs(model, batch.to(device)).T.tolist()
        for key, (chosen, rejected), source in zip(keys, values, batch.sources, strict=True):
            if not torch.tensor([chosen, rejected]).isfinite().all():
                raise TrainingError(
                    f"{source}: the model gives the chosen answer log-probability {chosen} and the "
                    f"rejected {rejected} before any training; look at the model and this pair"
                )
            scores[key] = (chosen, rejected)
    return scores


@torch.no_grad()
def _pair_logprobs(model: nn.Module, batch: PairBatch) -> Tensor:
    """Log-probabilities of chosen and rejected answers under the base model: (2, pairs)."""
    with adapters_off(model):
        samples = answer_logprobs(model, batch.packed)
    return torch.stack([samples[batch.chosen], samples[batch.rejected]])


def _tensors(scores: Mapping[bytes, tuple[float, float]]) -> dict[str, Tensor]:
    keys = torch.tensor([list(key) for key in scores], dtype=torch.uint8).view(-1, 16)
    values = torch.tensor(list(scores.values()), dtype=torch.float32).view(-1, 2)
    return {"keys": keys, "logprobs": values}


def _read(file: Path) -> dict[bytes, tuple[float, float]]:
    tensors = safetensors.torch.load_file(file)
    keys, values = tensors["keys"].tolist(), tensors["logprobs"].tolist()
    return {
        bytes(key): (chosen, rejected) for key, (chosen, rejected) in zip(keys, values, strict=True)
    }
