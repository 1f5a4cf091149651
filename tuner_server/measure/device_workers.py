"""The worker processes of one device and the queue for them: hand out, watch, void, have replaced."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tuner_core.errors import ConflictError, UnavailableError
from tuner_core.model import FailureKind
from tuner_server import timeline
from tuner_server.measure.exclusive import ExclusiveTurn
from tuner_server.measure.gate import CoreGate
from tuner_server.measure.memory import says_out_of_memory
from tuner_server.measure.metrics import FleetMetrics
from tuner_server.measure.neighbours import Activity, Neighbours
from tuner_server.measure.repairs import Outcomes, Repairs
from tuner_server.measure.slot import WorkerSlot
from tuner_server.measure.turns import Turns
from tuner_server.partitions.interface import Partition, PartitionProvider
from tuner_server.processes.handle import Child, ChildDied, ChildError, ChildTimeout, describe_exit
from tuner_server.processes.spawner import Spawner
from tuner_server.trial import TrialFailed

log = logging.getLogger(__name__)

_DEVICE_FAULT = "device_fault"  # as the worker says it
_UNUSABLE_AFTER_S = 30.0


@dataclass(frozen=True)
class Work:
    """One request.

    Attributes:
        op: Operation of the worker.
        args: Its arguments.
        timeout_s: Deadline from the moment a worker gets it.
        accepts: Which slots will do.
        expected_us: Latency of what is measured, microseconds; None: unknown.
        freed: Called when its worker takes other requests; the answer comes later where faults spread.
    """

    op: str
    args: dict[str, Any]
    timeout_s: float
    accepts: Callable[[WorkerSlot], bool]
    expected_us: float | None = None
    freed: Callable[[], None] | None = None


@dataclass(frozen=True)
class Done:
    """An answer, and what it was got on. ``neighbours``: most other requests on the device at the same time."""

    reply: dict[str, Any]
    slot: WorkerSlot
    sm_count: int
    affinity: tuple[int, ...]
    neighbours: int


class _Lost(Exception):
    """The worker was lost with the request, which may be innocent."""

    def __init__(self, kind: FailureKind, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class DeviceWorkers:
    """Requests go to whichever worker is idle; lost workers come back.

    Args:
        spawner: Starts the processes.
        provider: Divides the device.
        gate: Keeps search and build off the cores while a measurement runs.
        metrics: Where faults, restarts and pauses are counted.
        pause_bound_s: See :meth:`ExclusiveTurn.breathe`.
    """

    def __init__(
        self,
        spawner: Spawner,
        provider: PartitionProvider,
        gate: CoreGate,
        metrics: FleetMetrics,
        pause_bound_s: float,
    ) -> None:
        self._provider = provider
        self._gate = gate
        self._metrics = metrics
        self._pause_bound_s = pause_bound_s
        self._slots: list[WorkerSlot] = []
        self._turns: Turns[WorkerSlot] = Turns(lambda slot: slot.ready)
        self._neighbours = Neighbours()
        self._requests: set[asyncio.Task[Any]] = set()
        self._requests_alone: set[asyncio.Task[Any]] = set()
        self._incomplete_since: float | None = None
        self._stopping = False
        self._repairs = Repairs(spawner, provider, metrics, Outcomes(self._filled, self._void_all, self._failing))

    # Life

    async def start(self, partitions: Sequence[Partition]) -> None:
        """Start one worker for each partition, in place of those that run.

        Raises:
            TunerError: One did not start, or its share was not granted; none is left running then.
        """
        await self.stop()
        self._stopping = False
        self._turns = Turns(lambda slot: slot.ready)
        self._slots = [WorkerSlot(partition) for partition in partitions]
        self._provider.watch(self._device_lost)
        started = await asyncio.gather(*(self._repairs.fill(slot) for slot in self._slots), return_exceptions=True)
        errors = [outcome for outcome in started if isinstance(outcome, BaseException)]
        if errors:
            await self.stop()
            raise errors[0]

    async def stop(self) -> None:
        """End every worker. Requests that wait or run fail."""
        self._stopping = True
        self._provider.watch(None)
        self._turns.fail(ConflictError("the measurement workers are being stopped"))
        await self._repairs.cancel()
        await asyncio.gather(*(self._end(slot) for slot in self._slots))
        await asyncio.gather(*self._requests, return_exceptions=True)
        self._slots = []
        self._incomplete_since = None

    async def _end(self, slot: WorkerSlot) -> None:
        child, slot.child = slot.child, None
        if child is None:
            return
        if slot.state == "measuring":
            await self._provider.stop_worker(child)
        else:
            await child.close()
        slot.state = "lost"

    @property
    def slots(self) -> Sequence[WorkerSlot]:
        """The places of the workers."""
        return self._slots

    @property
    def capacity(self) -> int:
        """Workers that take requests now."""
        return sum(slot.ready for slot in self._slots)

    @contextlib.asynccontextmanager
    async def exclusive(self, *, first: bool = False) -> AsyncIterator[ExclusiveTurn]:
        """Wait until nothing else runs on the device, and let nothing else begin until the end of the block.

        Args:
            first: Before all others that wait.
        """
        turn = ExclusiveTurn(
            self._turns, lambda: self._requests_alone, len(self._slots) > 1, self._metrics, self._pause_bound_s
        )
        await turn.begin(first=first)
        try:
            yield turn
        finally:
            turn.end()

    async def perform(self, work: Work, *, alone: bool) -> Done:
        """Do one request; once more when its worker was lost: elsewhere, or alone where faults spread.

        Args:
            work: The request.
            alone: The caller is inside :meth:`exclusive`.

        Raises:
            TrialFailed: It failed, with its kind.
            TunerError: There is no worker, and none can be started.
        """
        try:
            return await self._turn(work, alone=alone)
        except _Lost as lost:
            if self._stopping:
                raise ConflictError("the measurement workers are being stopped") from None
            log.warning("%s; trying once more", lost)
        try:
            if alone or not self._provider.faults_spread:
                return await self._turn(work, alone=alone, first=True)
            async with self.exclusive(first=True):
                return await self._turn(work, alone=True)
        except _Lost as lost:
            if self._stopping:  # its loss says nothing about the candidate
                raise ConflictError("the measurement workers are being stopped") from None
            raise TrialFailed(lost.kind, f"twice: {lost}") from None

    async def _turn(self, work: Work, *, alone: bool, first: bool = False) -> Done:
        with timeline.waiting("waiting to be measured"):
            slot = await self._turns.take(work.accepts, within_alone=alone, first=first)
        # A task of its own: when the caller is cancelled the worker is not killed for it, but finishes and comes back.
        task = asyncio.create_task(self._request(slot, work, alone))
        for group in (self._requests, self._requests_alone) if alone else (self._requests,):
            group.add(task)
            task.add_done_callback(group.discard)
        task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        done, activity = await asyncio.shield(task)
        if work.freed is not None:
            work.freed()
        right = done.reply.get("verdict") == "ok"  # a neighbour's fault can only make outputs wrong
        if self._provider.faults_spread and not right:
            await activity.over()
        if activity.void:
            raise _Lost(FailureKind.WORKER_LOST, "a neighbour's fault made the measurement void")
        return done

    async def _request(self, slot: WorkerSlot, work: Work, alone: bool) -> tuple[Done, Activity]:
        try:
            child = slot.child
            if child is None or not slot.ready:
                raise _Lost(FailureKind.WORKER_LOST, f"{slot.name} ended before it was asked")
            slot.state = "measuring"
            stage = timeline.as_stage("promotion") if alone else contextlib.nullcontext()
            with self._neighbours.activity() as activity, self._holding(slot, work, alone), stage:
                reply = await child.request(work.op, work.args, work.timeout_s, kill=False)
            return Done(reply, slot, slot.sm_count_seen, slot.affinity, activity.neighbours), activity
        except ChildTimeout:
            if slot.ready and not self._stopping:
                self._metrics.fault(FailureKind.RUN_TIMEOUT)
            self._repair(slot, void=False)
            raise TrialFailed(FailureKind.RUN_TIMEOUT, f"it did not end within {work.timeout_s:g} s") from None
        except ChildDied as died:
            kind = _kind_of_exit(died)
            self._fault(slot, kind)
            if kind is FailureKind.OUT_OF_MEMORY:  # by its own last words: nobody else is to blame
                raise TrialFailed(kind, f"it needs more memory than a worker has: {_last_words(died)}") from None
            raise _Lost(kind, f"{slot.name} ended ({describe_exit(died.code)})") from None
        except ChildError as error:
            if error.kind == _DEVICE_FAULT:
                self._fault(slot, FailureKind.RUN_ERROR)
                raise _Lost(FailureKind.RUN_ERROR, str(error)) from None
            raise TrialFailed(_kind_of_error(error.kind), str(error)) from None
        finally:
            if slot.state == "measuring":
                slot.state = "idle"
            self._turns.give(slot)

    def _holding(self, slot: WorkerSlot, work: Work, alone: bool) -> contextlib.AbstractContextManager[None]:
        if work.op == "check":
            return contextlib.nullcontext()
        if alone and (work.expected_us or 0.0) < slot.partition.quiet_below_us:
            return self._gate.quiet()
        return self._gate.measuring()

    # Faults

    def _fault(self, slot: WorkerSlot, kind: str) -> None:
        """A worker ended by itself: replace it, and its neighbours where faults spread."""
        if not slot.ready or self._stopping:
            return
        self._metrics.fault(kind)
        if self._provider.faults_spread:
            self._void_all()
        else:
            self._repair(slot, void=False)

    def _device_lost(self) -> None:
        log.warning("all measurement workers of %s are lost; starting them again", self._provider.device.model)
        self._metrics.fault("device_lost")
        self._void_all()

    def _void_all(self) -> None:
        self._metrics.voided(self._neighbours.spoil())
        self._repairs.void([slot.arriving for slot in self._slots if slot.arriving is not None])
        for slot in self._slots:
            self._repair(slot, void=True)

    def _repair(self, slot: WorkerSlot, *, void: bool) -> None:
        if not slot.ready or self._stopping:
            return
        if self._incomplete_since is None:
            self._incomplete_since = time.monotonic()
        self._turns.withdraw(slot)
        self._repairs.begin(slot, void=void)

    def _filled(self, slot: WorkerSlot) -> None:
        child = slot.child
        assert child is not None
        child.exited.add_done_callback(lambda _: self._ended(slot, child))
        if self._incomplete_since is not None and self.capacity == len(self._slots):
            self._metrics.recovered(time.monotonic() - self._incomplete_since)
            self._incomplete_since = None
        self._turns.offer(slot)

    def _failing(self, error: Exception, seconds: float) -> None:
        if self.capacity == 0 and seconds > _UNUSABLE_AFTER_S:
            self._turns.fail(UnavailableError(f"no measurement worker can be started: {error}"))

    def _ended(self, slot: WorkerSlot, child: Child) -> None:
        if slot.child is child and slot.state == "idle" and not self._stopping:
            log.warning("%s ended while idle (%s)", slot.name, describe_exit(child.exited.result()))
            self._fault(slot, FailureKind.WORKER_LOST)


def _kind_of_exit(died: ChildDied) -> FailureKind:
    """SIGKILL comes from outside (an operator, the kernel short of memory); other ends are the candidate's doing."""
    if died.code in (None, -signal.SIGKILL):
        return FailureKind.WORKER_LOST
    return FailureKind.OUT_OF_MEMORY if says_out_of_memory(died.output) else FailureKind.RUN_ERROR


def _last_words(died: ChildDied) -> str:
    lines = [line.strip() for line in died.output.splitlines() if says_out_of_memory(line)]
    return lines[-1][:200] if lines else ""


def _kind_of_error(kind: str) -> FailureKind:
    try:
        return FailureKind(kind)
    except ValueError:
        return FailureKind.RUN_ERROR
