"""What a running job works with: the workers of its share, and its part of search and build."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tuner_core.model import DeviceInfo, EvaluatorSettings, PartitionKind, Workload, target_digest
from tuner_server.build.pool import Artifact, BuildPool
from tuner_server.lanes.device import SharedDevice
from tuner_server.lanes.fleet import LaneFleet
from tuner_server.measure.requests import CheckOutcome
from tuner_server.scheduler.gathering import Gathering
from tuner_server.scheduler.machine import Limits
from tuner_server.search.pool import SearchPool


@dataclass(frozen=True)
class Lane:
    """One share on the devices of one model, target and SM count, for one job at a time.

    Attributes:
        sm_percent: The share.
        sm_count: SMs or cores that each worker sees.
        target_json: What to build for.
        devices: Where its workers are; of one model.
        search, build: The server's pools, shared with other lanes.
        tvm_version: In the worker processes.
        evaluator: How to sample, unless a job says otherwise.
        run_timeout_s: Deadline of a measurement.
        limits: How much of a job is in flight.
        gathering: Where there is no core to spare: collects built candidates.
        fleet: The workers.
    """

    sm_percent: int
    sm_count: int
    target_json: str
    devices: Sequence[SharedDevice]
    search: SearchPool
    build: BuildPool
    tvm_version: str
    evaluator: EvaluatorSettings
    run_timeout_s: float
    limits: Limits
    gathering: Gathering
    fleet: LaneFleet = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "fleet", LaneFleet(self.devices, self.sm_percent))

    @property
    def device(self) -> DeviceInfo:
        """The device, or one of several of the same model."""
        return self.devices[0].info

    @property
    def device_uuids(self) -> tuple[str, ...]:
        """All of its devices."""
        return tuple(device.info.uuid for device in self.devices)

    @property
    def target_digest(self) -> str:
        """Digest of the target."""
        return target_digest(self.target_json)

    @property
    def partition_kind(self) -> PartitionKind:
        """How the share is granted."""
        return self.devices[0].partitions[0].kind

    def prestart(self, tasks: int) -> None:
        """Begin to start the processes that a search of so many operators needs; those that are there stay."""
        self.search.prestart(tasks)
        self.build.prestart()

    async def check(
        self, artifact: Artifact, workload: Workload, reference: Path | None, fallback: Artifact | None
    ) -> CheckOutcome:
        """Compare an artifact's output with the reference.

        Args:
            artifact: What is to be published.
            workload: Its operator.
            reference: Inputs and outputs of the unscheduled build; None when that took too long.
            fallback: The fallback schedule's artifact, the second-best reference; None when it is what is compared.
        """
        second = fallback.path if fallback is not None else None
        return await self.fleet.check(artifact.path, workload.args_info, reference, second)
