"""Asking a real HTTP server: what is sent, what comes back, and everything that can go wrong."""

from __future__ import annotations

import base64
import io
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from tests.data.conftest import picture
from tests.eval.chat_server import Answered, Body, chat_server, said

from cascadevl.errors import ConfigError, DataError, RequestError
from cascadevl.eval.responder import Reply, Responder, Sampler, replies
from cascadevl.eval.url_responder import UrlResponder
from cascadevl.types import ImageRef, Message, VideoRef


def ask(text: str) -> tuple[Message, ...]:
    return (Message.of("user", text),)


def text_of(body: Body) -> str:
    return str(body["messages"][-1]["content"])


def responder(url: str, **settings: object) -> UrlResponder:
    defaults = {"model": "tiny", "backoff_s": 0.0, "timeout_s": 20.0}
    return UrlResponder(url=url, **{**defaults, **settings})  # type: ignore[arg-type]


def test_the_request_is_openais() -> None:
    conversation = [
        Message.of("system", "Be brief."),
        Message.of("user", "Hi?"),
        Message.of("assistant", "Hi."),
        Message.of("user", "How many?"),
    ]
    with chat_server(lambda _: said("three")) as server:
        asked = responder(
            server.url + "/",
            api_key="secret",
            max_new_tokens=7,
            temperature=0.5,
            top_p=0.9,
            seed=3,
            extra={"top_k": 5},
        )
        assert asked([conversation]) == ["three"]
    assert server.bodies == [
        {
            "model": "tiny",
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "Hi?"},
                {"role": "assistant", "content": "Hi."},
                {"role": "user", "content": "How many?"},
            ],
            "max_tokens": 7,
            "temperature": 0.5,
            "top_p": 0.9,
            "seed": 3,
            "top_k": 5,
        }
    ]
    assert server.headers[0]["path"] == "/v1/chat/completions"
    assert server.headers[0]["Authorization"] == "Bearer secret"
    assert "secret" not in repr(asked)


def test_pictures_arrive_as_they_are(tmp_path: Path) -> None:
    drawn = picture(20, 10)
    drawn.save(tmp_path / "a.jpg", quality=90)
    drawn.save(tmp_path / "a.bmp")
    content = (tmp_path / "a.jpg").read_bytes()
    images = [ImageRef(drawn), ImageRef(tmp_path / "a.jpg"), ImageRef(tmp_path / "a.bmp")]
    with chat_server(lambda _: said("ok")) as server:
        responder(server.url)([[Message.of("user", *images, "\nWhat?")]])
    parts = server.bodies[0]["messages"][0]["content"]
    assert parts[3] == {"type": "text", "text": "\nWhat?"}
    headers, received = [], []
    for part in parts[:3]:
        assert part["type"] == "image_url"
        header, _, data = part["image_url"]["url"].partition(",")
        headers.append(header)
        received.append(base64.b64decode(data))
    assert headers == [f"data:image/{kind};base64" for kind in ("png", "jpeg", "png")]
    assert received[1] == content  # a file is not encoded anew
    for place in (0, 2):
        seen = PIL.Image.open(io.BytesIO(received[place]))
        np.testing.assert_array_equal(np.asarray(seen), np.asarray(drawn))


def test_a_broken_picture_and_a_video_are_refused_before_they_are_sent(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    with chat_server(lambda _: said("ok")) as server:
        with pytest.raises(DataError):
            responder(server.url)([[Message.of("user", ImageRef(tmp_path / "a.png"))]])
        with pytest.raises(RequestError, match="frames"):
            responder(server.url)([[Message.of("user", VideoRef(source=tmp_path / "a.mp4"))]])
    assert server.bodies == []


def test_answers_come_in_the_order_of_the_questions() -> None:
    """All five are asked at a time, and the first is held back until the last is answered."""
    last, together = threading.Event(), threading.Barrier(5, timeout=20)

    def answer(body: Body) -> Answered:
        together.wait()
        number = text_of(body)
        if number == "4":
            last.set()
        content = said(f"{number} {body['seed']}").content
        return Answered(content, hold=last if number == "0" else None)

    with chat_server(answer) as server:
        got = responder(server.url, concurrency=5)([ask(str(number)) for number in range(5)])
    assert got == ["0 0", "1 1", "2 2", "3 3", "4 4"]
    assert server.most_at_once == 5


def test_no_more_than_so_many_are_asked_at_a_time() -> None:
    with chat_server(lambda body: said(text_of(body))) as server:
        texts = [str(number) for number in range(20)]
        assert responder(server.url, concurrency=2)([ask(text) for text in texts]) == texts
    assert server.most_at_once <= 2
    assert sorted(body["seed"] for body in server.bodies) == list(range(20))


def test_passing_failures_are_tried_again() -> None:
    failures = [
        Answered(b"busy", status=503),
        Answered(b"slow down", status=429, headers={"Retry-After": "0"}),
        Answered(hang_up=True),
        Answered(b"x" * 10, headers={"Transfer-Encoding": "chunked"}),
    ]
    with chat_server(lambda _: failures.pop(0) if failures else said("there")) as server:
        assert responder(server.url, max_retries=4)([ask("?")]) == ["there"]
    assert len(server.bodies) == 5
    assert len({str(body) for body in server.bodies}) == 1  # the same request each time


def test_what_does_not_pass_ends_with_its_cause() -> None:
    with chat_server(lambda _: Answered(b"no memory", status=500)) as server:
        with pytest.raises(RequestError, match=r"status 500 \(no memory\), 3 times"):
            responder(server.url, max_retries=2)([ask("?")])
        assert len(server.bodies) == 3


@pytest.mark.parametrize(
    ("answered", "problem"),
    [
        (Answered({"error": "no"}, status=401), "API key"),
        (Answered({"error": "no"}, status=404), "knows a model 'tiny'"),
        (Answered(b"", status=301, headers={"Location": "/elsewhere"}), "status 301"),
        (Answered(b"<html>welcome</html>"), "OpenAI's chat completions"),
        (Answered({"choices": []}), "OpenAI's chat completions"),
        (Answered({"choices": [{"message": {"content": 5}}]}), "OpenAI's chat completions"),
    ],
)
def test_what_cannot_work_is_not_tried_again(answered: Answered, problem: str) -> None:
    with chat_server(lambda _: answered) as server:
        with pytest.raises(RequestError, match=problem):
            responder(server.url)([ask("?")])
        assert len(server.bodies) == 1


def test_a_server_that_keeps_silent_is_given_up() -> None:
    release = threading.Event()
    with chat_server(lambda _: Answered(said("late").content, hold=release)) as server:
        with pytest.raises(RequestError, match=r"no answer for 0\.2 s, 2 times"):
            responder(server.url, timeout_s=0.2, max_retries=1)([ask("?")])
        release.set()
        assert len(server.bodies) == 2


def test_nobody_listening_is_said() -> None:
    with chat_server(lambda _: said("")) as server:
        url = server.url
    with pytest.raises(RequestError, match="cannot be reached"):
        responder(url, max_retries=1)([ask("?")])


def test_the_first_failure_ends_all() -> None:
    """What waits for its turn is not asked any more."""

    def answer(body: Body) -> Answered:
        return Answered(b"no", status=403)

    with chat_server(answer) as server:
        with pytest.raises(RequestError, match="may not"):
            responder(server.url, concurrency=1)([ask(str(n)) for n in range(500)])
        assert len(server.bodies) < 500


def test_one_refused_conversation_does_not_end_the_others() -> None:
    def answer(body: Body) -> Answered:
        if text_of(body) == "long":
            return Answered({"message": "too many tokens"}, status=400)
        return said("fine")

    with chat_server(answer) as server:
        asked = responder(server.url)
        got = asked.sample([ask("a"), ask("long"), ask("b")], seed=0)
        assert [reply.text for reply in got] == ["fine", "", "fine"]
        assert [reply.finish for reply in got] == ["stop", "refused", "stop"]
        assert "too many tokens" in got[1].note
        assert Counter(map(text_of, server.bodies)) == {"a": 1, "long": 1, "b": 1}
        with pytest.raises(RequestError, match=r"refused all 2 requests.*too many tokens"):
            asked([ask("long"), ask("long")])


@pytest.mark.parametrize(
    ("answered", "reply"),
    [
        (said("42"), Reply("42")),
        (said("4", finish="length"), Reply("4", "length")),
        (said(None), Reply("")),
        (said("42", reasoning_content="6 * 7"), Reply("<think>\n6 * 7\n</think>\n\n42")),
        (said("42", reasoning="6 * 7"), Reply("<think>\n6 * 7\n</think>\n\n42")),
        (said(None, finish="length", reasoning="6 *"), Reply("<think>\n6 *", "length")),
    ],
)
def test_reasoning_and_ends_are_read(answered: Answered, reply: Reply) -> None:
    with chat_server(lambda _: answered) as server:
        assert responder(server.url).sample([ask("?")], seed=0) == [reply]


def test_it_is_a_responder_that_draws() -> None:
    asked = responder("http://localhost:1/v1")
    assert isinstance(asked, Responder)
    assert isinstance(asked, Sampler)
    assert asked([]) == []


def test_a_plain_responder_ends_all_its_answers() -> None:
    def echo(conversations: object) -> list[str]:
        return ["a", "b"]

    assert replies(echo, [ask("?"), ask("?")], seed=1) == [Reply("a"), Reply("b")]


@pytest.mark.parametrize(
    "settings",
    [
        {"url": "localhost:8000/v1"},
        {"url": "ftp://localhost/v1"},
        {"concurrency": 0},
        {"max_retries": -1},
        {"timeout_s": 0.0},
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        UrlResponder(**{"url": "http://localhost/v1", "model": "m", **settings})  # type: ignore[arg-type]
