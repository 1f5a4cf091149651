"""Who is on the device with whom, and from when on no neighbour's fault can spoil a measurement any more."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

SETTLE_S = 0.5
"""Where faults spread: a faulting MPS client took its neighbours along within 0.3 s when tried."""


class Activity:
    """A request on the device, from its beginning until its answer counts.

    Attributes:
        neighbours: Most other requests on the device at the same time.
        void: A neighbour's fault spoilt it.
    """

    def __init__(self) -> None:
        self.neighbours = 0
        self.void = False
        self._unsure_of: set[Activity] = set()
        self._answered = False
        self._over = asyncio.Event()

    async def over(self) -> None:
        """Wait until it counts, or is void. For one that was answered."""
        await self._over.wait()

    def _hears_of(self, neighbour: Activity) -> None:
        self._unsure_of.discard(neighbour)
        if self._answered and (self.void or not self._unsure_of):
            self._over.set()


class Neighbours:
    """All activities of one device.

    A fault stops what is on the device at that time. So an answer counts when everything that ran beside it has been
    answered, too, or else :data:`SETTLE_S` after it came: what ended otherwise may have hurt the context of all, and
    what still runs may be about to say so.
    """

    def __init__(self) -> None:
        self._running: set[Activity] = set()
        self._settling: set[Activity] = set()

    @contextlib.contextmanager
    def activity(self) -> Iterator[Activity]:
        """One more is on the device, until the end of the block: answered, or lost where an exception ends it."""
        activity = self._begin()
        try:
            yield activity
        finally:
            self._running.discard(activity)
        self._answered(activity)

    def spoil(self) -> int:
        """A fault: all that run or have not settled are void.

        Returns:
            How many.
        """
        spoilt = [one for one in (*self._running, *self._settling) if not one.void]
        for one in spoilt:
            one.void = True
        for one in self._settling:
            one._over.set()
        self._settling.clear()
        return len(spoilt)

    def _begin(self) -> Activity:
        activity = Activity()
        activity._unsure_of.update(self._running)
        for other in self._running:
            other._unsure_of.add(activity)
        self._running.add(activity)
        for one in self._running:
            one.neighbours = max(one.neighbours, len(self._running) - 1)
        return activity

    def _answered(self, activity: Activity) -> None:
        activity._answered = True
        self._settling.add(activity)
        for one in (*self._running, *self._settling):
            one._hears_of(activity)
        self._settling = {one for one in self._settling if not one._over.is_set()}
        if activity in self._settling:
            asyncio.get_running_loop().call_later(SETTLE_S, self._settle, activity)

    def _settle(self, activity: Activity) -> None:
        activity._over.set()
        self._settling.discard(activity)
