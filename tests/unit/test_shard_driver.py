"""What the driver of a sharded job does with what instances say."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from tests.integration.replay_fleet import FACTS
from tests.replay_server import replay_spec
from tuner_client.progress import Silent
from tuner_client.sharding.driver import ShardDriver
from tuner_client.sharding.gathering import Gatherer
from tuner_client.sharding.journal import ShardJournal
from tuner_client.sharding.link import InstanceLink
from tuner_client.sharding.report import ShardedJob
from tuner_core.leases import messages as m
from tuner_core.leases.machine import LeaseMachine
from tuner_core.leases.state import LeaseSettings, TaskPlan
from tuner_core.model import TaskState
from tuner_core.proto.tuner.v1 import leases_pb2 as pb
from tuner_core.store.open import open_store
from tuner_core.store.wire import workload_from_message
from tuner_core.transport.options import ConnectionOptions

PLACE = "127.0.0.1:1"


class Arriving(Gatherer):
    """Lets a test say when a record arrives."""

    def arrive(self, trial_id: str) -> None:
        self._have.add(trial_id)
        self._arrived.set()


async def hear(folder: Path) -> None:
    spec = replay_spec(2, 40)
    workloads = {task.name: workload_from_message(task.workload) for task in spec.tasks}
    store = open_store(f"sqlite:///{folder / 'records.sqlite'}")
    gatherer = Arriving(store, "sqlite://", "job")
    machine = LeaseMachine([TaskPlan(name, 1, True) for name in workloads], 40, LeaseSettings(heartbeat_s=60.0))
    job = ShardedJob("job", spec, FACTS, workloads, time.time())
    link = InstanceLink(ConnectionOptions(PLACE))
    driver = ShardDriver(
        job, [link], machine, machine.board.settings, store, gatherer, ShardJournal(folder, "job"), Silent(),
        target_given=False,
    )  # fmt: skip

    def say(**event: object) -> None:
        driver._hear(link, pb.WatchShardResponse(**event))

    try:
        driver._feed(m.InstanceJoined(time.monotonic(), PLACE, "1", 1, 8, in_flight=32))
        first, second = machine.board.tasks.values()
        lease, other = first.leases[PLACE], second.leases[PLACE]
        lease.conclude = True
        name, token = lease.task, lease.token
        ended = pb.LeaseEnded(
            task=name, token=token, reason="concluded", verified=True, best_latency_us=5.0, best_trial_id="best"
        )
        say(ended=ended)
        say(trial=pb.TrialFinished(task=other.task, token=other.token, trial_id="next", latency_us=7.0))
        assert list(second.counted) == ["next"]  # though the record of what ended is not here yet
        assert first.state is not TaskState.TUNED
        gatherer.arrive("best")
        async with asyncio.timeout(10):
            while first.state is not TaskState.TUNED:
                await asyncio.sleep(0.01)
    finally:
        await link.connection.close()
        store.close()


def test_a_promotion_whose_record_is_on_its_way_holds_up_nothing_else_that_its_instance_says(tmp_path: Path) -> None:
    asyncio.run(hear(tmp_path))
