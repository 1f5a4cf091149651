"""A whole GPU for one worker: what a host without MPS can grant."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tuner_core.errors import TunerError, UsageError
from tuner_core.model import DeviceInfo, PartitionKind
from tuner_server.gpu.inventory import GpuInfo
from tuner_server.gpu.lock import GpuLock
from tuner_server.gpu.target import PROBE_COMMAND, DeviceFacts, cuda_target_json, read_device_facts
from tuner_server.partitions.host import quiet_below_us, split_cores, usable_cores
from tuner_server.partitions.interface import Partition, check_share
from tuner_server.processes.handle import Child

_MEMORY_SHARE = 0.9  # of the device's memory, for arguments; the rest is for contexts and what others hold


def device_info(gpu: GpuInfo, facts: DeviceFacts | None) -> DeviceInfo:
    """A GPU as records name it; ``facts`` completes what NVML does not say."""
    return DeviceInfo(
        kind="cuda",
        model=gpu.name,
        arch=gpu.arch,
        uuid=gpu.uuid,
        sm_count=facts.sm_count if facts else 0,
        driver_version=gpu.driver_version,
        cuda_version=gpu.cuda_version,
    )


class ExclusivePartitions:
    """One worker with all SMs of one GPU.

    Args:
        gpu: The GPU.
        reason: Why no share can be granted, in one line; part of the refusal of every other share.
        cores: Host cores for its worker, search and build; None: all that this process may use.
        pause_builds: See :func:`quiet_below_us`.
        probe: Command that reads the device's facts.
    """

    faults_spread = False

    def __init__(
        self,
        gpu: GpuInfo,
        reason: str,
        *,
        cores: Sequence[int] | None = None,
        pause_builds: str = "auto",
        probe: Sequence[str] = PROBE_COMMAND,
    ) -> None:
        self._gpu = gpu
        self._reason = reason
        self._probe = probe
        self.cores = usable_cores() if cores is None else tuple(cores)
        self._split = split_cores(self.cores, 1)
        self._quiet_below_us = quiet_below_us(self._split, pause_builds)
        self._facts: DeviceFacts | None = None
        self._lock: GpuLock | None = None

    @property
    def device(self) -> DeviceInfo:
        """The GPU."""
        return device_info(self._gpu, self._facts)

    @property
    def kinds_on_offer(self) -> tuple[PartitionKind, ...]:
        """Exclusive only."""
        return (PartitionKind.EXCLUSIVE,)

    def describe(self) -> tuple[str, ...]:
        """Why there is one worker only."""
        return (f"one exclusive worker: {self._reason}",)

    async def start(self) -> None:
        """Take the GPU and ask it what it is. A second call does nothing.

        Raises:
            ConflictError: Another server holds it.
            TunerError: It cannot be used.
        """
        if self._lock is not None:
            return
        self._lock = GpuLock(self._gpu.uuid)
        try:
            self._facts = await read_device_facts(self._env, self._probe)
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Give the GPU back."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    @property
    def _env(self) -> dict[str, str]:
        return {"CUDA_VISIBLE_DEVICES": self._gpu.uuid}

    def plan(self, sm_percent: int, workers: int | None = None) -> list[Partition]:
        """The one partition.

        Raises:
            UsageError: Anything but one worker with 100 %.
        """
        check_share(sm_percent, workers)
        return self.plan_shares([sm_percent] * (workers or 1))

    def plan_shares(self, shares: Sequence[int]) -> list[Partition]:
        """The one partition.

        Raises:
            UsageError: Anything but one share of 100 %.
        """
        if list(shares) != [100]:
            raise UsageError(f"only one worker with 100 % of the GPU is on offer here: {self._reason}")
        if self._facts is None:
            raise TunerError("the GPU has not been started")
        return [
            Partition(
                index=0,
                device_uuid=self._gpu.uuid,
                kind=PartitionKind.EXCLUSIVE,
                sm_percent=100,
                expected_sm_count=self._facts.sm_count,
                affinity=self._split.workers[0],
                tvm_device="cuda:0",
                env=self._env,
                memory_bytes=int(self._facts.memory_bytes * _MEMORY_SHARE),
                quiet_below_us=self._quiet_below_us,
            )
        ]

    async def target_json(self, sm_percent: int) -> str:
        """Target of the GPU.

        Raises:
            UsageError: A share other than 100 %.
            TunerError: Not started.
        """
        self.plan(sm_percent)
        assert self._facts is not None
        return cuda_target_json(self._facts)

    def watch(self, on_lost: Callable[[], None] | None) -> None:
        """Nothing to watch: there is one worker."""

    async def prepare_worker(self, partition: Partition) -> None:
        """Nothing to do: the driver is always there."""

    async def stop_worker(self, child: Child) -> bool:
        """Kill it: there is no neighbour to harm."""
        child.kill()
        await child.exited
        return True

    def spare_cores(self, partitions: Sequence[Partition]) -> list[int]:
        """Host cores that no worker is pinned to."""
        return list(self._split.rest)
