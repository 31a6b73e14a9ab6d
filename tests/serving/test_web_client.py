"""What the web chat asks a server and makes of it, without a browser."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.engine.small_talk import build, model_for, picture
from tests.serving.small_server import NAME, listening, serving, small_pair

from cascadevl.engine.critics import Critics
from cascadevl.engine.engine import Engine
from cascadevl.engine.http_json import HttpServer
from cascadevl.engine.process_reward import SolutionScore
from cascadevl.errors import RequestError
from cascadevl.serving.admission import ApiConfig
from cascadevl.serving.api import Api
from cascadevl.serving.engine_thread import EngineThread
from cascadevl.serving.openai_prompts import Asker
from cascadevl.serving.web_client import Answer, Scored, Turn, WebClient, data_url
from cascadevl.serving.web_display import candidates_as_html, display, facts_of, question_of
from cascadevl.serving.web_tiles import COMPRESSED, FULL, paint

GREEDY = {"model": NAME, "temperature": 0.0, "max_tokens": 12, "ignore_eos": True}


def client_of(address: str) -> WebClient:
    return WebClient(HttpServer(url=f"{address}/v1", max_retries=0, timeout_s=60.0))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "two tiles.png"
    picture(0, (100, 50)).save(path)
    return path


def test_a_conversation_grows_as_it_is_streamed(file: Path):
    model, processor = small_pair()
    with serving(model, processor) as served:
        client = client_of(served.address)
        about = client.about()
        assert (about.name, about.abilities["routes"]) == (NAME, False)
        turns = [Turn(text="one", files=(file,))]
        *before, last = client.stream(turns, GREEDY)
        assert len(before) > 3
        assert all(last.text.startswith(answer.text) for answer in before)
        whole = served.client.chat.completions.create(
            model=NAME,
            messages=[turn.message() for turn in turns],
            temperature=0,
            max_tokens=12,
            extra_body={"ignore_eos": True},
        )
        assert last.text == whole.choices[0].message.content
        assert last.finish_reason == "length"
        assert set(last.seconds) == {"prepare", "first_token", "answer"}
        assert all(value > 0 for value in last.seconds.values())
        turns += [Turn(text=last.text, is_answer=True), Turn(text="two")]
        *_, second = client.stream(turns, GREEDY)
        details = second.usage["prompt_tokens_details"]
        assert details["cached_tokens"] > details["visual_tokens"] > 0


def test_tiles_of_a_flash_model_are_painted_by_what_the_router_decided(file: Path):
    processor = build()
    model = model_for(processor, flash_mode=True, flash_heads=3)
    with serving(model, processor) as served:
        client = client_of(served.address)
        abilities = client.about().abilities
        assert abilities["routes"]
        turns = [Turn(text="one", files=(file,))]
        for budget, num_compressed in (("full", 0), ("compressed", 3), ("34%", 1)):
            *_, answer = client.stream(turns, {**GREEDY, "visual_budget": budget})
            details = answer.usage["prompt_tokens_details"]
            counts = details["tokens_per_tile"]
            assert len(counts) == details["tiles"] == 3
            assert sum(n < abilities["tokens_per_tile"] for n in counts) == num_compressed
            ((painting, caption),) = paint([file], counts, abilities)
            assert caption.startswith("two tiles.png: 2 x 1 tiles + thumbnail")
            assert f"{sum(counts)} visual tokens" in caption
            pixels = np.asarray(painting)
            corners = [tuple(pixels[-1, x]) for x in (1, 400)]  # of the two tiles of the grid
            expected = [FULL if n == abilities["tokens_per_tile"] else COMPRESSED for n in counts]
            assert corners == expected[:2]
            facts = facts_of(answer.usage, answer.seconds, abilities["tokens_per_tile"])
            assert f"3, of them {num_compressed} compressed" in facts
            assert ("none saved" in facts) == (num_compressed == 0)
            assert "from the first token to the last" in facts


def length_scorer(prompt: object, solutions: list[str]) -> list[SolutionScore]:
    """Longer answers are better; two steps each."""
    scores = [min(1.0, len(text) / 200) for text in solutions]
    return [
        SolutionScore(score=score, steps=("<b>first</b>", text[:9]), step_scores=(1.0, score))
        for score, text in zip(scores, solutions, strict=True)
    ]


def test_the_best_of_several_with_the_scores_of_their_steps(file: Path):
    model, processor = small_pair()
    thread = EngineThread(Engine(model, processor))
    critics = Critics(process=length_scorer, outcome=length_scorer)
    asker = Asker(processor=processor, config=model.config, max_tokens=24, critics=critics)
    try:
        with listening(Api(thread, asker, ApiConfig(model_name=NAME))) as served:
            client = client_of(served.address)
            assert client.about().abilities["selects"] == ["prm", "outcome", "vote"]
            wishes = {**GREEDY, "temperature": 1.5, "select": "prm"}
            found = client.best([Turn(text="one", files=(file,))], wishes, 4)
    finally:
        thread.close()
    assert len(found) == 4
    assert [each.score for each in found] == sorted((e.score for e in found), reverse=True)
    assert all(each.steps[0] == ("<b>first</b>", 1.0) for each in found)
    page = candidates_as_html(found)
    assert page.count('class="candidate"') == 4
    assert page.count('class="step"') == 8
    assert "<b>first</b>" not in page, "what a model says is no HTML"
    assert "&lt;b&gt;first&lt;/b&gt;" in page
    assert "hsl(120," in page


def test_an_answer_without_steps_is_shown_as_text():
    assert "&lt;script&gt;" in candidates_as_html([Scored(text="<script>", score=0.5)])


def test_what_the_server_refuses_is_said_in_its_words(tmp_path: Path):
    model, processor = small_pair()
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"<html>")
    with serving(model, processor) as served:
        client = client_of(served.address)
        with pytest.raises(RequestError, match="no picture in a format that is read") as refused:
            list(client.stream([Turn(text="one", files=(bad,))], GREEDY))
        assert "{" not in str(refused.value)
        with pytest.raises(RequestError, match="no reward model"):
            client.best([Turn(text="one")], {**GREEDY, "temperature": 1.0, "select": "prm"}, 2)
    with pytest.raises(RequestError):
        client.about()


def test_reasoning_is_not_sent_again():
    turn = Turn(text="two", reasoning="one", is_answer=True)
    assert turn.message() == {"role": "assistant", "content": "two"}
    assert Answer().finish_reason is None


def test_a_file_is_sent_as_it_is(file: Path):
    assert data_url(file).startswith("data:image/*;base64,iVBOR")


def test_reasoning_is_open_while_it_goes_on_and_folded_then():
    asked = [Turn(text="<b>one</b> & two", files=(Path("a.png"),))]
    picture, question, thought, answer = display(asked, Answer(reasoning="hm"))
    assert picture == {"role": "user", "content": {"path": "a.png"}}
    assert question == {"role": "user", "content": "&lt;b>one&lt;/b> &amp; two"}
    assert thought["metadata"] == {"title": "Thinking", "status": "pending"}
    assert answer["content"] == "..."
    *_, thought, answer = display(asked, Answer(reasoning="hm", text="<box>"))
    assert thought["metadata"]["status"] == "done"
    assert answer["content"] == "&lt;box>"
    whole = [*asked, Turn(text="<box>", reasoning="hm", is_answer=True)]
    assert display(whole) == [picture, question, thought, answer]


def test_what_was_typed_and_dropped():
    assert question_of({"text": "  ", "files": []}) is None
    assert question_of({"text": None, "files": None}) is None
    assert question_of({"text": " one ", "files": ["a.png"]}) == Turn(
        text="one", files=(Path("a.png"),)
    )
    assert display([Turn(files=(Path("a.png"),))])[0]["content"] == {"path": "a.png"}
