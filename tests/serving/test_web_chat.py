"""The web chat in a real browser: a picture is dropped, a question asked, the answer read."""

from __future__ import annotations

import base64
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from playwright.sync_api import Page, expect, sync_playwright
from tests.serving.small_server import NAME, Served, serving

import cascadevl
from cascadevl.engine.requests import EngineConfig
from cascadevl.tasks.handwriting import Handwriting

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-web" / "bin" / "python"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
# A machine without a display, without a sandbox for root, and without a network.
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
)
WAIT_MS = 60_000

pytestmark = [
    pytest.mark.skipif(not PYTHON.exists(), reason="run `make setup-web` first"),
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium; run `make setup-web` first"),
    pytest.mark.timeout(600),
]


@contextmanager
def chat_page(served: Served, folder: Path) -> Iterator[str]:
    """The page, in a process of its own as people run it."""
    command = [str(PYTHON), "-m", "cascadevl.cli.main", "web", "--port", "0"]
    command += ["--server", f"{served.address}/v1"]
    settings: dict[str, Any] = {
        "env": {**os.environ, "GRADIO_TEMP_DIR": str(folder)},
        "stdout": subprocess.PIPE,
        "text": True,
    }
    with subprocess.Popen(command, **settings) as process:
        try:
            assert process.stdout is not None
            name, _, address = process.stdout.readline().strip().partition(" at ")
            assert name == NAME
            yield address
            process.terminate()
            assert process.wait(30) == 0
        finally:
            process.kill()


@contextmanager
def browser_at(address: str) -> Iterator[tuple[Page, set[str]]]:
    """A browser that shows the page, and the hosts that it asked."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        page = browser.new_page(viewport={"width": 1100, "height": 900})
        page.set_default_timeout(WAIT_MS)
        expect.set_options(timeout=WAIT_MS)
        asked: set[str] = set()
        page.on("request", lambda request: asked.add(request.url.partition("//")[2].split("/")[0]))
        page.goto(address)
        page.locator("#said textarea").wait_for()
        yield page, asked
        browser.close()


def drop(page: Page, file: Path) -> None:
    """Drop a file on the text box, as with a mouse."""
    content = base64.b64encode(file.read_bytes()).decode()
    transfer = page.evaluate_handle(
        """([content, name]) => {
            const bytes = Uint8Array.from(atob(content), letter => letter.charCodeAt(0));
            const transfer = new DataTransfer();
            transfer.items.add(new File([bytes], name, {type: "image/png"}));
            return transfer;
        }""",
        [content, file.name],
    )
    page.dispatch_event("#said textarea", "drop", {"dataTransfer": transfer})
    page.locator("#said img").first.wait_for()


def ask(page: Page, question: str, number: int) -> str:
    """Type a question; the answer, once it is whole."""
    page.fill("#said textarea", question)
    page.press("#said textarea", "Enter")
    answers = page.locator(".message.bot")
    expect(answers).to_have_count(number)
    expect(page.locator("#said textarea")).to_have_value("")
    expect(page.locator("#said .submit-button")).to_be_visible()
    last = answers.nth(number - 1)
    expect(last).not_to_have_text("...")
    expect(page.locator("#talk .generating")).to_have_count(0)
    return last.inner_text().strip()


def test_a_picture_is_dropped_and_asked_about(tmp_path: Path):
    model, processor = cascadevl.load("micro")
    scene = Handwriting().draw("test", 0, 3)
    question, file = scene.questions[0].prompt, tmp_path / "scan.png"
    scene.image.resize((300, 150)).save(file)
    with (
        serving(model, processor, EngineConfig(cache_bytes=2**26)) as served,
        chat_page(served, tmp_path / "uploads") as address,
        browser_at(address) as (page, asked),
    ):
        drop(page, file)
        answer = ask(page, question, 1)
        url = f"data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}"
        parts: Any = [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": question},
        ]
        turns: Any = [{"role": "user", "content": parts}]
        direct = served.client.chat.completions.create(model=NAME, messages=turns, temperature=0)
        assert answer == direct.choices[0].message.content
        assert ask(page, "<img src=x onerror=alert(1)> And now?", 2)
        assert page.locator('img[src="x"]').count() == 0, "what a person writes is no HTML"
        picture = tmp_path / "chat.png"
        page.screenshot(path=picture)
        assert len(np.unique(np.asarray(PIL.Image.open(picture)))) > 20

        page.get_by_role("tab", name="Tiles").click()
        expect(page.locator("#facts")).to_contain_text("none saved")
        expect(page.locator("#facts")).to_contain_text("from the first token to the last")
        expect(page.get_by_text("scan.png: 2 x 1 tiles + thumbnail").first).to_be_visible()
        page.screenshot(path=tmp_path / "tiles.png")

        page.get_by_role("tab", name="Best of N").click()
        page.set_input_files("#question input[type=file]", file)
        page.locator("#question img").first.wait_for()
        page.fill("#question textarea", question)
        page.press("#question textarea", "Enter")
        expect(page.locator("#candidates .candidate")).to_have_count(4)
        expect(page.locator("#candidates")).to_contain_text("1. score")
        page.screenshot(path=tmp_path / "best.png")

        page.get_by_role("tab", name="Chat").click()
        page.get_by_role("button", name="New conversation").click()
        expect(page.locator(".message")).to_have_count(0)
        assert asked == {address.partition("//")[2].strip("/")}, "nobody else is asked anything"
