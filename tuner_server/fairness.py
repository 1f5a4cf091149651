"""Turns on something that several jobs share: the next one goes to who has the fewest at the moment."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter, deque
from collections.abc import AsyncIterator
from contextvars import ContextVar

on_behalf_of: ContextVar[str] = ContextVar("on_behalf_of", default="")
"""Whom the running code works for, e.g. a job's lane. Tasks inherit it, so pools need not be told with every call."""


class FairTurns:
    """A semaphore that is fair between those on whose behalf it is asked, and first come first served for each.

    A job that has hundreds of builds waiting does not keep the next job's first build waiting behind all of them.

    Args:
        count: Turns at the same time.
    """

    def __init__(self, count: int) -> None:
        self._free = count
        self._held: Counter[str] = Counter()
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}

    @contextlib.asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Hold a turn for the length of the block, on behalf of :data:`on_behalf_of`."""
        who = on_behalf_of.get()
        await self._take(who)
        try:
            yield
        finally:
            self._give(who)

    async def _take(self, who: str) -> None:
        granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(who, deque()).append(granted)
        self._dispatch()
        try:
            await granted
        except asyncio.CancelledError:
            if granted.done() and not granted.cancelled():  # granted in the same breath
                self._give(who)
            else:
                self._dispatch()
            raise

    def _give(self, who: str) -> None:
        self._free += 1
        self._held[who] -= 1
        self._dispatch()

    def _dispatch(self) -> None:
        for who, queue in list(self._waiting.items()):
            while queue and queue[0].done():  # cancelled
                queue.popleft()
            if not queue:
                del self._waiting[who]
        while self._free > 0 and self._waiting:
            who = min(self._waiting, key=lambda name: self._held[name])
            queue = self._waiting.pop(who)
            granted = queue.popleft()
            if queue:
                self._waiting[who] = queue  # behind the others who have as few
            if not granted.done():
                self._free -= 1
                self._held[who] += 1
                granted.set_result(None)
