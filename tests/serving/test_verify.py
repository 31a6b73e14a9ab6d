"""Checked answers over HTTP, as OpenAI's own client sees them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from tests.serving.small_server import NAME, Served, answering, shown

import cascadevl
from cascadevl.cli.verifying import verdict_lines
from cascadevl.data.chat import to_messages
from cascadevl.data.documents import Documents, Passage
from cascadevl.engine.engine import Engine
from cascadevl.engine.engine_backend import EngineBackend
from cascadevl.engine.guard import Guard, Said, verify
from cascadevl.engine.requests import EngineConfig, Request
from cascadevl.serving.coupled import Coupled
from cascadevl.tasks.shapes import Shapes

MODEL, PROCESSOR = cascadevl.load("micro")
CONFIG = EngineConfig(cache_bytes=2**26, batch_invariant=True)
SCENE = Shapes(px=224, difficulty="full").draw("test", 3, 1)
QUESTION = "List all shapes."
TURNS: Any = [
    {"role": "user", "content": [shown(SCENE.image), {"type": "text", "text": f"\n{QUESTION}"}]}
]
TEXT: Any = [{"role": "user", "content": "Is it so?"}]
LIBRARY = Documents([Passage("a.md:1-2", "There is a red circle in every picture.")])
GREEDY: dict[str, Any] = {"model": NAME, "temperature": 0, "max_tokens": 40}
CHECK: dict[str, Any] = {"extra_body": {"verify": True}}


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with answering(Coupled(Engine(MODEL, PROCESSOR, CONFIG)), PROCESSOR, MODEL) as server:
        yield server


def expected(answer: str) -> Any:
    """What the guard finds without a server."""
    about = Request(prompt=PROCESSOR.prompt(to_messages(TURNS)))
    said = Said(about=about, question=QUESTION, answer=answer)
    backend = EngineBackend(engine=Engine(MODEL, PROCESSOR, CONFIG))
    return verify(backend, Guard(processor=PROCESSOR), [said])[0]


def of(choice: Any) -> Any:
    return choice.model_dump()["verification"]


def test_every_choice_has_its_claims_and_their_verdicts(served: Served):
    wishes = GREEDY | {"n": 2, "temperature": 1.0, "seed": 3}
    plain = served.client.chat.completions.create(messages=TURNS, **wishes)
    assert "verification" not in plain.choices[0].model_dump()
    reply = served.client.chat.completions.create(messages=TURNS, **wishes, **CHECK)
    assert [c.message.content for c in reply.choices] == [c.message.content for c in plain.choices]
    assert reply.usage is not None
    assert plain.usage is not None
    assert reply.usage.completion_tokens == plain.usage.completion_tokens  # without probes
    for choice in reply.choices:
        content = choice.message.content or ""
        found, known = of(choice), expected(content)
        assert found["text"] == known.text
        assert found["num_probes"] == len(known.checks) > 0
        for claim, check in zip(found["claims"], known.checks, strict=True):
            assert (claim["text"], claim["question"]) == (check.claim.text, check.claim.question)
            assert (claim["verdict"], claim["reason"]) == (check.verdict, check.reason)
            assert claim["probability"] == check.probability  # to the bit
            (evidence,) = claim["evidence"]
            assert (evidence["source"], evidence["passage"]) == ("picture", None)


def test_a_stream_ends_with_what_was_found(served: Served):
    whole = served.client.chat.completions.create(messages=TURNS, **GREEDY, **CHECK)
    events = list(
        served.client.chat.completions.create(
            messages=TURNS, stream=True, stream_options={"include_usage": True}, **GREEDY, **CHECK
        )
    )
    checked = [
        event
        for event in events
        if event.choices and event.choices[0].model_dump().get("verification")
    ]
    assert events.index(checked[0]) == len(events) - 2  # the usage comes last
    (event,) = checked
    assert [each["verdict"] for each in of(event.choices[0])["claims"]] == [
        each["verdict"] for each in of(whole.choices[0])["claims"]
    ]
    assert event.choices[0].index == 0
    assert event.choices[0].finish_reason is None


def test_what_cannot_be_checked_is_refused_before_it_is_answered(served: Served):
    def num_answered() -> str:
        base = served.client.with_options(base_url=served.address)
        text = base.get("/metrics", cast_to=str)
        name = 'cascadevl_tokens_total{kind="completion"}'
        (line,) = [each for each in text.splitlines() if each.startswith(name)]
        return line

    before = num_answered()
    with pytest.raises(openai.BadRequestError, match="nothing to verify an answer against"):
        served.client.chat.completions.create(messages=TEXT, **GREEDY, **CHECK)
    with pytest.raises(openai.BadRequestError, match="no sentences to verify"):
        served.client.chat.completions.create(
            messages=TURNS, response_format={"type": "json_object"}, **GREEDY, **CHECK
        )
    assert num_answered() == before


def test_documents_of_the_server_are_read():
    guard = Guard(processor=PROCESSOR, documents=LIBRARY)
    coupled = Coupled(Engine(MODEL, PROCESSOR, CONFIG))
    with answering(coupled, PROCESSOR, MODEL, guard=guard) as served:
        asked: Any = [{"role": "user", "content": "Is there a red circle?"}]
        reply = served.client.chat.completions.create(messages=asked, **GREEDY, **CHECK)
    found = of(reply.choices[0])
    sources = {each["source"] for claim in found["claims"] for each in claim["evidence"]}
    assert sources <= {"a.md:1-2", "documents"}
    assert found["num_probes"] == 2 * len(found["claims"])


def test_the_terminal_shows_verdicts_and_what_is_left(tmp_path: Path):
    known = expected("There is a red circle. There is a black star.")
    lines = [line for line, _ in verdict_lines(known)]
    assert len(lines) >= 2
    for line, check in zip(lines, known.checks, strict=False):
        assert check.verdict in line
        assert check.claim.text in line
    withdrawn = [each for each in known.checks if each.verdict == "withdrawn"]
    assert any(line.startswith("what is left: ") for line in lines) == bool(withdrawn)
    nothing = [line for line, _ in verdict_lines(expected("Sure!"))]
    assert nothing == ["no claim was found that could be checked"]
