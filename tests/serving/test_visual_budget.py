"""Fewer visual tokens over HTTP: what clients ask for, and what the server does by default."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import openai
import pytest
from tests.engine.small_talk import build, model_for, picture
from tests.serving.small_server import NAME, SMALL, answering, serving, shown, small_pair

from cascadevl.cli.main import main
from cascadevl.data.chat import to_messages
from cascadevl.engine.engine import Engine
from cascadevl.model.routing import KeepShare
from cascadevl.serving.coupled import Coupled

PROCESSOR = build()
PICTURE = picture(1, (20, 70))
TURNS: Any = [
    {"role": "user", "content": [shown(PICTURE), {"type": "text", "text": "what is this?"}]}
]
NUM_TILES = PROCESSOR.prompt(to_messages(TURNS)).num_tiles
FULL, SMALL_TILE = 4, 1


def details(client: openai.OpenAI, stream: bool = False, **extra: Any) -> dict[str, Any]:
    """What a reply says of the prompt's pictures."""
    wishes: Any = {"model": NAME, "messages": TURNS, "max_tokens": 2, "extra_body": extra}
    if stream:
        wishes |= {"stream": True, "stream_options": {"include_usage": True}}
        *_, reply = client.chat.completions.create(**wishes)
    else:
        reply = client.chat.completions.create(**wishes)
    assert reply.usage is not None
    assert reply.usage.prompt_tokens_details is not None
    return reply.usage.prompt_tokens_details.model_dump()


def test_a_request_says_how_many_tiles_stay_full():
    model = model_for(PROCESSOR, flash_mode=True, flash_heads=3)
    number = NUM_TILES
    assert number > 2
    half = KeepShare(0.5).num_kept(number)
    kept = {
        "full": number,
        "compressed": 0,
        0.5: half,
        "50%": half,
        1: number,
        0.0: 0,
        "threshold=0": 0,
    }
    engine = Engine(model, PROCESSOR, SMALL)
    with answering(Coupled(engine), PROCESSOR, model) as served:
        for budget, num_full in kept.items():
            for stream in (False, True):
                found = details(served.client, stream, visual_budget=budget)
                assert found["tiles"] == number, budget
                assert found["compressed_tiles"] == number - num_full, budget
                visual = FULL * num_full + SMALL_TILE * (number - num_full)
                assert found["visual_tokens"] == visual, budget
        assert details(served.client)["compressed_tiles"] == 0  # it has no thresholds of its own
        served.api.asker = replace(served.api.asker, visual_budget="compressed")
        assert details(served.client)["compressed_tiles"] == number
        assert details(served.client, visual_budget="full")["compressed_tiles"] == 0
        for wrong in ("some", 1.5, -0.1, "150%"):
            with pytest.raises(openai.BadRequestError) as refused:
                details(served.client, visual_budget=wrong)
            assert "visual_budget" in str(refused.value) or "share" in str(refused.value)


def test_a_plain_model_refuses_a_budget_and_says_which_models_have_one(
    capsys: pytest.CaptureFixture[str],
):
    model, processor = small_pair()
    with serving(model, processor) as served:
        assert details(served.client, visual_budget="full")["compressed_tiles"] == 0
        with pytest.raises(openai.BadRequestError, match="this model has no router"):
            details(served.client, visual_budget="50%")
    assert main(["serve", "micro", "--port", "0", "--visual-budget", "50%"]) == 2
    assert "this model has no router" in capsys.readouterr().err


def test_the_default_budget_is_for_the_front(capsys: pytest.CaptureFixture[str]):
    words = ["serve", "micro", "--role", "vision", "--join", "ipc:///nowhere"]
    assert main([*words, "--visual-budget", "50%"]) == 2
    assert "--visual-budget is for the front" in capsys.readouterr().err
