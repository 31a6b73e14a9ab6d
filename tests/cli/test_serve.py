"""`cascadevl serve` as a process of its own: it answers, and stops without losing an answer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import openai
import PIL.Image
import pytest
from tests.engine.vllm_double import TextModel, vllm_double
from tests.serving.small_command import command
from tests.serving.small_server import shown

from cascadevl.cli.main import main
from cascadevl.model.loading import find


def test_a_stream_in_hand_is_ended_after_sigterm_and_nothing_new_is_taken():
    with command() as (process, client):
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
    with command() as (_, client):
        port = client.base_url.port
        assert main(["serve", "micro", "--port", str(port)]) == 2
    assert f"cannot listen at 127.0.0.1:{port}" in capsys.readouterr().err


def test_questions_are_counted_by_key_alone(capsys: pytest.CaptureFixture[str]):
    assert main(["serve", "micro", "--port", "0", "--max-per-minute", "5"]) == 2
    assert "give --api-keys" in capsys.readouterr().err


QUESTION: Any = {
    "model": "micro",
    "messages": [{"role": "user", "content": "Count."}],
    "max_tokens": 4,
    "temperature": 0,
}


def test_a_full_disk_for_the_log_costs_no_answer():
    with command("--log", "/dev/full") as (process, client):
        for _ in range(3):
            assert client.chat.completions.create(**QUESTION).choices[0].message.content
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


def test_a_log_that_nobody_reads_costs_no_answer():
    """A pipe holds 64 KiB; each line of the log is longer than its path."""
    with command(stderr=subprocess.PIPE) as (process, client):
        for _ in range(400):
            with pytest.raises(openai.NotFoundError):
                client.models.retrieve("a" * 300)
        assert client.chat.completions.create(**QUESTION).choices[0].message.content
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


def test_keys_a_log_and_no_home(tmp_path: Path):
    """As a service is run: no home folder, nothing to write but its log."""
    keys, log = tmp_path / "keys", tmp_path / "log"
    key = "sk-" + "a" * 30
    keys.write_text(f"ann {key}\n")
    nowhere = {**os.environ, "HOME": "/nonexistent", "XDG_CACHE_HOME": "/nonexistent"}
    words = ("--api-keys", str(keys), "--log", str(log))
    with command(*words, key=key, env=nowhere) as (process, client):
        assert client.chat.completions.create(**QUESTION).choices[0].message.content
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="none").models.list()
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    requests = [line for line in lines if line["message"] == "request"]
    assert [(line["key"], line["status"]) for line in requests] == [("ann", 200), (None, 401)]
    assert key not in log.read_text()


@pytest.mark.slow
def test_a_server_with_a_reward_model_gives_the_best_of_several():
    with command("--reward-model", "micro", "--step-lines") as (_, client):
        reply = client.with_options(timeout=200).chat.completions.create(
            model="micro",
            messages=[{"role": "user", "content": "What is 27 + 45?"}],
            max_tokens=60,
            n=2,
            extra_body={"best_of": 3},
        )
    scores = [choice.model_dump()["score"] for choice in reply.choices]
    assert len(scores) == 2
    assert all(0 < score < 1 for score in scores)
    assert reply.model_dump()["num_drawn"] == 3


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["stored", "packed", "int8"])
def test_two_halves_as_processes_answer_and_all_end_with_the_front(weights: str):
    words = ["--vision", "1", "--language", "1", "--weights", weights]
    with command(*words) as (process, client):
        picture = PIL.Image.new("RGB", (200, 100), "white")
        part = {"type": "text", "text": "What is it?"}
        reply = client.with_options(timeout=200).chat.completions.create(
            model="micro",
            messages=[{"role": "user", "content": [shown(picture), part]}],
            max_tokens=4,
            temperature=0,
        )
        assert reply.usage is not None
        assert reply.usage.prompt_tokens_details is not None
        assert reply.usage.prompt_tokens_details.model_dump()["visual_tokens"] > 0
        members = children(process.pid)
        assert len(members) == 2
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        assert not any(Path(f"/proc/{member}").exists() for member in members)


@pytest.mark.slow
def test_processes_end_when_their_front_is_killed():
    with command("--vision", "1", "--language", "1") as (process, _):
        members = children(process.pid)
        process.kill()
        process.wait()
        end = time.monotonic() + 200
        while any(Path(f"/proc/{member}").exists() for member in members):
            assert time.monotonic() < end
            time.sleep(0.2)


@pytest.mark.slow
def test_vllm_computes_the_language_half(tmp_path: Path):
    text = TextModel(find("micro"), tmp_path / "text", max_model_len=4096)
    with vllm_double(text) as vllm, command("--vllm", vllm.url) as (process, client):
        part = {"type": "text", "text": "What is it?"}
        picture = PIL.Image.new("RGB", (200, 100), "white")
        reply = client.with_options(timeout=200).chat.completions.create(
            model="micro",
            messages=[{"role": "user", "content": [shown(picture), part]}],
            max_tokens=4,
            temperature=0,
            extra_body={"ignore_eos": True},
        )
        assert reply.usage is not None
        assert reply.usage.completion_tokens == 4
        (body,) = vllm.bodies
        assert body["max_tokens"] == 4
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


@pytest.mark.parametrize(
    "words", [["--coupled"], ["--role", "vision", "--join", "ipc:///tmp/nowhere"]]
)
def test_vllm_is_for_the_language_half_alone(words: list[str], capsys: pytest.CaptureFixture[str]):
    assert main(["serve", "micro", "--vllm", "http://localhost:1/v1", *words]) == 2
    assert "--vllm computes the language half" in capsys.readouterr().err


def children(pid: int) -> list[int]:
    listed = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=True
    )
    return [int(line) for line in listed.stdout.split()]
