"""A real Ray for a test: whose Python has it, a node of a cluster, and the replicas that run."""

from __future__ import annotations

import json
import os
import re
import secrets
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest
from tests.serving.small_hosts import Host

from cascadevl.serving.wire import Role

VARIABLE = "CASCADEVL_RAY_PYTHON"


def ray_python() -> str:
    """The Python that Ray is installed for."""
    found = os.environ.get(VARIABLE)
    if found is None and find_spec("ray") is None:
        pytest.fail(
            f"this test needs a real Ray: run `make setup-ray`, or name the Python of another "
            f"installation: {VARIABLE}=/path/to/bin/python"
        )
    return found or sys.executable


def replicas(role: Role) -> list[int]:
    """Processes of the replicas of a half, on all hosts of this machine."""
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


def cluster_env(folder: Path) -> dict[str, str]:
    """The environment of all nodes of one cluster, and of whoever uses it.

    It names a token of this cluster alone. Without one Ray takes the token of the home folder if
    there is any, but only for the head.

    Args:
        folder: For Ray's sockets, whose names may not be long.
    """
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    return {**os.environ, "RAY_TMPDIR": str(folder), **token}


@contextmanager
def ray_node(
    host: Host, env: Mapping[str, str], *words: str, resources: Mapping[str, float]
) -> Iterator[None]:
    """A host as a node of a cluster while the context lasts.

    Args:
        host: The host.
        env: Of the cluster.
        *words: What the node is: the head, or where that is.
        resources: What it offers beside one core.
    """
    command = [ray_python(), "-m", "ray.scripts.scripts", "start", "--block", *words]
    command += ["--node-ip-address", host.address, "--num-cpus", "1", "--disable-usage-stats"]
    command += ["--object-store-memory", str(100 * 2**20), "--resources", json.dumps(resources)]
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with host.running(*command, env=env, **output) as node:
        assert node.stdout is not None
        lines: list[str] = []
        while not lines or "Ray runtime started" not in lines[-1]:
            lines.append(node.stdout.readline())
            if not lines[-1]:
                pytest.fail(f"no Ray at {host.address}:\n{''.join(lines)}")
        yield
