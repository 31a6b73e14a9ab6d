"""A real vLLM server, started for a test in an environment of its own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
VARIABLE = "CASCADEVL_VLLM_PYTHON"
_START_S = 3000.0  # half a minute on a quiet machine; minutes where others compute

_SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB, instead of a share of the machine's memory
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",  # compiling takes longer than all the answers of a small model
    "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": "3000",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}


def vllm_python() -> Path:
    """The Python that vLLM is installed for."""
    python = Path(os.environ.get(VARIABLE) or ROOT / ".venv-vllm" / "bin" / "python")
    if not python.exists():
        pytest.fail(
            f"there is no {python}, and this test needs a real vLLM: run `make setup-vllm` (3.5 "
            f"GB), or name the Python of another installation: {VARIABLE}=/path/to/bin/python"
        )
    return python


@contextmanager
def vllm_server(model: Path, log: Path, *flags: str) -> Iterator[str]:
    """Run a server while the context lasts, and give its base address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        *(str(vllm_python()), "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(model), "--served-model-name", "text", "--enable-prompt-embeds"),
        *("--host", "127.0.0.1", "--port", str(port), "--enforce-eager", *flags),
    ]
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with log.open("wb") as output:
        server = subprocess.Popen(
            command,
            env={**own, **_SETTINGS},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _wait(server, f"http://127.0.0.1:{port}/health", log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def _wait(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    end = time.monotonic() + _START_S
    while time.monotonic() < end:
        if server.poll() is not None:
            break
        try:
            with urllib.request.urlopen(url, timeout=10):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    text = log.read_text(errors="replace")
    pytest.fail(f"the vLLM server did not start:\n{text[-3000:]}")
