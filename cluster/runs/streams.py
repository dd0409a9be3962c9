"""Asynchronous streams that end cleanly: several as one, and one that ends when its client leaves."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, MutableMapping, Sequence
from contextlib import aclosing
from typing import Any, Protocol, TypeVar

from twotower.errors import Cancelled

Item = TypeVar("Item")
Produced = TypeVar("Produced", covariant=True)


class Stream(Protocol[Produced]):
    """Items, until it ends or is closed."""

    def __aiter__(self) -> AsyncIterator[Produced]: ...

    async def aclose(self) -> None: ...


async def merged(streams: Sequence[Stream[Item]], at_once: int | None = None) -> AsyncGenerator[tuple[int, Item], None]:
    """Items of all streams as they come, each with its stream's index. The first error ends them all.

    One stream is read in place; several run in tasks of their own, no more than `at_once` at a time, in their order.
    """
    if len(streams) == 1:
        async with aclosing(streams[0]) as only:
            async for item in only:
                yield 0, item
        return
    turns = asyncio.Semaphore(at_once or max(1, len(streams)))
    queue: asyncio.Queue[tuple[int, Item] | Exception | None] = asyncio.Queue()

    async def pump(index: int, stream: Stream[Item]) -> None:
        try:
            async with turns, aclosing(stream):
                async for item in stream:
                    queue.put_nowait((index, item))
            queue.put_nowait(None)
        except Exception as error:
            queue.put_nowait(error)

    pumps = [asyncio.create_task(pump(index, stream)) for index, stream in enumerate(streams)]
    try:
        running = len(pumps)
        while running:
            got = await queue.get()
            if isinstance(got, Exception):
                raise got
            if got is None:
                running -= 1
            else:
                yield got
    finally:
        await _end(pumps)


async def drained(items: AsyncGenerator[Item, None]) -> None:
    """Reads them to their end."""
    async with aclosing(items):
        async for _ in items:
            pass


async def until_disconnect(
    receive: Callable[[], Awaitable[MutableMapping[str, Any]]], work: Coroutine[Any, Any, Item]
) -> Item:
    """The result of `work`, unless the HTTP client leaves first: then it is cancelled and Cancelled raised."""
    working, leaving = asyncio.create_task(work), asyncio.create_task(_disconnect(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise Cancelled("the client has disconnected")
    finally:
        await _end([working, leaving])


async def _disconnect(receive: Callable[[], Awaitable[MutableMapping[str, Any]]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(tasks: Sequence[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
