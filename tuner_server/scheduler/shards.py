"""The shards of a server: taken in, written to the journal, leased to, watched, closed.

A shard has partitions while it has leases, as a job has them while it runs; without leases it leaves them to the jobs
and shards that wait. Jobs at its share wait for the end of its leases, and its leases for the end of such jobs.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections import Counter
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass

from tuner_core.errors import ConflictError, NotFoundError, TunerError, UnavailableError, UsageError
from tuner_core.model import FailureKind, JobState, target_digest
from tuner_core.proto.tuner.v1 import leases_pb2, tuning_pb2
from tuner_core.store.interface import RecordStore
from tuner_server.engine import Engine
from tuner_server.scheduler import messages as m
from tuner_server.scheduler import shard_messages as sm
from tuner_server.scheduler.committer import Committer
from tuner_server.scheduler.job import Job
from tuner_server.scheduler.journal import JobJournal
from tuner_server.scheduler.report import JobFacts, queued_status
from tuner_server.scheduler.shard_run import ShardRun
from tuner_server.scheduler.validation import validate_spec

log = logging.getLogger(__name__)

IDLE_S = 600.0
"""A shard that nobody leases to or listens to for so long lets go of its searches."""
MIND_INTERVAL_S = 30.0
MIN_LEASE_S, MAX_LEASE_S = 0.5, 3600.0
_JOB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class Opened:
    """A shard as its client finds it; see ``OpenShardResponse``."""

    incarnation: str
    workers: int
    batch: int
    in_flight: int


class ShardSupervisor:
    """Keeps the server's part of sharded jobs.

    Args:
        jobs: All jobs of the server by id; shards are among them.
        engine: Where partitions come from.
        store: The record store.
        journal: Where shards and their tokens survive a restart.
        instance: Name of this server instance.

    Attributes:
        draining: Leases have ended, and no more are taken.
        trials_measured: By shards that are not at work any more.
    """

    def __init__(
        self, jobs: dict[str, Job], engine: Engine, store: RecordStore, journal: JobJournal, instance: str
    ) -> None:
        self._jobs = jobs
        self._engine = engine
        self._store = store
        self._journal = journal
        self._instance = instance
        self._committer: Committer | None = None
        self._minder: asyncio.Task[None] | None = None
        self._changing = asyncio.Lock()
        self._writes: set[asyncio.Task[None]] = set()
        self._models: set[asyncio.Task[m.ModelMeasured]] = set()
        self.draining = False
        self.trials_measured = 0

    # Life

    def start(self) -> None:
        """Begin to take shards in."""
        self._committer = Committer(self._store)
        self._minder = asyncio.create_task(self._mind())

    def restore(self, job: Job) -> None:
        """Take up a shard from the journal: its leases are gone, its tokens and records are not."""
        log.info("%s: this part of it waits for its client", job.facts.job)
        self._begin(job)

    async def stop(self) -> None:
        """End all work, with everything measured stored, the clients told, and the journal written."""
        if self._minder is not None:
            self._minder.cancel()
            await asyncio.gather(self._minder, return_exceptions=True)
        gone = UnavailableError("this instance is stopping; what was measured is stored")
        async with self._changing:
            for job in list(self._jobs.values()):
                if isinstance(job.run, ShardRun):
                    await self._retire(
                        job, JobState.STOPPED, "stopped; it goes on when its client asks", "draining", gone
                    )
        if self._committer is not None:
            await self._committer.stop()

    def drain(self) -> None:
        """End all leases as soon as what is being measured is done, and take no more."""
        self.draining = True
        for job in self._jobs.values():
            if isinstance(job.run, ShardRun):
                job.run.handle(sm.AllRevoked("draining"))

    async def _mind(self) -> None:
        """Send shards to rest whose client has gone."""
        while True:
            await asyncio.sleep(MIND_INTERVAL_S)
            async with self._changing:
                for job in list(self._jobs.values()):
                    if isinstance(job.run, ShardRun) and job.run.idle_for_s() > IDLE_S:
                        text = "its client has gone; it goes on when that comes back"
                        await self._retire(job, JobState.STOPPED, text, "expired", UnavailableError(text))

    # Requests

    async def open(self, job_id: str, spec: tuning_pb2.JobSpec, lease_s: float) -> Opened:
        """Take a shard in, or find it as it is.

        Raises:
            UsageError: The request is malformed or asks for the impossible.
            ConflictError: Target or share are not on offer, the id is another job's, the job was cancelled here, or
                the instance is draining and does not know it.
        """
        if not _JOB_ID.fullmatch(job_id):
            raise UsageError(f"{job_id!r} is no job id: letters, digits, dots, dashes and underscores, 100 at most")
        if not MIN_LEASE_S <= lease_s <= MAX_LEASE_S:
            raise UsageError(f"lease_s is {lease_s:g}, but must be {MIN_LEASE_S:g} to {MAX_LEASE_S:g}")
        async with self._changing:
            job = self._jobs.get(job_id)
            if job is None:
                job = await self._take_in(job_id, spec, lease_s)
            else:
                _check_same(job, spec)
                if job.state is JobState.CANCELLED:
                    raise _cancelled(job_id)
                await self._engine.start()
            if job.lease_s != lease_s:
                job.lease_s = lease_s
                await asyncio.to_thread(self._journal.mark_shard, job_id, lease_s)
            run = job.run if isinstance(job.run, ShardRun) else self._begin(job)
            run.machine.lease_s = lease_s
            offer = await self._engine.offer(job.facts.spec.sm_percent, job.facts.spec.target_json)
            limits = self._engine.limits
            return Opened(
                run.events.incarnation, offer.workers, limits.batch, in_flight=limits.batch * limits.batches_at_once
            )

    async def _take_in(self, job_id: str, spec: tuning_pb2.JobSpec, lease_s: float) -> Job:
        if self.draining:
            raise ConflictError("this instance is draining and takes no more jobs; use another")
        validate_spec(spec)
        if len({task.name for task in spec.tasks}) < len(spec.tasks):
            raise UsageError("two tasks of the job have the same name")
        await self._engine.start()
        spec.target_json = (await self._engine.offer(spec.sm_percent, spec.target_json)).target_json
        facts = JobFacts(job_id, spec, time.time(), self._instance)
        job = Job(facts, queued_status(facts), lease_s=lease_s)
        await asyncio.to_thread(self._journal.mark_shard, job_id, lease_s)
        await asyncio.to_thread(self._journal.add, job_id, spec, job.status)
        self._jobs[job_id] = job
        log.info("%s: a part of %s, %d tasks, %d %%", job_id, spec.model, len(spec.tasks), spec.sm_percent)
        return job

    async def grant(self, job_id: str, lease: leases_pb2.Lease) -> None:
        """Start a lease or extend it.

        Raises:
            NotFoundError: There is no such shard or task here.
            UsageError, ConflictError: See :meth:`ShardMachine.check`.
        """
        run = self._find(job_id)
        index = _index(run, lease.task)
        if run.machine.check(index, lease.token, lease.trials):
            await asyncio.to_thread(self._journal.note_token, job_id, lease.task, lease.token)
            self._jobs[job_id].tokens[lease.task] = lease.token
            run = self._find(job_id)  # it may have ended meanwhile
        run.grant(index, lease)

    def renew(self, job_id: str, leases: Sequence[tuple[str, int]]) -> list[str]:
        """Move deadlines.

        Returns:
            Tasks whose lease is not held here.

        Raises:
            NotFoundError, ConflictError: There is no such shard, or it was cancelled.
        """
        run = self._find(job_id)
        names = {task.name: index for index, task in enumerate(run.facts.spec.tasks)}
        lost = run.renew([(names[task], token) for task, token in leases if task in names])
        return [run.facts.spec.tasks[index].name for index in lost] + [task for task, _ in leases if task not in names]

    def revoke(self, job_id: str, task: str, token: int) -> None:
        """End a lease early; one that is not held is no matter.

        Raises:
            NotFoundError, ConflictError: There is no such shard or task, or it was cancelled.
        """
        run = self._find(job_id)
        run.handle(sm.LeaseRevoked(_index(run, task), token))

    async def measure_model(self, job_id: str, trial_ids: Mapping[str, str]) -> m.ModelMeasured:
        """Measure the whole model with the records' schedules.

        Raises:
            NotFoundError: There is no such shard, task or record.
            UsageError: A record is not one of its task, or failed.
            TunerError: There are no partitions, or the shard ends meanwhile.
        """
        run = self._find(job_id)
        traces = {_index(run, task): await self._trace(run, task, trial_id) for task, trial_id in trial_ids.items()}
        work = asyncio.create_task(run.measure_model(traces))  # which is not cancelled when the caller goes away
        self._models.add(work)
        work.add_done_callback(self._model_done)
        return await asyncio.shield(work)

    def _model_done(self, work: asyncio.Task[m.ModelMeasured]) -> None:
        self._models.discard(work)
        if not work.cancelled():
            work.exception()  # it is known, even when nobody waits for it any more

    async def _trace(self, run: ShardRun, task: str, trial_id: str) -> str:
        record = await asyncio.to_thread(self._store.get, trial_id)
        if record is None:
            raise NotFoundError(f"record {trial_id} of {task} is not in this instance's store; import it first")
        spec = run.facts.spec
        digest = spec.tasks[_index(run, task)].workload.digest
        if record.workload_digest != digest or record.target_digest != target_digest(spec.target_json):
            raise UsageError(f"record {trial_id} is not one of {task} for this target")
        if not record.valid:
            raise UsageError(f"record {trial_id} of {task} is that of a failed trial")
        return record.trace

    def watch(
        self, job_id: str, after: int, incarnation: str, heartbeat_s: float
    ) -> AsyncGenerator[leases_pb2.WatchShardResponse, None]:
        """Events of a shard, see :meth:`EventLog.follow`.

        Raises:
            NotFoundError, ConflictError: There is no such shard, or it was cancelled.
        """
        if not heartbeat_s > 0:
            raise UsageError(f"heartbeat_s is {heartbeat_s:g}, but must be over 0")
        return self._find(job_id).events.follow(after, incarnation, heartbeat_s)

    async def close(self, job_id: str) -> None:
        """End a shard; one that has ended is left as it is.

        Raises:
            NotFoundError: There is no such shard.
        """
        async with self._changing:
            job = self._shard(job_id)
            if isinstance(job.run, ShardRun):
                await self._retire(job, JobState.DONE, "", "revoked", None, job_over=True)
            elif job.state is JobState.STOPPED:
                job.set_state(JobState.DONE, "")
                await job.write(self._journal)

    async def cancel(self, job: Job) -> None:
        """End a shard for good: its client is refused until someone resumes it."""
        async with self._changing:
            if isinstance(job.run, ShardRun):
                await self._retire(job, JobState.CANCELLED, "cancelled", "revoked", _cancelled(job.facts.job))
            elif not job.state.ended or job.state is JobState.STOPPED:
                job.set_state(JobState.CANCELLED, "cancelled")
                await job.write(self._journal)

    async def resume(self, job: Job) -> None:
        """Let the client of a shard go on with it here."""
        async with self._changing:
            if job.run is None and job.state in (JobState.STOPPED, JobState.CANCELLED):
                self._begin(job)
                await job.write(self._journal)

    # Parts

    def _shard(self, job_id: str) -> Job:
        job = self._jobs.get(job_id)
        if job is None or job.lease_s is None:
            raise NotFoundError(f"there is no part of a job {job_id} on this instance; open it first")
        return job

    def _find(self, job_id: str) -> ShardRun:
        job = self._shard(job_id)
        if isinstance(job.run, ShardRun):
            return job.run
        if job.state is JobState.CANCELLED:
            raise _cancelled(job_id)
        raise NotFoundError(f"the part of job {job_id} on this instance has ended; open it again")

    def _begin(self, job: Job) -> ShardRun:
        assert self._committer is not None and job.lease_s is not None

        def changed(message: str) -> None:
            if message:
                job.messages.append(message)
            job.changed.set()
            if job.due():
                write = asyncio.create_task(job.write(self._journal))
                self._writes.add(write)
                write.add_done_callback(self._writes.discard)

        spec = job.facts.spec
        tokens = {index: job.tokens[task.name] for index, task in enumerate(spec.tasks) if task.name in job.tokens}
        run = ShardRun(
            job.facts, self._engine, self._store, self._committer, job.lease_s, tokens, job.elapsed_s, changed
        )
        run.machine.draining = self.draining
        for progress, before in zip(run.machine.tasks, job.status.tasks, strict=True):
            progress.measured = before.trials
            progress.failures = Counter({FailureKind(kind): count for kind, count in before.failures.items()})
        job.ended.clear()
        job.run = run
        job.set_state(JobState.RUNNING, run.machine.phase)
        return run

    async def _retire(
        self,
        job: Job,
        state: JobState,
        text: str,
        reason: str,
        error: TunerError | None,
        *,
        job_over: bool = False,
    ) -> None:
        run = job.run
        assert isinstance(run, ShardRun)
        await run.stop(reason, error, job_over=job_over)
        await asyncio.gather(*self._writes, return_exceptions=True)
        job.run, job.status, job.elapsed_s = None, run.status, run.elapsed_s
        self.trials_measured += run.trials_measured
        job.set_state(state, text)
        await asyncio.shield(job.write(self._journal))
        job.ended.set()
        log.info("%s: this part of it is %s", job.facts.job, state)


def _index(run: ShardRun, task: str) -> int:
    for index, plan in enumerate(run.facts.spec.tasks):
        if plan.name == task:
            return index
    raise NotFoundError(f"job {run.facts.job} has no task {task}")


def _check_same(job: Job, spec: tuning_pb2.JobSpec) -> None:
    name = job.facts.job
    if job.lease_s is None:
        raise ConflictError(f"{name} is a job of this server's own; choose another id")
    mine = [(task.name, task.workload.digest) for task in job.facts.spec.tasks]
    theirs = [(task.name, task.workload.digest) for task in spec.tasks]
    if mine != theirs or job.facts.spec.sm_percent != spec.sm_percent:
        raise ConflictError(f"{name} has other tasks, or another share, on this instance; choose another id")


def _cancelled(job_id: str) -> ConflictError:
    return ConflictError(f"{job_id} was cancelled on this instance; tuner-client resume {job_id} takes that back")
