"""Group commits: trials finish one by one, a durable commit costs a disk flush, so those that wait share one."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from tuner_core.model import Record, Workload
from tuner_core.store.interface import RecordStore
from tuner_server import timeline


class Committer:
    """Stores records in the order in which they come, as many at a time as are waiting.

    Args:
        store: Where they go; its calls run in a thread.
    """

    def __init__(self, store: RecordStore) -> None:
        self._store = store
        self._waiting: list[tuple[Record, asyncio.Future[None]]] = []
        self._wake = asyncio.Event()
        self._stopping = False
        self._task = asyncio.create_task(self._run())

    async def commit(self, record: Record) -> None:
        """Return when the record is durable.

        Raises:
            StoreError, UnavailableError: The store refused; nothing was stored.
        """
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((record, done))
        self._wake.set()
        await asyncio.shield(done)

    async def add_workloads(self, workloads: Iterable[Workload]) -> None:
        """Store workloads, so that records may refer to them."""
        await asyncio.to_thread(self._store.commit, [], list(workloads))

    async def _run(self) -> None:
        while self._waiting or not self._stopping:
            await self._wake.wait()
            self._wake.clear()
            batch, self._waiting = self._waiting, []
            if not batch:
                continue
            try:
                with timeline.slice("commit", "store", f"{len(batch)} records"):
                    await asyncio.to_thread(self._store.commit, [record for record, _ in batch])
            except Exception as error:
                for _, done in batch:
                    if not done.done():
                        done.set_exception(error)
            else:
                for _, done in batch:
                    if not done.done():
                        done.set_result(None)

    async def stop(self) -> None:
        """Store what waits, then end."""
        self._stopping = True
        self._wake.set()
        await self._task
