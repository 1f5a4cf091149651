"""All jobs of a server: taken in, written to the journal, run in lanes, watched, cancelled, resumed."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator

from tuner_core.errors import ConflictError, NotFoundError, TunerError
from tuner_core.model import JobState
from tuner_core.proto.tuner.v1 import tuning_pb2
from tuner_core.store.interface import RecordStore
from tuner_server.engine import Engine
from tuner_server.lanes.lane import Lane
from tuner_server.scheduler.committer import Committer
from tuner_server.scheduler.driver import JobRun
from tuner_server.scheduler.job import Job
from tuner_server.scheduler.journal import JobJournal
from tuner_server.scheduler.report import JobFacts, queued_status
from tuner_server.scheduler.shard_run import ShardRun
from tuner_server.scheduler.shards import ShardSupervisor
from tuner_server.scheduler.validation import validate_spec

log = logging.getLogger(__name__)

WATCH_INTERVAL_S = 0.2


class JobSupervisor:
    """Runs jobs in the order in which they came, those of different shares side by side where partitions allow it.

    Args:
        engine: Search, build and measurement.
        store: The record store.
        journal: Where jobs survive a restart.
        instance: Name of this server instance.
        auto_resume: Whether interrupted jobs go on at :meth:`start`; else they wait for :meth:`resume`.

    Attributes:
        shards: Parts of jobs that clients shard over several instances; they are jobs, too.
        draining: What is held is finished, and nothing more is taken.
    """

    def __init__(
        self, engine: Engine, store: RecordStore, journal: JobJournal, instance: str, *, auto_resume: bool
    ) -> None:
        self._engine = engine
        self._store = store
        self._journal = journal
        self._instance = instance
        self._auto_resume = auto_resume
        self._jobs: dict[str, Job] = {}
        self._queue: asyncio.Queue[str] = asyncio.Queue()
        self._runner: asyncio.Task[None] | None = None
        self._submitting = asyncio.Lock()
        self.shards = ShardSupervisor(self._jobs, engine, store, journal, instance)
        self.draining = False
        self._trials_measured = 0

    @property
    def trials_measured(self) -> int:
        """Trials of all jobs that are not at work any more."""
        return self._trials_measured + self.shards.trials_measured

    async def start(self) -> None:
        """Read the journal, queue what was interrupted, begin to run."""
        self.shards.start()
        for entry in reversed(await asyncio.to_thread(self._journal.entries)):
            facts = JobFacts(entry.job, entry.spec, entry.created_at, self._instance)
            job = Job(facts, entry.status, entry.elapsed_s, lease_s=entry.lease_s, tokens=dict(entry.tokens))
            self._jobs[entry.job] = job
            if entry.state.ended and not (entry.state is JobState.STOPPED and self._auto_resume):
                continue
            if self._auto_resume and job.lease_s is not None:
                self.shards.restore(job)
            elif self._auto_resume:
                log.info("%s goes on: it was interrupted", entry.job)
                job.set_state(JobState.QUEUED, "queued again after a restart of the server")
                self._queue.put_nowait(entry.job)
            else:
                job.set_state(JobState.STOPPED, f"stopped; go on with: tuner-client resume {entry.job}")
            await job.write(self._journal)
        self._runner = asyncio.create_task(self._run_jobs())

    async def stop(self) -> None:
        """Interrupt the running job, with everything measured stored and the journal written."""
        if self._runner is not None:
            self._runner.cancel()
            await asyncio.gather(self._runner, return_exceptions=True)
        await self.shards.stop()
        for job in self._jobs.values():
            if not job.state.ended:
                job.set_state(JobState.STOPPED, f"stopped; go on with: tuner-client resume {job.facts.job}")
                await job.write(self._journal)
            job.changed.set()

    def drain(self) -> None:
        """Finish the jobs that are held, end leases, and take no more."""
        self.draining = True
        self.shards.drain()

    # Requests

    async def submit(self, spec: tuning_pb2.JobSpec) -> str:
        """Take in a job.

        Returns:
            Its id; the same one for a repeat of the same ``request_id``.

        Raises:
            UsageError: The request is malformed or asks for the impossible.
            ConflictError: The server is draining, or its target is another.
        """
        async with self._submitting:
            if spec.request_id:
                known = await asyncio.to_thread(self._journal.by_request, spec.request_id)
                if known is not None:
                    return known
            if self.draining:
                raise ConflictError("this server is draining and takes no more jobs; use another --server")
            validate_spec(spec)
            await self._engine.start()
            spec.target_json = (await self._engine.offer(spec.sm_percent, spec.target_json)).target_json
            job_id = f"job-{secrets.token_hex(4)}"
            facts = JobFacts(job_id, spec, time.time(), self._instance)
            job = Job(facts, queued_status(facts))
            await asyncio.to_thread(self._journal.add, job_id, spec, job.status)
            self._jobs[job_id] = job
            self._queue.put_nowait(job_id)
            log.info(
                "%s: %s, %d tasks, %d trials, %d %%", job_id, spec.model, len(spec.tasks), spec.trials, spec.sm_percent
            )
            return job_id

    def get(self, job_id: str) -> tuning_pb2.JobStatus:
        """Status of a job.

        Raises:
            NotFoundError: There is no such job.
        """
        return self._find(job_id).current

    def statuses(self, limit: int) -> list[tuning_pb2.JobStatus]:
        """Statuses without their tasks, newest first."""
        newest = sorted(self._jobs.values(), key=lambda job: job.facts.created_at, reverse=True)
        statuses = []
        for job in newest[: limit or None]:
            status = tuning_pb2.JobStatus()
            status.CopyFrom(job.current)
            del status.tasks[:]
            statuses.append(status)
        return statuses

    def running(self) -> list[str]:
        """Jobs that have not ended; of the shards those with leases."""
        return [
            job_id
            for job_id, job in self._jobs.items()
            if (job.run.needs_partitions if isinstance(job.run, ShardRun) else not job.state.ended)
        ]

    async def watch(self, job_id: str) -> AsyncIterator[tuple[tuning_pb2.JobStatus, str]]:
        """The job's status now, then whenever it changes, until it has ended; with lines for people in between.

        Raises:
            NotFoundError: There is no such job.
        """
        job = self._find(job_id)
        said = len(job.messages)
        while True:
            job.changed.clear()
            status = job.current
            for message in job.messages[said:]:
                yield status, message
            said = len(job.messages)
            yield status, ""
            if JobState(status.status).ended:
                return
            await asyncio.sleep(WATCH_INTERVAL_S)
            await job.changed.wait()

    async def cancel(self, job_id: str) -> tuning_pb2.JobStatus:
        """End a job; what was measured stays. A job that has ended is left as it is.

        Raises:
            NotFoundError: There is no such job.
        """
        job = self._find(job_id)
        if job.lease_s is not None:
            await self.shards.cancel(job)
        elif isinstance(job.run, JobRun):
            job.run.cancel()
            await job.ended.wait()
        elif not job.state.ended or job.state is JobState.STOPPED:
            job.cancel_wanted = True
            if job.turn is not None:
                job.turn.cancel()
            job.set_state(JobState.CANCELLED, "cancelled")
            await job.write(self._journal)
        return job.current

    async def resume(self, job_id: str) -> tuning_pb2.JobStatus:
        """Go on with a job that was stopped, cancelled or failed; one that runs or is done is left as it is.

        Raises:
            NotFoundError: There is no such job.
            ConflictError: The server is draining.
        """
        job = self._find(job_id)
        if job.state in (JobState.STOPPED, JobState.CANCELLED, JobState.FAILED):
            if self.draining:
                raise ConflictError("this server is draining and takes no more jobs")
            if job.lease_s is not None:
                await self.shards.resume(job)
                return job.current
            job.cancel_wanted = False
            job.set_state(JobState.QUEUED, "queued again")
            await job.write(self._journal)
            self._queue.put_nowait(job_id)
        return job.current

    # Running

    async def _run_jobs(self) -> None:
        turns: set[asyncio.Task[None]] = set()
        async with _committer(self._store) as committer:
            try:
                while True:
                    job = self._jobs[await self._queue.get()]
                    if job.cancel_wanted or job.state.ended:
                        continue
                    job.turn = asyncio.create_task(self._run_in_turn(job, committer))
                    turns.add(job.turn)
                    job.turn.add_done_callback(turns.discard)
            finally:
                for turn in turns:
                    turn.cancel()
                await asyncio.gather(*turns, return_exceptions=True)

    async def _run_in_turn(self, job: Job, committer: Committer) -> None:
        """Wait until there are partitions for the job, then run it."""
        spec = job.facts.spec
        job.set_state(JobState.QUEUED, f"waiting for partitions of {spec.sm_percent} %")
        try:
            async with self._engine.lane(spec.sm_percent, spec.target_json) as lane:
                job.turn = None
                await self._run(job, lane, committer)
        except TunerError as problem:  # what goes wrong while it runs is dealt with there
            log.error("%s cannot run: %s", job.facts.job, problem)
            job.set_state(JobState.FAILED, str(problem))
            await job.write(self._journal)
        except Exception:
            log.exception("%s cannot run", job.facts.job)
            job.set_state(JobState.FAILED, "internal error (see the server's log)")
            await job.write(self._journal)

    async def _run(self, job: Job, lane: Lane, committer: Committer) -> None:
        name = job.facts.job

        def changed(message: str) -> None:
            if message:
                job.messages.append(message)
            job.changed.set()
            if job.due():
                writes.append(asyncio.create_task(job.write(self._journal)))
                writes[:] = [write for write in writes if not write.done()]

        writes: list[asyncio.Task[None]] = []
        run = JobRun(job.facts, lane, self._store, committer, job.elapsed_s, changed)
        job.ended.clear()
        job.set_state(JobState.RUNNING, "starting")
        job.run = run
        await job.write(self._journal)
        error = ""
        final: JobState | None = None
        try:
            final = await run.run()
        except asyncio.CancelledError:
            final, error = JobState.STOPPED, f"stopped; go on with: tuner-client resume {name}"
            raise
        except TunerError as problem:
            final, error = (
                JobState.FAILED,
                f"{problem}; what was measured is stored: tuner-client resume {name} goes on",
            )
            log.error("%s failed: %s", name, problem)
        except Exception as problem:
            final, error = JobState.FAILED, f"internal error: {problem!r} (see the server's log)"
            log.exception("%s failed", name)
        finally:
            await asyncio.gather(*writes, return_exceptions=True)
            status = run.status
            job.elapsed_s = run.elapsed_s
            self._trials_measured += status.trials_measured
            job.run = None
            job.status = status
            assert final is not None
            job.set_state(final, error or status.error)
            await asyncio.shield(job.write(self._journal))
            job.ended.set()
            log.info("%s: %s", name, final)

    # Parts

    def _find(self, job_id: str) -> Job:
        job = self._jobs.get(job_id)
        if job is None:
            raise NotFoundError(f"there is no job {job_id} on this server; see: tuner-client jobs")
        return job


class _committer:
    """A :class:`Committer` for the length of a block."""

    def __init__(self, store: RecordStore) -> None:
        self._store = store

    async def __aenter__(self) -> Committer:
        self._committer = Committer(self._store)
        return self._committer

    async def __aexit__(self, *_: object) -> None:
        await self._committer.stop()
