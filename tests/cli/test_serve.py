"""`cascadevl serve` as a process of its own: it answers, and stops without losing an answer."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import openai
import pytest

from cascadevl.cli.main import main


@contextmanager
def served(*words: str) -> Iterator[tuple[subprocess.Popen[str], openai.OpenAI]]:
    command = [sys.executable, "-m", "cascadevl.cli.main", "serve", "micro", "--port", "0", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            name, _, url = line.strip().partition(" at ")
            assert name == "micro"
            with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60) as client:
                yield process, client
        finally:
            process.kill()


def test_a_stream_in_hand_is_ended_after_sigterm_and_nothing_new_is_taken():
    with served() as (process, client):
        stream = client.chat.completions.create(
            model="micro",
            messages=[{"role": "user", "content": "Count."}],
            max_tokens=300,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        events = iter(stream)
        next(events)
        process.send_signal(signal.SIGTERM)
        reader = threading.Thread(target=process.wait, daemon=True)
        reader.start()
        *_, last = events
        assert last.choices[0].finish_reason == "length"
        assert process.wait(20) == 0
        with pytest.raises(openai.APIConnectionError):
            client.models.list()


def test_a_port_in_use_is_said(capsys: pytest.CaptureFixture[str]):
    with served() as (_, client):
        port = client.base_url.port
        assert main(["serve", "micro", "--port", str(port)]) == 2
    assert f"cannot listen at 127.0.0.1:{port}" in capsys.readouterr().err
