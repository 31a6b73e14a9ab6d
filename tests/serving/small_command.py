"""`cascadevl serve` as a process of its own, and OpenAI's client for it."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import openai
from tests.engine.small_talk import picture
from tests.serving.small_server import shown, text_of

EXACT = ("--batch-invariant", "--threads", "1")
"""With these words all answers are the same to the bit, wherever they are computed."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def command(
    *words: str,
    python: str = sys.executable,
    before: Sequence[str] = (),
    key: str = "none",
    **settings: Any,
) -> Iterator[tuple[subprocess.Popen[str], openai.OpenAI]]:
    """Serve micro while the context lasts.

    Args:
        *words: Of the command.
        python: Runs it.
        before: A program that starts it, with its words.
        key: Of the client.
        **settings: Of the process.
    """
    module = ["-m", "cascadevl.cli.main", "serve", "micro", "--port", "0"]
    started = [*before, python, *module, *words]
    with subprocess.Popen(started, stdout=subprocess.PIPE, text=True, **settings) as process:
        assert process.stdout is not None
        try:
            name, _, url = process.stdout.readline().strip().partition(" at ")
            assert name == "micro", "the server did not start"
            with openai.OpenAI(base_url=url, api_key=key, max_retries=0, timeout=60) as client:
                yield process, client
        finally:
            process.kill()


def ask(client: openai.OpenAI, seed: int, *, num_pictures: int = 1) -> str:
    """What a stream says of a picture, or without one; each seed asks for an answer of its own."""
    pictures = [shown(picture(seed, (200, 150)))] * num_pictures
    events = client.with_options(timeout=600).chat.completions.create(
        model="micro",
        messages=[{"role": "user", "content": [*pictures, {"type": "text", "text": "Describe."}]}],
        max_tokens=8 + 4 * seed,
        temperature=1.0,
        seed=seed,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    return text_of(events)


def ask_until_answered(client: openai.OpenAI, seed: int, seconds: float) -> str:
    """The same, where servers may be missing: a request waits only so long for one to come."""
    end = time.monotonic() + seconds
    while True:
        try:
            return ask(client, seed)
        except openai.InternalServerError:
            assert time.monotonic() < end, "no server has come"


def coupled_answers(num_seeds: int, *, num_pictures: int = 1) -> list[str]:
    """What both halves answer in one process."""
    with command("--coupled", *EXACT) as (_, client):
        return [ask(client, seed, num_pictures=num_pictures) for seed in range(num_seeds)]
