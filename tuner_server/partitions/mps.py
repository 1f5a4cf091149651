"""Several workers on one GPU, each capped to a share of its SMs by CUDA MPS.

What the design rests on was measured (H200, driver 580): the percentage is read when a process creates its context;
workers whose shares sum to at most 100 % rank candidates like an idle GPU; a client that faults, or is killed in the
middle of a kernel, takes all others with it, while ``terminate_client`` leaves them untouched.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tuner_core.errors import TunerError, UsageError
from tuner_core.model import DeviceInfo, PartitionKind
from tuner_server.gpu.inventory import GpuInfo
from tuner_server.gpu.mps import MpsDaemon, Termination, control_version, find_control
from tuner_server.gpu.sm_share import SmShares, fit_shares
from tuner_server.gpu.target import PROBE_COMMAND, DeviceFacts, cuda_target_json, read_device_facts
from tuner_server.partitions.exclusive import device_info
from tuner_server.partitions.host import quiet_below_us, split_cores, usable_cores
from tuner_server.partitions.interface import Partition, check_share, check_sum
from tuner_server.processes.handle import Child

log = logging.getLogger(__name__)

MAX_CLIENTS = 48  # per device, up to CUDA 13.0 (https://docs.nvidia.com/deploy/mps/)
_PROBED_SHARES = (10, 25, 50)
_PROBED_MEMORY_BYTES = 4 << 30
_MEMORY_SHARE = 0.9  # of the device's memory, for the workers together
_EXIT_GRACE_S = 1.0
_CONFIRM_S = 0.5


class MpsPartitions:
    """Shares of one GPU.

    Args:
        gpu: The GPU.
        directory: Where the daemon's pipes and logs go; this GPU's own.
        control: Path of the control program.
        external: Use the daemon that the operator runs.
        oversubscribe: Allow shares that sum to more than 100 %.
        cores: Host cores for its workers, search and build; None: all that this process may use.
        pause_builds: See :func:`quiet_below_us`.
        probe: Command that reads the device's facts.
    """

    faults_spread = True

    def __init__(
        self,
        gpu: GpuInfo,
        directory: Path,
        *,
        control: str | None = None,
        external: bool = False,
        oversubscribe: bool = False,
        cores: Sequence[int] | None = None,
        pause_builds: str = "auto",
        probe: Sequence[str] = PROBE_COMMAND,
    ) -> None:
        self._gpu = gpu
        self._oversubscribe = oversubscribe
        self.cores = usable_cores() if cores is None else tuple(cores)
        self._pause_builds = pause_builds
        self._probe = probe
        self._facts: DeviceFacts | None = None
        self._shares: SmShares | None = None
        self._limits_memory = True
        self._version = ""
        control = control or find_control()
        if control is None:
            raise TunerError("nvidia-cuda-mps-control is not installed")
        self._control = control
        self.daemon = MpsDaemon(gpu.uuid, directory, control=control, external=external)

    @property
    def device(self) -> DeviceInfo:
        """The GPU, with all of its SMs."""
        return device_info(self._gpu, self._facts)

    @property
    def kinds_on_offer(self) -> tuple[PartitionKind, ...]:
        """MPS shares; 100 % is one of them."""
        return (PartitionKind.MPS,)

    def describe(self) -> tuple[str, ...]:
        """The daemon, and the SM counts that were read back."""
        whose = "the operator's" if self.daemon.external else f"own, pid {self.daemon.pid}"
        state = f"answers, pipes in {self.daemon.pipe_directory}" if self._shares is not None else "is not running"
        lines = [f"MPS control daemon ({whose}) {state}"]
        if self._version:
            lines.append(f"MPS: {self._version}")
        if self._shares is not None:
            seen = ", ".join(f"{count} at {share} %" for share, count in sorted((self._shares.seen or {}).items()))
            lines.append(f"SMs seen: {seen}, {self._shares.total} at 100 %")
        if not self._limits_memory:
            lines.append("MPS does not limit device memory here: only a worker's own arguments are limited")
        return tuple(lines)

    # Life

    async def start(self) -> None:
        """Start the daemon and read back what a few shares are granted. A second call does nothing.

        Raises:
            ConflictError: Another server holds the GPU.
            TunerError: The daemon does not start, or shares are not capped.
        """
        if self._shares is not None:
            return
        await self.daemon.start()
        try:
            self._facts = await self._ask(100)
            self._version = await control_version(self._control)
            # Together, not one by one: a context costs most of a second. It is also the first test of several clients.
            capped, self._limits_memory = await asyncio.gather(
                asyncio.gather(*(self._ask(share) for share in _PROBED_SHARES)),
                self._memory_limit_works(min(self._facts.memory_bytes // 4, _PROBED_MEMORY_BYTES)),
            )
            seen = dict(zip(_PROBED_SHARES, (facts.sm_count for facts in capped), strict=True))
            self._shares = fit_shares(self._facts.sm_count, seen)
            log.info("%s: %d SMs, by share %s", self._gpu.name, self._facts.sm_count, seen)
        except BaseException:
            await self.stop()
            raise

    async def _ask(self, sm_percent: int, memory_bytes: int = 0) -> DeviceFacts:
        return await read_device_facts(self._env(sm_percent, memory_bytes), self._probe)

    async def _memory_limit_works(self, memory_bytes: int) -> bool:
        try:
            await self._ask(5, memory_bytes)
        except TunerError as error:
            log.warning("device memory of workers is limited for their arguments only, not by MPS: %s", error)
            return False
        return True

    async def stop(self) -> None:
        """Stop the daemon, unless it is the operator's."""
        self._shares = None
        await self.daemon.stop()

    # Partitions

    def _env(self, sm_percent: int, memory_bytes: int) -> dict[str, str]:
        env = {
            **self.daemon.client_env,
            "CUDA_VISIBLE_DEVICES": self._gpu.uuid,
            "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": str(sm_percent),
        }
        if memory_bytes:
            env["CUDA_MPS_PINNED_DEVICE_MEM_LIMIT"] = f"0={memory_bytes >> 20}M"
        return env

    def plan(self, sm_percent: int, workers: int | None = None) -> list[Partition]:
        """Equal shares.

        Args:
            sm_percent: Share of each worker, 1..100.
            workers: How many; None: as many as fit into 100 %.

        Raises:
            UsageError: Shares that sum to more than 100 % without ``oversubscribe``, or too many workers.
        """
        check_share(sm_percent, workers)
        return self.plan_shares([sm_percent] * (workers or min(100 // sm_percent, MAX_CLIENTS)))

    def plan_shares(self, shares: Sequence[int]) -> list[Partition]:
        """Shares one by one, e.g. 50, 25, 25.

        Raises:
            UsageError: See :meth:`plan`.
        """
        if len(shares) > MAX_CLIENTS:
            raise UsageError(f"{len(shares)} workers are too many: MPS takes {MAX_CLIENTS} on a GPU")
        check_sum(shares, self._oversubscribe)
        if self._facts is None or self._shares is None:
            raise TunerError("the GPU has not been started")
        total = sum(shares)
        split = split_cores(self.cores, len(shares))
        partitions = []
        for index, share in enumerate(shares):
            memory = int(self._facts.memory_bytes * _MEMORY_SHARE * share / max(100, total))
            partitions.append(
                Partition(
                    index=index,
                    device_uuid=self._gpu.uuid,
                    kind=PartitionKind.MPS,
                    sm_percent=share,
                    expected_sm_count=self._shares.at(share),
                    affinity=split.workers[index],
                    tvm_device="cuda:0",
                    env=self._env(share, memory if self._limits_memory else 0),
                    memory_bytes=memory,
                    quiet_below_us=quiet_below_us(split, self._pause_builds),
                )
            )
        return partitions

    async def target_json(self, sm_percent: int) -> str:
        """Target of a worker; the same at every share.

        Raises:
            UsageError: The percentage is out of range.
            TunerError: Not started.
        """
        check_share(sm_percent)
        if self._facts is None:
            raise TunerError("the GPU has not been started")
        return cuda_target_json(self._facts)

    def spare_cores(self, partitions: Sequence[Partition]) -> list[int]:
        """Host cores that no worker is pinned to."""
        return list(split_cores(self.cores, len(partitions)).rest)

    # Workers

    def watch(self, on_lost: Callable[[], None] | None) -> None:
        """Call this when the daemon has died."""
        self.daemon.on_death = on_lost

    async def prepare_worker(self, partition: Partition) -> None:
        """Have a daemon that answers, started again if it has died.

        Raises:
            TunerError: It does not start.
        """
        await self.daemon.revive()

    async def stop_worker(self, child: Child) -> bool:
        """Take the worker off the GPU (``terminate_client``), let it exit, kill last.

        Its socket is closed at once: it exits by itself when its request is over, or when the daemon has ended that.

        Returns:
            Whether its neighbours are surely untouched.
        """
        if not child.alive:
            return False  # how it ended, and in the middle of what, is unknown
        child.hang_up()
        terminating = asyncio.ensure_future(self.daemon.terminate_client(child.pid))
        waited: set[asyncio.Future[Any]] = {terminating, child.exited}
        await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        if child.exited.done() and child.exited.result() == 0:
            terminating.cancel()
            return True  # it was done with its work, and left in order
        await asyncio.wait({terminating}, timeout=_CONFIRM_S if child.exited.done() else None)
        outcome = terminating.result() if terminating.done() else Termination.UNKNOWN
        terminating.cancel()  # after a fault the daemon may never answer
        if outcome is Termination.ACCEPTED:
            await asyncio.wait({child.exited}, timeout=_EXIT_GRACE_S)
            if child.alive and await self.daemon.is_client(child.pid):
                outcome = Termination.UNKNOWN
        if child.alive:
            child.kill()
            await asyncio.wait({child.exited}, timeout=_EXIT_GRACE_S)
        return outcome is not Termination.UNKNOWN
