"""Performs what the lease state machine decides, over gRPC: one event loop, one event stream for each instance."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import signal
import time
import zlib
from collections.abc import Coroutine, Iterable, Sequence
from typing import Any

from tuner_client.job import JobReport
from tuner_client.progress import Progress
from tuner_client.sharding.admission import JobFacts, mismatch
from tuner_client.sharding.events import event_of
from tuner_client.sharding.gathering import Gatherer
from tuner_client.sharding.history import records_of
from tuner_client.sharding.journal import ShardJournal
from tuner_client.sharding.link import InstanceLink
from tuner_client.sharding.report import ShardedJob, job_report
from tuner_core.errors import ConflictError, DeadlineError, NotFoundError, TunerError, UnavailableError
from tuner_core.leases import messages as m
from tuner_core.leases.machine import LeaseMachine
from tuner_core.leases.state import LeaseSettings
from tuner_core.model import JobState, RecordKey, target_digest
from tuner_core.proto.tuner.v1 import leases_pb2 as pb
from tuner_core.proto.tuner.v1 import tuning_pb2
from tuner_core.store.interface import RecordStore

OPEN_TIMEOUT_S = 120.0
MODEL_TIMEOUT_S = 1_800.0
LEAVE_S = 5.0
_SETTLE_S = 10.0
_REPORT_S = 0.5
_JOURNAL_S = 2.0
_RETRY_S = (0.3, 0.5, 1.0, 2.0)
"""The first is longer than gRPC's own pause after a failed connection (0.24 s at most): it is a new attempt."""


class ShardDriver:
    """One sharded job, from the first lease to the end.

    Args:
        job: What it is.
        links: Its instances, those that cannot be reached yet included.
        machine: Decides.
        store: Where every record goes.
        gatherer: Brings them there.
        journal: Remembers the job.
        progress: Hears what happens.
        target_given: The target was asked for, so an instance's own may differ from it in what does not matter.
    """

    def __init__(
        self,
        job: ShardedJob,
        links: Sequence[InstanceLink],
        machine: LeaseMachine,
        settings: LeaseSettings,
        store: RecordStore,
        gatherer: Gatherer,
        journal: ShardJournal,
        progress: Progress,
        *,
        target_given: bool,
    ) -> None:
        self._job = job
        self._links = {link.address: link for link in links}
        self._machine = machine
        self._settings = settings
        self._store = store
        self._gatherer = gatherer
        self._journal = journal
        self._progress = progress
        self._target_given = target_given
        self._keys = {
            name: RecordKey(
                workload.digest, target_digest(job.facts.target_json), job.facts.device_model, job.facts.sm_count
            )
            for name, workload in job.workloads.items()
        }
        self._fair_trials = machine.board.fair_trials
        self._tasks: set[asyncio.Task[None]] = set()
        self._watches: dict[str, asyncio.Task[None]] = {}
        self._measured_at: dict[str, str] = {}
        self._over = asyncio.Event()
        self._failure: BaseException | None = None
        self.interrupted = False
        self._began_s = time.monotonic()
        self._measured_before = sum(len(task.counted) for task in machine.board.tasks.values())

    def report(self, status: str = "", error: str = "") -> JobReport:
        """The job's present state."""
        return job_report(
            self._job,
            self._machine,
            list(self._links.values()),
            elapsed_s=time.monotonic() - self._began_s,
            measured_before=self._measured_before,
            status=status,
            error=error,
        )

    async def run(self) -> JobReport:
        """Until the job has ended, or Ctrl-C (``interrupted`` is set then, and the job is saved)."""
        loop = asyncio.get_running_loop()
        handled = []
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            with contextlib.suppress(ValueError, RuntimeError, NotImplementedError):  # not the main thread
                loop.add_signal_handler(number, self._interrupt)
                handled.append(number)
        try:
            for link in self._links.values():
                if not link.left_out:
                    self._watches[link.address] = self._start(self._live(link))
                    self._start(self._command(link))
            self._start(self._tick())
            self._start(self._show())
            await self._over.wait()
            if self._failure is not None:
                raise self._failure
            return await self._leave() if self.interrupted else await self._end()
        finally:
            for number in handled:
                loop.remove_signal_handler(number)
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            for link in self._links.values():
                await link.connection.close()

    def _interrupt(self) -> None:
        if self.interrupted:  # a second Ctrl-C does not wait for anybody
            self._failure = KeyboardInterrupt()
        self.interrupted = True
        self._over.set()

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._failure = self._failure or error
            self._over.set()

    # Events and instructions

    def _now(self) -> float:
        return time.monotonic()

    def _feed(self, event: m.Event) -> None:
        for instruction in self._machine.handle(event):
            match instruction:
                case m.Say():
                    self._progress.note(instruction.text)
                case m.Finish():
                    self._over.set()
                case m.Warm():
                    self._start(self._warm(instruction))
                case m.MeasureModel():
                    self._start(self._measure_model(instruction))
                case m.Grant() | m.Renew() | m.Revoke():
                    self._links[instruction.instance].commands.put_nowait(instruction)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(self._settings.heartbeat_s / 8)
            if self._journal.cancel_wanted:
                self._feed(m.CancelRequested(self._now()))
            self._feed(m.Tick(self._now()))
            for link in self._links.values():
                state = self._machine.board.instances.get(link.address)
                if link.joined and state is not None and not state.alive:
                    # Nobody answers, but its connection looks alive: begin again with a new one.
                    link.joined = False
                    self._watches[link.address].cancel()
                    self._watches[link.address] = self._start(self._live(link, renew=True))

    async def _show(self) -> None:
        saved_s = 0.0
        while True:
            report = self.report()
            if not self._over.is_set():
                self._progress.job(report)
            if self._now() - saved_s >= _JOURNAL_S:
                saved_s = self._now()
                await asyncio.to_thread(self._journal.save, report)
            await asyncio.sleep(_REPORT_S)

    # One instance

    async def _live(self, link: InstanceLink, *, renew: bool = False) -> None:
        """Reach an instance, open the job there, listen; again and again until the job ends."""
        failures = 0
        if renew:
            await link.reconnect()
        while True:
            try:
                await self._open(link)
                failures = 0
                await _first_to_fail(self._watch(link), self._gatherer.follow(link))
            except TunerError as error:
                link.trouble = " ".join(str(error).split())
                if _is_final(error):
                    link.left_out = link.trouble
                    self._gone(link, f"is left out: {link.trouble}")
                    self._progress.note(f"{link.address} is left out: {link.trouble}")
                    if link.incarnation:  # it took part before
                        with contextlib.suppress(TunerError):
                            await self._gatherer.rest(link)
                    self._check_anybody_left()
                    return
                refused = "refused" in link.trouble
                # the socket of a process that is being killed may still accept one connection, and reset it
                if link.joined and (refused or failures > 1):
                    link.joined = False
                    self._gone(link, "is gone" if refused else "cannot be reached")
            await asyncio.sleep(_RETRY_S[min(failures, len(_RETRY_S)) - 1] if failures else 0.02)
            failures += 1

    def _check_anybody_left(self) -> None:
        """Raise ConflictError when every server is left out for good: there is nothing to wait for."""
        if all(link.left_out for link in self._links.values()):
            reasons = "; ".join(f"{link.address}: {link.left_out}" for link in self._links.values())
            raise ConflictError(f"no server can take part in {self._job.job} ({reasons}); what was measured is kept")

    def _gone(self, link: InstanceLink, reason: str) -> None:
        while not link.commands.empty():
            link.commands.get_nowait()
        self._feed(m.InstanceGone(self._now(), link.address, reason))

    async def _open(self, link: InstanceLink) -> None:
        """Open the job at an instance.

        Raises:
            TunerError: It cannot be reached, or has no place in the job.
        """
        facts: JobFacts = self._job.facts
        await link.ask(facts.sm_percent, max(2.0, self._settings.heartbeat_s))
        assert link.facts is not None
        if reason := mismatch(link.facts, facts, target_given=self._target_given):
            raise ConflictError(reason)
        spec = spec_for(self._job.spec, link.address)
        request = pb.OpenShardRequest(job=self._job.job, spec=spec, lease_s=self._settings.lease_s)
        opened = await link.connection.call(link.leases.OpenShard, request, OPEN_TIMEOUT_S)
        if opened.incarnation != link.incarnation:
            link.incarnation, link.sequence, link.cursor, link.holds = opened.incarnation, 0, None, set()
        link.trouble, link.joined = "", True
        self._feed(
            m.InstanceJoined(
                self._now(),
                link.address,
                opened.incarnation,
                opened.workers,
                opened.batch,
                opened.draining,
                opened.in_flight,
            )
        )

    async def _watch(self, link: InstanceLink) -> None:
        request = pb.WatchShardRequest(
            job=self._job.job,
            after_sequence=link.sequence,
            heartbeat_s=self._settings.heartbeat_s / 2,
            incarnation=link.incarnation,
        )
        async for response in link.connection.stream(link.leases.WatchShard, request):
            if response.incarnation != link.incarnation:
                break
            self._hear(link, response)
            link.sequence = max(link.sequence, response.sequence)
        raise UnavailableError(f"the server at {link.address} ended the job's events")

    def _hear(self, link: InstanceLink, response: pb.WatchShardResponse) -> None:
        event = event_of(response, link.address, self._now())
        match event:
            case None:
                return
            case m.Heard():
                link.doing = response.heartbeat.doing
            case m.BaselineMeasured():
                self._gatherer.told(link, event.trial_id)
            case m.TrialFinished():
                self._measured_at[event.trial_id] = link.address
                self._gatherer.told(link, event.trial_id)
            case m.LeaseEnded():
                self._gatherer.told(link, event.best_trial_id)
                if event.reason == "published" or self._gatherer.missing(filter(None, [event.best_trial_id])):
                    self._start(self._ended(link, event))  # what else the instance says does not wait for that
                    return
        self._feed(event)

    async def _ended(self, link: InstanceLink, event: m.LeaseEnded) -> None:
        """A published record counts when it is here, too: another instance may have to build the model with it."""
        with contextlib.suppress(TunerError):  # it is out of reach: the lease is lost, or the next one ends like this
            if event.reason == "published":  # by another job, whose records are not followed
                await self._gatherer.fetch(link, self._keys[event.task], self._fair_trials)
            else:
                await self._gatherer.settled([event.best_trial_id], self._settings.heartbeat_s)
            self._feed(dataclasses.replace(event, now_s=self._now()))

    async def _command(self, link: InstanceLink) -> None:
        """Give, renew and revoke leases, one after the other, so that none overtakes another."""
        while True:
            command = await link.commands.get()
            try:
                match command:
                    case m.Grant():
                        await self._grant(link, command)
                    case m.Renew():
                        await self._renew(link, command)
                    case m.Revoke():
                        request = pb.RevokeLeaseRequest(job=self._job.job, task=command.task, token=command.token)
                        await self._call(link, link.leases.RevokeLease, request)
            except TunerError as error:
                link.trouble = str(error)
                if isinstance(command, m.Grant):
                    unanswered = isinstance(error, DeadlineError | UnavailableError)
                    self._feed(
                        m.LeaseRefused(
                            self._now(),
                            link.address,
                            command.task,
                            command.token,
                            str(error),
                            unanswered=unanswered,
                        )
                    )

    async def _call(self, link: InstanceLink, method: Any, request: Any) -> Any:
        return await link.connection.call(method, request, self._settings.heartbeat_s)

    async def _grant(self, link: InstanceLink, command: m.Grant) -> None:
        claim = not self._job.spec.refresh and (command.trials > 0 or command.conclude)
        lease = pb.Lease(
            task=command.task,
            token=command.token,
            trials=command.trials,
            conclude=command.conclude,
            claim=claim,
            take_over=claim and command.take_over,
        )
        await self._call(link, link.leases.GrantLease, pb.GrantLeaseRequest(job=self._job.job, lease=lease))
        self._feed(m.LeaseAccepted(self._now(), link.address, command.task, command.token))

    async def _renew(self, link: InstanceLink, command: m.Renew) -> None:
        tasks, tokens = zip(*command.leases, strict=True)
        request = pb.RenewLeasesRequest(job=self._job.job, tasks=tasks, tokens=tokens)
        response = await self._call(link, link.leases.RenewLeases, request)
        self._feed(m.Heard(self._now(), link.address, response.draining))
        for task, token in command.leases:
            if task in response.lost:
                self._feed(m.LeaseLost(self._now(), link.address, task, token))

    # Records

    async def _warm(self, work: m.Warm) -> None:
        link = self._links[work.instance]
        ledger = self._machine.board.tasks[work.task]
        try:
            await self._gatherer.settled(self._coming(ledger.counted), self._settings.heartbeat_s / 4)
            records = await asyncio.to_thread(records_of, self._store, self._keys[work.task], self._job.job)
            await self._gatherer.bring(link, records, [self._job.workloads[work.task]])
        except TunerError as error:
            self._feed(m.LeaseRefused(self._now(), work.instance, work.task, work.token, str(error)))
            return
        self._feed(m.Warmed(self._now(), work.instance, work.task, work.token))

    async def _measure_model(self, work: m.MeasureModel) -> None:
        link = self._links[work.instance]
        try:
            found = [await asyncio.to_thread(self._store.get, trial_id) for trial_id in work.trial_ids.values()]
            records = [record for record in found if record is not None]
            workloads = [self._job.workloads[task] for task in work.trial_ids]
            await self._gatherer.bring(link, records, workloads)
            request = pb.MeasureModelRequest(job=self._job.job, trial_ids=dict(work.trial_ids))
            answer = await link.connection.call(link.leases.MeasureModel, request, MODEL_TIMEOUT_S)
        except TunerError as error:
            self._feed(m.ModelNotMeasured(self._now(), work.instance, str(error)))
            return
        self._feed(
            m.ModelMeasured(
                self._now(),
                work.instance,
                answer.baseline_latency_us if answer.HasField("baseline_latency_us") else None,
                answer.tuned_latency_us if answer.HasField("tuned_latency_us") else None,
                answer.outputs_match if answer.HasField("outputs_match") else None,
                answer.error,
            )
        )

    # The end

    def _counted(self) -> list[str]:
        tasks = self._machine.board.tasks.values()
        return [trial for task in tasks for trial in (*task.counted, task.best_trial_id) if trial]

    def _coming(self, trials: Iterable[str]) -> list[str]:
        """Those whose records have not come yet, but can: where they were measured lives."""
        instances = self._machine.board.instances
        return [
            trial
            for trial in self._gatherer.missing(trials)
            if trial in self._measured_at and instances[self._measured_at[trial]].alive
        ]

    async def _gather_rest(self) -> None:
        await self._gatherer.settled(self._coming(self._counted()), _SETTLE_S)
        missing = self._gatherer.missing(self._counted())
        if missing:
            places = sorted({self._measured_at.get(trial, "servers that are away") for trial in missing})
            self._progress.note(f"{len(missing)} records are not gathered; they are stored at {', '.join(places)}")

    async def _end(self) -> JobReport:
        """The job is over: gather what is still on its way, let the instances forget it."""
        await self._gather_rest()
        await self._close_shards()
        report = self.report()
        await asyncio.to_thread(self._journal.save, report)
        return report

    async def _leave(self) -> JobReport:
        """Ctrl-C: give the leases back, gather what is finished meanwhile, and save."""
        with self._progress.step("saving the job"):
            self._feed(m.StopRequested(self._now()))
            deadline_s = self._now() + LEAVE_S
            while self._now() < deadline_s and self._holds_leases():
                await asyncio.sleep(0.1)
                if self._failure is not None:
                    break
            await self._gatherer.settled(self._coming(self._counted()), 2.0)
            await self._close_shards()
            report = self.report(JobState.STOPPED.value)
            await asyncio.to_thread(self._journal.save, report)
        return report

    def _holds_leases(self) -> bool:
        return any(one.alive and one.leases for one in self._machine.board.instances.values())

    async def _close_shards(self) -> None:
        for watch in self._watches.values():  # or they would open the job again
            watch.cancel()
        await asyncio.gather(*self._watches.values(), return_exceptions=True)

        async def close(link: InstanceLink) -> None:
            with contextlib.suppress(TunerError):
                await link.connection.call(link.leases.CloseShard, pb.CloseShardRequest(job=self._job.job), 2.0)

        await asyncio.gather(*(close(link) for link in self._links.values() if link.joined))


def spec_for(spec: tuning_pb2.JobSpec, address: str) -> tuning_pb2.JobSpec:
    """A job as one instance gets it: with a seed of its own, so that two searches of a task do not propose the same."""
    own = tuning_pb2.JobSpec()
    own.CopyFrom(spec)
    own.seed = (spec.seed + zlib.crc32(address.encode())) % (1 << 62)
    return own


def _is_final(error: TunerError) -> bool:
    """Whether trying again is of no use."""
    return not isinstance(error, UnavailableError | DeadlineError | NotFoundError) and "drain" not in str(error)


async def _first_to_fail(*works: Coroutine[Any, Any, None]) -> None:
    """Run all until one of them ends, cancel the others, raise what it raised."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        pending = set(tasks)
        while pending:
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
