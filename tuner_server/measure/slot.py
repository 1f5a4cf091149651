"""One partition's worker: started, asked what it sees, replaced when it is lost."""

from __future__ import annotations

from tuner_core.errors import TunerError
from tuner_core.model import PartitionKind
from tuner_server.measure.requests import WorkerSnapshot
from tuner_server.partitions.interface import Partition, PartitionProvider
from tuner_server.processes.handle import Child, ChildDied, ChildError, ChildTimeout
from tuner_server.processes.spawner import Spawner

_HELLO_TIMEOUT_S = 60.0  # creating a CUDA context takes seconds on a busy host
_PROMPT_S = 2.0


class WorkerSlot:
    """A place for one worker. A lost worker leaves the slot empty until another one comes.

    Attributes:
        partition: What the worker may use.
        child: Its process; None while there is none.
        arriving: A process on its way to the device, in place of ``child``.
        state: ``starting``, ``idle``, ``measuring`` or ``lost``.
        sm_count_seen: SMs or cores that the present worker sees.
        affinity: Cores that it is pinned to.
    """

    def __init__(self, partition: Partition) -> None:
        self.partition = partition
        self.child: Child | None = None
        self.arriving: Child | None = None
        self.state = "starting"
        self.sm_count_seen = 0
        self.affinity: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """For logs."""
        return self.partition.worker_name

    @property
    def ready(self) -> bool:
        """Whether the worker takes requests."""
        return self.child is not None and self.state in ("idle", "measuring")

    def snapshot(self) -> WorkerSnapshot:
        """The worker as it is now."""
        partition = self.partition
        return WorkerSnapshot(
            index=partition.index,
            device_uuid=partition.device_uuid,
            kind=str(partition.kind),
            sm_percent=partition.sm_percent,
            sm_count_seen=self.sm_count_seen,
            state=self.state,
            pid=self.child.pid if self.child is not None else 0,
            affinity=self.affinity,
        )

    async def fork(self, spawner: Spawner) -> Child:
        """A process for this place that has not touched the device yet; :meth:`occupy` comes next.

        It gets ready (share, cores, libraries) while the worker before it is still being stopped.

        Raises:
            TunerError: It cannot be started.
        """
        partition = self.partition
        on_host = partition.kind is PartitionKind.CPU
        config: dict[str, object] = {"device": partition.tvm_device}
        if not on_host:
            config["memory_bytes"] = partition.memory_bytes
        try:
            return await spawner.spawn(
                "measure",
                config,
                name=self.name,
                env=partition.env,
                affinity=partition.affinity,
                address_space_bytes=partition.memory_bytes if on_host else 0,
            )
        except ChildDied as error:
            raise TunerError(f"the worker {self.name} did not start: {error}") from None

    async def occupy(self, child: Child, provider: PartitionProvider, *, prompt: bool = False) -> None:
        """Let a forked process go to the device, and take it as this place's worker if its share was granted.

        Args:
            child: The process.
            provider: Of the device.
            prompt: Give it two seconds, not a minute. A device that takes new workers in does so in half a second, four
                at once; one that is busy with a fault keeps them waiting for 5 s and refuses them then
                (cudaErrorDevicesUnavailable): trying again is faster.

        Raises:
            TunerError: It does not get there, or sees another number of SMs than its share has. It is stopped then.
        """
        partition = self.partition
        self.state = "starting"
        self.arriving = child
        try:
            seen = await child.request("hello", {}, timeout_s=_PROMPT_S if prompt else _HELLO_TIMEOUT_S, kill=False)
            if seen["sm_count"] != partition.expected_sm_count:
                unit = "cores" if partition.kind is PartitionKind.CPU else "SMs"
                raise TunerError(
                    f"the worker {self.name} sees {seen['sm_count']} {unit} instead of the "
                    f"{partition.expected_sm_count} of its share of {partition.sm_percent} %: it is not used"
                )
        except BaseException as error:
            if prompt and isinstance(error, ChildTimeout):
                child.kill()  # nothing of it is on the device yet
            elif not isinstance(error, ChildDied):  # what is gone need not be stopped; after a fault that may hang
                await provider.stop_worker(child)
            if isinstance(error, ChildDied | ChildError | ChildTimeout):
                raise TunerError(f"the worker {self.name} did not start: {error}") from None
            raise
        finally:
            self.arriving = None
        self.sm_count_seen = seen["sm_count"]
        self.affinity = tuple(seen["affinity"]) if partition.affinity else ()
        self.child = child
        self.state = "idle"
