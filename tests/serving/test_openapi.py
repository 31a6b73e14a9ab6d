"""The API against its own document: schemathesis asks everything that the document allows."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tests.serving.small_server import serving, small_pair


def test_the_document_names_every_route():
    model, processor = small_pair()
    with serving(model, processor) as served:
        document = served.client.with_options(base_url=served.address).get(
            "/openapi.json", cast_to=object
        )
    assert isinstance(document, dict)
    assert set(document["paths"]) == {
        *("/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/models/{name}"),
        *("/health", "/ready", "/metrics"),
    }
    body = document["paths"]["/v1/chat/completions"]["post"]["requestBody"]
    assert body["content"]["application/json"]["schema"]["$ref"].endswith("/ChatRequest")
    assert "thinking" in document["components"]["schemas"]["ChatRequest"]["properties"]


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("examples", [12, pytest.param(100, marks=pytest.mark.slow)])
def test_schemathesis_finds_nothing(examples: int, tmp_path: Path):
    model, processor = small_pair()
    with serving(model, processor) as served:
        done = subprocess.run(
            [
                str(Path(sys.executable).with_name("schemathesis")),
                *("run", f"{served.address}/openapi.json"),
                *("--max-examples", str(examples), "--seed", "1", "--no-color"),
                # Roles in an impossible order, pictures that are none and prompts that are too long
                # fit the document and are refused all the same.
                *("--exclude-checks", "positive_data_acceptance"),
            ],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=1100,
            check=False,
        )
        assert served.api.answers.failure is None
    assert done.returncode == 0, done.stdout[-6000:]
