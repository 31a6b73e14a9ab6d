"""What the candidates of a mixture search share: data sets, held-out parts, tokenizer, facts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from cascadevl.data.example import ExampleBuilder
from cascadevl.data.meta import DatasetSpec, read_meta
from cascadevl.data.mixture import WeightedSource
from cascadevl.data.modality import Modality
from cascadevl.data.packing import Size, size_of
from cascadevl.data.processor import CascadeVLProcessor
from cascadevl.data.source import Source, StreamedSource, readable_by_number
from cascadevl.data.tokenizer import build_tokenizer
from cascadevl.errors import ConfigError, DataError
from cascadevl.eval.suite import SuiteRow
from cascadevl.model.loading import find
from cascadevl.model.repository_files import load_processor
from cascadevl.tasks.naming import held_out, open_entry, task_of, weighted
from cascadevl.train.config import TrainConfig
from cascadevl.train.mixing import Profile, profile_sources
from cascadevl.train.sources import example_builder
from cascadevl.train.start import from_scratch
from cascadevl.workflows.mixture_config import MixtureSearchConfig

EXAM_SEED = 2025

SIZED_RECORDS = 64
"""Records of each data set whose sizes stand for all when the filling of rows is foreseen."""

TOKENIZER_RECORDS = 400
"""Records of each data set whose texts a new tokenizer is made of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """What all candidates share.

    Attributes:
        config: The search.
        train: The recipe, with the tokenizer that all of them use.
        sources: The data sets.
        profiles: What is known of each, by name.
        sizes: Tokens and tiles of some usable records of each, by name.
        held_out: Held-out records, by data set.
        rows: Held-out questions, by data set.
        facts: What a finished candidate must agree with to be taken over.
        console: Where progress is shown.
    """

    config: MixtureSearchConfig
    train: TrainConfig
    sources: Sequence[WeightedSource]
    profiles: Mapping[str, Profile]
    sizes: Mapping[str, Sequence[Size]]
    held_out: Mapping[str, Source | StreamedSource]
    rows: Mapping[str, SuiteRow]
    facts: Mapping[str, Any]
    console: Console

    def of(self, modality: Modality) -> list[WeightedSource]:
        """The data sets of one modality."""
        return [s for s in self.sources if self.profiles[s.source.name].modality == modality]


def prepare(config: MixtureSearchConfig, console: Console) -> Search:
    """Open all data sets, and settle what every candidate has in common.

    Args:
        config: The search.
        console: Where progress is shown.

    Raises:
        ConfigError: If there is no data set, two have one name, or one has no held-out part.
        DataError: If a data set cannot be used.
    """
    specs = _by_name(config.train.data.meta)
    if not specs:
        raise ConfigError("there is nothing to mix; name meta files in train.data.meta")
    sources = [weighted(spec) for spec in specs.values()]
    train = replace(config.train, data=replace(config.train.data, mixture="as_given", weights={}))
    if train.model.preset is not None and train.model.tokenizer is None:
        folder = _tokenizer(config, sources)
        train = replace(train, model=replace(train.model, tokenizer=folder))
    builder = example_builder(train.data, _processor(train), EXAM_SEED)
    with console.status("looking at the data sets"):
        counted = replace(train.data, mixture_unit="tokens")  # the budget counts tokens anyway
        profiles = profile_sources(sources, builder, counted, seed=EXAM_SEED)
        sizes = {one.source.name: _sizes(one, builder) for one in sources}
    tests = _held_out_specs(config, specs)
    rows = {
        name: SuiteRow(name=name, task=task_of(spec), num_questions=config.questions)
        for name, spec in tests.items()
        if spec.task is not None and config.questions
    }
    exam = {name: getattr(config, name) for name in ("examples", "questions", "answer_tokens")}
    data_sets = {name: [str(spec), str(tests[name])] for name, spec in specs.items()}
    return Search(
        config=config,
        train=train,
        sources=sources,
        profiles={profile.name: profile for profile in profiles},
        sizes=sizes,
        held_out={name: open_entry(spec) for name, spec in tests.items()},
        rows=rows,
        facts={"exam": exam, "data_sets": data_sets},
        console=console,
    )


def _by_name(paths: Sequence[Path]) -> dict[str, DatasetSpec]:
    specs = [spec for path in paths for spec in read_meta(path)]
    names = [spec.name for spec in specs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"two data sets of the meta files are named {twice[0]!r}")
    return {spec.name: spec for spec in specs}


def _held_out_specs(
    config: MixtureSearchConfig, specs: Mapping[str, DatasetSpec]
) -> dict[str, DatasetSpec]:
    """Of every data set its held-out records: from the files for that, or a task's test part."""
    given = _by_name(config.held_out)
    if unknown := sorted(given.keys() - specs.keys()):
        raise ConfigError(
            f"held_out has {unknown[0]!r}, which is no data set of the training; the names there "
            f"are {', '.join(specs)}"
        )
    return {name: given.get(name) or held_out(spec) for name, spec in specs.items()}


def _tokenizer(config: MixtureSearchConfig, sources: Sequence[WeightedSource]) -> Path:
    """The folder of a tokenizer made of the data sets' texts, the same in every attempt."""
    folder = config.out / "tokenizer"
    if folder.exists():
        return folder
    texts = []
    for one in sources:
        reader = readable_by_number(one.source, TOKENIZER_RECORDS)
        for number in range(min(len(reader), TOKENIZER_RECORDS)):
            record = reader[number]
            turns = (record.messages, *record.branches)
            texts += [turn.text for every in turns for turn in every]
    partial = folder.with_suffix(".partial")
    build_tokenizer(texts, config.vocab_size).save_pretrained(partial)
    return partial.rename(folder)


def _sizes(one: WeightedSource, builder: ExampleBuilder) -> list[Size]:
    reader = readable_by_number(one.source, SIZED_RECORDS)
    found = []
    for number in range(min(len(reader), SIZED_RECORDS)):
        try:
            example = builder(reader[number * len(reader) // min(len(reader), SIZED_RECORDS)])
        except DataError:
            continue
        found.append(size_of(example, builder.tokens_per_tile))
    return found


def _processor(train: TrainConfig) -> CascadeVLProcessor:
    if train.model.path is not None:
        return load_processor(find(train.model.path))
    return from_scratch(train.model, None, seed=0)[1]
