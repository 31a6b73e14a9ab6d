"""API keys: read from a file, compared in a time that tells nothing."""

from __future__ import annotations

import hmac
from pathlib import Path

import pytest

from cascadevl.errors import ConfigError
from cascadevl.serving.keys import Keys

ANN, BOB = "sk-" + "a" * 30, "sk-" + "b" * 30


@pytest.fixture
def keys() -> Keys:
    return Keys.of({"ann": ANN, "bob": BOB})


@pytest.mark.parametrize(
    ("header", "owner"),
    [
        (f"Bearer {ANN}", "ann"),
        (f"bearer  {BOB} ", "bob"),
        ("", None),
        ("Bearer", None),
        ("Bearer ", None),
        (ANN, None),
        (f"Basic {ANN}", None),
        (f"Bearer {ANN[:-1]}", None),
        (f"Bearer {ANN}a", None),
        (f"Bearer {ANN.upper()}", None),
        ("Bearer \udcff\x00", None),
    ],
)
def test_whose_key_it_is(keys: Keys, header: str, owner: str | None):
    assert keys.owner(header) == owner


def test_every_key_is_compared_whatever_is_given(keys: Keys, monkeypatch: pytest.MonkeyPatch):
    lengths: list[tuple[int, int]] = []

    def compare(one: bytes, other: bytes) -> bool:
        lengths.append((len(one), len(other)))
        return real(one, other)

    real = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", compare)
    for header in (f"Bearer {ANN}", f"Bearer {BOB}", "Bearer x", "", "Basic " + "x" * 10_000):
        keys.owner(header)
    assert lengths == [(32, 32)] * 2 * 5


def test_keys_are_not_kept_and_not_shown(keys: Keys):
    assert ANN not in repr(keys)
    assert "ann" in repr(keys)


def test_a_file_of_keys(tmp_path: Path):
    file = tmp_path / "keys"
    file.write_text(f"# who may ask\n\nann {ANN}\n  bob\t{BOB}\n")
    keys = Keys.read(file)
    assert [keys.owner(f"Bearer {key}") for key in (ANN, BOB)] == ["ann", "bob"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no API key"),
        (f"{ANN}\n", r"keys:1 has 1 words"),
        (f"ann {ANN} x\n", r"keys:1 has 3 words"),
        (f"ann {ANN}\nann {BOB}\n", "keys:2 gives 'ann' a second key"),
        ("ann short\n", "'ann' has 5 letters"),
    ],
)
def test_a_file_that_cannot_be_used(tmp_path: Path, content: str, message: str):
    file = tmp_path / "keys"
    file.write_text(content)
    with pytest.raises(ConfigError, match=message) as caught:
        Keys.read(file)
    assert ANN not in str(caught.value)
