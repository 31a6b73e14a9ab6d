"""The weights of a run's sources: what the configuration says, put into the ratio it asks for.

What was estimated is written into the run folder, and a run that is taken up again reads it from
there: a file that grew, or another sample, must not change which record comes when.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from cascadevl.data.collate import num_tokens
from cascadevl.data.example import ExampleBuilder
from cascadevl.data.mixture import Mixture, WeightedSource
from cascadevl.data.modality import Modality, modality_of
from cascadevl.data.ratios import TokenEstimate, estimate_tokens, parse_ratio, with_ratio
from cascadevl.data.source import Source
from cascadevl.errors import ConfigError
from cascadevl.train.config import FREE_KEYS, DataConfig, TrainConfig, plain
from cascadevl.train.run import older_run
from cascadevl.types import Record

FACTS = "mixture.json"
"""File of the run folder with what is known of its sources and the shares they got."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """What a ratio needs to know of a source.

    Attributes:
        name: The source.
        size: Its records; None of a stream.
        modality: Whether it is text alone.
        tokens: Tokens of a record; None where the ratio counts samples.
    """

    name: str
    size: int | None
    modality: Modality
    tokens: TokenEstimate | None

    @property
    def mean(self) -> float:
        """What a draw adds to its side of the ratio."""
        return 1.0 if self.tokens is None else self.tokens.mean


def mixed(
    sources: Sequence[WeightedSource],
    builder: ExampleBuilder,
    config: TrainConfig,
    accelerator: Accelerator | None = None,
) -> list[WeightedSource]:
    """The sources with the weights that a run's configuration gives them.

    Args:
        sources: The sources.
        builder: Makes the run's examples, whose tokens are counted.
        config: The run's.
        accelerator: The main process estimates for all; None to look only, without a run folder.

    Raises:
        ConfigError: If weights are missing or name no source, or one modality has no source.
        DataError: If no record of a source can be used.
    """
    sources = with_weights(sources, config.data)
    ratio = parse_ratio(config.data.mixture)
    if ratio is None:
        return list(sources)
    if accelerator is None:
        profiles = profile_sources(sources, builder, config.data, seed=config.run.seed)
    else:
        profiles = _shared(sources, builder, config, accelerator)
    result = in_ratio(sources, profiles, ratio)
    if accelerator and accelerator.is_main_process and older_run(config.run.out) is None:
        write_facts(config.run.out / FACTS, profiles, result, config)
    return result


def in_ratio(
    sources: Sequence[WeightedSource], profiles: Sequence[Profile], ratio: tuple[float, float]
) -> list[WeightedSource]:
    """The sources with weights that bring text and multimodal data into a ratio.

    Raises:
        ConfigError: If one modality has no source.
    """
    modalities = {profile.name: profile.modality for profile in profiles}
    tokens = {profile.name: profile.mean for profile in profiles}
    return with_ratio(sources, modalities, tokens, ratio)


def with_weights(sources: Sequence[WeightedSource], data: DataConfig) -> list[WeightedSource]:
    """The sources with the weights that are configured by name, if any are; repeats are in them.

    Raises:
        ConfigError: If a source has none while others do, or a name is unknown.
    """
    if not data.weights:
        return list(sources)
    names = [one.source.name for one in sources]
    for name in data.weights:
        if name not in names:
            nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
            raise ConfigError(
                f"data.weights names {name!r}, which is no data set of this run; did you mean "
                f"{nearest!r}? There are {', '.join(names)}"
            )
    if missing := [name for name in names if name not in data.weights]:
        raise ConfigError(
            f"data.weights names {len(data.weights)} of {len(names)} data sets; give a weight to "
            f"{', '.join(missing)} too, or to none"
        )
    return [replace(one, weight=data.weights[one.source.name], repeat=1.0) for one in sources]


def profile_sources(
    sources: Sequence[WeightedSource], builder: ExampleBuilder, data: DataConfig, *, seed: int
) -> list[Profile]:
    """Find out modality and tokens of every source.

    Args:
        sources: The sources.
        builder: Makes the examples whose tokens are counted.
        data: How many records are built, and whether at all.
        seed: Which records.

    Raises:
        DataError: If no record of a source can be used.
    """

    def measure(record: Record) -> int:
        return num_tokens(builder(record), builder.tokens_per_tile)

    profiles = []
    for one in sources:
        tokens = None
        if data.mixture_unit == "tokens":
            tokens = estimate_tokens(one, measure, seed=seed, most=data.mixture_examples)
        modality = one.modality or modality_of(one.source)
        profiles.append(
            Profile(name=one.source.name, size=_size(one), modality=modality, tokens=tokens)
        )
    return profiles


def write_facts(
    path: Path,
    profiles: Sequence[Profile],
    sources: Sequence[WeightedSource],
    config: TrainConfig,
) -> None:
    """Write what is known of the sources, and the shares of draws and tokens they get."""
    shares = Mixture(sources, config.run.seed).shares
    brought = {profile.name: shares[profile.name] * profile.mean for profile in profiles}
    facts = {
        "mixture": config.data.mixture,
        "unit": config.data.mixture_unit,
        "seed": config.run.seed,
        "data": _settings(config),
        "sources": [
            {
                **asdict(profile),
                "share_of_draws": shares[profile.name],
                f"share_of_{config.data.mixture_unit}": brought[profile.name]
                / sum(brought.values()),
            }
            for profile in profiles
        ],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


def read_facts(path: Path, config: TrainConfig) -> list[Profile] | None:
    """What an earlier attempt of a run knew of its sources; None if it was set up otherwise."""
    if not path.is_file():
        return None
    facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if facts["data"] != _settings(config):
        return None
    return [
        Profile(
            name=known["name"],
            size=known["size"],
            modality=known["modality"],
            tokens=None if known["tokens"] is None else TokenEstimate(**known["tokens"]),
        )
        for known in facts["sources"]
    ]


def _shared(
    sources: Sequence[WeightedSource],
    builder: ExampleBuilder,
    config: TrainConfig,
    accelerator: Accelerator,
) -> list[Profile]:
    """The profiles, found by the main process or read from the run that is taken up again."""
    found: list[list[Profile] | None] = [None]
    if accelerator.is_main_process:
        known = read_facts(config.run.out / FACTS, config) if config.run.resume else None
        now = [(one.source.name, _size(one)) for one in sources]
        if known is None or [(profile.name, profile.size) for profile in known] != now:
            known = profile_sources(sources, builder, config.data, seed=config.run.seed)
        found = [known]
    if accelerator.num_processes > 1:
        broadcast_object_list(found)
    assert found[0] is not None
    return found[0]


def _settings(config: TrainConfig) -> dict[str, Any]:
    """The section ``data`` without what may change when a run is taken up again."""
    return {
        key: value for key, value in plain(config)["data"].items() if f"data.{key}" not in FREE_KEYS
    }


def _size(one: WeightedSource) -> int | None:
    return len(one.source) if isinstance(one.source, Source) else None
