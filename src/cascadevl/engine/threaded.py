"""What a thread makes, as an asynchronous iterator."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from typing import TypeVar

Item = TypeVar("Item")


async def from_thread(
    produce: Callable[[Callable[[Item], None], threading.Event], None],
) -> AsyncIterator[Item]:
    """Run a function in a thread and give what it emits, as it comes.

    Args:
        produce: Calls its first argument with every item; should return soon after its second is
            set, which happens when nobody waits for more. What it raises is raised here.
    """
    loop = asyncio.get_running_loop()
    items: asyncio.Queue[Item | None] = asyncio.Queue()
    stop = threading.Event()

    def emit(item: Item) -> None:
        loop.call_soon_threadsafe(items.put_nowait, item)

    done = asyncio.ensure_future(asyncio.to_thread(produce, emit, stop))
    done.add_done_callback(lambda _: items.put_nowait(None))
    try:
        while (item := await items.get()) is not None:
            yield item
        await done
    finally:
        stop.set()
