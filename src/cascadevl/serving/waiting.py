"""Waiting for several things at once in an event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.requests import Request

from cascadevl.errors import CascadeVLError
from cascadevl.serving.http_errors import ClientGone

Item = TypeVar("Item")


async def unless_gone(request: Request, work: Awaitable[Item]) -> Item:
    """Wait for work, but only as long as the client does; then it is cancelled.

    Args:
        request: Of the client; its body was read.
        work: What it waits for.

    Raises:
        ClientGone: If the client went away before.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        await _stop(task, gone)


async def together(work: Sequence[Awaitable[Item]]) -> list[Item]:
    """All results; the first failure cancels the others.

    Args:
        work: What is waited for.
    """
    tasks = [asyncio.ensure_future(each) for each in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        await _stop(*tasks)


async def merged(
    sources: Sequence[AsyncGenerator[Item, None]],
) -> AsyncGenerator[tuple[int, Item], None]:
    """What several generators give, as it comes, with the number of the generator.

    Args:
        sources: All are closed when this one is, or one of them fails.
    """
    items: asyncio.Queue[tuple[int, Item] | CascadeVLError | None] = asyncio.Queue()

    async def forward(number: int, source: AsyncGenerator[Item, None]) -> None:
        try:
            async with aclosing(source):
                async for item in source:
                    items.put_nowait((number, item))
        except CascadeVLError as error:
            items.put_nowait(error)
        finally:
            items.put_nowait(None)

    tasks = [asyncio.ensure_future(forward(*each)) for each in enumerate(sources)]
    try:
        left = len(tasks)
        while left:
            item = await items.get()
            if isinstance(item, CascadeVLError):
                raise item
            if item is None:
                left -= 1
            else:
                yield item
        await asyncio.gather(*tasks)  # raises what is a bug
    finally:
        await _stop(*tasks)


async def with_signs(work: Awaitable[Item], every_s: float) -> AsyncGenerator[Item | None, None]:
    """A result, and until it is there None again and again.

    Args:
        work: What is waited for; cancelled when this is closed.
        every_s: Time from one None to the next.
    """
    task = asyncio.ensure_future(work)
    try:
        while not (await asyncio.wait({task}, timeout=every_s))[0]:
            yield None
        yield task.result()
    finally:
        await _stop(task)


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _stop(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
