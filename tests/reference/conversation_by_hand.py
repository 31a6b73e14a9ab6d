"""A training sample the way released code makes it: whole turns as strings, then masks.

No pieces, no branches: every turn is written out with its image tokens and tokenised at once. An
assistant turn loses as many targets as its header has tokens, and its last one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

IMAGE = "<img><IMG_CONTEXT></img>"


def qwen(
    tokenizer: Any, turns: Sequence[tuple[str, str]], system: str
) -> tuple[list[int], list[bool]]:
    """Ids and trained flags of (role, text) turns; ``<image>`` in a text is a picture."""
    ids: list[int] = []
    trained: list[bool] = []
    if system:
        turns = [("system", system), *turns]
    header = tokenizer("<|im_start|>assistant\n", add_special_tokens=False).input_ids
    for role, text in turns:
        text = text.replace("<image>", IMAGE)
        turn = tokenizer(f"<|im_start|>{role}\n{text}<|im_end|>\n", add_special_tokens=False)
        ids += turn.input_ids
        flags = [role == "assistant"] * len(turn.input_ids)
        if role == "assistant":
            flags[: len(header)] = [False] * len(header)
            flags[-1] = False
        trained += flags
    return ids, trained


def gpt_oss(
    tokenizer: Any, turns: Sequence[tuple[str, str]], system: str
) -> tuple[list[int], list[bool]]:
    """The same for GPT-OSS: only the header of an assistant turn is not trained."""
    ids: list[int] = []
    trained: list[bool] = []
    for number, (role, text) in enumerate([("system", system), *turns]):
        text = text.replace("<image>", IMAGE)
        if role == "assistant":
            end = "<|return|>" if number == len(turns) else "<|end|>"
            turn = f"<|start|>assistant<|channel|>final<|message|>{text}{end}"
        else:
            turn = f"<|start|>{role}<|message|>{text}<|end|>"
        tokens = tokenizer(turn, add_special_tokens=False).input_ids
        header = tokenizer("<|start|>assistant", add_special_tokens=False).input_ids
        flags = [role == "assistant"] * len(tokens)
        if role == "assistant":
            flags[: len(header)] = [False] * len(header)
        ids += tokens
        trained += flags
    return ids, trained
