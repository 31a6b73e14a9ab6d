"""How the web chat shows a conversation, what an answer took, and several answers with scores.

All that somebody wrote is shown as text and never as HTML.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cascadevl.serving.web_client import Answer, Scored, Turn

_STAGES = {
    "prepare": "to cut pictures into tiles",
    "first_token": "to encode them and read the prompt",
    "answer": "from the first token to the last",
}


def question_of(said: Mapping[str, Any]) -> Turn | None:
    """What a person has typed and shown; None if nothing.

    Args:
        said: Of the text box.
    """
    text, files = (said.get("text") or "").strip(), said.get("files") or []
    return Turn(text=text, files=tuple(map(Path, files))) if text or files else None


def empty() -> dict[str, Any]:
    """A text box with nothing in it."""
    return {"text": "", "files": []}


def display(turns: Sequence[Turn], answer: Answer | None = None) -> list[dict[str, Any]]:
    """A conversation as the page shows it, reasoning folded once it is done.

    Args:
        turns: The conversation.
        answer: That is being given.
    """
    shown: list[dict[str, Any]] = []
    for turn in turns:
        role = "assistant" if turn.is_answer else "user"
        shown += [{"role": role, "content": {"path": str(file)}} for file in turn.files]
        if turn.reasoning:
            shown.append(_thought(turn.reasoning, "done"))
        if turn.text or not turn.files:
            shown.append({"role": role, "content": as_text(turn.text)})
    if answer is not None:
        if answer.reasoning:
            shown.append(_thought(answer.reasoning, "done" if answer.text else "pending"))
        shown.append({"role": "assistant", "content": as_text(answer.text) or "..."})
    return shown


def _thought(text: str, status: str) -> dict[str, Any]:
    metadata = {"title": "Thinking", "status": status}
    return {"role": "assistant", "content": as_text(text), "metadata": metadata}


def as_text(text: str) -> str:
    """Text in which Markdown still counts and HTML does not: boxes of answers stay visible.

    Args:
        text: What a person or a model wrote.
    """
    return text.replace("&", "&amp;").replace("<", "&lt;")


def facts_of(usage: Mapping[str, Any], seconds: Mapping[str, float], full: int) -> str:
    """What an answer took, as a table of Markdown.

    Args:
        usage: Of the answer.
        seconds: How long each stage took.
        full: Visual tokens of a full tile.
    """
    details = usage["prompt_tokens_details"]
    visual, whole = details["visual_tokens"], details["tiles"] * full
    saved = f"{1 - visual / whole:.0%} saved" if visual < whole else "none saved"
    rows = [
        ("tiles", f"{details['tiles']}, of them {details['compressed_tiles']} compressed"),
        ("visual tokens", f"{visual} of {whole} ({saved})" if whole else "0"),
        ("prompt", f"{usage['prompt_tokens']} tokens, {details['cached_tokens']} known before"),
        ("answer", f"{usage['completion_tokens']} tokens"),
    ]
    rows += [(_STAGES.get(stage, stage), f"{value:.3f} s") for stage, value in seconds.items()]
    return "\n".join(
        ["| of this answer | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]
    )


def candidates_as_html(candidates: Sequence[Scored]) -> str:
    """Answers with their scores, each step on a ground from red (0) to green (1).

    Args:
        candidates: The answers, the best first.
    """
    return "".join(
        f'<div class="candidate"><b>{place}. score {each.score:.3f}</b>{_steps(each)}</div>'
        for place, each in enumerate(candidates, start=1)
    )


def _steps(candidate: Scored) -> str:
    if not candidate.steps:
        return f"<p>{html.escape(candidate.text)}</p>"
    return "".join(
        f'<p class="step" style="background:hsl({round(120 * score)},70%,88%);color:#222">'
        f"<b>{score:.2f}</b> {html.escape(text)}</p>"
        for text, score in candidate.steps
    )
