"""The worker processes of one device and the queue for them: hand out, watch, void, replace."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tuner_core.errors import ConflictError, UnavailableError
from tuner_core.model import FailureKind
from tuner_server.measure.gate import CoreGate
from tuner_server.measure.slot import WorkerSlot
from tuner_server.measure.turns import Turns
from tuner_server.partitions.interface import Partition, PartitionProvider
from tuner_server.processes.spawner import Child, ChildDied, ChildError, ChildTimeout, Spawner, describe_exit
from tuner_server.trial import TrialFailed

log = logging.getLogger(__name__)

_DEVICE_FAULT = "device_fault"  # as the worker says it
_SETTLE_S = 0.5  # where faults spread: a faulting MPS client took its neighbours along within 0.3 s when tried
_UNUSABLE_AFTER_S = 30.0
_LONGEST_RETRY_S = 5.0


@dataclass(frozen=True)
class Work:
    """One request.

    Attributes:
        op: Operation of the worker.
        args: Its arguments.
        timeout_s: Deadline from the moment a worker gets it.
        accepts: Which slots will do.
    """

    op: str
    args: dict[str, Any]
    timeout_s: float
    accepts: Callable[[WorkerSlot], bool]


@dataclass(eq=False)
class _Activity:
    """A request that runs on the device."""

    slot: WorkerSlot
    neighbours: int = 0
    void: bool = False


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
    """

    def __init__(self, spawner: Spawner, provider: PartitionProvider, gate: CoreGate) -> None:
        self._spawner = spawner
        self._provider = provider
        self._gate = gate
        self._slots: list[WorkerSlot] = []
        self._turns: Turns[WorkerSlot] = Turns(lambda slot: slot.ready)
        self._running: set[_Activity] = set()
        self._settling: set[_Activity] = set()
        self._requests: set[asyncio.Task[Any]] = set()
        self._requests_alone: set[asyncio.Task[Any]] = set()
        self._repairs: set[asyncio.Task[None]] = set()
        self._stopping = False

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
        started = await asyncio.gather(*(self._fill(slot) for slot in self._slots), return_exceptions=True)
        errors = [outcome for outcome in started if isinstance(outcome, BaseException)]
        if errors:
            await self.stop()
            raise errors[0]

    async def stop(self) -> None:
        """End every worker. Requests that wait or run fail."""
        self._stopping = True
        self._provider.watch(None)
        self._turns.fail(ConflictError("the measurement workers are being stopped"))
        for repair in self._repairs:
            repair.cancel()
        await asyncio.gather(*self._repairs, return_exceptions=True)
        await asyncio.gather(*(self._end(slot) for slot in self._slots))
        await asyncio.gather(*self._requests, return_exceptions=True)
        self._slots = []

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
    async def exclusive(self, *, first: bool = False) -> AsyncIterator[None]:
        """Wait until nothing else runs on the device, and let nothing else begin until the end of the block.

        Args:
            first: Before all others that wait.
        """
        turns = self._turns
        await turns.begin_alone(first=first)
        try:
            yield
        finally:
            left = [task for task in self._requests_alone if not task.done()]
            if left:  # cancelled in the middle: the device is free when the worker is done
                ending = asyncio.ensure_future(asyncio.wait(left))
                ending.add_done_callback(lambda _: turns.end_alone())
            else:
                turns.end_alone()

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
        slot = await self._turns.take(work.accepts, within_alone=alone, first=first)
        # A task of its own: when the caller is cancelled the worker is not killed for it, but finishes and comes back.
        activity = _Activity(slot)
        task = asyncio.create_task(self._request(slot, work, activity, alone))
        for group in (self._requests, self._requests_alone) if alone else (self._requests,):
            group.add(task)
            task.add_done_callback(group.discard)
        task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        done = await asyncio.shield(task)
        if self._provider.faults_spread and done.neighbours:
            self._settling.add(activity)
            try:
                await asyncio.sleep(_SETTLE_S)
            finally:
                self._settling.discard(activity)
        if activity.void:
            raise _Lost(FailureKind.WORKER_LOST, "a neighbour's fault made the measurement void")
        return done

    async def _request(self, slot: WorkerSlot, work: Work, activity: _Activity, alone: bool) -> Done:
        name = f"measure-{slot.partition.index}"
        try:
            child = slot.child
            if child is None or not slot.ready:
                raise _Lost(FailureKind.WORKER_LOST, f"{name} ended before it was asked")
            slot.state = "measuring"
            self._running.add(activity)
            for other in self._running:
                other.neighbours = max(other.neighbours, len(self._running) - 1)
            with self._holding(work, alone):
                reply = await child.request(work.op, work.args, work.timeout_s, kill=False)
            return Done(reply, slot, slot.sm_count_seen, slot.affinity, activity.neighbours)
        except ChildTimeout:
            self._repair(slot)
            raise TrialFailed(FailureKind.RUN_TIMEOUT, f"it did not end within {work.timeout_s:g} s") from None
        except ChildDied as died:
            self._fault(slot)
            raise _Lost(_kind_of_exit(died.code), f"{name} ended ({describe_exit(died.code)})") from None
        except ChildError as error:
            if error.kind == _DEVICE_FAULT:
                self._fault(slot)
                raise _Lost(FailureKind.RUN_ERROR, str(error)) from None
            raise TrialFailed(_kind_of_error(error.kind), str(error)) from None
        finally:
            self._running.discard(activity)
            if slot.state == "measuring":
                slot.state = "idle"
            self._turns.give(slot)

    def _holding(self, work: Work, alone: bool) -> contextlib.AbstractContextManager[None]:
        if alone:
            return self._gate.promoting()
        return self._gate.measuring() if work.op == "measure" else contextlib.nullcontext()

    # Faults

    def _fault(self, slot: WorkerSlot) -> None:
        """A worker ended by itself: replace it, and its neighbours where faults spread."""
        if not slot.ready or self._stopping:
            return
        self._repair(slot)
        if self._provider.faults_spread:
            self._void_all()

    def _device_lost(self) -> None:
        log.warning("all measurement workers of %s are lost; starting them again", self._provider.device.model)
        self._void_all()

    def _void_all(self) -> None:
        for activity in self._running | self._settling:
            activity.void = True
        for slot in self._slots:
            self._repair(slot)

    def _repair(self, slot: WorkerSlot) -> None:
        if not slot.ready or self._stopping:
            return
        slot.state = "starting"
        self._turns.withdraw(slot)
        repair = asyncio.create_task(self._bring_back(slot))
        self._repairs.add(repair)
        repair.add_done_callback(self._repairs.discard)

    async def _bring_back(self, slot: WorkerSlot) -> None:
        """Stop what is left of the worker and start another, for as long as it takes."""
        child, slot.child = slot.child, None
        if child is not None:
            try:
                untouched = await self._provider.stop_worker(child)
            except asyncio.CancelledError:
                child.kill()
                raise
            if not untouched and self._provider.faults_spread:
                self._void_all()
        loop = asyncio.get_running_loop()
        began, delay_s = loop.time(), 0.1
        while True:
            try:
                await self._fill(slot)
                return
            except Exception as error:  # whatever it is, the capacity has to come back
                slot.state = "lost"
                log.warning("%s; trying again in %.1f s", error, delay_s)
                if self.capacity == 0 and loop.time() - began > _UNUSABLE_AFTER_S:
                    self._turns.fail(UnavailableError(f"no measurement worker can be started: {error}"))
            await asyncio.sleep(delay_s)
            delay_s = min(2 * delay_s, _LONGEST_RETRY_S)

    async def _fill(self, slot: WorkerSlot) -> None:
        child = await slot.start(self._spawner, self._provider)
        child.exited.add_done_callback(lambda _: self._ended(slot, child))
        self._turns.offer(slot)

    def _ended(self, slot: WorkerSlot, child: Child) -> None:
        if slot.child is child and slot.state == "idle" and not self._stopping:
            log.warning("measure-%d ended while idle (%s)", slot.partition.index, describe_exit(child.exited.result()))
            self._fault(slot)


def _kind_of_exit(code: int | None) -> FailureKind:
    """SIGKILL comes from outside (an operator, the kernel short of memory); other ends are the candidate's doing."""
    return FailureKind.WORKER_LOST if code in (None, -signal.SIGKILL) else FailureKind.RUN_ERROR


def _kind_of_error(kind: str) -> FailureKind:
    try:
        return FailureKind(kind)
    except ValueError:
        return FailureKind.RUN_ERROR
