"""How lost workers come back: in overlapping steps, and what is recorded of why they were lost."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.gpu import kernels
from tests.integration import measured_libraries as libraries
from tests.integration.measured_libraries import MATMUL_ARGS, VECTOR_ARGS
from tests.integration.process_state import gone, until
from tuner_core.errors import TunerError
from tuner_core.model import EvaluatorSettings, FailureKind
from tuner_server.measure.fleet import MeasureRequest, WorkerFleet
from tuner_server.measure.gate import CoreGate
from tuner_server.measure.slot import WorkerSlot
from tuner_server.partitions.cpu import CpuPartitions
from tuner_server.partitions.interface import Partition
from tuner_server.processes.handle import Child, ChildError
from tuner_server.processes.spawner import Spawner
from tuner_server.trial import TrialFailed

ROLES = {"measure": "tuner_server.measure.worker"}
ONCE = EvaluatorSettings(number=1, repeat=1, min_repeat_ms=0)
pytestmark = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")


class CountingSpawner(Spawner):
    """Says when it has forked a child."""

    forked = 0

    async def spawn(self, *args: Any, **options: Any) -> Child:
        child = await super().spawn(*args, **options)
        self.forked += 1
        return child


class Shared(CpuPartitions):
    """Cores that behave like a GPU under MPS: who dies takes the neighbours' measurements along."""

    faults_spread = True
    gentle = True

    def __init__(self, spawner: CountingSpawner) -> None:
        super().__init__(spawner, sorted(os.sched_getaffinity(0))[:2])

    async def prepare_worker(self, partition: Partition) -> None:
        pass

    async def stop_worker(self, child: Child) -> bool:
        await super().stop_worker(child)
        return self.gentle


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def spawner(runner: asyncio.Runner, tmp_path_factory: pytest.TempPathFactory) -> Iterator[CountingSpawner]:
    spawner = CountingSpawner(tmp_path_factory.mktemp("logs"), ROLES)
    runner.run(spawner.start())
    yield spawner
    runner.run(spawner.stop())


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("libraries")
    functions = {
        "matmul": libraries.matmul(),
        "hang": libraries.calling("pause"),
        "crash": libraries.calling("abort"),
        "slow": libraries.calling("usleep", 100_000),
    }
    built = {name: libraries.build(function, folder / f"{name}.so") for name, function in functions.items()}
    return {**built, "greedy": kernels.build("greedy", folder, '{"kind": "llvm"}')}


@contextlib.asynccontextmanager
async def two_workers(spawner: Spawner, provider: CpuPartitions, **options: Any) -> AsyncIterator[WorkerFleet]:
    fleet = WorkerFleet(spawner, provider, CoreGate(spare=True), **options)
    await fleet.start(provider.plan(50))
    try:
        yield fleet
    finally:
        await fleet.stop()


def pids(fleet: WorkerFleet) -> set[int]:
    return {worker.pid for worker in fleet.workers()}


def ask(path: Path, timeout_s: float = 10.0) -> MeasureRequest:
    return MeasureRequest(path, MATMUL_ARGS if path.stem == "matmul" else VECTOR_ARGS, ONCE, timeout_s)


async def fails(fleet: WorkerFleet, request: MeasureRequest) -> TrialFailed:
    with pytest.raises(TrialFailed) as failure:
        await fleet.measure(request)
    return failure.value


# Out of memory


def test_a_candidate_whose_own_allocation_aborts_the_worker_is_out_of_memory(
    runner: asyncio.Runner, spawner: CountingSpawner, library: dict[str, Path]
) -> None:
    async def check() -> None:
        async with two_workers(spawner, Shared(spawner)) as fleet:
            before = pids(fleet)
            failure = await fails(fleet, kernels.request(library["greedy"]))
            assert failure.kind is FailureKind.OUT_OF_MEMORY
            assert "bad_alloc" in str(failure), "the worker's last words are not in the record"
            assert await until(lambda: fleet.capacity == 2)
            assert before.isdisjoint(pids(fleet)), "it did abort, and the neighbour was not trusted"
            assert fleet.facts().faults == {"out_of_memory": 1}, "its words are proof: it is not tried twice"
            # whoever ends without such words afterwards is not blamed for those in the same log
            assert (await fails(fleet, ask(library["crash"]))).kind is FailureKind.RUN_ERROR

    runner.run(asyncio.wait_for(check(), 60))


def test_arguments_beyond_the_workers_limit_are_out_of_memory_and_cost_no_worker(
    runner: asyncio.Runner, spawner: CountingSpawner, library: dict[str, Path]
) -> None:
    async def check() -> None:
        worker = await spawner.spawn("measure", {"device": "cpu:0", "memory_bytes": 1 << 20}, name="limited")
        for op, extra in (("measure", {}), ("check", {"reference_artifact": str(library["matmul"]), "outputs": 1})):
            arguments = {**ask(library["matmul"]).arguments(), **extra}
            huge = {**arguments, "args_info": [["TENSOR", "float32", [1 << 20]]] * 3}
            with pytest.raises(ChildError, match="need 12 MiB, a worker may use 1 MiB") as error:
                await worker.request(op, huge)
            assert error.value.kind == FailureKind.OUT_OF_MEMORY
            await worker.request(op, arguments)
        await worker.close()

    runner.run(asyncio.wait_for(check(), 60))


# Recovery


def test_the_next_worker_is_forked_while_the_one_before_is_still_being_stopped(
    runner: asyncio.Runner, spawner: CountingSpawner, library: dict[str, Path]
) -> None:
    class Patient(Shared):
        async def stop_worker(self, child: Child) -> bool:
            forked = spawner.forked
            self.overlapped = await until(lambda: spawner.forked > forked)
            return await super().stop_worker(child)

    async def check() -> None:
        provider = Patient(spawner)
        async with two_workers(spawner, provider) as fleet:
            before = pids(fleet)
            assert (await fails(fleet, ask(library["hang"], 0.2))).kind is FailureKind.RUN_TIMEOUT
            assert await until(lambda: fleet.capacity == 2)
            assert provider.overlapped
            assert len(before & pids(fleet)) == 1, "a neighbour was replaced though the stop was gentle"
            facts = fleet.facts()
            assert (facts.worker_restarts, facts.recoveries.count) == (1, 1)
            assert facts.faults == {"run_timeout": 1}

    runner.run(asyncio.wait_for(check(), 60))


def test_after_a_fault_nobody_is_asked_to_leave_and_all_return_together_when_all_have_left(
    runner: asyncio.Runner, spawner: CountingSpawner, library: dict[str, Path]
) -> None:
    class Stuck(Shared):
        """Never confirms a stop, as a daemon may after a fault, and watches who comes when."""

        def __init__(self) -> None:
            super().__init__(spawner)
            self.lost: set[int] = set()
            self.arriving = 0
            self.problems: list[str] = []

        async def stop_worker(self, child: Child) -> bool:
            await asyncio.sleep(3600)
            raise AssertionError

        async def prepare_worker(self, partition: Partition) -> None:
            if not self.lost:
                return
            if not all(gone(pid) for pid in self.lost):
                self.problems.append("a worker goes to the device while one of the fault is still there")
            self.arriving += 1
            if not await until(lambda: self.arriving >= 2):
                self.problems.append("the workers return one after the other")

    async def check() -> None:
        provider = Stuck()
        async with two_workers(spawner, provider) as fleet:
            provider.lost = pids(fleet)
            innocent = asyncio.create_task(fleet.measure(ask(library["slow"])))
            guilty = asyncio.create_task(fails(fleet, ask(library["crash"])))
            assert (await innocent).neighbours == 0, "the timing beside the fault was kept"
            assert (await guilty).kind is FailureKind.RUN_ERROR
            assert await until(lambda: fleet.capacity == 2)
            assert provider.problems == []
            facts = fleet.facts()
            assert facts.voided == 1, "only the innocent one counts"
            assert facts.faults == {"run_error": 2}, "beside a neighbour, and alone"
            assert facts.worker_restarts in (3, 4), "both; and again, unless the second was still on its way"

    runner.run(asyncio.wait_for(check(), 60))


def test_a_stop_that_is_not_surely_gentle_voids_the_neighbours(
    runner: asyncio.Runner, spawner: CountingSpawner, library: dict[str, Path]
) -> None:
    async def check() -> None:
        provider = Shared(spawner)
        provider.gentle = False
        async with two_workers(spawner, provider) as fleet:
            before = pids(fleet)
            beside = asyncio.create_task(fleet.measure(ask(library["hang"], 30)))
            assert await until(lambda: any(worker.state == "measuring" for worker in fleet.workers()))
            await fails(fleet, ask(library["hang"], 0.2))
            assert await until(lambda: fleet.capacity == 2 and before.isdisjoint(pids(fleet)))
            assert fleet.facts().voided == 1
            beside.cancel()

    runner.run(asyncio.wait_for(check(), 60))


# Exclusive measurement


def test_a_long_exclusive_block_lets_the_others_go_on_in_between(
    runner: asyncio.Runner, spawner: CountingSpawner, library: dict[str, Path]
) -> None:
    def between(order: list[str]) -> list[str]:
        return order[order.index("alone") : len(order) - order[::-1].index("alone")]

    async def check() -> None:
        order: list[str] = []
        stop = asyncio.Event()

        async def others() -> None:
            while not stop.is_set():
                await fleet.measure(ask(library["matmul"]))
                order.append("other")

        async def promote(candidates: int, timeout_s: float) -> None:
            async with fleet.exclusive() as alone:
                for _ in range(candidates):
                    assert (await alone.measure(ask(library["slow"], timeout_s))).neighbours == 0
                    order.append("alone")

        async with two_workers(spawner, Shared(spawner), pause_bound_s=0.5) as fleet:
            stream = asyncio.create_task(others())
            await promote(14, 2.0)  # bound: 4 s, and each takes 0.2 s
            assert "other" in between(order)
            pauses = fleet.facts().pauses
            assert pauses.count >= 2
            order.clear()
            await promote(4, 30.0)  # bound: 60 s
            assert "other" not in between(order)
            after = fleet.facts().pauses
            assert after.count == pauses.count + 1
            assert after.total_s >= pauses.total_s + after.last_s - 1e-6
            assert after.longest_s == max(pauses.longest_s, after.last_s)
            stop.set()
            await stream

    runner.run(asyncio.wait_for(check(), 60))


def test_the_first_worker_back_measures_while_the_others_are_on_their_way(
    runner: asyncio.Runner, spawner: CountingSpawner, library: dict[str, Path]
) -> None:
    class Slow(Shared):
        """Lets the first worker through and holds the second on its way."""

        held: asyncio.Event | None = None

        async def prepare_worker(self, partition: Partition) -> None:
            if self.held is not None and partition.index == 1:
                await self.held.wait()

    async def check() -> None:
        provider = Slow(spawner)
        async with two_workers(spawner, provider) as fleet:
            provider.held = asyncio.Event()
            assert (await fails(fleet, ask(library["crash"]))).kind is FailureKind.RUN_ERROR  # beside, then alone
            assert await until(lambda: fleet.capacity == 1)
            assert (await fleet.measure(ask(library["matmul"]))).median_us > 0, "one worker measures already"
            provider.held.set()
            assert await until(lambda: fleet.capacity == 2)
            assert fleet.facts().recoveries.count == 1, "the device was not whole in between"

    runner.run(asyncio.wait_for(check(), 60))


def test_a_worker_that_dies_on_its_way_to_the_device_is_not_stopped_once_more(
    runner: asyncio.Runner, spawner: CountingSpawner
) -> None:
    class Stuck(Shared):
        async def stop_worker(self, child: Child) -> bool:
            await asyncio.sleep(3600)
            raise AssertionError

    async def check() -> None:
        provider = Stuck(spawner)
        (partition, _) = provider.plan(50)
        slot = WorkerSlot(partition)
        child = await slot.fork(spawner)
        child.pause()  # so that it does not answer before it is killed
        arriving = asyncio.create_task(slot.occupy(child, provider))
        await asyncio.sleep(0.1)
        child.kill()
        with pytest.raises(TunerError, match="did not start"):
            await asyncio.wait_for(arriving, 10)

    runner.run(asyncio.wait_for(check(), 60))
