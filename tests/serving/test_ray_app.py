"""Both halves as Ray Serve deployments, on a real Ray of this machine.

Slow, and needs Ray: `make setup-ray`, or an environment with cascadevl and Ray whose Python
``CASCADEVL_RAY_PYTHON=/path/to/bin/python`` names.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import openai
import PIL.Image
import pytest
from tests.serving.small_server import shown

from cascadevl.cli.main import main


@pytest.fixture(scope="module")
def python() -> str:
    found = os.environ.get("CASCADEVL_RAY_PYTHON")
    if found is None and find_spec("ray") is None:
        pytest.fail("this test needs a real Ray: run `make setup-ray`")
    return found or sys.executable


@pytest.fixture(scope="module")
def served(python: str) -> Iterator[tuple[subprocess.Popen[str], openai.OpenAI]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [python, "-m", "cascadevl.cli.main", "serve", "micro", "--port", "0", "--ray"]
    command += ["--wire", f"tcp://127.0.0.1:{port}", "--threads", "1", "--replica-cpus", "0.1"]
    command += ["--cache-bytes", "64MB", "--max-language", "2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            url = process.stdout.readline().strip().partition(" at ")[2]
            with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=600) as client:
                yield process, client
        finally:
            process.kill()


def ask(client: openai.OpenAI) -> str | None:
    part = {"type": "text", "text": "What is it?"}
    picture = shown(PIL.Image.new("RGB", (200, 100), "white"))
    talk = [{"role": "user", "content": [picture, part]}]
    reply = client.chat.completions.create(
        model="micro", messages=talk, max_tokens=4, temperature=0
    )
    assert reply.usage is not None
    assert reply.usage.prompt_tokens_details is not None
    assert reply.usage.prompt_tokens_details.model_dump()["visual_tokens"] > 0
    return reply.choices[0].message.content


def replicas(role: str) -> list[int]:
    """Processes of the replicas of a half."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                name = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            if name.startswith("ray::") and re.search(f"cascadevl-{role}[#:]", name):
                found.append(int(folder.name))
    return found


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_replicas_answer_and_one_that_is_killed_comes_back(
    served: tuple[subprocess.Popen[str], openai.OpenAI],
):
    process, client = served
    said = ask(client)
    (victim,) = replicas("vision")
    os.kill(victim, signal.SIGKILL)
    end = time.monotonic() + 1200
    while True:
        try:
            assert ask(client) == said
            break
        except openai.InternalServerError:  # it waited as long as requests do for a server
            assert time.monotonic() < end, "no other replica has come"
    (other,) = replicas("vision")
    assert other != victim
    process.send_signal(signal.SIGTERM)
    assert process.wait(300) == 0
    end = time.monotonic() + 60
    while replicas("vision") or replicas("language"):
        assert time.monotonic() < end, "replicas are left"
        time.sleep(0.5)


FOLLOWS = """
from types import SimpleNamespace
from cascadevl.serving.ray_app import ByLoad
policy = ByLoad(1, 4, 8.0)
each = [None, {}, {"load": {1: 8.0}}, {"load": {1: 8.0, 2: 9.0}}, {"load": {1: 40.0}}]
print([policy(SimpleNamespace(aggregated_metrics=known))[0] for known in each])
"""


@pytest.mark.slow
def test_replicas_are_as_many_as_what_is_in_hand_wants(python: str):
    done = subprocess.run([python, "-c", FOLLOWS], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[1, 1, 1, 3, 4]"


def test_words_that_make_no_cluster_are_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("cascadevl.cli.serve_ray.find_spec", lambda name: None)
    words = ["serve", "micro", "--ray", "--wire", "tcp://127.0.0.1:5555"]
    assert main(words) == 2
    assert "pip install 'cascadevl[cluster]'" in capsys.readouterr().err
    monkeypatch.setattr("cascadevl.cli.serve_ray.find_spec", lambda name: name)
    assert main(["serve", "micro", "--ray", "--vision", "1", "--language", "1"]) == 2
    assert "--wire that all hosts reach" in capsys.readouterr().err
    assert main([*words, "--vllm", "http://localhost:1/v1"]) == 2
    assert "--vllm is one server" in capsys.readouterr().err
