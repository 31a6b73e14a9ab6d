"""The share of text in a mixture, counted in tokens as the reports count it.

InternVL3 mixes language and multimodal data 1 : 3, 50 of 200 billion tokens against 150
(report, section 2.2). Data sets are drawn by record, and a record with a picture has many times
the tokens of a short text, so the tokens of a record are estimated from a sample first. Among the
data sets of one side nothing changes: they keep the draws they have relative to each other.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from cascadevl.data.mixture import WeightedSource
from cascadevl.data.modality import MODALITIES, Modality
from cascadevl.data.permutation import named_key, permuted
from cascadevl.data.source import readable_by_number
from cascadevl.errors import ConfigError, DataError
from cascadevl.types import Record

AS_GIVEN = "as_given"

PRESETS: dict[str, tuple[float, float]] = {
    "internvl3": (1.0, 3.0),  # InternVL3, section 2.2: 50 and 150 billion tokens
    "internvl3_5": (1.0, 2.5),  # InternVL3.5, pre-training; the unit is not said
    "internvl3_5_sft": (1.0, 3.5),  # InternVL3.5, SFT; the unit is not said
}
"""Text to multimodal, as the reports mix them."""

ENOUGH = 0.02
"""Relative standard error of the mean tokens at which no more records are looked at."""

FEWEST = 64
"""Records looked at before that is believed: a few very long ones may be among the next."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenEstimate:
    """Tokens that a draw of a source brings.

    Attributes:
        mean: Mean over the records looked at; those that cannot be used bring none.
        standard_error: Of that mean; 0 where all records of the source were looked at.
        num_records: Records looked at.
        num_unusable: How many of them cannot be used.
    """

    mean: float
    standard_error: float
    num_records: int
    num_unusable: int


def parse_ratio(text: str) -> tuple[float, float] | None:
    """Parts of text and of multimodal data.

    Args:
        text: A key of ``PRESETS``, or ``"a:b"`` such as ``"1:3"``, or ``"as_given"``.

    Returns:
        The two parts; None for ``"as_given"``.

    Raises:
        ConfigError: If it is none of these, or a part is not a positive number.
    """
    if text == AS_GIVEN:
        return None
    if text in PRESETS:
        return PRESETS[text]
    try:
        parts = tuple(float(part) for part in text.split(":"))
    except ValueError:
        parts = ()
    if len(parts) != 2 or not all(math.isfinite(part) and part > 0 for part in parts):
        raise ConfigError(
            f"the mixture is {text!r}; write {', '.join([*PRESETS, AS_GIVEN])}, or the parts of "
            "text and multimodal data, both above 0, such as 1:3"
        )
    return parts[0], parts[1]


def estimate_tokens(
    weighted: WeightedSource, measure: Callable[[Record], int], *, seed: int, most: int
) -> TokenEstimate:
    """Look at records of a source until their mean tokens are known well enough.

    The records are a random sample without repetition; of a stream, the first of some parts.
    Looking ends when the standard error is 2 % of the mean, after 64 records at the earliest.

    Args:
        weighted: The source.
        measure: Tokens of a record, visual ones included; raises `DataError` for an unusable one.
        seed: Which sample.
        most: Records looked at, at most.

    Raises:
        DataError: Of kind ``no_sample`` if none of the records can be used.
    """
    source = weighted.source
    reader = readable_by_number(source, most)
    size, key = len(reader), named_key(seed, f"tokens of {source.name}")
    population = (
        float(size) if reader is source else math.inf
    )  # of a stream, only the beginning is seen
    found: list[int] = []
    num_unusable = 0
    error = 0.0
    for number in range(min(size, most)):
        try:
            found.append(measure(reader[permuted(number, size, key)]))
        except DataError:
            found.append(0)
            num_unusable += 1
        if number + 1 >= FEWEST:
            error = _standard_error(found, population)
            if num_unusable < len(found) and error <= ENOUGH * statistics.fmean(found):
                break
    if num_unusable == len(found):
        raise DataError(
            f"none of {len(found)} records looked at can be used, so the tokens of a record are "
            "unknown",
            kind="no_sample",
            source=source.name,
            remedy="run `cascadevl data check`, or leave the data set out",
        )
    return TokenEstimate(
        mean=statistics.fmean(found),
        standard_error=_standard_error(found, population),
        num_records=len(found),
        num_unusable=num_unusable,
    )


def with_ratio(
    sources: Sequence[WeightedSource],
    modalities: Mapping[str, Modality],
    tokens: Mapping[str, float],
    ratio: tuple[float, float],
) -> list[WeightedSource]:
    """The same sources with weights that bring text and multimodal data into a ratio.

    With w_i the draws of source i (weight and repeats) and t_i its tokens a record, the sources of
    modality m get the weights ``f_m w_i``, where ``f_m = share_m / sum_(i in m) w_i t_i``; so
    ``sum_(i in m) f_m w_i t_i`` is in the ratio, and the w_i within m stay in theirs.

    Args:
        sources: The sources.
        modalities: Modality of each, by name.
        tokens: Tokens of a record of each, by name; 1 of each for a ratio of records.
        ratio: Parts of text and of multimodal data.

    Raises:
        ConfigError: If there are no sources of one modality.
    """
    draws = {one.source.name: float(one.draws) for one in sources}
    parts = dict(zip(MODALITIES, ratio, strict=True))
    brought = dict.fromkeys(MODALITIES, 0.0)
    for name, weight in draws.items():
        brought[modalities[name]] += weight * tokens[name]
    for modality, amount in brought.items():
        if amount == 0:
            raise ConfigError(
                f"text and multimodal data shall be mixed {ratio[0]:g}:{ratio[1]:g}, but none of "
                f"the data sets {', '.join(draws)} is {modality}; add one, correct its "
                f'"modality" in the meta file, or use {AS_GIVEN}'
            )
    factors = {modality: parts[modality] / brought[modality] for modality in MODALITIES}
    scaled = {name: factors[modalities[name]] * weight for name, weight in draws.items()}
    least = min(scaled.values())  # the smallest becomes 1, so that fractions hold the others well
    return [
        replace(one, weight=scaled[name] / least, repeat=1.0, modality=modalities[name])
        for one in sources
        for name in [one.source.name]
    ]


def _standard_error(values: Sequence[int], population: float) -> float:
    """Of the mean of a sample without repetition from so many values."""
    if len(values) < 2:
        return 0.0
    unseen = 1.0 - len(values) / population
    return statistics.stdev(values) * math.sqrt(max(unseen, 0.0) / len(values))
