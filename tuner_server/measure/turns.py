"""Whose turn it is: idle workers for those who wait, first come first served, and the whole device for one alone."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

S = TypeVar("S")


@dataclass(eq=False)
class _Waiter(Generic[S]):
    granted: asyncio.Future[S | None]
    accepts: Callable[[S], bool] | None = None  # None: waits to be alone
    holds_since: float | None = (
        None  # when it began to keep slots from those behind it; only one that waits to be alone
    )
    first: bool = False  # before all others


def _future() -> asyncio.Future[S | None]:
    return asyncio.get_running_loop().create_future()


class Turns(Generic[S]):
    """Idle slots and the queue for them.

    A turn alone begins when every slot that was handed out has come back, and who came after it waits behind it. When
    it ends, those who wait for a slot by then go before the next turn alone: neither kind of turn starves the other,
    and a row of turns alone does not keep the rest waiting for all of them. Every wait may be cancelled.

    Args:
        ready: Whether a slot can be handed out.
    """

    def __init__(self, ready: Callable[[S], bool]) -> None:
        self._ready = ready
        self._idle: list[S] = []
        self._out: list[S] = []
        self._queue: deque[_Waiter[S]] = deque()
        self._queue_alone: deque[_Waiter[S]] = deque()
        self._alone = False
        self._error: Exception | None = None

    @property
    def alone(self) -> bool:
        """Whether someone has the device alone."""
        return self._alone

    def offer(self, slot: S) -> None:
        """A slot is ready to be handed out (once more)."""
        self._error = None
        if slot not in self._idle and slot not in self._out:
            self._idle.append(slot)
        self._dispatch()

    def withdraw(self, slot: S) -> None:
        """An idle slot is not ready any more."""
        if slot in self._idle:
            self._idle.remove(slot)

    def give(self, slot: S) -> None:
        """A slot that was taken comes back; when it is not ready now, :meth:`offer` it later."""
        self._out.remove(slot)
        if self._ready(slot):
            self._idle.append(slot)
        self._dispatch()

    async def take(
        self, accepts: Callable[[S], bool] = lambda _: True, *, within_alone: bool = False, first: bool = False
    ) -> S:
        """Wait for a slot; the caller gives it back.

        Args:
            accepts: Which slots will do.
            within_alone: The caller has the turn alone.
            first: Before all others that wait.

        Raises:
            Exception: What :meth:`fail` was called with.
        """
        slot = await self._wait(self._queue_alone if within_alone else self._queue, _Waiter(_future(), accepts), first)
        assert slot is not None
        return slot

    async def begin_alone(self, *, first: bool = False) -> float:
        """Wait until no slot is handed out; then none is but to the caller, until :meth:`end_alone`.

        Returns:
            The time (``time.monotonic``) since which slots have been kept from others for this.

        Raises:
            Exception: What :meth:`fail` was called with.
        """
        waiter: _Waiter[S] = _Waiter(_future())
        await self._wait(self._queue, waiter, first)
        assert waiter.holds_since is not None
        return waiter.holds_since

    def end_alone(self) -> None:
        """The others may go on: who waits for a slot now, before the next turn alone."""
        self._alone = False
        in_order = sorted(self._queue, key=lambda one: 0 if one.first else 2 if one.accepts is None else 1)  # stable
        self._queue.clear()
        self._queue.extend(in_order)
        self._dispatch()

    def fail(self, error: Exception) -> None:
        """No slot will be offered soon: raise this in all that wait, and at once in new ones, until one is offered."""
        self._error = error
        for queue in (self._queue, self._queue_alone):
            while queue:
                waiter = queue.popleft()
                if not waiter.granted.done():
                    waiter.granted.set_exception(error)

    async def _wait(self, queue: deque[_Waiter[S]], waiter: _Waiter[S], first: bool) -> S | None:
        if self._error is not None:
            raise self._error
        if first:
            waiter.first = True
            queue.appendleft(waiter)
        else:
            queue.append(waiter)
        self._dispatch()
        try:
            return await waiter.granted
        except asyncio.CancelledError:
            if waiter in queue:
                queue.remove(waiter)
                self._dispatch()  # it may have stood before others
            elif waiter.granted.done() and not waiter.granted.cancelled() and waiter.granted.exception() is None:
                slot = waiter.granted.result()  # granted in the same breath
                if slot is None:
                    self.end_alone()
                else:
                    self.give(slot)
            raise

    def _dispatch(self) -> None:
        if self._alone:
            self._hand_out(self._queue_alone)
            return
        self._hand_out(self._queue)
        while self._queue and self._queue[0].granted.done():  # cancelled, its task has not run yet
            self._queue.popleft()
        if not self._queue or self._queue[0].accepts is not None:
            return
        head = self._queue[0]
        if head.holds_since is None:
            head.holds_since = time.monotonic()
        if not self._out:
            self._alone = True
            self._queue.popleft().granted.set_result(None)

    def _hand_out(self, queue: deque[_Waiter[S]]) -> None:
        """Idle slots to those who wait for one, in order, up to the first that waits to be alone."""
        served: list[_Waiter[S]] = []
        for waiter in queue:
            if waiter.granted.done():
                continue
            if not self._idle or waiter.accepts is None:
                break
            slot = next((slot for slot in self._idle if waiter.accepts(slot)), None)
            if slot is not None:
                self._idle.remove(slot)
                self._out.append(slot)
                waiter.granted.set_result(slot)
                served.append(waiter)
        for waiter in served:
            queue.remove(waiter)
