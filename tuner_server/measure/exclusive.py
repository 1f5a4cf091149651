"""One turn alone on a device: nothing else runs meanwhile, and the others' wait for it is bounded and counted."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection
from typing import Any

from tuner_server.measure.metrics import FleetMetrics
from tuner_server.measure.slot import WorkerSlot
from tuner_server.measure.turns import Turns


class ExclusiveTurn:
    """The device alone, between :meth:`begin` and :meth:`end`.

    Args:
        turns: The queue for the device.
        requests: What runs in this turn, looked at when it ends.
        others_wait: Whether there are other workers, which stand idle meanwhile.
        metrics: Where pauses are counted.
        bound_s: See :meth:`breathe`.
    """

    def __init__(
        self,
        turns: Turns[WorkerSlot],
        requests: Callable[[], Collection[asyncio.Task[Any]]],
        others_wait: bool,
        metrics: FleetMetrics,
        bound_s: float,
    ) -> None:
        self._turns = turns
        self._requests = requests
        self._others_wait = others_wait
        self._metrics = metrics
        self._bound_s = bound_s
        self._since: float | None = None

    async def begin(self, *, first: bool = False) -> None:
        """Wait until nothing else runs on the device.

        Args:
            first: Before all others that wait.
        """
        self._since = await self._turns.begin_alone(first=first)

    def end(self) -> None:
        """Let the others go on: at once, or when a request of a cancelled caller has left the device."""
        since, self._since = self._since, None
        if since is None:
            return
        left = [task for task in self._requests() if not task.done()]
        if left:
            ending = asyncio.ensure_future(asyncio.wait(left))
            ending.add_done_callback(lambda _: self._release(since))
        else:
            self._release(since)

    def _release(self, since: float) -> None:
        if self._others_wait:
            self._metrics.paused(time.monotonic() - since)
        self._turns.end_alone()

    async def breathe(self, next_s: float) -> None:
        """Before a request: let those who wait have their turn first, if the pause could become too long.

        No pause is longer than ``bound_s``, or twice ``next_s`` if that is more: once for the requests that were
        running when it began, once for one of its own. Only the loss of a worker adds to that.

        Args:
            next_s: Deadline of the request that comes next.
        """
        if self._since is None or time.monotonic() - self._since + next_s <= max(self._bound_s, 2 * next_s):
            return
        self.end()
        await self.begin()
