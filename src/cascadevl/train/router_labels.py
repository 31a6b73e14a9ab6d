"""From measured losses to labelled records, and how much of the labels is about single tiles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import torch

from cascadevl.errors import ConfigError, DataError
from cascadevl.losses.router import balanced_weights, tile_labels, variance_between
from cascadevl.train.loss_journal import NO_TILES, TileLosses
from cascadevl.train.router_batch import LabelledRecord
from cascadevl.train.router_config import RouterSection

ROUNDING = 1e-7
"""Losses below this, in nats, are rounding of float32 logits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelFacts:
    """What the labels are like.

    Attributes:
        records: Records with tiles.
        tiles: Their tiles.
        tokens: Tokens that were read to measure them, by both models.
        keep: Share of the tiles that are labelled to be kept.
        between: Share of the labels' variance that lies between records.
        within: The rest, which lies between the tiles of a record.
        floored: Share of the records whose denominator is the floor.
        full_loss: Median loss with all tiles full.
        compressed_loss: Median loss with one tile compressed.
    """

    records: int
    tiles: int
    tokens: int
    keep: float
    between: float
    within: float
    floored: float
    full_loss: float
    compressed_loss: float

    @property
    def words(self) -> str:
        """The same in a sentence."""
        return (
            f"{self.tiles:,} tiles of {self.records:,} records are labelled, {self.keep:.1%} to be "
            f"kept; {self.within:.1%} of the labels' variance lies within records, "
            f"{self.floored:.1%} of the records are below the floor"
        )


def labelled(
    losses: Sequence[TileLosses], section: RouterSection
) -> tuple[list[LabelledRecord], LabelFacts]:
    """Labels of all tiles that were measured.

    Args:
        losses: In the order in which they were drawn.
        section: How tiles are labelled.

    Raises:
        ConfigError: If ratios are asked for and losses with all tiles full are next to nothing.
        DataError: If no record has tiles.
    """
    found = [each for each in losses if not each.fault]
    if not found:
        raise DataError(
            f"none of the {len(losses)} records drawn has a tile that could be measured",
            kind="no_sample",
            remedy="name data with pictures, or raise router.records",
        )
    full = torch.tensor([each.full for each in found], dtype=torch.float64)
    if section.label == "ratio" and float(full.median()) < ROUNDING:
        raise ConfigError(
            "with all tiles full the model says what router.reference says, to within rounding, so "
            "there is nothing to divide by; name the model before ViCO, or take router.label "
            "difference"
        )
    counts = [len(each.compressed) for each in found]
    compressed = torch.tensor([x for each in found for x in each.compressed], dtype=torch.float64)
    sample = torch.repeat_interleave(torch.tensor(counts))
    labels = tile_labels(
        compressed,
        full,
        sample,
        form=section.label,
        percentile=section.percentile,
        window=section.window,
        floor=section.floor,
    )
    weights = balanced_weights(labels.keep) if section.balanced else torch.ones(len(labels.keep))
    records = [
        LabelledRecord(
            position=each.position,
            source=f"{each.dataset}:{each.record_id}",
            keep=keep,
            weights=weight,
        )
        for each, keep, weight in zip(
            found, labels.keep.split(counts), weights.split(counts), strict=True
        )
    ]
    between = float(variance_between(labels.keep.double(), sample))
    facts = LabelFacts(
        records=len(found),
        tiles=len(sample),
        tokens=sum(each.tokens for each in found),
        keep=float(labels.keep.double().mean()),
        between=between,
        within=1 - between if 0 < float(labels.keep.double().mean()) < 1 else 0.0,
        floored=float(labels.floored.double().mean()),
        full_loss=float(full.median()),
        compressed_loss=float(compressed.median()),
    )
    return records, facts


def parted(
    records: Sequence[LabelledRecord], share: float
) -> tuple[list[LabelledRecord], list[LabelledRecord]]:
    """Records to train with and records to examine with; neither is empty.

    A record belongs to one of them by its name, so one that was drawn twice is never in both.

    Args:
        records: All of them.
        share: Of them to examine with; where that makes none, all do both.
    """
    held_out = [each for each in records if _chance(each.source) < share]
    taught = [each for each in records if _chance(each.source) >= share]
    return (taught, held_out) if taught and held_out else (list(records), list(records))


def faults(losses: Sequence[TileLosses], max_share: float) -> list[tuple[str, str, int, str]]:
    """What measuring left out: data set, kind of fault, how many, and the first in words.

    Args:
        losses: All of them. A record without tiles is no fault.
        max_share: Share of faulty records that is borne.

    Raises:
        DataError: If there are more.
    """
    first: dict[tuple[str, str], str] = {}
    count: dict[tuple[str, str], int] = {}
    for each in losses:
        if each.fault not in ("", NO_TILES):
            key = (each.dataset, each.fault)
            first.setdefault(key, each.message)
            count[key] = count.get(key, 0) + 1
    left_out = [(*key, count[key], first[key]) for key in sorted(count)]
    bad = sum(count.values())
    if bad > max_share * len(losses):
        words = "".join(f"\n  {n} x {kind} of {name}, first: {m}" for name, kind, n, m in left_out)
        raise DataError(
            f"{bad} of {len(losses)} records drawn cannot be used, more than the share of "
            f"{max_share} that is allowed",
            kind="too_many_skipped",
            remedy="mend the data (`cascadevl data check` names every bad record), or raise "
            f"data.max_skipped_share; left out were{words}",
        )
    return left_out


def _chance(name: str) -> float:
    """A number of 0 to 1 that follows from a name."""
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "big") / 2**64
