"""The store of sampled answers: questions with what a model drew for them, kept once.

Drawing answers costs far more than anything that is made of them, so they are kept as they came,
and preference pairs, the filter by accuracy and data for process rewards begin with them
(InternVL3.5 report, Cascade RL: rollouts are made once and used again). One line of a JSONL file
is one question with all its answers; pictures that are no files lie beside it. A store only grows,
and a process that is killed loses nothing that it has appended (docs/decisions/0021).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeAlias

from cascadevl.data.image import open_image
from cascadevl.data.journal import JOURNAL, Journal, alone, noted_sizes
from cascadevl.data.json_text import decode_json
from cascadevl.data.writing import keep_picture
from cascadevl.errors import DataError
from cascadevl.types import ImageRef, Message, Part, Rollout, SampledAnswer

ROLLOUTS = "rollouts.jsonl"
"""Name of the file of rollouts in the folder of a store."""

Identity: TypeAlias = tuple[str, str]
"""Which weights drew the answers, and for which question."""

# A line begins with its identity, so that it can be found without decoding thousands of tokens.
_BEGINNING = re.compile(
    rb'\{"weight_version": ("(?:[^"\\]|\\.)*"), "problem_id": ("(?:[^"\\]|\\.)*")'
)


class RolloutStore:
    """A store that is being written; from `open_store`."""

    def __init__(self, folder: Path, journal: Journal) -> None:
        """Find what is there.

        Args:
            folder: The store's folder.
            journal: Of its file.

        Raises:
            DataError: Of kind ``bad_field`` or ``invalid_json``, if a line is no rollout.
        """
        self._folder, self._journal = folder, journal
        self._known = {identity for identity, _ in _index(folder / ROLLOUTS, None)}

    def __len__(self) -> int:
        """Number of rollouts."""
        return len(self._known)

    def __contains__(self, identity: Identity) -> bool:
        """Whether these weights have answered this question."""
        return identity in self._known

    def append(self, rollouts: Sequence[Rollout]) -> int:
        """Keep some rollouts: all of them, or none if the process ends meanwhile.

        Those that are there already are left as they are: work that goes on from an earlier point
        makes some of them again.

        Args:
            rollouts: In the order in which they are written.

        Returns:
            How many were new.

        Raises:
            DataError: If a prompt shows a video, or a picture that cannot be opened.
        """
        new = {identity_of(each): each for each in rollouts if identity_of(each) not in self._known}
        if new:
            rows = [_to_row(each, self._folder) for each in new.values()]
            self._journal.commit({ROLLOUTS: rows}, {})
            self._known |= new.keys()
        return len(new)


@contextmanager
def open_store(folder: Path, settings: Mapping[str, Any]) -> Iterator[RolloutStore]:
    """Begin a store, or go on with one; nobody else can write it meanwhile.

    Args:
        folder: Made if missing.
        settings: JSON values that the answers depend on; a store that is gone on with must have
            been begun with the same.

    Raises:
        ConfigError: If the store was begun with other settings, was changed since, or is being
            written.
        DataError: If it is damaged.
    """
    with alone(folder / ROLLOUTS):
        journal = Journal(folder, [ROLLOUTS], settings, resume=True)
        yield RolloutStore(folder, journal)


class StoredRollouts:
    """The rollouts of a store by number, ordered by identity, in whatever order they came.

    Only their places are kept in memory. What is appended later is not seen.
    """

    def __init__(self, folder: Path) -> None:
        """Find the rollouts; the store may be written meanwhile.

        Args:
            folder: The store's folder.

        Raises:
            DataError: Of kind ``missing_file`` if there is no store; of another kind if it is
                damaged.
        """
        self.folder = folder
        self._path = folder / ROLLOUTS
        for path in (folder / JOURNAL, self._path):
            if not path.exists():
                raise DataError(
                    f"the folder is no store of rollouts: it has no {path.name}",
                    kind="missing_file",
                    source=str(folder),
                    remedy="check the path, or make one: cascadevl data rollouts",
                )
        size = noted_sizes(folder / JOURNAL).get(ROLLOUTS, 0)
        self._places = sorted(_index(self._path, size))

    def __len__(self) -> int:
        """Number of rollouts."""
        return len(self._places)

    def __getitem__(self, index: int, /) -> Rollout:
        """Read one.

        Raises:
            DataError: If its line is damaged.
            IndexError: If there is no such rollout.
        """
        (_, name), offset = self._places[index]
        with self._path.open("rb") as file:
            file.seek(offset)
            line = file.readline()
        source = f"{self._path}, {name}"
        return _to_rollout(decode_json(line, source=source), self.folder, source)

    def __iter__(self) -> Iterator[Rollout]:
        """All of them, in order."""
        return (self[index] for index in range(len(self)))

    @property
    def identities(self) -> list[Identity]:
        """Of each of them, in order."""
        return [identity for identity, _ in self._places]


def identity_of(rollout: Rollout) -> Identity:
    """What makes a rollout the same as another one.

    Args:
        rollout: The rollout.
    """
    return rollout.weight_version, rollout.problem_id


def _index(path: Path, size: int | None) -> list[tuple[Identity, int]]:
    """Identity and place of each line, as far as the file is complete."""
    found, offset = [], 0
    with path.open("rb") as file:
        for line in file:
            if size is not None and offset >= size:
                break
            found.append((_identity(line, f"{path}, byte {offset}"), offset))
            offset += len(line)
    return found


def _identity(line: bytes, source: str) -> Identity:
    if match := _BEGINNING.match(line):
        return json.loads(match[1]), json.loads(match[2])
    fields = decode_json(line, source=source)  # somebody wrote it in another order
    return identity_of(_to_rollout(fields, Path(), source))


def _to_row(rollout: Rollout, folder: Path) -> dict[str, Any]:
    """A rollout as a line; its pictures are files by then."""
    row: dict[str, Any] = {
        "weight_version": rollout.weight_version,
        "problem_id": rollout.problem_id,
        "prompt": [
            {
                "role": turn.role,
                "content": [_shown(part, folder, rollout.problem_id) for part in turn.parts],
            }
            for turn in rollout.prompt
        ],
        "reference": rollout.reference,
    }
    if rollout.metric:
        row["metric"] = rollout.metric
    if rollout.choices:
        row["choices"] = dict(rollout.choices)
    return {**row, "answers": [asdict(answer) for answer in rollout.answers]}


def _shown(part: Part, folder: Path, source: str) -> dict[str, str]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, ImageRef):
        raise DataError(
            "a prompt with a video cannot be kept",
            kind="bad_field",
            source=source,
            field="video",
            remedy="give its frames as images",
        )
    if isinstance(part.source, Path):
        return {"type": "image", "path": str(part.source.resolve())}
    return {"type": "image", "path": keep_picture(open_image(part, source=source), folder)}


def _to_rollout(fields: Any, folder: Path, source: str) -> Rollout:
    try:
        return Rollout(
            problem_id=fields["problem_id"],
            prompt=tuple(
                Message(turn["role"], tuple(_part(part, folder) for part in turn["content"]))
                for turn in fields["prompt"]
            ),
            reference=fields["reference"],
            answers=tuple(_answer(each) for each in fields["answers"]),
            weight_version=fields["weight_version"],
            metric=fields.get("metric", ""),
            choices=tuple(fields.get("choices", {}).items()),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"the line is no rollout ({error!r})",
            kind="bad_field",
            source=source,
            remedy="was the file changed? take the line out, with the journal's note of it",
        ) from error


def _part(fields: Mapping[str, str], folder: Path) -> Part:
    if fields["type"] == "text":
        return fields["text"]
    return ImageRef(folder / fields["path"])


def _answer(fields: Mapping[str, Any]) -> SampledAnswer:
    values = {**fields, "token_ids": tuple(fields["token_ids"])}
    return SampledAnswer(**{**values, "logprobs": tuple(fields["logprobs"])})
