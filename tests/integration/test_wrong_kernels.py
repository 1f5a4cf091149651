"""A kernel that computes the wrong thing is recorded as such and never published.

Real processes, real TVM, a real store; only the builds are sabotaged: they apply every schedule to a workload that adds
another constant.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from tests.integration.small_workloads import matmul
from tuner_core.model import FailureKind, JobState, RecordKey, TaskState, Workload
from tuner_core.proto.tuner.v1 import tuning_pb2
from tuner_core.store.interface import RecordFilter
from tuner_core.store.open import open_store
from tuner_core.store.wire import workload_to_message
from tuner_server.build.pool import Artifact, BuildPool, FallbackBuild
from tuner_server.config import DeviceSettings, ServerConfig
from tuner_server.engine import Engine
from tuner_server.scheduler.committer import Committer
from tuner_server.scheduler.driver import JobRun
from tuner_server.scheduler.report import JobFacts

TRIALS = 12


class SabotagedEngine(Engine):
    """Builds ``a @ b + 1.5`` whenever ``a @ b + 1`` is asked for."""

    @property
    def build(self) -> BuildPool:
        pool = super().build
        if not isinstance(pool, SabotagedBuilds):
            pool.__class__ = SabotagedBuilds
        return pool


class SabotagedBuilds(BuildPool):
    async def build(self, workload: Workload, trace: str, target_json: str) -> Artifact:
        return await super().build(matmul(addend=1.5), trace, target_json)

    async def fallback(self, workload: Workload, target_json: str) -> FallbackBuild:
        return await super().fallback(matmul(addend=1.5), target_json)


def test_wrong_kernels_are_recorded_one_by_one_and_none_is_published(tmp_path: Path) -> None:
    workload = matmul()
    store = open_store(f"sqlite:///{tmp_path / 'records.sqlite'}")

    async def tune() -> tuple[tuning_pb2.JobStatus, RecordKey]:
        engine = SabotagedEngine(ServerConfig(data_dir=tmp_path, devices=(DeviceSettings("cpu"),)))
        spec = tuning_pb2.JobSpec(model="m", sm_percent=100, trials=TRIALS)
        spec.tasks.add(name="dense", workload=workload_to_message(workload), weight=1, tunable=True)
        committer = Committer(store)
        try:
            async with engine.lane(100) as lane:
                run = JobRun(JobFacts("job-1", spec, time.time(), "here"), lane, store, committer, 0.0, lambda _: None)
                assert await run.run() is JobState.FAILED
                key = RecordKey(workload.digest, lane.target_digest, lane.device.model, lane.sm_count)
                return run.status, key
        finally:
            await committer.stop()
            await engine.stop()

    status, key = asyncio.run(tune())
    (task,) = status.tasks
    records = store.query(RecordFilter(job="job-1", include_failed=True), limit=1000).records
    wrong = {record.trace for record in records if record.failure is FailureKind.WRONG_RESULT}
    measured = {record.trace for record in records if not record.verified}
    promoted = min(8, task.trials - (task.failed - len(wrong))) + 1  # the best, and the fallback
    assert len(wrong) == promoted == task.failures["wrong_result"]
    assert wrong <= measured  # every trial stays on record
    assert task.state == TaskState.FAILED and not task.verified and task.error
    assert store.top(key, 100, verified_only=True) == []
    assert not wrong & {record.trace for record in store.top(key, 100)}
    store.close()
