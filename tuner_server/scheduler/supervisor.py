"""All jobs of a server: taken in, written to the journal, run in lanes, watched, cancelled, resumed."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import secrets
import time
import zlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from tuner_core.errors import ConflictError, NotFoundError, TunerError, UsageError
from tuner_core.model import JobState
from tuner_core.proto.tuner.v1 import tuning_pb2
from tuner_core.store.interface import RecordStore
from tuner_server.engine import Engine
from tuner_server.lanes.lane import Lane
from tuner_server.scheduler.committer import Committer
from tuner_server.scheduler.driver import JobRun
from tuner_server.scheduler.journal import JobJournal
from tuner_server.scheduler.report import JobFacts, queued_status

log = logging.getLogger(__name__)

MAX_TRIALS = 1_000_000
MAX_TASKS = 10_000
MAX_BODY_BYTES = 16 << 20
JOURNAL_INTERVAL_S = 2.0
WATCH_INTERVAL_S = 0.2


@dataclass
class _Job:
    facts: JobFacts
    status: tuning_pb2.JobStatus
    elapsed_s: float = 0.0
    run: JobRun | None = None
    turn: asyncio.Task[None] | None = None
    cancel_wanted: bool = False
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    messages: list[str] = field(default_factory=list)
    journalled_at: float = 0.0

    @property
    def state(self) -> JobState:
        return JobState(self.status.status)


class JobSupervisor:
    """Runs jobs in the order in which they came, those of different shares side by side where partitions allow it.

    Args:
        engine: Search, build and measurement.
        store: The record store.
        journal: Where jobs survive a restart.
        instance: Name of this server instance.
        auto_resume: Whether interrupted jobs go on at :meth:`start`; else they wait for :meth:`resume`.
    """

    def __init__(
        self, engine: Engine, store: RecordStore, journal: JobJournal, instance: str, *, auto_resume: bool
    ) -> None:
        self._engine = engine
        self._store = store
        self._journal = journal
        self._instance = instance
        self._auto_resume = auto_resume
        self._jobs: dict[str, _Job] = {}
        self._queue: asyncio.Queue[str] = asyncio.Queue()
        self._runner: asyncio.Task[None] | None = None
        self._submitting = asyncio.Lock()
        self.draining = False
        self.trials_measured = 0

    async def start(self) -> None:
        """Read the journal, queue what was interrupted, begin to run."""
        for entry in reversed(await asyncio.to_thread(self._journal.entries)):
            facts = JobFacts(entry.job, entry.spec, entry.created_at, self._instance)
            job = _Job(facts, entry.status, entry.elapsed_s)
            self._jobs[entry.job] = job
            if entry.state.ended and not (entry.state is JobState.STOPPED and self._auto_resume):
                continue
            if self._auto_resume:
                log.info("%s goes on: it was interrupted", entry.job)
                self._set_state(job, JobState.QUEUED, "queued again after a restart of the server")
                self._queue.put_nowait(entry.job)
            else:
                self._set_state(job, JobState.STOPPED, f"stopped; go on with: tuner-client resume {entry.job}")
            await self._write(job)
        self._runner = asyncio.create_task(self._run_jobs())

    async def stop(self) -> None:
        """Interrupt the running job, with everything measured stored and the journal written."""
        if self._runner is not None:
            self._runner.cancel()
            await asyncio.gather(self._runner, return_exceptions=True)
        for job in self._jobs.values():
            if not job.state.ended:
                self._set_state(job, JobState.STOPPED, f"stopped; go on with: tuner-client resume {job.facts.job}")
                await self._write(job)
            job.changed.set()

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
            job = _Job(facts, queued_status(facts))
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
        return self._status(self._find(job_id))

    def statuses(self, limit: int) -> list[tuning_pb2.JobStatus]:
        """Statuses without their tasks, newest first."""
        newest = sorted(self._jobs.values(), key=lambda job: job.facts.created_at, reverse=True)
        statuses = []
        for job in newest[: limit or None]:
            status = tuning_pb2.JobStatus()
            status.CopyFrom(self._status(job))
            del status.tasks[:]
            statuses.append(status)
        return statuses

    def running(self) -> list[str]:
        """Jobs that have not ended."""
        return [job_id for job_id, job in self._jobs.items() if not job.state.ended]

    async def watch(self, job_id: str) -> AsyncIterator[tuple[tuning_pb2.JobStatus, str]]:
        """The job's status now, then whenever it changes, until it has ended; with lines for people in between.

        Raises:
            NotFoundError: There is no such job.
        """
        job = self._find(job_id)
        said = len(job.messages)
        while True:
            job.changed.clear()
            status = self._status(job)
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
        if job.run is not None:
            job.run.cancel()
            await job.ended.wait()
        elif not job.state.ended or job.state is JobState.STOPPED:
            job.cancel_wanted = True
            if job.turn is not None:
                job.turn.cancel()
            self._set_state(job, JobState.CANCELLED, "cancelled")
            await self._write(job)
        return self._status(job)

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
            job.cancel_wanted = False
            self._set_state(job, JobState.QUEUED, "queued again")
            await self._write(job)
            self._queue.put_nowait(job_id)
        return self._status(job)

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

    async def _run_in_turn(self, job: _Job, committer: Committer) -> None:
        """Wait until there are partitions for the job, then run it."""
        spec = job.facts.spec
        self._set_state(job, JobState.QUEUED, f"waiting for partitions of {spec.sm_percent} %")
        try:
            async with self._engine.lane(spec.sm_percent, spec.target_json) as lane:
                job.turn = None
                await self._run(job, lane, committer)
        except TunerError as problem:  # what goes wrong while it runs is dealt with there
            log.error("%s cannot run: %s", job.facts.job, problem)
            self._set_state(job, JobState.FAILED, str(problem))
            await self._write(job)
        except Exception:
            log.exception("%s cannot run", job.facts.job)
            self._set_state(job, JobState.FAILED, "internal error (see the server's log)")
            await self._write(job)

    async def _run(self, job: _Job, lane: Lane, committer: Committer) -> None:
        name = job.facts.job

        def changed(message: str) -> None:
            if message:
                job.messages.append(message)
            job.changed.set()
            if time.monotonic() - job.journalled_at > JOURNAL_INTERVAL_S:
                job.journalled_at = time.monotonic()
                writes.append(asyncio.create_task(self._write(job)))
                writes[:] = [write for write in writes if not write.done()]

        writes: list[asyncio.Task[None]] = []
        run = JobRun(job.facts, lane, self._store, committer, job.elapsed_s, changed)
        job.ended.clear()
        self._set_state(job, JobState.RUNNING, "starting")
        job.run = run
        await self._write(job)
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
            self.trials_measured += status.trials_measured
            job.run = None
            job.status = status
            assert final is not None
            self._set_state(job, final, error or status.error)
            await asyncio.shield(self._write(job))
            job.ended.set()
            log.info("%s: %s", name, final)

    # Parts

    def _find(self, job_id: str) -> _Job:
        job = self._jobs.get(job_id)
        if job is None:
            raise NotFoundError(f"there is no job {job_id} on this server; see: tuner-client jobs")
        return job

    def _status(self, job: _Job) -> tuning_pb2.JobStatus:
        return job.run.status if job.run is not None else job.status

    def _set_state(self, job: _Job, state: JobState, error: str) -> None:
        job.status.status = state
        job.status.error = error if state.ended else ""
        job.status.phase = "ended" if state.ended else error
        job.changed.set()

    async def _write(self, job: _Job) -> None:
        status = self._status(job)
        elapsed_s = job.run.elapsed_s if job.run is not None else job.elapsed_s
        await asyncio.to_thread(self._journal.update, job.facts.job, JobState(status.status), status, elapsed_s)


class _committer:
    """A :class:`Committer` for the length of a block."""

    def __init__(self, store: RecordStore) -> None:
        self._store = store

    async def __aenter__(self) -> Committer:
        self._committer = Committer(self._store)
        return self._committer

    async def __aexit__(self, *_: object) -> None:
        await self._committer.stop()


def validate_spec(spec: tuning_pb2.JobSpec) -> None:
    """Check a job's request before it is taken in.

    Raises:
        UsageError: Says what is wrong.
    """
    if not 1 <= spec.sm_percent <= 100:
        raise UsageError(f"sm_percent is {spec.sm_percent}, but must be 1 to 100")
    if not 1 <= spec.trials <= MAX_TRIALS:
        raise UsageError(f"trials is {spec.trials}, but must be 1 to {MAX_TRIALS:,}")
    if len(spec.tasks) > MAX_TASKS:
        raise UsageError(f"the job has {len(spec.tasks)} tasks, over the limit of {MAX_TASKS:,}")
    for task in spec.tasks:
        body = _inflate(task.workload.body_zlib, f"the workload of task {task.name}")
        if hashlib.sha256(body).hexdigest() != task.workload.digest:
            raise UsageError(f"the workload of task {task.name} does not have the digest that it claims")
        if task.weight < 1:
            raise UsageError(f"the weight of task {task.name} is {task.weight}, but must be at least 1")
    if spec.HasField("evaluator"):
        asked = spec.evaluator
        if asked.number < 1 or asked.repeat < 1 or not 0 <= asked.min_repeat_ms <= 10_000:
            raise UsageError("evaluator settings are out of range: number and repeat from 1, min_repeat_ms 0 to 10000")
    if spec.target_json:
        try:
            json.loads(spec.target_json)
        except ValueError:
            raise UsageError("the target is not JSON") from None


def _inflate(data: bytes, what: str) -> bytes:
    stream = zlib.decompressobj()
    try:
        body = stream.decompress(data, MAX_BODY_BYTES)
    except zlib.error:
        raise UsageError(f"{what} is not zlib data") from None
    if stream.unconsumed_tail:
        raise UsageError(f"{what} is over the limit of {MAX_BODY_BYTES >> 20} MiB")
    return body
