"""The best of several answers to a request: what is wished, and how it is drawn and judged."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from typing import TypeAlias

from cascadevl.engine.best_of_n import BestOfConfig, Candidate, rounds
from cascadevl.engine.critics import Critics
from cascadevl.engine.draws import stream_of
from cascadevl.engine.requests import Completion, Request
from cascadevl.errors import RequestError
from cascadevl.serving.openai_schema import ChatRequest, UserMessage, VideoPart
from cascadevl.types import Message

Draw: TypeAlias = Callable[[Request], Awaitable[list[Completion]]]
"""Gives all answers to a request, in order."""


def choice_of(body: ChatRequest, critics: Critics) -> BestOfConfig | None:
    """How the best answers to a conversation are found; None for answers as they come.

    Args:
        body: The request.
        critics: What they can be chosen by.

    Raises:
        RequestError: If wishes exclude each other or cannot be fulfilled.
        ConfigError: The same.
    """
    if body.best_of is None:
        for name in ("select", "round_size", "stop_score"):
            if getattr(body, name) is not None:
                raise RequestError(
                    f"{name} chooses among several answers; say with best_of how many are drawn"
                )
        return None
    number, wanted = body.best_of, body.n or 1
    if number < wanted:
        raise RequestError(f"best_of is {number}, but n is {wanted}; draw at least as many")
    config = BestOfConfig(
        num_samples=number,
        select=body.select or ("prm" if critics.has_reward_model else "vote"),
        round_size=body.round_size,
        stop_score=None if body.stop_score is None else float(body.stop_score),
    )
    config.check_temperature(1.0 if body.temperature is None else float(body.temperature))
    critics.selection(config)  # refuses what nobody can choose by
    if config.select != "vote" and _shows_a_video(body):
        raise RequestError(
            "a reward model reads pictures, but a video is shown; show its frames as pictures, or "
            "choose by 'vote'"
        )
    return config


def _shows_a_video(body: ChatRequest) -> bool:
    return any(
        isinstance(part, VideoPart)
        for message in body.messages
        if isinstance(message, UserMessage) and not isinstance(message.content, str)
        for part in message.content
    )


async def draw_candidates(
    request: Request,
    messages: Sequence[Message],
    config: BestOfConfig,
    critics: Critics,
    *,
    draw: Draw,
    judging: Executor,
) -> list[Candidate]:
    """Draw answers until the choice is settled; all of them, with what speaks for each.

    Args:
        request: What is asked; at least its ``num_samples`` answers are drawn.
        messages: The conversation.
        config: How many are drawn, and by what is chosen.
        critics: Who chooses.
        draw: Asks the engine.
        judging: Where answers are judged, which takes time.

    Raises:
        CascadeVLError: If they cannot be drawn, or not be judged.
    """
    selection = critics.selection(config)
    candidates: list[Candidate] = []
    for first, size in rounds(config.num_samples, config.round_size):
        left = config.num_samples - first
        if len(candidates) >= request.num_samples and selection.is_settled(candidates, left):
            break
        sampling = replace(request.sampling, seed=stream_of(request.sampling.seed, first))
        new = await draw(replace(request, sampling=sampling, num_samples=size))
        candidates = await asyncio.get_running_loop().run_in_executor(
            judging, selection.judged, messages, candidates, new
        )
    return candidates
