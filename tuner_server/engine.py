"""The worker processes of a server, as one: search, build and measurement on one device at one share at a time."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import tempfile
from pathlib import Path

from tuner_core.errors import ConflictError
from tuner_core.model import DeviceInfo, PartitionKind, Workload, target_digest
from tuner_server.build.pool import Artifact, BuildPool
from tuner_server.config import ServerConfig
from tuner_server.measure.fleet import WorkerFleet
from tuner_server.measure.gate import CoreGate
from tuner_server.measure.requests import CheckOutcome, WorkerSnapshot
from tuner_server.partitions.interface import Partition, PartitionProvider
from tuner_server.partitions.select import select_provider
from tuner_server.processes.spawner import Spawner
from tuner_server.scheduler.gathering import Gathering
from tuner_server.scheduler.machine import Limits
from tuner_server.search.messages import SearchSettings
from tuner_server.search.pool import SearchPool

log = logging.getLogger(__name__)

GATHER_PER_WORKER = 4
"""Built candidates per worker that are measured in one pause of the builds, where there is no core to spare."""


class Engine:
    """Starts at the first need, re-partitions between jobs, stops with the server.

    Args:
        config: The server's settings.
    """

    def __init__(self, config: ServerConfig) -> None:
        self._config = config
        self._lock = asyncio.Lock()
        self._started = False
        self._spawner: Spawner | None = None
        self._provider: PartitionProvider | None = None
        self._fleet: WorkerFleet | None = None
        self._search: SearchPool | None = None
        self._build: BuildPool | None = None
        self._scratch: Path | None = None
        self._partitions: list[Partition] = []
        self.evaluator = config.evaluator
        self.run_timeout_s = config.run_timeout_s
        self.limits = Limits()
        self.gathering = Gathering(1)
        self.notes: tuple[str, ...] = ()
        self.target_json = ""
        self.target_digest = ""
        self.sm_count = 0

    # Facts

    @property
    def provider(self) -> PartitionProvider:
        """What partitions the device."""
        assert self._provider is not None, "the engine has not been started"
        return self._provider

    @property
    def fleet(self) -> WorkerFleet:
        """The measurement workers."""
        assert self._fleet is not None, "the engine has not been started"
        return self._fleet

    @property
    def search(self) -> SearchPool:
        """The search processes."""
        assert self._search is not None, "the engine has not been started"
        return self._search

    @property
    def build(self) -> BuildPool:
        """The build processes."""
        assert self._build is not None, "the engine has not been started"
        return self._build

    @property
    def device(self) -> DeviceInfo:
        """The device that is measured."""
        return self.provider.device

    @property
    def tvm_version(self) -> str:
        """TVM's version in the worker processes."""
        assert self._spawner is not None
        return self._spawner.tvm_version

    @property
    def partition_kinds(self) -> tuple[PartitionKind, ...]:
        """Kinds of partition on offer."""
        return tuple(self.provider.kinds_on_offer)

    @property
    def partition_kind(self) -> PartitionKind:
        """Kind of the present partitions."""
        return self._partitions[0].kind

    @property
    def default_share(self) -> int:
        """Share of a job that does not ask for one."""
        if self._config.partitions:
            return self._config.partitions[0]
        return self._config.sm_percent or 100

    def workers(self) -> list[WorkerSnapshot]:
        """The workers as they are now."""
        return self.fleet.workers()

    async def target_at(self, sm_percent: int) -> str:
        """Target, as JSON, of a worker with that share.

        Raises:
            UsageError, ConflictError: The device cannot be partitioned so, or may not be.
        """
        self._plan(sm_percent)
        return await self.provider.target_json(sm_percent)

    def sm_count_at(self, sm_percent: int) -> int:
        """SMs (or cores) that a worker with that share should see."""
        return self._plan(sm_percent)[0].expected_sm_count

    # Life

    async def start(self) -> None:
        """Load TVM, find the device, start the workers of the default share. A second call does nothing.

        Raises:
            TunerError: TVM does not load, no such device, or no worker starts.
        """
        async with self._lock:
            if self._started:
                return
            config = self._config
            self._scratch = Path(tempfile.mkdtemp(prefix="tuner-", dir=_scratch_root()))
            self._spawner = Spawner(config.data_dir / "logs")
            await self._spawner.start()
            self._provider, self.notes = await select_provider(
                config.device, config.data_dir, self._spawner, mps=config.mps, oversubscribe=config.oversubscribe
            )
            for note in self.notes:
                log.info("%s", note)
            await self._provider.start()
            await self._partition(self.default_share)
            self._started = True

    async def ensure_share(self, sm_percent: int) -> None:
        """Make the workers those of that share; called only while nothing is being measured.

        Raises:
            UsageError, ConflictError: See :meth:`target_at`.
        """
        await self.start()
        async with self._lock:
            if self._partitions and self._partitions[0].sm_percent == sm_percent:
                return
            log.info("re-partitioning for a share of %d %%", sm_percent)
            await self._partition(sm_percent)

    def _plan(self, sm_percent: int) -> list[Partition]:
        config = self._config
        own = sm_percent == (config.sm_percent or 100) or sm_percent in config.partitions
        if not own and not config.repartition:
            offered = sorted(set(config.partitions) or {config.sm_percent or 100})
            raise ConflictError(
                f"this server offers {', '.join(f'{share} %' for share in offered)} only, not {sm_percent} %; "
                "ask for one of these with --sm-percent, or use another server"
            )
        workers = config.workers if own and config.workers else None
        return self.provider.plan(sm_percent, workers)

    async def _partition(self, sm_percent: int) -> None:
        assert self._spawner is not None and self._scratch is not None
        partitions = self._plan(sm_percent)
        await self._stop_pools()
        spare = self.provider.spare_cores(partitions)
        cores = len(spare) or len(os.sched_getaffinity(0))
        search_processes = self._config.search_processes or _share_of(cores, 0.4)
        build_processes = self._config.build_processes or max(1, cores if not spare else _share_of(cores, 0.8))
        self._search = SearchPool(self._spawner, search_processes, SearchSettings(), affinity=spare)
        self._build = BuildPool(
            self._spawner,
            build_processes,
            self._scratch,
            timeout_s=self._config.build_timeout_s,
            reference_timeout_s=self._config.reference_timeout_s,
            affinity=spare,
        )
        self.gathering = Gathering(1 if spare else GATHER_PER_WORKER * len(partitions))
        gate = CoreGate([self._search, self._build], spare=bool(spare))
        self._fleet = WorkerFleet(self._spawner, self.provider, gate)
        self._partitions = partitions
        await self._fleet.start(partitions)
        self.target_json = await self.provider.target_json(sm_percent)
        self.target_digest = target_digest(self.target_json)
        self.sm_count = self._fleet.workers()[0].sm_count_seen
        batch = self._config.batch or (16 if self.device.kind == "cpu" else 32)
        self.limits = Limits(batch=batch, batches_at_once=2 * (search_processes + 1))

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

    async def _stop_pools(self) -> None:
        for part in (self._fleet, self._search, self._build):
            if part is not None:
                await part.stop()
        self._fleet = self._search = self._build = None

    async def stop(self) -> None:
        """End every process and remove the scratch files."""
        async with self._lock:
            await self._stop_pools()
            if self._provider is not None:
                await self._provider.stop()
            if self._spawner is not None:
                await self._spawner.stop()
            if self._scratch is not None:
                await asyncio.to_thread(shutil.rmtree, self._scratch, ignore_errors=True)
            self._started = False


def _share_of(cores: int, share: float) -> int:
    return max(1, round(cores * share))


def _scratch_root() -> str | None:
    """Artifacts are many, small and short-lived: keep them in memory where there is a place for that."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
