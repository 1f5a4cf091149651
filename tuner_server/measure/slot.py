"""One partition's worker: started, asked what it sees, replaced when it is lost."""

from __future__ import annotations

from tuner_core.errors import TunerError
from tuner_core.model import PartitionKind
from tuner_server.measure.requests import WorkerSnapshot
from tuner_server.partitions.interface import Partition, PartitionProvider
from tuner_server.processes.spawner import Child, ChildDied, ChildError, ChildTimeout, Spawner

_HELLO_TIMEOUT_S = 60.0  # creating a CUDA context takes seconds on a busy host


class WorkerSlot:
    """A place for one worker. A lost worker leaves the slot empty until :meth:`start` fills it again.

    Attributes:
        partition: What the worker may use.
        child: Its process; None while there is none.
        state: ``starting``, ``idle``, ``measuring`` or ``lost``.
        sm_count_seen: SMs or cores that the present worker sees.
        affinity: Cores that it is pinned to.
        starts: Workers started so far.
    """

    def __init__(self, partition: Partition) -> None:
        self.partition = partition
        self.child: Child | None = None
        self.state = "starting"
        self.sm_count_seen = 0
        self.affinity: tuple[int, ...] = ()
        self.starts = 0

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

    async def start(self, spawner: Spawner, provider: PartitionProvider) -> Child:
        """Start a worker and check that its share was granted.

        Raises:
            TunerError: It did not start, or sees another number of SMs than its share has.
        """
        partition = self.partition
        self.state = "starting"
        await provider.prepare_worker(partition)
        name = f"measure-{partition.index}"
        on_host = partition.kind is PartitionKind.CPU
        try:
            child = await spawner.spawn(
                "measure",
                {"device": partition.tvm_device},
                name=name,
                env=partition.env,
                affinity=partition.affinity,
                address_space_bytes=partition.memory_bytes if on_host else 0,
            )
        except ChildDied as error:
            raise TunerError(f"the worker {name} did not start: {error}") from None
        self.starts += 1
        try:
            seen = await child.request("hello", {}, timeout_s=_HELLO_TIMEOUT_S, kill=False)
            if seen["sm_count"] != partition.expected_sm_count:
                unit = "cores" if on_host else "SMs"
                raise TunerError(
                    f"the worker {name} sees {seen['sm_count']} {unit} instead of the {partition.expected_sm_count} of "
                    f"its share of {partition.sm_percent} %: it is not used"
                )
        except BaseException as error:
            await provider.stop_worker(child)
            if isinstance(error, ChildDied | ChildError | ChildTimeout):
                raise TunerError(f"the worker {name} did not start: {error}") from None
            raise
        self.sm_count_seen = seen["sm_count"]
        self.affinity = tuple(seen["affinity"]) if partition.affinity else ()
        self.child = child
        self.state = "idle"
        return child
