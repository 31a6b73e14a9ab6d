"""The table of wishes refuses what it cannot hold, and forgets what it held."""

from __future__ import annotations

from typing import Any

import pytest

from cascadevl.engine.sampling import SamplingParams, SamplingTable
from cascadevl.errors import RequestError

VOCAB = 150


@pytest.mark.parametrize("extra", [{"token_ids": [1, VOCAB]}, {"end_ids": [-1]}], ids=str)
def test_tokens_outside_the_vocabulary_are_refused(extra: dict[str, Any]):
    table = SamplingTable(VOCAB)
    with pytest.raises(RequestError, match=r"request names the token .* from 0 to 149"):
        table.add("request", SamplingParams(), **extra)
    assert len(table) == 0
    assert table.add("request", SamplingParams()) == 0


def test_a_row_forgets_what_its_last_sample_has_said():
    table, params = SamplingTable(VOCAB), SamplingParams(repetition_penalty=2.0)
    row = table.add("one", params, token_ids=[3, 5])
    assert table.seen([row]).nonzero()[:, 1].tolist() == [3, 5]
    table.remove(row)
    with pytest.raises(KeyError):
        table.seen([row])
    assert table.add("without a penalty", SamplingParams(), token_ids=[3]) == row
    with pytest.raises(KeyError):
        table.seen([row])
    table.remove(row)
    assert table.add("another", params, token_ids=[7]) == row
    assert table.seen([row]).nonzero()[:, 1].tolist() == [7]
