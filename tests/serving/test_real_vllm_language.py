"""`cascadevl serve --vllm` before a real vLLM server on the CPU: the tokens of the whole model.

Slow, and needs vLLM in an environment of its own: `make setup-vllm`.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from tests.engine.real_vllm import vllm_server
from tests.engine.small_backend import picture, vllm_checkpoint
from tests.serving.small_server import shown

from cascadevl.data.chat import to_messages
from cascadevl.engine.engine import Engine
from cascadevl.engine.requests import EngineConfig, Request
from cascadevl.engine.sampling import SamplingParams
from cascadevl.model.language_export import export_language
from cascadevl.model.loading import load

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vllm_checkpoint(tmp_path_factory.mktemp("checkpoint") / "whole")


@pytest.fixture(scope="module")
def client(whole: Path) -> Iterator[openai.OpenAI]:
    """A front, a vision server, a language server, and vLLM, all of them processes."""
    text = whole.with_name("text")
    export_language(whole, text)
    flags = ("--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "8")
    with vllm_server(text, whole.with_name("log.txt"), *flags) as url:
        command = [sys.executable, "-m", "cascadevl.cli.main", "serve", str(whole), "--port", "0"]
        command += ["--vllm", url, "--name", "small", "--threads", "1"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            try:
                address = process.stdout.readline().strip().partition(" at ")[2]
                with openai.OpenAI(base_url=address, api_key="none", timeout=600) as found:
                    yield found
            finally:
                process.terminate()
                process.wait(120)


@pytest.mark.parametrize("num_pictures", [0, 1, 2])
def test_answers_over_http_are_those_of_the_whole_model(
    client: openai.OpenAI, whole: Path, num_pictures: int
):
    pictures = [shown(picture(seed).source) for seed in range(num_pictures)]
    talk = [{"role": "user", "content": [*pictures, {"type": "text", "text": "The door"}]}]
    model, processor = load(whole)
    sampling = SamplingParams(max_tokens=16, ignore_eos=True)
    wish = Request(prompt=processor.prompt(to_messages(talk)), sampling=sampling)
    ((expected,),) = Engine(model, processor, EngineConfig(num_pages=400)).generate([wish])
    stream = client.chat.completions.create(
        model="small",
        messages=talk,
        max_tokens=16,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    events = list(stream)
    text = "".join(each.choices[0].delta.content or "" for each in events if each.choices)
    usage = events[-1].usage
    assert usage is not None
    assert text == expected.text
    assert usage.completion_tokens == 16
    assert usage.prompt_tokens == expected.usage.prompt_tokens
