"""What cascadevl raises when something a person gave it is wrong.

Every message says what is wrong, where, with the numbers, and what to do. An ``assert``
elsewhere in the package marks what only a bug of ours could break.
"""

from __future__ import annotations


class CascadeVLError(Exception):
    """Base of all errors that a person can cause and mend."""


class ConfigError(CascadeVLError, ValueError):
    """A configuration that cannot be used: an unknown key, a value out of range, two that clash."""


class CheckpointError(CascadeVLError, ValueError):
    """A checkpoint that does not fit: missing, unexpected or misshapen tensors, unknown formats."""


class RequestError(CascadeVLError, ValueError):
    """A question that cannot be answered as asked: too long, no image where one is named."""


class LogitsError(RequestError):
    """Logits from which no token can be chosen: not finite, or everything masked.

    Attributes:
        places: The rows of logits that cannot be used; all others can.
    """

    def __init__(self, message: str, *, places: tuple[int, ...]) -> None:
        """Keep the rows beside the message."""
        self.places = places
        super().__init__(message)

    def __reduce__(self) -> tuple[object, ...]:
        """Make the error cross process borders unchanged."""
        return (_rebuild_logits_error, (str(self), self.places))


class ServerError(CascadeVLError, RuntimeError):
    """A request that failed through no fault of its own: a part of the server broke or is gone."""


class UnavailableError(ServerError):
    """Nobody can answer at the moment: the same request may be answered in a while."""


class TrainingError(CascadeVLError, RuntimeError):
    """A run that must stop: a loss that is not finite, a resume that does not match the run."""


class DataError(CascadeVLError, ValueError):
    """A record, image or video that cannot be used.

    The text reads ``source: field 'name': problem; remedy``, leaving out what is not known.

    Attributes:
        kind: A short fixed word for the sort of problem, by which runs count what they skipped,
            for example ``"image_count"`` or ``"corrupt_image"``.
        source: Where the data came from, ``file:line`` if a file.
        field: The field of the record.
        problem: What is wrong, with the numbers.
        remedy: What to do about it.
    """

    def __init__(
        self,
        problem: str,
        *,
        kind: str,
        source: str | None = None,
        field: str | None = None,
        remedy: str | None = None,
    ) -> None:
        """Build the message from its parts."""
        self.kind, self.source, self.field = kind, source, field
        self.problem, self.remedy = problem, remedy
        where = f"{source}: " if source else ""
        what = f"field {field!r}: " if field else ""
        super().__init__(f"{where}{what}{problem}" + (f"; {remedy}" if remedy else ""))

    def __reduce__(self) -> tuple[object, ...]:
        """Make the error cross process borders (data loader workers) unchanged."""
        return (_rebuild, (self.problem, self.kind, self.source, self.field, self.remedy))

    def at(self, source: str, field: str | None = None) -> DataError:
        """The same error with its place filled in where it was not known yet."""
        return DataError(
            self.problem,
            kind=self.kind,
            source=self.source or source,
            field=self.field or field,
            remedy=self.remedy,
        )


def _rebuild(
    problem: str, kind: str, source: str | None, field: str | None, remedy: str | None
) -> DataError:
    return DataError(problem, kind=kind, source=source, field=field, remedy=remedy)


def _rebuild_logits_error(message: str, places: tuple[int, ...]) -> LogitsError:
    return LogitsError(message, places=places)
