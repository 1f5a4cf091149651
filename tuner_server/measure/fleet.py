"""What a device's measurement workers do for the rest of the server: time candidates, check outputs, time models."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from pathlib import Path

from tuner_core.errors import ConflictError
from tuner_server.measure.device_workers import DeviceWorkers, Work
from tuner_server.measure.exclusive import ExclusiveTurn
from tuner_server.measure.gate import CoreGate
from tuner_server.measure.inputs import ArgsInfo
from tuner_server.measure.metrics import FleetFacts, FleetMetrics
from tuner_server.measure.requests import (
    CheckOutcome,
    Measurement,
    MeasureRequest,
    ModelMeasurement,
    WorkerSnapshot,
)
from tuner_server.measure.slot import WorkerSlot
from tuner_server.measure.statistics import summarise
from tuner_server.partitions.interface import Partition, PartitionProvider
from tuner_server.processes.spawner import Spawner

__all__ = [
    "Alone", "CheckOutcome", "MeasureRequest", "Measurement", "ModelMeasurement", "WorkerFleet", "WorkerSnapshot",
]  # fmt: skip

CHECK_TIMEOUT_S = 60.0
MODELS_TIMEOUT_S = 300.0
MODELS_BUDGET_S = 20.0
PAUSE_BOUND_S = 20.0


class WorkerFleet:
    """The measurement workers of one device.

    Args:
        spawner: Starts the processes.
        provider: Divides the device.
        gate: Keeps search and build off the cores while a measurement runs.
        pause_bound_s: Exclusive measurement lets the others go on in between so that they never stand idle for longer;
            or twice the deadline of a request, if that is more.
        metrics: Goes on counting in these, e.g. those of the fleet before.
    """

    def __init__(
        self,
        spawner: Spawner,
        provider: PartitionProvider,
        gate: CoreGate,
        *,
        pause_bound_s: float = PAUSE_BOUND_S,
        metrics: FleetMetrics | None = None,
    ) -> None:
        self._metrics = metrics if metrics is not None else FleetMetrics(pause_bound_s)
        self._workers = DeviceWorkers(spawner, provider, gate, self._metrics, pause_bound_s)

    async def start(self, partitions: Sequence[Partition]) -> None:
        """Start one worker for each partition, in place of those that run.

        Raises:
            TunerError: One did not start, or its share was not granted; none is left running then.
        """
        await self._workers.start(partitions)

    async def stop(self) -> None:
        """End every worker. Requests that wait or run fail."""
        await self._workers.stop()

    @property
    def capacity(self) -> int:
        """Workers that take requests now."""
        return self._workers.capacity

    def workers(self) -> list[WorkerSnapshot]:
        """Every worker as it is now."""
        return [slot.snapshot() for slot in self._workers.slots]

    def facts(self) -> FleetFacts:
        """What measuring has cost so far: pauses, faults, restarts."""
        return self._metrics.facts()

    async def measure(self, request: MeasureRequest, freed: Callable[[], None] | None = None) -> Measurement:
        """Time one candidate on the next idle worker.

        Args:
            request: The candidate.
            freed: Called when the worker takes other requests. The measurement itself comes when its neighbours have
                been answered, too, or half a second later: a fault of theirs could still make it void.

        Raises:
            TrialFailed: It failed, with its kind.
            TunerError: There is no worker, and none can be started.
        """
        return await self._measure(request, alone=False, freed=freed)

    async def check(
        self,
        artifact: Path,
        args_info: ArgsInfo,
        reference: Path | None,
        fallback: Path | None = None,
        *,
        timeout_s: float = CHECK_TIMEOUT_S,
        sm_percent: int | None = None,
    ) -> CheckOutcome:
        """Compare an artifact's outputs with a reference.

        Args:
            artifact: Built library.
            args_info: Its arguments.
            reference: Inputs and outputs, see :func:`tuner_server.measure.inputs.save_reference`.
            fallback: Where there is no reference: another library of the same workload, run on the device.
            timeout_s: Deadline for the worker.
            sm_percent: Only workers with this share; None: any.

        Returns:
            ``inconclusive`` when there is nothing to compare with.

        Raises:
            TrialFailed: The artifact (or the fallback) fails to run.
        """
        return await self._check(artifact, args_info, reference, fallback, timeout_s, sm_percent, alone=False)

    async def measure_models(
        self, baseline: Path, tuned: Path, args_info: ArgsInfo, *, rounds: int = 10, seed: int = 0
    ) -> ModelMeasurement:
        """Time two Relax executables of one model in turn, alone on the device.

        Args:
            baseline: Executable whose outputs are the reference.
            tuned: The other one.
            args_info: Types and shapes of the parameters of ``main``.
            rounds: Timed rounds at most.
            seed: Of the random inputs and weights.

        Raises:
            TrialFailed: One of them fails to run.
        """
        async with self.exclusive() as alone:
            return await alone.measure_models(baseline, tuned, args_info, rounds=rounds, seed=seed)

    @contextlib.asynccontextmanager
    async def exclusive(self, sm_percent: int | None = None) -> AsyncIterator[Alone]:
        """Wait until nothing else runs on the device, and let nothing else begin until the end of the block.

        In a long block the others go on between two requests, so that no pause exceeds its bound.

        Args:
            sm_percent: Share of the workers that are used meanwhile; None: any.
        """
        async with self._workers.exclusive() as turn:
            yield Alone(self, turn, sm_percent)

    async def _measure(
        self, request: MeasureRequest, *, alone: bool, freed: Callable[[], None] | None = None
    ) -> Measurement:
        accepts = _having(request.sm_percent)
        if not any(accepts(slot) for slot in self._workers.slots):
            raise ConflictError(f"no worker has a share of {request.sm_percent} %")
        done = await self._workers.perform(
            Work("measure", request.arguments(), request.timeout_s, accepts, request.expected_us, freed), alone=alone
        )
        samples = tuple(float(sample) for sample in done.reply["samples_us"])
        summary = summarise(samples)
        return Measurement(
            latencies_us=samples,
            median_us=summary.median_us,
            ci_low_us=summary.ci_low_us,
            ci_high_us=summary.ci_high_us,
            neighbours=done.neighbours,
            sm_count=done.sm_count,
            affinity=done.affinity,
            partition=done.slot.partition,
            gave_up=bool(done.reply["gave_up"]),
        )

    async def _check(
        self,
        artifact: Path,
        args_info: ArgsInfo,
        reference: Path | None,
        fallback: Path | None,
        timeout_s: float,
        sm_percent: int | None,
        *,
        alone: bool,
    ) -> CheckOutcome:
        if reference is None and fallback is None:
            return CheckOutcome("inconclusive", None, "there is no reference to compare with")
        args = {
            "artifact": str(artifact),
            "args_info": [list(info) for info in args_info],
            "reference": str(reference) if reference is not None else None,
            "reference_artifact": str(fallback) if fallback is not None else None,
        }
        done = await self._workers.perform(Work("check", args, timeout_s, _having(sm_percent)), alone=alone)
        return CheckOutcome(done.reply["verdict"], done.reply["max_error"], done.reply["message"])

    async def _models(
        self, baseline: Path, tuned: Path, args_info: ArgsInfo, rounds: int, seed: int, sm_percent: int | None
    ) -> ModelMeasurement:
        args = {
            "baseline": str(baseline),
            "tuned": str(tuned),
            "args_info": [list(info) for info in args_info],
            "rounds": rounds,
            "budget_s": MODELS_BUDGET_S,
            "seed": seed,
        }
        work = Work("measure_models", args, MODELS_TIMEOUT_S, _having(sm_percent))
        done = await self._workers.perform(work, alone=True)
        return ModelMeasurement(**done.reply)


def _having(sm_percent: int | None) -> Callable[[WorkerSlot], bool]:
    return lambda slot: sm_percent in (None, slot.partition.sm_percent)


class Alone:
    """The device without neighbours; from :meth:`WorkerFleet.exclusive`. Requests run one at a time."""

    def __init__(self, fleet: WorkerFleet, turn: ExclusiveTurn, sm_percent: int | None = None) -> None:
        self._fleet = fleet
        self._turn = turn
        self._sm_percent = sm_percent
        self._lock = asyncio.Lock()

    async def measure(self, request: MeasureRequest) -> Measurement:
        """As :meth:`WorkerFleet.measure`."""
        async with self._lock:
            await self._turn.breathe(request.timeout_s)
            wanted = request if self._sm_percent is None else replace(request, sm_percent=self._sm_percent)
            return await self._fleet._measure(wanted, alone=True)

    async def check(
        self, artifact: Path, args_info: ArgsInfo, reference: Path | None, fallback: Path | None = None
    ) -> CheckOutcome:
        """As :meth:`WorkerFleet.check`."""
        async with self._lock:
            await self._turn.breathe(CHECK_TIMEOUT_S)
            return await self._fleet._check(
                artifact, args_info, reference, fallback, CHECK_TIMEOUT_S, self._sm_percent, alone=True
            )

    async def measure_models(
        self, baseline: Path, tuned: Path, args_info: ArgsInfo, *, rounds: int = 10, seed: int = 0
    ) -> ModelMeasurement:
        """As :meth:`WorkerFleet.measure_models`."""
        async with self._lock:
            await self._turn.breathe(MODELS_TIMEOUT_S)
            return await self._fleet._models(baseline, tuned, args_info, rounds, seed, self._sm_percent)
