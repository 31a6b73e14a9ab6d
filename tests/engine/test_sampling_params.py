"""What a request may ask of sampling is refused with the value and what may stand there."""

from __future__ import annotations

import math
from typing import Any

import pytest

from cascadevl.engine.sampling import SamplingParams
from cascadevl.errors import RequestError

REFUSED = [
    ({"temperature": -0.5}, r"temperature is -0\.5; it must be .* 0 \(greedy\) or more"),
    ({"temperature": math.nan}, "temperature is nan"),
    ({"temperature": math.inf}, "temperature is inf"),
    ({"top_p": 0.0}, r"top_p is 0\.0; .* above 0 and at most 1"),
    ({"top_p": 1.25}, r"top_p is 1\.25"),
    ({"top_k": -1}, r"top_k is -1; .* 0 \(off\)"),
    ({"min_p": -0.1}, r"min_p is -0\.1"),
    ({"min_p": 1.5}, r"min_p is 1\.5"),
    ({"repetition_penalty": 0.0}, r"repetition_penalty is 0\.0; .* 1 is off"),
    ({"repetition_penalty": math.inf}, "repetition_penalty is inf"),
    ({"seed": -1}, r"seed is -1; it must be from 0 to 2\*\*64 - 1"),
    ({"seed": 2**64}, "seed is 18446744073709551616"),
    ({"logprobs": -1}, r"logprobs is -1; .* 0 \(chosen tokens only\)"),
    ({"max_tokens": 0}, "max_tokens is 0; it must be at least 1"),
    ({"min_tokens": -1}, "min_tokens is -1"),
    ({"min_tokens": 9, "max_tokens": 8}, "min_tokens is 9; .* max_tokens, which is 8"),
    ({"stop": ("end", "")}, r"a stop string is empty.*leave it out of \['end', ''\]"),
    ({"stop_token_ids": (3, -2)}, "stop_token_ids holds -2"),
    ({"json_schema": "{}", "min_tokens": 2}, "together with min_tokens, .* leave it out"),
    ({"json_schema": "{}", "ignore_eos": True}, "together with ignore_eos, "),
    (
        {"json_schema": "{}", "stop": ("a",), "stop_token_ids": (3,)},
        "together with stop, stop_token_ids, .* leave them out",
    ),
]


@pytest.mark.parametrize(("wish", "message"), REFUSED, ids=lambda value: str(value))
def test_what_means_nothing_is_refused(wish: dict[str, Any], message: str):
    with pytest.raises(RequestError, match=message):
        SamplingParams(**wish)


ALLOWED: list[dict[str, Any]] = [
    {},
    {"temperature": 5e-324, "top_p": 1e-9, "top_k": 1, "min_p": 1.0, "repetition_penalty": 0.5},
    {"seed": 2**64 - 1, "logprobs": 0, "min_tokens": 256, "stop": ("a",), "stop_token_ids": (0,)},
    {"json_schema": "{}", "max_tokens": 1},
]


@pytest.mark.parametrize("wish", ALLOWED, ids=lambda value: str(value))
def test_the_ends_of_every_range_are_allowed(wish: dict[str, Any]):
    params = SamplingParams(**wish)
    assert {name: getattr(params, name) for name in wish} == wish
