"""API keys: who may ask, found out in a time that tells nothing about the keys."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cascadevl.errors import ConfigError

LEAST_LENGTH = 16
"""Letters of a key; a shorter one could be guessed."""


@dataclass(frozen=True, slots=True)
class _Key:
    """A key, of which only a digest is kept.

    Attributes:
        owner: Who it was given to.
        digest: Of the key; digests are equally long, whatever the key is.
    """

    owner: str
    digest: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys that are accepted."""

    _keys: tuple[_Key, ...]

    @classmethod
    def of(cls, keys: Mapping[str, str]) -> Keys:
        """Accept some keys.

        Args:
            keys: The key of each owner.

        Raises:
            ConfigError: If there is none, or one is so short that it could be guessed.
        """
        if not keys:
            raise ConfigError("no API key is named; nobody could ask anything")
        for owner, key in keys.items():
            if len(key) < LEAST_LENGTH:
                raise ConfigError(
                    f"the API key of {owner!r} has {len(key)} letters and could be guessed; it "
                    f"needs at least {LEAST_LENGTH} (openssl rand -hex 24 makes a good one)"
                )
        return cls(tuple(_Key(owner, _digest(key)) for owner, key in keys.items()))

    @classmethod
    def read(cls, file: Path) -> Keys:
        """Read keys: a line for each, its owner and the key; empty lines and comments are skipped.

        Args:
            file: The file.

        Raises:
            ConfigError: If a line has another form, an owner has two keys, or `of` refuses one.
            OSError: If it cannot be read.
        """
        keys: dict[str, str] = {}
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
            words = line.split()
            if not words or words[0].startswith("#"):
                continue
            if len(words) != 2:  # the line is not shown: it holds a key
                raise ConfigError(
                    f"{file}:{number} has {len(words)} words; write the owner and the key"
                )
            owner, key = words
            if owner in keys:
                raise ConfigError(f"{file}:{number} gives {owner!r} a second key; use other names")
            keys[owner] = key
        return cls.of(keys)

    def owner(self, header: str) -> str | None:
        """Whose key a request brings; None if nobody's.

        Args:
            header: Its ``Authorization``; empty if it has none.
        """
        scheme, _, key = header.partition(" ")
        given, found = _digest(key.strip()), None
        for each in self._keys:  # always all of them: time must not tell which one was near
            if hmac.compare_digest(given, each.digest):
                found = each.owner
        return found if scheme.lower() == "bearer" else None


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
