"""For all tests of the engine."""

from __future__ import annotations

import pytest

from cascadevl.engine import runner


@pytest.fixture(autouse=True)
def every_beginning_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the few tokens that small prompts have in common be worth attending to apart."""
    monkeypatch.setattr(runner, "_WORTH_SHARING", 1)
