"""Values of decoded JSON, checked one by one, and how errors about them are worded."""

from __future__ import annotations

from cascadevl.errors import DataError

_TYPE_NAMES = {dict: "an object", list: "a list", str: "text", bool: "true or false"}


def text_of(value: object, source: str, field: str) -> str:
    """A value that has to be text.

    Args:
        value: The value.
        source: Where its record stands, for errors.
        field: Its field, for errors.

    Raises:
        DataError: Of kind ``bad_field``, if it is no text, or none that can be encoded.
    """
    if not isinstance(value, str):
        raise wrong_type(value, "text", source, field)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"character {error.start} is half of a surrogate pair, which is no character",
            kind="bad_field",
            source=source,
            field=field,
            remedy="write the text again as UTF-8",
        ) from error
    return value


def answer_of(value: object, source: str, field: str, who: str) -> str:
    """A value that has to be text to be learned, and so not blank.

    Args:
        value: The value.
        source: Where its record stands, for errors.
        field: Its field, for errors.
        who: What it is, for errors.

    Raises:
        DataError: Of kind ``bad_field``.
    """
    text = text_of(value, source, field)
    if not text.strip():
        raise DataError(
            f"{who} is empty",
            kind="bad_field",
            source=source,
            field=field,
            remedy="write what is to be learned, or remove the record",
        )
    return text


def is_absent(value: object) -> bool:
    """Whether a field says nothing: missing, null or empty."""
    return value is None or (isinstance(value, str | list | tuple) and len(value) == 0)


def wrong_type(value: object, expected: str, source: str, field: str) -> DataError:
    """The error for a value of another type, or for none at all.

    Args:
        value: The value.
        expected: What should stand there.
        source: Where its record stands.
        field: Its field.
    """
    return DataError(
        "is missing" if value is None else f"is {type_name(value)}",
        kind="bad_field",
        source=source,
        field=field,
        remedy=f"give {expected}",
    )


def type_name(value: object) -> str:
    """What a decoded value is, in the words of JSON."""
    if value is None:
        return "null"
    return _TYPE_NAMES.get(type(value), f"a value of type {type(value).__name__}")


def counted(number: int, noun: str) -> str:
    """A number with its noun, for errors.

    Args:
        number: How many.
        noun: In the singular.
    """
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
