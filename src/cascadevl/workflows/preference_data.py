"""Preference data of stored rollouts, in the format of MMPR: what MPO learns from.

Two pipelines (MMPR, arXiv 2411.10442, section 3). Correctness: right answers against wrong ones,
without asking a model again. DropoutNTP, for questions that no reference answers: the first half of
a sampled answer is continued by the model without the picture; what it makes up then is rejected,
and the answer itself chosen. Each is a file of its own, and a meta file lists both.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from cascadevl.data.journal import Journal, alone
from cascadevl.data.preferences import PairRules, pairs_of
from cascadevl.data.processor import CascadeVLProcessor
from cascadevl.data.rollouts import StoredRollouts
from cascadevl.data.writing import image_paths, preference_fields, write_meta
from cascadevl.engine.backends import Backend
from cascadevl.errors import DataError
from cascadevl.types import Rollout
from cascadevl.workflows.dropout_ntp import Rejections
from cascadevl.workflows.preference_config import PreferenceConfig, PreferenceReport

CORRECTNESS, DROPOUT = "correctness", "dropout"
"""Names of the two data sets; each is one file of records."""

META, REPORT = "meta.json", "report.json"
"""What else is left in the folder."""

Rows = list[dict[str, Any]]


def make_preferences(
    config: PreferenceConfig,
    *,
    processor: CascadeVLProcessor | None = None,
    backend: Backend | None = None,
    facts: Mapping[str, Any] | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> PreferenceReport:
    """Make preference pairs of all rollouts of a store.

    The same call goes on after an interruption, and the files are the same as without one.

    Args:
        config: Of what, and how.
        processor: Makes prompts for the backend.
        backend: Continues answers without their pictures (DropoutNTP); None for no such pairs.
        facts: JSON values that the backend's answers depend on, such as the model's name.
        on_progress: Told how many groups of questions are done, and how many there are.

    Raises:
        ConfigError: If the folder belongs to other work, or is being written.
        DataError: If the store cannot be read.
        RequestError: If the backend cannot answer any more; the same call goes on.
    """
    stored = StoredRollouts(config.store)
    rules = config.rules(len(stored))
    rejections = None
    if backend is not None:
        assert processor is not None, "a backend needs prompts"
        rejections = Rejections(config, processor, backend)
    settings = {
        **config.settings(),
        "rollouts": _digest(stored),
        "continues": backend is not None,
        **(facts or {}),
    }
    files = {name: f"{name}.jsonl" for name in (CORRECTNESS, DROPOUT)}
    with alone(config.out / files[CORRECTNESS]):
        journal = Journal(config.out, list(files.values()), settings, resume=True)
        counts = Counter[str](journal.state)
        num_groups = -(-len(stored) // config.group)
        for number in range(journal.num_chunks, num_groups):
            on_progress(number, num_groups)
            first = number * config.group
            numbers = range(first, min(first + config.group, len(stored)))
            group = [stored[each] for each in numbers]
            rows = {files[CORRECTNESS]: _correctness_rows(group, rules, counts)}
            if rejections is not None:
                rows[files[DROPOUT]] = list(_dropout_rows(group, rejections, counts))
            journal.commit(rows, counts)
        on_progress(num_groups, num_groups)
        return _finish(config, counts)


def _digest(stored: StoredRollouts) -> str:
    """Which rollouts these are: pairs of a store that has grown since are other work."""
    names = json.dumps(stored.identities).encode()
    return f"{len(stored)} {hashlib.blake2b(names, digest_size=8).hexdigest()}"


def _correctness_rows(group: Sequence[Rollout], rules: PairRules, counts: Counter[str]) -> Rows:
    rows: Rows = []
    for rollout in group:
        made = pairs_of(rollout, rules)
        counts[f"outcome/{made.outcome}"] += 1
        counts["entailed"] += made.num_entailed
        for order, (chosen, rejected) in enumerate(made.pairs):
            name = f"{rollout.problem_id}/{order}"
            rows += _row(rollout, chosen.text, rejected.text, name, counts)
    counts[CORRECTNESS] += len(rows)
    return rows


def _dropout_rows(
    group: Sequence[Rollout], rejections: Rejections, counts: Counter[str]
) -> Iterator[dict[str, Any]]:
    for rollout, order, chosen, rejected in rejections.of(group, counts):
        for row in _row(rollout, chosen, rejected, f"{rollout.problem_id}/drop/{order}", counts):
            counts[DROPOUT] += 1
            yield row


def _row(rollout: Rollout, chosen: str, rejected: str, name: str, counts: Counter[str]) -> Rows:
    """One pair as it is written; none, and counted, if it could not be read back."""
    try:
        row = preference_fields(
            rollout.prompt,
            chosen,
            rejected,
            record_id=name,
            images=image_paths(rollout.prompt),
            reference=rollout.reference,
        )
    except DataError as error:
        counts[f"skipped/{error.kind}"] += 1
        return []
    counts["characters/chosen"] += len(chosen)
    counts["characters/rejected"] += len(rejected)
    return [row]


def _finish(config: PreferenceConfig, counts: Counter[str]) -> PreferenceReport:
    """Write the meta file and the report."""

    def part(prefix: str) -> dict[str, int]:
        found = {k.removeprefix(prefix): v for k, v in counts.items() if k.startswith(prefix) and v}
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    datasets = {
        name: {"annotation": f"{name}.jsonl", "length": counts[name]}
        for name in (CORRECTNESS, DROPOUT)
        if counts[name]
    }
    if datasets:
        write_meta(config.out / META, datasets)
    total = max(1, counts[CORRECTNESS] + counts[DROPOUT])
    report = PreferenceReport(
        outcomes=part("outcome/"),
        num_pairs=counts[CORRECTNESS],
        num_entailed=counts["entailed"],
        num_dropout=counts[DROPOUT],
        dropped=part("dropped/"),
        skipped=part("skipped/"),
        mean_characters=(
            counts["characters/chosen"] / total,
            counts["characters/rejected"] / total,
        ),
        meta=config.out / META if datasets else None,
    )
    content = json.dumps(asdict(report), default=str, indent=2) + "\n"
    (config.out / REPORT).write_text(content, "utf-8")
    return report
