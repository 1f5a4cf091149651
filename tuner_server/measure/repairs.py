"""Brings lost workers back, all at once and in overlapping steps.

The next process of a place is forked, pinned and has loaded its libraries while the one before is still being stopped.
It goes to the device when everything that had to leave the device has left: under MPS a new client may be refused, or
struck by the same fault, until then. What remains in sequence is stopping one worker and creating one context.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from tuner_server.measure.metrics import FleetMetrics
from tuner_server.measure.slot import WorkerSlot
from tuner_server.partitions.interface import PartitionProvider
from tuner_server.processes.handle import Child
from tuner_server.processes.spawner import Spawner

log = logging.getLogger(__name__)

_LEAVE_S = 5.0  # a killed process that the driver does not let go for longer is not waited for
_FIRST_RETRY_S = 0.1
_LONGEST_RETRY_S = 5.0


@dataclass(frozen=True)
class Outcomes:
    """Whom the repairs tell what.

    Attributes:
        filled: A place has a worker again.
        untrusted: A worker could not be stopped gently, so its neighbours' measurements may be spoilt.
        failing: No worker could be started for so many seconds, with the last reason; it goes on trying.
    """

    filled: Callable[[WorkerSlot], None]
    untrusted: Callable[[], None]
    failing: Callable[[Exception, float], None]


class Repairs:
    """The workers of one device that are being replaced.

    Args:
        spawner: Starts the processes.
        provider: Stops workers and prepares the device for new ones.
        metrics: Where restarts are counted.
        outcomes: Whom to tell.
    """

    def __init__(
        self, spawner: Spawner, provider: PartitionProvider, metrics: FleetMetrics, outcomes: Outcomes
    ) -> None:
        self._spawner = spawner
        self._provider = provider
        self._metrics = metrics
        self._outcomes = outcomes
        self._tasks: set[asyncio.Task[None]] = set()
        self._leaving: dict[Child, asyncio.Future[None]] = {}
        self._doomed: set[Child] = set()

    async def fill(self, slot: WorkerSlot) -> None:
        """Start a worker where there has been none.

        Raises:
            TunerError: It does not start, or its share was not granted.
        """
        await self._arrive(slot, await slot.fork(self._spawner))

    def begin(self, slot: WorkerSlot, *, void: bool) -> None:
        """Replace the worker of a place, in the background.

        Args:
            slot: The place; it takes no requests from now on.
            void: Every measurement on the device is void already: there is nobody to be gentle for.
        """
        child, slot.child = slot.child, None
        slot.state = "starting"
        task = asyncio.create_task(self._bring_back(slot, child, void))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def void(self, arriving: Iterable[Child]) -> None:
        """Everything on the device is void: workers that are being stopped gently are killed instead.

        Args:
            arriving: Workers on their way to the device: they would be struck too, or wait for ever.
        """
        for child in list(self._leaving):
            self._doomed.add(child)
            child.kill()
        for child in arriving:
            child.kill()
            self._leaves(child)
            child.exited.add_done_callback(functools.partial(self._left, child))

    def _leaves(self, child: Child) -> None:
        self._leaving.setdefault(child, asyncio.get_running_loop().create_future())

    def _left(self, child: Child, _exit: asyncio.Future[int | None] | None = None) -> None:
        left = self._leaving.pop(child, None)
        if left is not None:
            left.set_result(None)
        self._doomed.discard(child)

    async def cancel(self) -> None:
        """Give up; no process is left behind."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _bring_back(self, slot: WorkerSlot, child: Child | None, void: bool) -> None:
        began, delay_s = time.monotonic(), _FIRST_RETRY_S
        forking = asyncio.create_task(slot.fork(self._spawner))
        try:
            if child is not None:
                await self._stop(child, void)
                stopped_s = time.monotonic() - began
            while True:
                try:
                    prompt = delay_s == _FIRST_RETRY_S and self._provider.faults_spread
                    await self._arrive(slot, await forking, prompt=prompt)
                    break
                except Exception as error:  # whatever it is, the capacity has to come back
                    slot.state = "lost"
                    log.warning("%s; trying again in %.1f s", error, delay_s)
                    self._outcomes.failing(error, time.monotonic() - began)
                forking = asyncio.create_task(slot.fork(self._spawner))
                await asyncio.sleep(delay_s)
                delay_s = min(2 * delay_s, _LONGEST_RETRY_S)
        finally:
            if not forking.done():
                forking.cancel()
            elif not forking.cancelled() and forking.exception() is None and forking.result() is not slot.child:
                forking.result().kill()
        self._metrics.restarted()
        log.info(
            "%s is back after %.2f s%s",
            slot.name,
            time.monotonic() - began,
            f", {stopped_s:.2f} s of them to stop the one before" if child is not None else "",
        )

    async def _stop(self, child: Child, void: bool) -> None:
        self._leaves(child)
        try:
            if void and self._provider.faults_spread:
                child.kill()
                await asyncio.wait({child.exited}, timeout=_LEAVE_S)
                return
            untouched = await self._provider.stop_worker(child)
            if not untouched and self._provider.faults_spread and child not in self._doomed:
                self._outcomes.untrusted()
        except asyncio.CancelledError:
            child.kill()
            raise
        finally:
            self._left(child)

    async def _arrive(self, slot: WorkerSlot, child: Child, *, prompt: bool = False) -> None:
        """Let a forked process become the worker of its place."""
        try:
            while self._leaving:
                left, _ = await asyncio.wait(list(self._leaving.values()), timeout=_LEAVE_S)
                if not left:
                    log.warning("processes do not leave the device: %s", [other.pid for other in self._leaving])
                    break
            await self._provider.prepare_worker(slot.partition)
        except BaseException:
            child.kill()
            raise
        await slot.occupy(child, self._provider, prompt=prompt)
        self._outcomes.filled(slot)
