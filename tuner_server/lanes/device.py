"""One device of a server: its provider, its workers, and how it is divided now."""

from __future__ import annotations

import asyncio
import dataclasses
import logging

from tuner_core.model import DeviceInfo
from tuner_server.config import DeviceSettings
from tuner_server.measure.fleet import WorkerFleet
from tuner_server.measure.gate import CoreGate
from tuner_server.partitions.interface import Partition, PartitionProvider
from tuner_server.processes.spawner import Spawner

log = logging.getLogger(__name__)


class SharedDevice:
    """A device that is divided into partitions, each with a worker.

    Args:
        name: Of the device on this server, e.g. ``cuda:1``; unique.
        settings: How it is divided unless a job needs another share.
        provider: Divides it; started.
        spawner: Starts the workers.
        gate: Keeps search and build off the cores while a measurement runs.
        only: Whether it is the server's only device; if not, its workers carry its name.

    Attributes:
        wanted_alone: Promotions that wait for the device or have it.
    """

    def __init__(
        self,
        name: str,
        settings: DeviceSettings,
        provider: PartitionProvider,
        spawner: Spawner,
        gate: CoreGate,
        *,
        only: bool,
    ) -> None:
        self.name = name
        self.provider = provider
        self.fleet = WorkerFleet(spawner, provider, gate)
        self.wanted_alone = 0
        self._prefix = "" if only else name.replace(":", "")
        self._dividing = asyncio.Lock()
        self._partitions: list[Partition] = []
        if settings.partitions:
            planned = provider.plan_shares(settings.partitions)
        else:
            planned = provider.plan(settings.sm_percent or 100, settings.workers or None)
        self._planned = planned
        self.configured = tuple(partition.sm_percent for partition in planned)

    @property
    def info(self) -> DeviceInfo:
        """The device as records name it."""
        return self.provider.device

    @property
    def shares(self) -> tuple[int, ...]:
        """Shares of the present partitions; empty when it is not divided."""
        return tuple(partition.sm_percent for partition in self._partitions)

    @property
    def partitions(self) -> list[Partition]:
        """The present partitions."""
        return self._partitions

    def sm_count_at(self, sm_percent: int) -> int:
        """SMs (or cores) that a worker with that share should see.

        Raises:
            UsageError: The device cannot grant such a share.
        """
        return self.provider.plan(sm_percent, 1)[0].expected_sm_count

    async def divide(self, shares: tuple[int, ...]) -> None:
        """Have a worker for each share, in place of those that run; nothing happens when it is divided so already.

        Raises:
            TunerError: A worker did not start, or sees another number of SMs than its share has. No worker runs then.
        """
        async with self._dividing:
            if shares == self.shares:
                return
            if self._partitions:
                log.info("%s: re-partitioning into %s", self.name, ", ".join(f"{share} %" for share in shares))
            planned = self._planned if shares == self.configured else self.provider.plan_shares(shares)
            partitions = [dataclasses.replace(partition, device_name=self._prefix) for partition in planned]
            self._partitions = []
            await self.fleet.start(partitions)
            self._partitions = partitions

    async def divide_for(self, sm_percent: int) -> None:
        """As many workers with that share as fit.

        Raises:
            UsageError, TunerError: See :meth:`divide`.
        """
        await self.divide(tuple(partition.sm_percent for partition in self.provider.plan(sm_percent)))
