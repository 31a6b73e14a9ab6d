"""Both halves on a real Ray of two hosts, each half where it belongs, and a host that dies.

Slow, and needs Ray (see `test_ray_app`), Linux, root, and the programs of iproute2 and util-linux:
the hosts are namespaces.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from tests.serving.small_command import (
    EXACT,
    ask,
    ask_until_answered,
    command,
    coupled_answers,
)
from tests.serving.small_hosts import host, make_hub, plug
from tests.serving.small_ray import cluster_env, ray_node, ray_python, replicas

NUM = 4


@pytest.fixture
def folder() -> Iterator[Path]:
    """One of a short name, which each host has for itself."""
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as name:
        yield Path(name)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_each_half_runs_at_its_host_and_at_another_one_when_that_dies(folder: Path):
    python = ray_python()
    expected = coupled_answers(NUM)
    without_picture = coupled_answers(1, num_pictures=0)
    with host(1, folder) as near, host(2, folder) as far:
        make_hub(near)
        plug(near, far)
        port, wire = "6379", f"tcp://{near.address}:5555"
        head = ("--head", "--port", port, "--include-dashboard", "false")
        more = ("--address", f"{near.address}:{port}")
        words = ["--ray", "auto", "--wire", wire, *EXACT, "--cache-bytes", "64MB"]
        words += ["--vision-resource", "eyes", "--language-resource", "tongue"]
        words += ["--replica-cpus", "0.1"]
        env = cluster_env(folder)
        with (
            ray_node(near, env, *head, resources={"tongue": 1}),
            ray_node(far, env, *more, resources={"eyes": 1}),
            command(*words, python=python, before=near.words, env=env) as (_, client),
            near.entered(),
        ):
            assert [ask(client, seed) for seed in range(NUM - 1)] == expected[: NUM - 1]
            (vision,), (language,) = replicas("vision"), replicas("language")
            assert far.owns(vision)
            assert near.owns(language)

            far.kill()
            with pytest.raises(openai.InternalServerError, match="no vision server is there"):
                ask(client, NUM - 1)
            assert ask(client, 0, num_pictures=0) == without_picture[0]

            with host(3, folder) as another:
                plug(near, another)
                with ray_node(another, env, *more, resources={"eyes": 1}):
                    assert ask_until_answered(client, NUM - 1, 1200) == expected[NUM - 1]
                    (vision,) = replicas("vision")
                    assert another.owns(vision)
                    assert replicas("language") == [language]
