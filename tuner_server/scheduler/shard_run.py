"""Runs a shard: takes partitions while it has leases, performs what its state machine asks for, tells the client."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from tuner_core.errors import TunerError, UnavailableError
from tuner_core.proto.tuner.v1 import leases_pb2, tuning_pb2
from tuner_core.store.interface import RecordStore
from tuner_core.store.wire import workload_from_message
from tuner_server.engine import Engine
from tuner_server.lanes.lane import Lane
from tuner_server.scheduler import messages as m
from tuner_server.scheduler import shard_messages as sm
from tuner_server.scheduler.committer import Committer
from tuner_server.scheduler.history import known_trials
from tuner_server.scheduler.performer import Performer
from tuner_server.scheduler.progress import TaskPlan
from tuner_server.scheduler.report import JobFacts, device_facts, queued_status, running_status
from tuner_server.scheduler.shard_events import EventLog
from tuner_server.scheduler.shard_machine import ShardMachine
from tuner_server.scheduler.task_claims import TTL_S, TaskClaims
from tuner_server.scheduler.transfer import Transfer

log = logging.getLogger(__name__)

LINGER_S = 1.0
"""How long partitions are kept without a lease: the client's next one is on its way."""
TICKS_PER_LEASE = 10
MAX_TICK_S = 1.0


class ShardRun:
    """A shard between its opening and its end, in one life of the server.

    Args:
        facts: The job.
        engine: Where partitions come from.
        store: For look-ups; commits go through ``committer``.
        lease_s: How long a lease lasts without renewal.
        tokens: Newest token seen of each task, by index.
        elapsed_s: Time that earlier lives had partitions.
        on_change: Called after every event, with a line for people or an empty string.
        claim_ttl_s: How long the job's claims last without renewal.

    Attributes:
        events: What the client is told.
    """

    def __init__(
        self,
        facts: JobFacts,
        engine: Engine,
        store: RecordStore,
        committer: Committer,
        lease_s: float,
        tokens: Mapping[int, int],
        elapsed_s: float,
        on_change: Callable[[str], None],
        claim_ttl_s: float = TTL_S,
    ) -> None:
        spec = facts.spec
        self.facts = facts
        self.machine = ShardMachine(
            [TaskPlan(task.name, task.weight, task.tunable) for task in spec.tasks], lease_s, tokens
        )
        self.events = EventLog(secrets.token_hex(4), [task.name for task in spec.tasks], self._heartbeat)
        self.idle_since_s = time.monotonic()
        self._engine = engine
        self._store = store
        self._committer = committer
        self._on_change = on_change
        self._base = queued_status(facts)
        self._elapsed_s = elapsed_s
        self._working_since_s: float | None = None
        self._performer: Performer | None = None
        self._inbox: asyncio.Queue[m.Instruction | sm.LookUp | sm.TakeClaim | BaseException] = asyncio.Queue()
        self._look_ups: set[asyncio.Task[None]] = set()
        self._claims = TaskClaims(store, facts.job, claim_ttl_s)  # in the name of the job: its instances are one holder
        self._claiming: set[asyncio.Task[None]] = set()
        self._wanted = asyncio.Event()
        self._model_turn = asyncio.Lock()
        self._model: asyncio.Future[m.ModelMeasured] | None = None
        self._tasks = [asyncio.create_task(work) for work in (self._run(), self._tick(), self._keep_claims())]

    # Facts

    @property
    def status(self) -> tuning_pb2.JobStatus:
        """The shard as a job: what this instance measures of it."""
        return running_status(self.facts, self.machine, self._base, self.elapsed_s)

    @property
    def elapsed_s(self) -> float:
        """Time with partitions."""
        since = self._working_since_s
        return self._elapsed_s + (time.monotonic() - since if since is not None else 0.0)

    @property
    def trials_measured(self) -> int:
        """Trials of this life, failed ones included."""
        return sum(len(shard.own) for shard in self.machine.shards)

    @property
    def needs_partitions(self) -> bool:
        """Whether anything is to be measured."""
        return self.machine.busy or self._model is not None

    def idle_for_s(self) -> float:
        """For how long nobody has wanted or followed anything."""
        if self.needs_partitions or self.events.followers:
            self.idle_since_s = time.monotonic()
        return time.monotonic() - self.idle_since_s

    def _heartbeat(self) -> leases_pb2.ShardHeartbeat:
        return leases_pb2.ShardHeartbeat(
            draining=self.machine.draining, doing=self.machine.phase, in_flight=self.machine.in_flight
        )

    # Requests

    def grant(self, index: int, lease: leases_pb2.Lease) -> None:
        """Start a lease or extend it.

        Raises:
            UsageError, ConflictError: See :meth:`ShardMachine.check`.
        """
        self._act(
            self.machine.grant(
                index,
                lease.token,
                lease.trials,
                lease.conclude,
                time.monotonic(),
                claim=lease.claim,
                take_over=lease.take_over,
            )
        )

    def renew(self, leases: list[tuple[int, int]]) -> list[int]:
        """Move deadlines; returns the tasks whose lease is lost."""
        return self.machine.renew(leases, time.monotonic())

    def handle(self, event: sm.Event) -> None:
        """Give the machine an event, and see to what it says."""
        if isinstance(event, m.ModelMeasured):
            if self._model is not None and not self._model.done():
                self._model.set_result(event)
            return
        instructions = self.machine.handle(event)
        if instructions or not isinstance(event, sm.Tick):
            self._act(instructions)

    async def measure_model(self, traces: Mapping[int, str]) -> m.ModelMeasured:
        """Measure the whole model, untuned and with these traces by task index.

        Raises:
            TunerError: There are no partitions, or the shard ends.
        """
        async with self._model_turn:
            self._model = asyncio.get_running_loop().create_future()
            try:
                self._act([m.MeasureModel(traces)])
                return await asyncio.shield(self._model)
            finally:
                self._model = None

    async def stop(self, reason: str, error: TunerError | None = None, *, job_over: bool = False) -> None:
        """End all work at once; what was measured is stored, leases end, followers are told.

        Args:
            reason: Of the leases' end.
            error: What followers get in place of a proper end.
            job_over: The job ends everywhere, and gives its claims back; else its other instances may need them.
        """
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._give_up(reason, "" if error is None else str(error))
        await asyncio.gather(*self._claiming, return_exceptions=True)
        if job_over:
            await self._claims.release_all()
        self.events.end(error)

    # Work

    def _act(self, instructions: list[sm.Instruction]) -> None:
        for instruction in instructions:
            match instruction:
                case sm.TellBaseline() | sm.TellTrial() | sm.TellEnded():
                    self.events.publish(instruction)
                case sm.ReleaseClaim():
                    self._claim_work(self._claims.release(instruction.task))
                case m.Say():
                    log.info("%s: %s", self.facts.job, instruction.message)
                    self._on_change(instruction.message)
                case _:
                    self._inbox.put_nowait(instruction)
        if self.needs_partitions:
            self._wanted.set()
        else:
            self._wanted.clear()
        self._on_change("")

    def _emit(self, event: m.Event | BaseException) -> None:
        if isinstance(event, BaseException):
            self._inbox.put_nowait(event)
        else:
            self.handle(event)

    async def _tick(self) -> None:
        interval_s = min(MAX_TICK_S, self.machine.lease_s / TICKS_PER_LEASE)
        while True:
            await asyncio.sleep(interval_s)
            self.handle(sm.Tick(time.monotonic()))

    async def _keep_claims(self) -> None:
        while True:
            await asyncio.sleep(self._claims.ttl_s / 3)
            for index, shard in enumerate(self.machine.shards):
                if shard.claimed and not await self._claims.renew(index) and shard.claimed:
                    self.handle(sm.ClaimLost(index))

    def _claim_work(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._claiming.add(task)
        task.add_done_callback(self._claiming.discard)

    async def _take_claim(self, performer: Performer, index: int) -> None:
        taken = await self._claims.take(index, performer.key(index))
        self.handle(sm.ClaimAnswered(index, taken.holder, taken.fresh))

    async def _run(self) -> None:
        spec = self.facts.spec
        while True:
            await self._wanted.wait()
            try:
                async with self._engine.lane(spec.sm_percent, spec.target_json) as lane:
                    await self._use(lane)
            except TunerError as error:
                log.error("%s: %s", self.facts.job, error)
                await self._give_up("failed", str(error))
            except Exception as error:
                log.exception("%s failed", self.facts.job)
                await self._give_up("failed", f"internal error: {error!r} (see the instance's log)")

    async def _use(self, lane: Lane) -> None:
        """Work as long as there are leases."""
        self._working_since_s = time.monotonic()
        try:
            await self._begin(lane)
            while True:
                try:
                    work = await asyncio.wait_for(self._inbox.get(), LINGER_S)
                except TimeoutError:
                    if not self.needs_partitions:
                        break
                    continue
                self._perform(work)
        except BaseException:
            if self._performer is not None:
                await self._performer.stop()  # before anybody else gets the partitions
            raise
        finally:
            self.handle(sm.LaneClosed())
            self._elapsed_s, self._working_since_s = self.elapsed_s, None

    async def _begin(self, lane: Lane) -> None:
        device_facts(self._base, lane)
        if self._performer is None:
            spec = self.facts.spec
            own = {task.workload.digest for task in spec.tasks}
            transfer = None if spec.refresh else Transfer(self._store, own)
            workloads = [workload_from_message(task.workload) for task in self.facts.spec.tasks]
            performer = Performer(
                self.facts, workloads, lane, self._committer, self.machine.tasks, self._emit, transfer
            )
            await performer.add_workloads()
            self._performer = performer
        self._performer.lane = lane
        self.handle(sm.LaneOpened(lane.limits))

    def _perform(self, work: m.Instruction | sm.LookUp | sm.TakeClaim | BaseException) -> None:
        assert self._performer is not None
        if isinstance(work, BaseException):
            raise work
        if isinstance(work, sm.LookUp):
            look_up = asyncio.create_task(self._look_up(self._performer, work.task))
            self._look_ups.add(look_up)
            look_up.add_done_callback(self._look_ups.discard)
        elif isinstance(work, sm.TakeClaim):
            self._claim_work(self._take_claim(self._performer, work.task))
        else:
            self._performer.perform(work)

    async def _look_up(self, performer: Performer, index: int) -> None:
        try:
            known = await asyncio.to_thread(
                known_trials, self._store, performer.key(index), self.facts.job, refresh=self.facts.spec.refresh
            )
        except Exception as error:
            self._emit(error)
        else:
            self.handle(sm.KnownFound(index, known))

    async def _give_up(self, reason: str, error: str) -> None:
        """Cancel everything that is under way; leases end with what they have measured."""
        if self._performer is not None:
            await self._performer.stop()
        for look_up in list(self._look_ups):
            look_up.cancel()
        await asyncio.gather(*self._look_ups, return_exceptions=True)
        while not self._inbox.empty():
            self._inbox.get_nowait()
        if self._model is not None and not self._model.done():
            self._model.set_exception(UnavailableError(error or "the shard ended"))
        self.handle(sm.Stopped(reason, error))
