"""Shares of the host's processor: whole cores, to which workers are pinned."""

from __future__ import annotations

import itertools
import platform
from collections.abc import Callable, Sequence

from tuner_core.errors import TunerError, UsageError
from tuner_core.model import DeviceInfo, PartitionKind
from tuner_server.partitions.host import processor_model, usable_cores, usable_memory_bytes
from tuner_server.partitions.interface import Partition, check_share, check_sum
from tuner_server.processes.handle import Child, ChildDied, ChildError, ChildTimeout
from tuner_server.processes.spawner import Spawner

_MEMORY_SHARE = 0.8  # of the memory that this process may use, per worker: a candidate may not take the host down
_TARGET_TIMEOUT_S = 60.0


class CpuPartitions:
    """The cores that this process may use, divided among workers.

    Args:
        spawner: Starts the process that asks LLVM what the processor is.
        cores: Cores to divide; None: those that affinity and the control group leave to this process.
        name: Of the device, in place of a UUID.
        oversubscribe: Allow shares that sum to more than 100 %, or to more whole cores than there are.
    """

    faults_spread = False

    def __init__(
        self,
        spawner: Spawner,
        cores: Sequence[int] | None = None,
        *,
        name: str = "cpu",
        oversubscribe: bool = False,
    ) -> None:
        self._spawner = spawner
        self._oversubscribe = oversubscribe
        self.cores = tuple(cores) if cores is not None else usable_cores()
        self._targets: dict[int, str] = {}
        self._device = DeviceInfo(
            kind="cpu", model=processor_model(), arch=platform.machine(), uuid=name, sm_count=len(self.cores)
        )

    @property
    def device(self) -> DeviceInfo:
        """The processor; ``sm_count`` is the number of cores."""
        return self._device

    @property
    def kinds_on_offer(self) -> tuple[PartitionKind, ...]:
        """Cores only."""
        return (PartitionKind.CPU,)

    def describe(self) -> tuple[str, ...]:
        """Nothing to add to the number of cores."""
        return ()

    async def start(self) -> None:
        """Nothing to do: cores are always there."""

    async def stop(self) -> None:
        """Nothing to undo."""

    def plan(self, sm_percent: int, workers: int | None = None) -> list[Partition]:
        """Equal shares, see :meth:`plan_shares`.

        Args:
            sm_percent: Share of each worker, 1..100.
            workers: How many; None: as many as fit.

        Raises:
            UsageError: Out of range, or more than the processor has.
        """
        check_share(sm_percent, workers)
        fitting = min(100 // sm_percent, len(self.cores) // self._cores_of(sm_percent))
        return self.plan_shares([sm_percent] * (fitting if workers is None else workers))

    def plan_shares(self, shares: Sequence[int]) -> list[Partition]:
        """Give each worker its share of the cores, rounded down, but at least one: a core is not divided.

        So a share of less than one core is granted a whole one, and the SM count of its records says so. Cores that
        share a physical core go to the same worker where they can, because they slow each other down.

        Raises:
            UsageError: Out of range, or more than the processor has without ``oversubscribe``.
        """
        check_sum(shares, self._oversubscribe)
        counts = [self._cores_of(share) for share in shares]
        if sum(counts) > len(self.cores) and not self._oversubscribe:
            wanted = " + ".join(f"{share}" for share in shares)
            raise UsageError(
                f"the shares {wanted} need {sum(counts)} whole cores, {self._device.uuid} has {len(self.cores)}; "
                "use fewer workers, or --oversubscribe at a loss of fidelity"
            )
        around = itertools.cycle(self.cores)  # once around, unless oversubscribed
        return [
            self._partition(index, share, tuple(itertools.islice(around, count)))
            for index, (share, count) in enumerate(zip(shares, counts, strict=True))
        ]

    def _cores_of(self, sm_percent: int) -> int:
        return max(1, len(self.cores) * sm_percent // 100)

    def _partition(self, index: int, sm_percent: int, affinity: tuple[int, ...]) -> Partition:
        cores = len(affinity)
        return Partition(
            index=index,
            device_uuid=self._device.uuid,
            kind=PartitionKind.CPU,
            sm_percent=sm_percent,
            expected_sm_count=cores,
            affinity=tuple(sorted(affinity)),
            tvm_device="cpu:0",
            env={
                "TVM_NUM_THREADS": str(cores),
                "TVM_BIND_THREADS": "0",  # the affinity of the process decides, TVM's own binding ignores it
                "OMP_NUM_THREADS": str(cores),
            },
            memory_bytes=int(usable_memory_bytes() * _MEMORY_SHARE),
        )

    async def target_json(self, sm_percent: int) -> str:
        """An llvm target with the host's processor type and the worker's number of cores.

        Raises:
            UsageError: The percentage is out of range.
            TunerError: The process that knows LLVM could not be asked.
        """
        check_share(sm_percent)
        cores = self._cores_of(sm_percent)
        if cores not in self._targets:
            try:
                child = await self._spawner.spawn("measure", {"device": "cpu:0"}, name="target")
                try:
                    answer = await child.request("cpu_target", {"cores": cores}, timeout_s=_TARGET_TIMEOUT_S)
                finally:
                    await child.close()
            except (ChildDied, ChildError, ChildTimeout) as error:
                raise TunerError(f"cannot ask LLVM about this processor: {error}") from None
            self._targets[cores] = answer["target"]
        return self._targets[cores]

    def watch(self, on_lost: Callable[[], None] | None) -> None:
        """Nothing to watch: workers end one by one."""

    async def prepare_worker(self, partition: Partition) -> None:
        """Nothing to do."""

    async def stop_worker(self, child: Child) -> bool:
        """Kill it; neighbours have their own cores and do not notice."""
        child.kill()
        await child.exited
        return True

    def spare_cores(self, partitions: Sequence[Partition]) -> list[int]:
        """Cores that no partition has."""
        taken = {core for partition in partitions for core in partition.affinity}
        return sorted(set(self.cores) - taken)


def parse_cores(device: str) -> tuple[int, ...] | None:
    """Cores that ``cpu:0,2-3`` names; None for ``cpu``, which means all.

    Raises:
        UsageError: It is no such list.
    """
    _, separator, listed = device.partition(":")
    if not separator:
        return None
    cores: set[int] = set()
    try:
        for part in listed.split(","):
            first, _, last = part.partition("-")
            cores.update(range(int(first), int(last or first) + 1))
    except ValueError:
        cores.clear()
    if not cores:
        raise UsageError(f"--device {device}: wants cores as in cpu:0-3 or cpu:0,2")
    return tuple(sorted(cores))
