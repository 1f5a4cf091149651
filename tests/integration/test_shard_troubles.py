"""Shards when something goes wrong on the server: a store that refuses, a client that goes away for good."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pytest

from tests.integration.small_workloads import matmul
from tuner_core.errors import NotFoundError, StoreError
from tuner_core.model import JobState, Record, Workload
from tuner_core.proto.tuner.v1 import leases_pb2, tuning_pb2
from tuner_core.store.interface import CommitResult, RecordFilter
from tuner_core.store.sqlite import SqliteStore
from tuner_core.store.wire import workload_to_message
from tuner_server.config import DeviceSettings, ServerConfig
from tuner_server.engine import Engine
from tuner_server.scheduler import shards
from tuner_server.scheduler.job import Job
from tuner_server.scheduler.journal import JobJournal
from tuner_server.scheduler.shards import ShardSupervisor


class FillingStore(SqliteStore):
    """Has room for so many records; ``room`` may be changed."""

    room = 10**9

    def commit(self, records: Sequence[Record], workloads: Iterable[Workload] = ()) -> CommitResult:
        if len(records) > self.room:
            raise StoreError("the disk is full; make room")
        self.room -= len(records)
        return super().commit(records, workloads)


def test_a_store_that_refuses_ends_leases_as_failed_and_an_absent_client_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asyncio.run(_troubles(tmp_path, monkeypatch))


async def _troubles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "MIND_INTERVAL_S", 0.1)
    store = FillingStore(tmp_path / "records.sqlite")
    engine = Engine(ServerConfig(data_dir=tmp_path, devices=(DeviceSettings("cpu"),)))
    journal, jobs = JobJournal(tmp_path / "jobs.sqlite"), dict[str, Job]()
    spec = tuning_pb2.JobSpec(model="m", sm_percent=100, trials=100)
    spec.tasks.add(name="dense", workload=workload_to_message(matmul()), weight=1, tunable=True)
    supervisor = ShardSupervisor(jobs, engine, store, journal, "here")
    supervisor.start()
    try:
        opened = await supervisor.open("job-1", spec, 60.0)
        listener = Listener(supervisor, "job-1")
        store.room = 6
        await supervisor.grant("job-1", leases_pb2.Lease(task="dense", token=1, trials=40))
        ended = await listener.ended(1)
        assert ended.reason == "failed" and "disk is full" in ended.error
        trials = [event.trial.trial_id for event in listener.told if event.HasField("trial")]
        kept = {record.trial_id for record in store.query(RecordFilter(include_failed=True), limit=100).records}
        assert ended.measured == len(trials) and set(trials) <= kept
        assert engine.search.sessions == 0

        store.room = 10**9
        await supervisor.grant("job-1", leases_pb2.Lease(task="dense", token=2, trials=4))
        ended = await listener.ended(2)
        assert (ended.reason, ended.measured) == ("measured", 4)
        assert engine.search.sessions == 1  # warm

        monkeypatch.setattr(shards, "IDLE_S", 0.3)
        await asyncio.sleep(1.0)
        assert jobs["job-1"].state is JobState.RUNNING  # its client listens
        await listener.stop()
        await _until(lambda: jobs["job-1"].state is JobState.STOPPED)
        assert engine.search.sessions == 0 and "client has gone" in jobs["job-1"].current.error
        with pytest.raises(NotFoundError):
            await supervisor.grant("job-1", leases_pb2.Lease(task="dense", token=3, trials=4))
        monkeypatch.setattr(shards, "IDLE_S", 600.0)
        again = await supervisor.open("job-1", spec, 60.0)
        assert again.incarnation != opened.incarnation
        await supervisor.grant("job-1", leases_pb2.Lease(task="dense", token=3))
    finally:
        await supervisor.stop()
        await engine.stop()
        journal.close()
    assert {entry.job: entry.state for entry in JobJournal(tmp_path / "jobs.sqlite").entries()} == {
        "job-1": JobState.STOPPED
    }


class Listener:
    """Hears what a shard tells its client.

    Attributes:
        told: Everything but heartbeats.
    """

    def __init__(self, supervisor: ShardSupervisor, job: str) -> None:
        self.told: list[leases_pb2.WatchShardResponse] = []
        self._task = asyncio.create_task(self._listen(supervisor, job))

    async def _listen(self, supervisor: ShardSupervisor, job: str) -> None:
        async with contextlib.aclosing(supervisor.watch(job, 0, "", 10.0)) as events:
            async for event in events:
                self.told.append(event)

    async def ended(self, token: int) -> leases_pb2.LeaseEnded:
        """The end of the lease with this token."""

        def found() -> list[leases_pb2.LeaseEnded]:
            return [event.ended for event in self.told if event.HasField("ended") and event.ended.token == token]

        await _until(lambda: bool(found()))
        return found()[0]

    async def stop(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


async def _until(condition: Callable[[], bool], timeout_s: float = 90.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.05)
