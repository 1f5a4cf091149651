"""Runs a job: its state machine decides, a performer does it, every outcome goes back into the machine."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from tuner_core.allocation.options import negligible_share_of, stopping_of
from tuner_core.model import JobState
from tuner_core.proto.tuner.v1 import tuning_pb2
from tuner_core.store.interface import RecordStore
from tuner_core.store.wire import workload_from_message
from tuner_server.lanes.lane import Lane
from tuner_server.scheduler import messages as m
from tuner_server.scheduler.committer import Committer
from tuner_server.scheduler.history import known_trials
from tuner_server.scheduler.machine import JobMachine
from tuner_server.scheduler.performer import Performer
from tuner_server.scheduler.progress import TaskPlan
from tuner_server.scheduler.report import JobFacts, device_facts, queued_status, running_status
from tuner_server.scheduler.single_flight import SingleFlight
from tuner_server.scheduler.transfer import Transfer

log = logging.getLogger(__name__)


class JobRun:
    """One run of a job: from the start, or from where an earlier run was interrupted.

    Args:
        facts: The job.
        engine: Search and build, and the workers of the job's share.
        store: For look-ups; commits go through ``committer``.
        elapsed_s: Time that earlier runs took.
        on_change: Called after every event, with a line for people or an empty string.
    """

    def __init__(
        self,
        facts: JobFacts,
        engine: Lane,
        store: RecordStore,
        committer: Committer,
        elapsed_s: float,
        on_change: Callable[[str], None],
    ) -> None:
        self.facts = facts
        self._engine = engine
        self._store = store
        self._elapsed_before_s = elapsed_s
        self._on_change = on_change
        self._started_at = time.monotonic()
        self._ended_at: float | None = None
        self._base = queued_status(facts)
        workloads = [workload_from_message(task.workload) for task in facts.spec.tasks]
        plans = [
            TaskPlan(task.name, task.weight, task.tunable, workload.cost_guess)
            for task, workload in zip(facts.spec.tasks, workloads, strict=True)
        ]
        self._machine = JobMachine(
            plans,
            facts.spec.trials,
            engine.limits.for_tasks(sum(plan.tunable for plan in plans)),
            stopping_of(facts.spec),
            negligible_share_of(facts.spec),
        )
        self._events: asyncio.Queue[m.Event | BaseException] = asyncio.Queue()
        own = {task.workload.digest for task in facts.spec.tasks}
        transfer = None if facts.spec.refresh else Transfer(store, own)
        self._performer = Performer(
            facts, workloads, engine, committer, self._machine.tasks, self._events.put_nowait, transfer
        )
        self._flight = SingleFlight(store, f"{facts.instance}/{facts.job}", self._claim_taken)
        self._letting_go: set[asyncio.Task[None]] = set()
        self._final: set[int] = set()

    @property
    def status(self) -> tuning_pb2.JobStatus:
        """The job as it stands."""
        return running_status(self.facts, self._machine, self._base, self.elapsed_s)

    @property
    def elapsed_s(self) -> float:
        """Time spent running, earlier runs included."""
        now = self._ended_at if self._ended_at is not None else time.monotonic()
        return self._elapsed_before_s + now - self._started_at

    def cancel(self) -> None:
        """End the job; what was measured stays in the store."""
        self._events.put_nowait(m.CancelRequested())

    async def run(self) -> JobState:
        """Run to the end.

        Returns:
            How the job ended.

        Raises:
            TunerError: The store or a process pool refuses to go on; what was measured is stored.
            asyncio.CancelledError: The server stops; likewise.
        """
        try:
            await self._begin()
            while self._machine.finished is None:
                event = await self._events.get()
                if isinstance(event, BaseException):
                    raise event
                self._handle(event)
            return self._machine.finished.state
        finally:
            self._ended_at = time.monotonic()
            await self._performer.stop()
            await asyncio.gather(*self._letting_go, return_exceptions=True)
            await self._flight.stop()
            if self._machine.finished is None:
                log.info("%s: interrupted; what was measured is stored", self.facts.job)

    async def _begin(self) -> None:
        engine, spec = self._engine, self.facts.spec
        device_facts(self._base, engine)
        await self._performer.add_workloads()
        tunable = [index for index, task in enumerate(spec.tasks) if task.tunable]
        held = {} if spec.refresh else await self._flight.begin({i: self._performer.key(i) for i in tunable})
        known = {index: await self._known(index) for index in range(len(spec.tasks))}  # looked up after the claims
        self._handle(m.Started(known, held))

    async def _known(self, index: int) -> m.Known:
        key, spec = self._performer.key(index), self.facts.spec
        return await asyncio.to_thread(known_trials, self._store, key, self.facts.job, refresh=spec.refresh)

    async def _claim_taken(self, index: int) -> None:
        self._events.put_nowait(m.ClaimTaken(index, await self._known(index)))

    def _handle(self, event: m.Event) -> None:
        said = ""
        for instruction in self._machine.handle(event):
            if isinstance(instruction, m.Say):
                said = instruction.message
                log.info("%s: %s", self.facts.job, said)
                self._on_change(said)
            else:
                self._performer.perform(instruction)
        for index, task in enumerate(self._machine.tasks):
            if task.state.final and index not in self._final:
                self._final.add(index)
                letting_go = asyncio.create_task(self._flight.let_go(index))
                self._letting_go.add(letting_go)
                letting_go.add_done_callback(self._letting_go.discard)
        if not said:
            self._on_change("")
