"""Both halves as Ray Serve deployments, on a real Ray of this machine.

Slow, and needs Ray: `make setup-ray`, or an environment with cascadevl and Ray whose Python
``CASCADEVL_RAY_PYTHON=/path/to/bin/python`` names.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator

import openai
import PIL.Image
import pytest
from tests.serving.small_command import command, free_port
from tests.serving.small_ray import ray_python, replicas
from tests.serving.small_server import shown

from cascadevl.cli.main import main


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[subprocess.Popen[str], openai.OpenAI]]:
    words = ["--ray", "--wire", f"tcp://127.0.0.1:{free_port()}", "--threads", "1"]
    words += ["--replica-cpus", "0.1", "--cache-bytes", "64MB", "--max-language", "2"]
    with command(*words, python=ray_python()) as (process, client):
        yield process, client.with_options(timeout=600)


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


def last_line(program: str) -> str:
    """What a program said at last that may import Ray."""
    command = [ray_python(), "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1]


FOLLOWS = """
from types import SimpleNamespace
from cascadevl.serving.ray_app import ByLoad
policy = ByLoad(1, 4, 8.0)
each = [None, {}, {"load": {1: 8.0}}, {"load": {1: 8.0, 2: 9.0}}, {"load": {1: 40.0}}]
print([policy(SimpleNamespace(aggregated_metrics=known))[0] for known in each])
"""


@pytest.mark.slow
def test_replicas_are_as_many_as_what_is_in_hand_wants():
    assert last_line(FOLLOWS) == "[1, 1, 1, 3, 4]"


WAITS = """
from cascadevl.serving.ray_app import Scale, missing_resources
scale = Scale(least=3, most=3, gpus=1.0, resources={"eyes": 1.0})
each = [{"CPU": 2.0, "GPU": 3.0}, {"CPU": 3.0, "eyes": 2.0}, {"CPU": 9.0, "GPU": 3.0, "eyes": 3.0}]
print([missing_resources(scale, offered) for offered in each])
"""


@pytest.mark.slow
def test_what_hosts_do_not_offer_is_named():
    assert last_line(WAITS) == str(
        [["CPU (2 of 3)", "eyes (0 of 3)"], ["GPU (0 of 3)", "eyes (2 of 3)"], []]
    )


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
