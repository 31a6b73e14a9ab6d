"""Records in the form of a JSONL file's lines."""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path("/pictures")


def chat(*turns, **more):
    names = {"h": "human", "g": "gpt", "s": "system", "f": "function", "p": "pretrain"}
    return {
        "conversations": [{"from": names[turn[0]], "value": turn[2:]} for turn in turns],
        **more,
    }


def line(number, **more):
    return json.dumps(
        chat(f"h:question {number}", f"g:answer {number}", id=number, **more)
    ).encode()
