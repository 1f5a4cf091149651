"""Every record of a sharded job in one store: followed from each instance, and brought to whoever needs it next."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable

from tuner_client.sharding.link import InstanceLink
from tuner_core.model import Record, Workload
from tuner_core.proto.tuner.v1 import records_pb2
from tuner_core.store import wire
from tuner_core.store.interface import RecordStore

_COMMIT_TIMEOUT_S = 30.0
_COMMIT_RECORDS = 500
_SHARED = ("redis:", "rediss:")


class Gatherer:
    """Keeps the client's store complete while a job runs.

    Args:
        store: Where the records go.
        store_url: Its URL: instances that use the same shared store need no copying.
        job: The job.
    """

    def __init__(self, store: RecordStore, store_url: str, job: str) -> None:
        self._store = store
        self._shared = store_url.split("@")[-1] if store_url.startswith(_SHARED) else ""
        self._filter = records_pb2.RecordFilter(job=job, include_failed=True)
        self._have: set[str] = set()
        self._arrived = asyncio.Event()

    @property
    def gathered(self) -> int:
        """Records that came from instances, or were here before."""
        return len(self._have)

    def shares_store(self, link: InstanceLink) -> bool:
        """Whether the instance writes into the client's own store."""
        return bool(self._shared) and link.facts is not None and link.facts.store.split("@")[-1] == self._shared

    def missing(self, trial_ids: Iterable[str]) -> list[str]:
        """Those that have not been gathered."""
        return [trial_id for trial_id in trial_ids if trial_id not in self._have]

    def note(self, records: Iterable[Record]) -> None:
        """These are in the store already."""
        self._have.update(record.trial_id for record in records)

    async def follow(self, link: InstanceLink) -> None:
        """Copy the job's records from an instance: those that are there, then as they come. Ends by cancellation.

        Raises:
            TunerError: The instance went away.
        """
        if self.shares_store(link):
            return
        await self.catch_up(link)
        request = records_pb2.FollowRecordsRequest(filter=self._filter, after=link.cursor or "")
        async for response in link.connection.stream(link.records.FollowRecords, request):
            await self._take(link, response.records)
            link.cursor = response.cursor

    async def catch_up(self, link: InstanceLink) -> None:
        """Copy what an instance has of the job, unless that was done before.

        Raises:
            TunerError: The instance went away.
        """
        if link.cursor is not None or self.shares_store(link):
            return
        # First a place to go on from, then what is before it: nothing falls between the two, and some comes twice.
        cursor = ""
        first = records_pb2.FollowRecordsRequest(filter=self._filter, wait_s=0.0)
        async for response in link.connection.stream(link.records.FollowRecords, first):
            cursor = response.cursor
            break
        before = records_pb2.StreamRecordsRequest(filter=self._filter, order="newest")
        async for page in link.connection.stream(link.records.StreamRecords, before):
            await self._take(link, page.records)
        link.cursor = cursor

    async def _take(self, link: InstanceLink, messages: Collection[records_pb2.Record]) -> None:
        link.holds.update(message.trial_id for message in messages)
        fresh = [message for message in messages if message.trial_id not in self._have]
        if not fresh:
            return

        def commit() -> None:
            self._store.commit([wire.record_from_message(message) for message in fresh])

        await asyncio.to_thread(commit)
        self._have.update(message.trial_id for message in fresh)
        self._arrived.set()

    async def settled(self, trial_ids: Collection[str], timeout_s: float) -> bool:
        """Wait until these have been gathered; whether that was so in time."""
        deadline = asyncio.get_running_loop().time() + timeout_s
        while self.missing(trial_ids):
            left_s = deadline - asyncio.get_running_loop().time()
            if left_s <= 0:
                return False
            self._arrived.clear()
            try:
                await asyncio.wait_for(self._arrived.wait(), left_s)
            except TimeoutError:
                return not self.missing(trial_ids)
        return True

    async def bring(self, link: InstanceLink, records: Collection[Record], workloads: Collection[Workload]) -> None:
        """Commit records to an instance that does not have them.

        Raises:
            TunerError: It cannot be reached, or refuses.
        """
        if self.shares_store(link):
            return
        wanted = [record for record in records if record.trial_id not in link.holds]
        for start in range(0, len(wanted), _COMMIT_RECORDS):
            part = wanted[start : start + _COMMIT_RECORDS]
            request = records_pb2.CommitRecordsRequest(
                workloads=[wire.workload_to_message(workload) for workload in workloads],
                records=[wire.record_to_message(record) for record in part],
            )
            await link.connection.call(link.records.CommitRecords, request, _COMMIT_TIMEOUT_S)
            link.holds.update(record.trial_id for record in part)
