"""Records written in the released formats: JSONL lines, pictures, the meta file that lists them.

The counterpart of `cascadevl.data.parsing`, which reads every record back before it leaves here:
so what is written trains.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import PIL.Image

from cascadevl.data.parsing import IMAGE_MARK, ROLES, VIDEO_MARK, parse_record
from cascadevl.errors import DataError
from cascadevl.types import ImageRef, Message, Role

_NAMES: dict[Role, str] = {role: name for name, role in reversed(ROLES.items())}
"""Our roles to those of the released format, which come first among `ROLES`."""


def conversation_fields(
    messages: Sequence[Message], *, record_id: str, images: Sequence[str] = ()
) -> dict[str, Any]:
    """One conversation as a record: ``id``, ``image`` if it shows any, ``conversations``.

    Args:
        messages: The turns, with pictures in their places.
        record_id: The record's ``id``.
        images: Paths of the pictures, in the order they are shown, as they are to be written.

    Raises:
        DataError: If the record could not be read back: turns in a wrong order, a video, a mark
            in the text that no picture belongs to, or another number of pictures.
    """
    turns = [{"from": _NAMES[turn.role], "value": _marked(turn, record_id)} for turn in messages]
    return _read_back({**_beginning(record_id, images), "conversations": turns}, messages)


def preference_fields(
    prompt: Sequence[Message],
    chosen: str,
    rejected: str,
    *,
    record_id: str,
    images: Sequence[str] = (),
    reference: str = "",
) -> dict[str, Any]:
    """One preference pair as MMPR has it: ``question``, ``chosen``, ``rejected``.

    Args:
        prompt: One question, after a system message if there is one, with pictures in their places.
        chosen: The better answer.
        rejected: The worse one.
        record_id: The record's ``id``.
        images: Paths of the pictures, in the order they are shown, as they are to be written.
        reference: The reference answer, if there is one.

    Raises:
        DataError: If the pair could not be read back, or the prompt has several turns.
    """
    *before, question = prompt
    if question.role != "user" or [turn.role for turn in before] not in ([], ["system"]):
        raise DataError(
            f"the prompt has the turns {', '.join(turn.role for turn in prompt)}",
            kind="bad_turns",
            source=record_id,
            remedy="a pair has one question, and a system message before it at most",
        )
    fields = _beginning(record_id, images)
    if before:
        fields["system_prompt"] = before[0].text
    fields |= {"question": _marked(question, record_id), "chosen": chosen, "rejected": rejected}
    if reference:
        fields["answer_gt"] = reference
    return _read_back(fields, prompt)


def problem_fields(
    question: Message,
    reference: str,
    *,
    record_id: str,
    images: Sequence[str] = (),
    metric: str,
    choices: Mapping[str, str],
) -> dict[str, Any]:
    """One question with its reference: ``question``, ``answer``, and how answers are compared.

    Args:
        question: The user's turn, with pictures in their places.
        reference: The reference answer.
        record_id: The record's ``id``.
        images: Paths of the pictures, in the order they are shown, as they are to be written.
        metric: How an answer is compared with the reference.
        choices: Text of each choice by its letter; empty where there are none.

    Raises:
        DataError: If the question could not be read back.
    """
    asked = {**_beginning(record_id, images), "question": _marked(question, record_id)}
    fields = {**_read_back(asked, [question], answered=False), "answer": reference}
    fields["metric"] = metric
    return {**fields, "choices": dict(choices)} if choices else fields


def _beginning(record_id: str, images: Sequence[str]) -> dict[str, Any]:
    if not images:
        return {"id": record_id}
    return {"id": record_id, "image": images[0] if len(images) == 1 else list(images)}


def _read_back(
    fields: dict[str, Any], messages: Sequence[Message], *, answered: bool = True
) -> dict[str, Any]:
    """The same, once it is sure that it says what was meant."""
    read = parse_record(fields, source=fields["id"], answered=answered)
    if [turn.text for turn in read.messages] != [turn.text for turn in messages]:
        raise DataError(
            "the text holds marks of pictures that are not shown there",
            kind="image_count",
            source=fields["id"],
            remedy=f"take {IMAGE_MARK} and {VIDEO_MARK} out of the text",
        )
    return fields


def _marked(message: Message, record_id: str) -> str:
    pieces = []
    for part in message.parts:
        if not isinstance(part, str | ImageRef):
            raise DataError(
                "a video cannot be written here",
                kind="bad_field",
                source=record_id,
                field="video",
                remedy="give its frames as images",
            )
        pieces.append(part if isinstance(part, str) else IMAGE_MARK)
    return "".join(pieces)


def save_picture(image: PIL.Image.Image, folder: Path, name: str) -> str:
    """Save a picture as PNG below a data set's folder; one of that name is written again.

    Args:
        image: The picture.
        folder: The data set's folder.
        name: File name without suffix; what no file name can hold is replaced.

    Returns:
        Its path relative to the folder, as records name it.
    """
    safe = "".join(each if each.isalnum() or each in "-_." else "_" for each in name)
    path = folder / "images" / f"{safe}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return f"images/{safe}.png"


def keep_picture(image: PIL.Image.Image, folder: Path) -> str:
    """Save a picture as PNG below a folder, named by what it shows: one that is there stays.

    Args:
        image: The picture, RGB.
        folder: The folder.

    Returns:
        Its path relative to the folder.
    """
    digest = hashlib.blake2b(f"{image.size}".encode() + image.tobytes(), digest_size=16)
    name = f"images/{digest.hexdigest()}.png"
    path = folder / name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        # Renamed into place: a part of a picture would be taken for the whole the next time.
        partial = path.with_suffix(".partial")
        image.save(partial, format="PNG")
        partial.replace(path)
    return name


def image_paths(messages: Sequence[Message]) -> list[str]:
    """Paths of the pictures that messages show, in their order, in full.

    Args:
        messages: Their pictures are files.
    """
    parts = (part for turn in messages for part in turn.parts)
    paths = [part.source for part in parts if isinstance(part, ImageRef)]
    assert all(isinstance(path, Path) for path in paths), "stored prompts show files"
    return [str(path.resolve()) for path in paths if isinstance(path, Path)]


def write_meta(path: Path, datasets: Mapping[str, Mapping[str, Any]]) -> None:
    """Write a meta file, whole or not at all.

    Args:
        path: The file; data sets and pictures are found relative to its folder.
        datasets: Of each data set its ``annotation`` and whatever departs from the defaults.
    """
    common = {"root": "", "data_augment": False, "repeat_time": 1}
    entries = {name: {**common, **entry} for name, entry in datasets.items()}
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(entries, indent=2) + "\n", "utf-8")
    partial.replace(path)
