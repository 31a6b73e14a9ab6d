"""What a thread makes, as an asynchronous iterator."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Executor
from typing import TypeVar

Item = TypeVar("Item")


async def from_thread(
    produce: Callable[[Callable[[Item], None], threading.Event], None],
    executor: Executor | None = None,
) -> AsyncGenerator[Item, None]:
    """Run a function in a thread and give what it emits, as it comes.

    Args:
        produce: Calls its first argument with every item; should return soon after its second is
            set, which happens when nobody waits for more. What it raises is raised here.
        executor: Has the thread; None for the event loop's own, which has few.
    """
    loop = asyncio.get_running_loop()
    items: asyncio.Queue[Item | None] = asyncio.Queue()
    stop = threading.Event()

    def emit(item: Item) -> None:
        loop.call_soon_threadsafe(items.put_nowait, item)

    done = loop.run_in_executor(executor, produce, emit, stop)

    def end(_: object) -> None:
        items.put_nowait(None)
        if stop.is_set() and not done.cancelled():
            done.exception()  # nobody waits for it any more

    done.add_done_callback(end)
    try:
        while (item := await items.get()) is not None:
            yield item
        await done
    finally:
        stop.set()
