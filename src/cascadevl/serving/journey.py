"""A request on its way through a decoupled server, and what to do with what comes twice."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from jaxtyping import Int, UInt8

from cascadevl.engine.prompts import Prompt
from cascadevl.engine.requests import (
    Completion,
    ImageTiles,
    Request,
    TextIds,
    TokenOutput,
)
from cascadevl.errors import CascadeVLError, RequestError, ServerError
from cascadevl.model.routing import KeepShare, Thresholds, VisualBudget
from cascadevl.serving.engine_thread import Output
from cascadevl.serving.fleet import Server
from cascadevl.types import Example


@dataclass(frozen=True, slots=True, eq=False)
class Contents:
    """What of a request travels.

    Attributes:
        ids: Token ids, one slot a picture.
        tiles: Tiles of all pictures.
        tiles_per_image: Tiles of each.
        increments: Position steps that were given, if any.
    """

    ids: Int[np.ndarray, " slots"]
    tiles: UInt8[np.ndarray, "tiles px px 3"]
    tiles_per_image: tuple[int, ...]
    increments: tuple[float, ...] | float | None


def contents_of(request: Request, image_token_id: int) -> Contents:
    """Take a request apart.

    Args:
        request: The request.
        image_token_id: Marks a slot.

    Raises:
        RequestError: If it brings features: they are made here.
    """
    given = request.increments
    if isinstance(request.prompt, Example):
        example = request.prompt
        given = example.increments or None if given is None else given
        ids, tiles, counts = example.input_ids, example.tiles, example.tiles_per_image
    else:
        ids, tiles, counts = _of_parts(request, image_token_id)
    return Contents(
        np.ascontiguousarray(ids, dtype=np.int64),
        np.ascontiguousarray(tiles),
        tuple(counts),
        given if given is None or isinstance(given, int | float) else tuple(given),
    )


def _of_parts(
    request: Request, image_token_id: int
) -> tuple[Int[np.ndarray, " slots"], UInt8[np.ndarray, "tiles px px 3"], tuple[int, ...]]:
    ids: list[int] = []
    pictures: list[UInt8[np.ndarray, "tiles px px 3"]] = []
    assert not isinstance(request.prompt, Example)
    for part in request.prompt:
        if isinstance(part, TextIds):
            ids += part.ids
        elif isinstance(part, ImageTiles):
            ids.append(image_token_id)
            pictures.append(part.tiles)
        else:
            raise RequestError("the request brings features, but they are made by the server")
    tiles = np.concatenate(pictures) if pictures else np.empty((0, 1, 1, 3), dtype=np.uint8)
    return np.array(ids, dtype=np.int64), tiles, tuple(map(len, pictures))


def asked_of_router(budget: VisualBudget) -> float | Thresholds:
    """A budget on its way to the router: the share to be kept, or thresholds.

    Args:
        budget: Of a request whose tiles are not settled without the router.
    """
    assert not isinstance(budget, str), "a budget without a choice is settled"
    return budget.share if isinstance(budget, KeepShare) else budget


@dataclass(slots=True, eq=False)
class _Said:
    """What one of the answers has said.

    Attributes:
        tokens: That were handed on.
        again: How many of them have come again after a new beginning.
        is_over: Whether it has ended.
    """

    tokens: list[TokenOutput] = field(default_factory=list)
    again: int = 0
    is_over: bool = False


@dataclass(slots=True, eq=False)
class Journey:
    """A request on its way.

    Attributes:
        number: Its number on the wire.
        request: What is asked.
        prompt: The same, with the keys of its tiles.
        contents: What of it travels.
        outputs: What has come, for whoever asked.
        language: Who answers it.
        vision: Who encodes its tiles, until the language server has their features.
        awaits_features: Whether the language server waits for them.
        num_deaths: Servers that died with it.
        since: Since when it waits for a server.
    """

    number: int
    request: Request
    prompt: Prompt
    contents: Contents
    outputs: asyncio.Queue[Output | CascadeVLError] = field(default_factory=asyncio.Queue)
    language: Server | None = None
    vision: Server | None = None
    awaits_features: bool = False
    num_deaths: int = 0
    since: float = field(default_factory=time.monotonic)
    _said: dict[int, _Said] = field(default_factory=dict)

    @property
    def waits(self) -> bool:
        """Whether it waits for a server to come."""
        return self.language is None or (self.awaits_features and self.vision is None)

    def begin_again(self) -> None:
        """Its answers begin anew, with another language server; nothing is handed on twice."""
        self.language = self.vision = None
        self.awaits_features = False
        self.since = time.monotonic()
        for said in self._said.values():
            said.again = 0

    def hand_on(self, outputs: Sequence[Output]) -> None:
        """Hand on what is new.

        An answer that begins anew draws the same numbers; where rounding still makes it another
        one, what was handed on cannot be continued, and the request ends with an error.
        """
        for output in outputs:
            said = self._said.setdefault(output.sample, _Said())
            if said.is_over:
                continue
            if isinstance(output, Completion):
                said.is_over = True
                self.outputs.put_nowait(output)
            elif said.again < len(said.tokens):
                if _differ(said.tokens[said.again], output):
                    self.outputs.put_nowait(_other_answer(said))
                    return
                said.again += 1
            else:
                said.tokens.append(replace(output, logprobs=None))
                said.again += 1
                self.outputs.put_nowait(output)


def _differ(one: TokenOutput, other: TokenOutput) -> bool:
    return (one.token_id, one.text, one.finish_reason) != (
        other.token_id,
        other.text,
        other.finish_reason,
    )


def _other_answer(said: _Said) -> ServerError:
    return ServerError(
        f"the language server was lost after {len(said.tokens)} tokens, and another one says "
        f"something else there; ask again"
    )
