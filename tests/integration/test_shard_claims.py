"""Two sharded jobs on one real instance: the operator that one of them tunes, the other takes over."""

from __future__ import annotations

import asyncio
from pathlib import Path

from tests.integration.small_workloads import matmul
from tests.integration.test_shard_troubles import Listener
from tuner_core.model import target_digest
from tuner_core.proto.tuner.v1 import leases_pb2, tuning_pb2
from tuner_core.store.interface import RecordFilter
from tuner_core.store.sqlite import SqliteStore
from tuner_core.store.wire import workload_to_message
from tuner_server.config import DeviceSettings, ServerConfig
from tuner_server.engine import Engine
from tuner_server.scheduler.job import Job
from tuner_server.scheduler.journal import JobJournal
from tuner_server.scheduler.shards import ShardSupervisor


def test_a_lease_waits_for_the_other_job_s_claim_and_ends_with_what_that_has_published(tmp_path: Path) -> None:
    asyncio.run(_two_jobs(tmp_path))


async def _two_jobs(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "records.sqlite")
    engine = Engine(ServerConfig(data_dir=tmp_path, devices=(DeviceSettings("cpu"),)))
    journal, jobs = JobJournal(tmp_path / "jobs.sqlite"), dict[str, Job]()
    supervisor = ShardSupervisor(jobs, engine, store, journal, "here")
    supervisor.start()
    listeners = {}
    try:
        for job in ("job-1", "job-2"):
            spec = tuning_pb2.JobSpec(model="m", sm_percent=100, trials=100)
            spec.tasks.add(name="dense", workload=workload_to_message(matmul(32)), weight=1, tunable=True)
            await supervisor.open(job, spec, 60.0)
            listeners[job] = Listener(supervisor, job)

        async def lease(job: str, token: int, trials: int, **more: bool) -> leases_pb2.LeaseEnded:
            await supervisor.grant(job, leases_pb2.Lease(task="dense", token=token, trials=trials, claim=True, **more))
            return await listeners[job].ended(token)

        assert (await lease("job-1", 1, 4)).reason == "measured"
        ended = await lease("job-2", 1, 4)
        assert (ended.reason, ended.holder, ended.measured) == ("held", "job-1", 0)
        ended = await lease("job-2", 2, 4, take_over=True)
        assert ended.reason == "held"  # between two leases the operator is still the other job's
        published = await lease("job-1", 2, 0, conclude=True)
        assert published.reason == "concluded" and published.verified
        taken = await lease("job-2", 3, 4, take_over=True)
        assert (taken.reason, taken.verified, taken.reused) == ("published", True, 4)
        assert (taken.best_trial_id, taken.best_latency_us) == (published.best_trial_id, published.best_latency_us)
        assert taken.baseline_latency_us > 0
        assert (await lease("job-1", 3, 4)).reason == "measured"  # neither keeps the other out after its end
        await supervisor.close("job-1")
        assert (await lease("job-2", 4, 4)).reason == "measured"
        await supervisor.close("job-2")
    finally:
        for listener in listeners.values():
            await listener.stop()
        await supervisor.stop()
        await engine.stop()
        journal.close()
    records = store.query(RecordFilter(include_failed=True), limit=1000).records
    assert {record.target_digest for record in records} == {target_digest(jobs["job-1"].facts.spec.target_json)}
