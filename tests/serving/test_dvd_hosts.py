"""One half at another host, over a network that is cut: nothing is lost, or it is said what is.

Slow, and needs Linux, root, and the programs of iproute2 and util-linux: the hosts are namespaces.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import get_args

import openai
import pytest
from tests.serving.small_command import (
    EXACT,
    ask,
    ask_until_answered,
    command,
    coupled_answers,
)
from tests.serving.small_hosts import Cable, Host, host, make_hub, plug

from cascadevl.serving.pipeline import PipelineConfig
from cascadevl.serving.wire import Role

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

NUM = 12
PATIENCE_S, SILENCE_S = PipelineConfig().patience_s, PipelineConfig().silence_s
BACK_S = 30.0
"""A server is there again so long after its network, however long that was away."""


@dataclass(frozen=True, kw_only=True)
class Apart:
    """A server whose halves are at two hosts.

    Attributes:
        half: Which one is not where the front is.
        client: Asks the front.
        cable: Joins the hosts.
    """

    half: Role
    client: openai.OpenAI
    cable: Cable


@pytest.fixture(scope="module")
def expected() -> list[str]:
    return coupled_answers(NUM)


@contextmanager
def halves(near: Host, far: Host, half: Role) -> Iterator[openai.OpenAI]:
    """A front and one half at one host, the other half at the other."""
    wire = f"tcp://{near.address}:5555"
    with ExitStack() as stack:
        for role in get_args(Role):
            at = far if role == half else near
            words = ["--role", role, "--join", wire, *EXACT]
            if role == "language":
                words += ["--features", f"tcp://{at.address}:5556", "--cache-bytes", "64MB"]
            module = ("-m", "cascadevl.cli.main", "serve", "micro")
            stack.enter_context(at.running(sys.executable, *module, *words))
        front = command("--wire", wire, *EXACT, before=near.words)
        _, client = stack.enter_context(front)
        stack.enter_context(near.entered())
        yield client


@pytest.fixture(scope="module", params=get_args(Role))
def apart(
    request: pytest.FixtureRequest, expected: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Apart]:
    folder = tmp_path_factory.mktemp("host")
    with host(1, folder) as near, host(2, folder) as far:
        make_hub(near)
        cable = plug(near, far)
        with halves(near, far, request.param) as client:
            assert ask_until_answered(client, 0, 600) == expected[0]
            yield Apart(half=request.param, client=client, cable=cable)


def test_a_short_cut_loses_no_request_and_changes_no_answer(apart: Apart, expected: list[str]):
    """Longer than a silent server is waited for, shorter than requests wait for one to come."""
    with ThreadPoolExecutor(NUM) as pool:
        asking = [pool.submit(ask, apart.client, seed) for seed in range(NUM - 4)]
        next(as_completed(asking))
        apart.cable.cut()
        assert not all(each.done() for each in asking), "nothing was on its way any more"
        late = [pool.submit(ask, apart.client, seed) for seed in range(NUM - 4, NUM)]
        time.sleep(SILENCE_S + 3)
        assert not any(each.done() for each in late), "they did not need the cable"
        apart.cable.mend()
        assert [each.result(PATIENCE_S + 240) for each in (*asking, *late)] == expected


def test_a_long_cut_is_an_error_and_then_service_comes_back(apart: Apart, expected: list[str]):
    apart.cable.cut()
    try:
        with pytest.raises(openai.InternalServerError, match=f"no {apart.half} server is there"):
            ask(apart.client, 20)
        if apart.half == "vision":
            assert ask(apart.client, 0, num_pictures=0)
        time.sleep(15)  # by now Linux by itself would ask once in a minute whether the way is free
    finally:
        apart.cable.mend()
    start = time.monotonic()
    assert ask_until_answered(apart.client, 1, 240) == expected[1]
    assert time.monotonic() - start < BACK_S, "it found its way back too late"
