"""The worker processes of a server, as one: search, build, and measurement on its devices, in lanes for jobs."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass

from tuner_core.errors import ConflictError, TunerError, UsageError
from tuner_core.model import DeviceInfo, PartitionKind, target_digest
from tuner_server.build.pool import BuildPool
from tuner_server.config import ServerConfig
from tuner_server.fairness import on_behalf_of
from tuner_server.lanes.device import SharedDevice
from tuner_server.lanes.floor import Floor, Grant, Wish
from tuner_server.lanes.lane import Lane
from tuner_server.lanes.pools import WorkPools
from tuner_server.measure.gate import CoreGate
from tuner_server.measure.requests import WorkerSnapshot
from tuner_server.partitions.host import usable_cores
from tuner_server.partitions.select import Chosen, select_providers
from tuner_server.processes.spawner import Spawner
from tuner_server.scheduler.gathering import Gathering
from tuner_server.scheduler.machine import Limits
from tuner_server.scratch import Scratch
from tuner_server.search.pool import SearchPool

log = logging.getLogger(__name__)

GATHER_PER_WORKER = 4
"""Built candidates per worker that are measured in one pause of the builds, where there is no core to spare."""


@dataclass(frozen=True)
class Offer:
    """What a server has for a share.

    Attributes:
        sm_percent: The share.
        sm_count: SMs or cores that its workers see.
        target_json: What is built for.
        devices: Devices that would do, all of one model.
        on_offer: Whether partitions with the share are configured; if not, free devices are divided anew for it.
    """

    sm_percent: int
    sm_count: int
    target_json: str
    devices: tuple[SharedDevice, ...]
    on_offer: bool

    @property
    def device(self) -> DeviceInfo:
        """The device, or one of several of the same model."""
        return self.devices[0].info

    @property
    def workers(self) -> int:
        """Workers that a job would have, if it had all of the devices."""
        if self.on_offer:
            return sum(device.configured.count(self.sm_percent) for device in self.devices)
        return sum(len(device.provider.plan(self.sm_percent)) for device in self.devices)


_BATCH = 8
"""Candidates of a task that are proposed together, where many tasks are searched; see :meth:`Limits.for_tasks`."""
_IN_FLIGHT_PER_CORE = 6
"""Candidates in flight for each core that searches and builds: a candidate takes about a core-second, and six seconds
from the search's first thought of it to its measurement. More only means proposing without having learned."""


class Engine:
    """Starts at the first need, lets jobs in when there are partitions for them, stops with the server.

    Args:
        config: The server's settings.
    """

    def __init__(self, config: ServerConfig) -> None:
        self._config = config
        self._starting = asyncio.Lock()
        self._asking = asyncio.Lock()
        self._arranging = asyncio.Lock()
        self._started = False
        self._spawner: Spawner | None = None
        self._pools: WorkPools | None = None
        self._gate: CoreGate | None = None
        self._floor: Floor | None = None
        self._scratch: Scratch | None = None
        self._granted: dict[str, asyncio.Future[Grant]] = {}
        self._chosen: list[Chosen] = []
        self._lanes: dict[str, Lane] = {}
        self._gathering = Gathering(1)
        self._tickets = itertools.count()
        self.devices: list[SharedDevice] = []
        self.evaluator = config.evaluator
        self.run_timeout_s = config.run_timeout_s
        self.notes: tuple[str, ...] = ()

    # Facts

    @property
    def search(self) -> SearchPool:
        """The search processes."""
        assert self._pools is not None, "the engine has not been started"
        return self._pools.search

    @property
    def build(self) -> BuildPool:
        """The build processes."""
        assert self._pools is not None, "the engine has not been started"
        return self._pools.build

    @property
    def tvm_version(self) -> str:
        """TVM's version in the worker processes."""
        assert self._spawner is not None
        return self._spawner.tvm_version

    @property
    def default_share(self) -> int:
        """Share of a job that does not ask for one."""
        return self.devices[0].configured[0]

    @property
    def batch(self) -> int:
        """Candidates in one batch of a search."""
        return self._config.batch or _BATCH

    @property
    def limits(self) -> Limits:
        """How much of a job is in flight, on the cores that search and build have now."""
        assert self._pools is not None, "the engine has not been started"
        return Limits.for_cores(self.batch, _IN_FLIGHT_PER_CORE * self._pools.cores)

    def workers(self) -> list[WorkerSnapshot]:
        """The workers of all devices as they are now."""
        return [worker for device in self.devices for worker in device.fleet.workers()]

    async def offers(self, sm_percent: int) -> list[Offer]:
        """What a share is here: one offer for devices of each model, those with partitions of the share first.

        Raises:
            UsageError, ConflictError: No device can be partitioned so, or may be.
        """
        shares = sorted({share for device in self.devices for share in device.configured}, reverse=True)
        if sm_percent not in shares and not self._config.repartition:
            raise ConflictError(
                f"this server offers {', '.join(f'{share} %' for share in shares)} only, not {sm_percent} %; "
                "ask for one of these with --sm-percent, or use another server"
            )
        groups: dict[tuple[str, str, int], list[SharedDevice]] = {}
        refusal: UsageError | None = None
        for device in self.devices:
            if not self._config.repartition and sm_percent not in device.configured:
                continue
            try:
                key = (
                    await device.provider.target_json(sm_percent),
                    device.info.model,
                    device.sm_count_at(sm_percent),
                )
            except UsageError as error:
                refusal = refusal or error
                continue
            groups.setdefault(key, []).append(device)
        if not groups:
            assert refusal is not None
            raise refusal
        found = []
        for (target, _, sm_count), devices in groups.items():
            having = tuple(device for device in devices if sm_percent in device.configured)
            found.append(Offer(sm_percent, sm_count, target, having or tuple(devices), bool(having)))
        return sorted(found, key=lambda offer: not offer.on_offer)

    async def offer(self, sm_percent: int, target_json: str = "") -> Offer:
        """What a job with that share would run on.

        Args:
            sm_percent: The share.
            target_json: Target that the job wants; empty: that of the first device with partitions of the share, or
                else of the first device.

        Raises:
            UsageError, ConflictError: No device can be partitioned so, or may be, or has the target.
        """
        offers = await self.offers(sm_percent)
        for offer in offers:
            if not target_json or target_digest(offer.target_json) == target_digest(target_json):
                return offer
        own = ", ".join(dict.fromkeys(offer.target_json for offer in offers))
        raise ConflictError(
            f"this server measures for the target {own}, not for {target_json}; "
            "leave out --target, or use a server with that device"
        )

    # Life

    async def start(self) -> None:
        """Load TVM, find the devices, start the workers as configured. A second call does nothing.

        Raises:
            TunerError: TVM does not load, no such device, or no worker starts.
        """
        async with self._starting:
            if self._started:
                return
            config = self._config
            self._scratch = await asyncio.to_thread(Scratch)
            self._spawner = spawner = Spawner(config.data_dir / "logs")
            try:
                await spawner.start()
                self._pools = WorkPools(config, spawner, self._scratch.path)
                self._gate = gate = CoreGate([self._pools])
                self._chosen, self.notes = await select_providers(config.devices, config.data_dir, spawner)
                for note in self.notes:
                    log.info("%s", note)
                only = len(self._chosen) == 1
                self.devices = [
                    SharedDevice(one.name, one.settings, one.provider, spawner, gate, only=only) for one in self._chosen
                ]
                await asyncio.gather(*(device.divide(device.configured) for device in self.devices))
                self._floor = Floor({device.name: device.configured for device in self.devices})
                await self._arrange()
            except BaseException:
                await self._end_all()
                raise
            self._started = True

    async def _arrange(self) -> None:
        """Give search and build the cores that the present partitions leave, and lend builds those of GPU workers."""
        assert self._pools is not None and self._gate is not None
        spare = set(usable_cores())
        for device in self.devices:
            spare.difference_update(device.provider.cores)
        for device in self.devices:
            spare.update(device.provider.spare_cores(device.partitions))
        lent: set[int] = set()
        if spare and self._config.lend_cores:
            for partition in (partition for device in self.devices for partition in device.partitions):
                if partition.kind is not PartitionKind.CPU:
                    lent.update(partition.affinity)
        await self._pools.arrange(tuple(sorted(spare)), tuple(sorted(lent - spare)))
        self._gate.spare = bool(spare)

    async def stop(self) -> None:
        """End every process and remove the scratch files."""
        async with self._starting:
            await self._end_all()
            self._started = False

    async def _end_all(self) -> None:
        await asyncio.gather(*(device.fleet.stop() for device in self.devices))
        await asyncio.gather(*(one.provider.stop() for one in self._chosen))
        self.devices, self._chosen = [], []
        if self._pools is not None:
            await self._pools.stop()
        if self._spawner is not None:
            await self._spawner.stop()
        if self._scratch is not None:
            await asyncio.to_thread(self._scratch.remove)

    # Lanes

    @contextlib.asynccontextmanager
    async def lane(self, sm_percent: int, target_json: str = "") -> AsyncIterator[Lane]:
        """Wait for partitions of a share, in the order of the calls, and have them for the length of the block.

        Jobs at different shares on offer run at the same time, jobs at one share one after the other. For a share that
        is not on offer, devices that nobody uses are divided anew; they go back when a job wants them back.

        Args:
            sm_percent: The share.
            target_json: Target that the job wants; empty: the server's own.

        Raises:
            UsageError, ConflictError: See :meth:`offer`.
            TunerError: The device could not be divided.
        """
        ticket = f"{sm_percent} % #{next(self._tickets)}"
        async with self._asking:
            await self.start()
            offer = await self.offer(sm_percent, target_json)
            assert self._floor is not None
            self._granted[ticket] = asyncio.get_running_loop().create_future()
            names = tuple(device.name for device in offer.devices)
            self._floor.ask(Wish(ticket, sm_percent, names, offer.on_offer))
        self._serve()
        behalf = on_behalf_of.set(ticket)
        try:
            grant = await self._granted[ticket]
            devices = [device for device in offer.devices if device.name in grant.devices]
            async with self._arranging:
                await self._divide(devices, grant)
                if not self._lanes:  # else the pools keep the cores that they have
                    await self._arrange()
                lane = self._lanes[ticket] = self._lane(offer, devices)
                self._gather()
            yield lane
        finally:
            on_behalf_of.reset(behalf)
            self._lanes.pop(ticket, None)
            self._gather()
            del self._granted[ticket]
            self._floor.leave(ticket)
            self._serve()

    def _serve(self) -> None:
        assert self._floor is not None
        for grant in self._floor.grants():
            waiting = self._granted[grant.wish.job]
            if not waiting.done():
                waiting.set_result(grant)

    async def _divide(self, devices: list[SharedDevice], grant: Grant) -> None:
        assert self._floor is not None
        outcomes = await asyncio.gather(
            *(
                device.divide(device.configured) if grant.configured else device.divide_for(grant.wish.sm_percent)
                for device in devices
            ),
            return_exceptions=True,
        )
        for device, outcome in zip(devices, outcomes, strict=True):
            if isinstance(outcome, BaseException):
                self._floor.undivided(device.name)
        for outcome in outcomes:
            if isinstance(outcome, TunerError):
                raise TunerError(f"the device could not be divided for {grant.wish.sm_percent} %: {outcome}")
            if isinstance(outcome, BaseException):
                raise outcome

    def _gather(self) -> None:
        """Adapt how many candidates are measured in one pause of the builds to the workers that are in use."""
        assert self._gate is not None
        workers = sum(len(lane.fleet.workers()) for lane in self._lanes.values())
        self._gathering.enough = 1 if self._gate.spare else max(1, GATHER_PER_WORKER * workers)

    def _lane(self, offer: Offer, devices: list[SharedDevice]) -> Lane:
        assert self._pools is not None
        return Lane(
            sm_percent=offer.sm_percent,
            sm_count=offer.sm_count,
            target_json=offer.target_json,
            devices=devices,
            search=self.search,
            build=self.build,
            tvm_version=self.tvm_version,
            evaluator=self.evaluator,
            run_timeout_s=self.run_timeout_s,
            limits=self.limits,
            gathering=self._gathering,
        )
