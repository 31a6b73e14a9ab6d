"""Whether a data set is text alone or multimodal: the two sides of the reports' mixing ratios.

A meta file may say it. Otherwise it is found by reading a few records, without opening a picture.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, TypeAlias, get_args

from cascadevl.data.source import Source, StreamedSource, readable_by_number
from cascadevl.errors import DataError
from cascadevl.types import ImageRef, Record, VideoRef

Modality: TypeAlias = Literal["text", "multimodal"]
MODALITIES: tuple[Modality, ...] = get_args(Modality)

LOOKED_AT = 32
"""Records read to find out what a data set shows."""


def shows_pictures(record: Record) -> bool:
    """Whether a record, or one of its branches, has an image or a video."""
    return any(
        isinstance(part, ImageRef | VideoRef)
        for turns in (record.messages, *record.branches)
        for turn in turns
        for part in turn.parts
    )


def modality_of(source: Source | StreamedSource) -> Modality:
    """What kind of data a source holds, found from up to 32 of its records.

    They are spread evenly over a source that is read by number, and are the first of a streamed
    one. One record with an image or a video makes the source multimodal; a record that cannot be
    read tells nothing. A large file with rare pictures may be misjudged: say ``modality`` in its
    meta entry.

    Args:
        source: The source.

    Raises:
        DataError: Of kind ``no_sample`` if none of the records can be read.
    """
    found = list(_readable(source))
    if not found:
        raise DataError(
            f"none of the {LOOKED_AT} records looked at can be read, so it is unknown whether "
            "they show pictures",
            kind="no_sample",
            source=source.name,
            remedy='run `cascadevl data check`, or write "modality" into the meta file',
        )
    return "multimodal" if any(map(shows_pictures, found)) else "text"


def _readable(source: Source | StreamedSource) -> Iterator[Record]:
    reader = readable_by_number(source, LOOKED_AT)
    count = min(len(reader), LOOKED_AT)
    for number in range(count):
        try:
            yield reader[number * len(reader) // count]
        except DataError:
            continue
