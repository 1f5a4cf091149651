"""The seam between the service and a kind of device share: how a device is divided, and how a worker gets its part.

One provider stands for one device. A new kind of share is one new file beside this one that implements
:class:`PartitionProvider`; search, build, measurement and promotion do not know which kind they use.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from tuner_core.errors import UsageError
from tuner_core.model import DeviceInfo, PartitionKind
from tuner_server.processes.handle import Child

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Partition:
    """What one measurement worker may use of a device.

    Attributes:
        index: Position among the partitions of its plan, from 0.
        device_uuid: Device that it is a share of.
        kind: How the share is granted.
        sm_percent: The share that was asked for, 1..100.
        expected_sm_count: SMs (on a CPU: cores) that a worker must see; a worker that sees another number is not used.
        affinity: Cores to pin the worker process to; empty: all.
        tvm_device: TVM's name of the device inside the worker, e.g. ``cpu:0`` or ``cuda:0``.
        env: Environment of the worker, set before it touches the device.
        memory_bytes: Device memory that the worker may use for arguments; 0: no limit.
        quiet_below_us: Kernels that take less are measured for publication with search and build stopped.
        device_name: Tells the workers of several devices apart, e.g. ``cuda1``; empty: there is one device.
    """

    index: int
    device_uuid: str
    kind: PartitionKind
    sm_percent: int
    expected_sm_count: int
    affinity: tuple[int, ...] = ()
    tvm_device: str = "cpu:0"
    env: Mapping[str, str] = field(default_factory=dict)
    memory_bytes: int = 0
    quiet_below_us: float = math.inf
    device_name: str = ""

    @property
    def worker_name(self) -> str:
        """Of the worker, for logs."""
        return f"measure-{self.device_name}-{self.index}" if self.device_name else f"measure-{self.index}"


class PartitionProvider(Protocol):
    """Divides one device. Methods are called from the server's event loop and must not block it."""

    @property
    def device(self) -> DeviceInfo:
        """The device; complete after :meth:`start`."""
        ...

    @property
    def cores(self) -> Sequence[int]:
        """Host cores for this device: its workers', and what is left of them for search and build."""
        ...

    @property
    def kinds_on_offer(self) -> tuple[PartitionKind, ...]:
        """Kinds of share that this host can grant on the device, best first."""
        ...

    @property
    def faults_spread(self) -> bool:
        """Whether a worker that dies on the device takes its neighbours' measurements with it (CUDA MPS does).

        If so, the fleet voids every measurement in flight, restarts all workers, and measures the suspects one at a
        time.
        """
        ...

    def describe(self) -> tuple[str, ...]:
        """Lines for people on how the device is shared, for ``tuner-server check``; call it after :meth:`start`."""
        ...

    async def start(self) -> None:
        """Make the device ready for workers, e.g. start a control daemon.

        Raises:
            TunerError: The device cannot be used; one line saying why and what to do.
        """
        ...

    async def stop(self) -> None:
        """Undo :meth:`start`. Every worker has been stopped before. May be called without a start."""
        ...

    def watch(self, on_lost: Callable[[], None] | None) -> None:
        """Have ``on_lost`` called in the event loop when the device has lost all of its workers at once.

        That is when a control daemon has died: a worker may then hang instead of failing. None: call nothing any more.
        """
        ...

    def plan(self, sm_percent: int, workers: int | None = None) -> list[Partition]:
        """Divide the device into equal shares.

        Args:
            sm_percent: Share of each worker, 1..100.
            workers: How many; None: as many as fit.

        Raises:
            UsageError: The percentage is out of range, or the shares sum to more than the device has.
        """
        ...

    def plan_shares(self, shares: Sequence[int]) -> list[Partition]:
        """Divide the device into these shares, e.g. 50, 25, 25.

        Raises:
            UsageError: One is out of range, or they sum to more than the device has.
        """
        ...

    async def target_json(self, sm_percent: int) -> str:
        """TVM target of a worker at this share, as canonical JSON that ``Target(json.loads(...))`` accepts.

        Raises:
            UsageError: The percentage is out of range.
            TunerError: The device could not be asked.
        """
        ...

    async def prepare_worker(self, partition: Partition) -> None:
        """Called before each start of a worker, a restart included; brings back what the worker needs.

        Raises:
            TunerError: The device is not usable now; the fleet tries again later.
        """
        ...

    async def stop_worker(self, child: Child) -> bool:
        """Stop a worker that may be in the middle of a kernel, and wait until it has ended.

        Returns:
            Whether its neighbours are surely untouched. If not, and faults spread, their measurements are void.
        """
        ...

    def spare_cores(self, partitions: Sequence[Partition]) -> list[int]:
        """Host cores for search and build that no measurement uses; empty when there are none."""
        ...


def check_share(sm_percent: int, workers: int | None = None) -> None:
    """Refuse a share or number of workers that no device could grant.

    Raises:
        UsageError: Outside 1..100, or fewer than one worker.
    """
    if not 1 <= sm_percent <= 100:
        raise UsageError(f"the SM percentage must be from 1 to 100, not {sm_percent}")
    if workers is not None and workers < 1:
        raise UsageError(f"the number of workers must be at least 1, not {workers}")


def check_sum(shares: Sequence[int], oversubscribe: bool) -> None:
    """Refuse shares that no device could grant, and warn of more than 100 % where that is wanted.

    Raises:
        UsageError: A share is out of range; or they sum to more than 100 without ``oversubscribe``.
    """
    for share in shares:
        check_share(share)
    total = sum(shares)
    if total <= 100:
        return
    if not oversubscribe:
        wanted = " + ".join(f"{share}" for share in shares)
        raise UsageError(
            f"the shares {wanted} sum to {total} %, more than the device has; use fewer workers or smaller shares, "
            "or --oversubscribe at a loss of fidelity"
        )
    log.warning(
        "shares sum to %d %%: workers disturb each other. Measured with 8 workers at 25 %%: rank correlation down from "
        "0.95 to 0.88, and picks up to 34 %% slower than the best before verification",
        total,
    )
