"""One job at a time tunes a task: a job waits for the records of tasks that other jobs have claimed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping

from tuner_core.model import RecordKey
from tuner_core.store.interface import RecordStore
from tuner_server.scheduler.task_claims import TTL_S, TaskClaims

log = logging.getLogger(__name__)

POLL_S = 2.0


class SingleFlight:
    """The claims of one job, renewed while it runs, and those that it waits for.

    Args:
        store: Where the claims are.
        holder: This job, e.g. ``host-a/job-1``: the same after a restart.
        on_taken: Called with a task's index when it waited for another job and is this job's now.
        ttl_s: How long a claim lasts without renewal.
        poll_s: Pause between looks at claims of others.
    """

    def __init__(
        self,
        store: RecordStore,
        holder: str,
        on_taken: Callable[[int], Awaitable[None]],
        *,
        ttl_s: float = TTL_S,
        poll_s: float = POLL_S,
    ) -> None:
        self._claims = TaskClaims(store, holder, ttl_s)
        self._on_taken = on_taken
        self._poll_s = poll_s
        self._waiting: dict[int, RecordKey] = {}
        self._keeper: asyncio.Task[None] | None = None

    async def begin(self, tasks: Mapping[int, RecordKey]) -> dict[int, str]:
        """Claim tasks.

        Args:
            tasks: Index to key.

        Returns:
            Those that another job holds, with its name; they are claimed as soon as it lets go of them.
        """
        held: dict[int, str] = {}
        for index, key in tasks.items():
            if holder := (await self._claims.take(index, key)).holder:
                held[index] = holder
                self._waiting[index] = key
        if self._claims.held or self._waiting:
            self._keeper = asyncio.create_task(self._keep())
        return held

    async def let_go(self, index: int) -> None:
        """Release a task that is finished; one that is not held is left alone."""
        await self._claims.release(index)

    async def stop(self) -> None:
        """Release everything."""
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
        self._waiting.clear()
        await self._claims.release_all()

    async def _keep(self) -> None:
        """Renew what is held and look whether what is awaited has become free, until cancelled."""
        renewed_at = asyncio.get_running_loop().time()
        while True:
            await asyncio.sleep(self._poll_s)
            for index, key in list(self._waiting.items()):
                if not (await self._claims.take(index, key)).holder:
                    del self._waiting[index]
                    await self._on_taken(index)
            now = asyncio.get_running_loop().time()
            if now - renewed_at < self._claims.ttl_s / 3:
                continue
            renewed_at = now
            for index in self._claims.held:
                if not await self._claims.renew(index):
                    holder = self._claims.holder
                    log.warning("%s was overtaken on a task that it had claimed: it was out of reach", holder)
