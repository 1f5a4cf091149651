"""Measurement workers at 25 % of a GPU: what they see, and every fault of the table, with innocents beside it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import signal
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from tests.gpu import kernels
from tuner_core.model import FailureKind
from tuner_server.gpu.inventory import GpuInfo
from tuner_server.gpu.target import read_device_facts
from tuner_server.measure.fleet import WorkerFleet
from tuner_server.measure.gate import CoreGate
from tuner_server.partitions.mps import MpsPartitions
from tuner_server.processes.spawner import Spawner
from tuner_server.trial import TrialFailed

WORKERS = 4
RECOVERY_S = 5.0
DAEMON_RECOVERY_S = 15.0


@contextlib.asynccontextmanager
async def four_workers(gpu: GpuInfo, directory: Path) -> AsyncIterator[tuple[WorkerFleet, MpsPartitions]]:
    spawner = Spawner(directory / "logs")
    provider = MpsPartitions(gpu, directory / "mps")
    fleet = WorkerFleet(spawner, provider, CoreGate(spare=True))
    await spawner.start()
    try:
        await provider.start()
        await fleet.start(provider.plan(25, WORKERS))
        yield fleet, provider
    finally:
        await fleet.stop()
        await provider.stop()
        await spawner.stop()


async def all_back(fleet: WorkerFleet, recoveries: int, within_s: float) -> None:
    """The product's own limits: workers return within 5 s, after a daemon's death within 15 s.

    Args:
        recoveries: How many there were before the fault.
    """
    deadline = time.monotonic() + within_s + 15
    while fleet.capacity < WORKERS or fleet.facts().recoveries.count == recoveries:
        assert time.monotonic() < deadline, f"{fleet.capacity} of {WORKERS} workers: {fleet.facts()}"
        await asyncio.sleep(0.02)
    print(fleet.facts())  # pytest -rP shows it
    assert fleet.facts().recoveries.longest_s <= within_s, fleet.facts()


Hurt = Callable[[WorkerFleet, MpsPartitions], Awaitable[None]]


async def innocents_survive(
    fleet: WorkerFleet, provider: MpsPartitions, artifacts: Path, hurt: Hurt, within_s: float = RECOVERY_S
) -> None:
    """Measure an innocent kernel all along; none may fail, and none may come out poisoned."""
    good = kernels.request(kernels.built(artifacts, "good"))
    expected = statistics.median([(await fleet.measure(good)).median_us for _ in range(5)])
    stop = asyncio.Event()
    seen: list[float] = []

    async def innocent() -> None:
        while not stop.is_set():
            seen.append((await fleet.measure(good)).median_us)

    loops = [asyncio.create_task(innocent()) for _ in range(WORKERS - 1)]
    await asyncio.sleep(0.3)
    pids = {worker.pid for worker in fleet.workers()}
    recoveries = fleet.facts().recoveries.count
    await hurt(fleet, provider)
    await all_back(fleet, recoveries, within_s)
    await asyncio.sleep(0.5)
    stop.set()
    await asyncio.gather(*loops)
    assert {worker.pid for worker in fleet.workers()} != pids
    # A timing through a dying context would be off by orders of magnitude; neighbours cost some percent.
    assert max(seen) < 10 * expected
    after = statistics.median([(await fleet.measure(good)).median_us for _ in range(5)])
    assert 0.5 * expected < after < 2 * expected


def failing(artifacts: Path, name: str, kind: FailureKind, timeout_s: float = 10.0) -> Hurt:
    async def hurt(fleet: WorkerFleet, _provider: MpsPartitions) -> None:
        with pytest.raises(TrialFailed) as failure:
            await fleet.measure(kernels.request(kernels.built(artifacts, name), timeout_s))
        assert failure.value.kind == kind

    return hurt


def run(gpu: GpuInfo, directory: Path, body: Callable[[WorkerFleet, MpsPartitions], Awaitable[None]]) -> None:
    async def session() -> None:
        async with four_workers(gpu, directory) as (fleet, provider):
            await body(fleet, provider)

    asyncio.run(session())


def test_each_worker_sees_its_share_and_measures(gpu: GpuInfo, artifacts: Path, short_dir: Path) -> None:
    async def body(fleet: WorkerFleet, provider: MpsPartitions) -> None:
        share = provider.plan(25)[0].expected_sm_count
        assert [worker.sm_count_seen for worker in fleet.workers()] == [share] * WORKERS
        assert share < provider.device.sm_count / 3
        measured = await asyncio.gather(
            *(fleet.measure(kernels.request(kernels.built(artifacts, "good"))) for _ in range(16))
        )
        assert {one.partition.index for one in measured} == set(range(WORKERS))
        assert all(one.sm_count == share for one in measured)
        clients = {client.pid for client in await provider.daemon.clients()}
        assert clients == {worker.pid for worker in fleet.workers()}
        async with fleet.exclusive() as alone:
            assert (await alone.measure(kernels.request(kernels.built(artifacts, "good")))).neighbours == 0

    run(gpu, short_dir / "seen", body)


def test_an_illegal_access_is_found_and_spares_the_innocent(gpu: GpuInfo, artifacts: Path, short_dir: Path) -> None:
    async def body(fleet: WorkerFleet, provider: MpsPartitions) -> None:
        hurt = failing(artifacts, "illegal", FailureKind.RUN_ERROR)
        await innocents_survive(fleet, provider, artifacts, hurt)

    run(gpu, short_dir / "illegal", body)


def test_an_endless_kernel_is_stopped_and_spares_the_innocent(gpu: GpuInfo, artifacts: Path, short_dir: Path) -> None:
    async def body(fleet: WorkerFleet, provider: MpsPartitions) -> None:
        hurt = failing(artifacts, "endless", FailureKind.RUN_TIMEOUT, timeout_s=2.0)
        await innocents_survive(fleet, provider, artifacts, hurt)

    run(gpu, short_dir / "endless", body)


def test_two_endless_kernels_at_once_are_stopped(gpu: GpuInfo, artifacts: Path, short_dir: Path) -> None:
    async def hurt(fleet: WorkerFleet, provider: MpsPartitions) -> None:
        endless = failing(artifacts, "endless", FailureKind.RUN_TIMEOUT, timeout_s=2.0)
        await asyncio.gather(endless(fleet, provider), endless(fleet, provider))

    async def body(fleet: WorkerFleet, provider: MpsPartitions) -> None:
        await innocents_survive(fleet, provider, artifacts, hurt)

    run(gpu, short_dir / "endless-twice", body)


def test_a_stopped_kernel_leaves_the_neighbours_alone(gpu: GpuInfo, artifacts: Path, short_dir: Path) -> None:
    """What ``terminate_client`` is for: only the guilty worker is replaced, no neighbour's measurement is void."""

    async def body(fleet: WorkerFleet, provider: MpsPartitions) -> None:
        before = {worker.pid for worker in fleet.workers()}
        await failing(artifacts, "endless", FailureKind.RUN_TIMEOUT, timeout_s=2.0)(fleet, provider)
        await all_back(fleet, 0, RECOVERY_S)
        assert len(before & {worker.pid for worker in fleet.workers()}) == WORKERS - 1, fleet.facts()
        assert fleet.facts().voided == 0

    run(gpu, short_dir / "terminated", body)


def test_a_kernel_that_allocates_more_than_the_gpu_has_is_out_of_memory(
    gpu: GpuInfo, artifacts: Path, short_dir: Path
) -> None:
    async def body(fleet: WorkerFleet, provider: MpsPartitions) -> None:
        await innocents_survive(fleet, provider, artifacts, failing(artifacts, "greedy", FailureKind.OUT_OF_MEMORY))
        assert fleet.facts().faults == {"out_of_memory": 1}

    run(gpu, short_dir / "greedy", body)


def test_a_kernel_that_allocates_more_than_its_workers_limit_is_out_of_memory(
    gpu: GpuInfo, artifacts: Path, short_dir: Path
) -> None:
    async def body(fleet: WorkerFleet, provider: MpsPartitions) -> None:
        assert not any("does not limit" in line for line in provider.describe()), provider.describe()
        limit = provider.plan(25)[0].memory_bytes
        assert limit < 48 << 30, "this GPU is too large for the test's kernel"
        await innocents_survive(fleet, provider, artifacts, failing(artifacts, "hungry", FailureKind.OUT_OF_MEMORY))

    run(gpu, short_dir / "hungry", body)


def test_a_memory_limit_is_kept_and_a_worker_within_it_is_not_bothered(gpu: GpuInfo, short_dir: Path) -> None:
    async def session() -> None:
        provider = MpsPartitions(gpu, short_dir / "limit")
        await provider.start()
        try:
            limited = {**provider.plan(25)[0].env, "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT": "0=2048M"}
            seen = await read_device_facts(limited)  # allocates beyond the limit, and fails if that works
            assert seen.sm_count == provider.plan(25)[0].expected_sm_count
        finally:
            await provider.stop()

    asyncio.run(session())


def test_a_worker_killed_in_a_kernel_costs_no_trial(gpu: GpuInfo, artifacts: Path, short_dir: Path) -> None:
    async def hurt(fleet: WorkerFleet, _provider: MpsPartitions) -> None:
        victim = asyncio.create_task(fleet.measure(kernels.request(kernels.built(artifacts, "slow"))))
        await asyncio.sleep(0.1)
        busy = next(worker for worker in fleet.workers() if worker.state == "measuring")
        os.kill(busy.pid, signal.SIGKILL)
        assert (await victim).median_us > 0

    async def body(fleet: WorkerFleet, provider: MpsPartitions) -> None:
        await innocents_survive(fleet, provider, artifacts, hurt)

    run(gpu, short_dir / "killed-worker", body)


def test_a_killed_mps_server_costs_no_trial(gpu: GpuInfo, artifacts: Path, short_dir: Path) -> None:
    async def hurt(_fleet: WorkerFleet, provider: MpsPartitions) -> None:
        for pid in await provider.daemon.servers():
            os.kill(pid, signal.SIGKILL)

    async def body(fleet: WorkerFleet, provider: MpsPartitions) -> None:
        await innocents_survive(fleet, provider, artifacts, hurt)

    run(gpu, short_dir / "killed-server", body)


def test_promotion_is_counted_and_keeps_its_bound(gpu: GpuInfo, artifacts: Path, short_dir: Path) -> None:
    async def body(fleet: WorkerFleet, _provider: MpsPartitions) -> None:
        good = kernels.request(kernels.built(artifacts, "good"))
        stop = asyncio.Event()

        async def other() -> None:
            while not stop.is_set():
                await fleet.measure(good)

        loops = [asyncio.create_task(other()) for _ in range(WORKERS)]
        await asyncio.sleep(0.3)
        async with fleet.exclusive() as alone:
            assert [(await alone.measure(good)).neighbours for _ in range(8)] == [0] * 8
        stop.set()
        await asyncio.gather(*loops)
        pauses = fleet.facts().pauses
        print(pauses)
        assert pauses.count == 1 and 0 < pauses.longest_s < fleet.facts().pause_bound_s

    run(gpu, short_dir / "promotion", body)


def test_a_promotion_outlives_the_daemon_and_its_worker(gpu: GpuInfo, artifacts: Path, short_dir: Path) -> None:
    async def body(fleet: WorkerFleet, provider: MpsPartitions) -> None:
        async def measured_despite(kill: Callable[[], None]) -> None:
            in_flight = asyncio.create_task(alone.measure(kernels.request(kernels.built(artifacts, "slow"), 60.0)))
            while not any(worker.state == "measuring" for worker in fleet.workers()):
                await asyncio.sleep(0.001)
            kill()
            measured = await in_flight
            assert measured.median_us > 0 and measured.neighbours == 0

        def kill_daemon() -> None:
            assert provider.daemon.pid is not None
            os.kill(provider.daemon.pid, signal.SIGKILL)

        def kill_worker() -> None:
            os.kill(next(worker.pid for worker in fleet.workers() if worker.state == "measuring"), signal.SIGKILL)

        async with fleet.exclusive() as alone:
            await measured_despite(kill_daemon)
            await measured_despite(kill_worker)
            good = kernels.built(artifacts, "good")
            assert (await alone.check(good, kernels.ARGS_INFO, None, fallback=good)).verdict == "ok"
        await all_back(fleet, 0, DAEMON_RECOVERY_S)

    run(gpu, short_dir / "promoted", body)


def test_a_hopeless_candidate_gets_a_glance(gpu: GpuInfo, artifacts: Path, short_dir: Path) -> None:
    async def body(fleet: WorkerFleet, _provider: MpsPartitions) -> None:
        good = await fleet.measure(kernels.request(kernels.built(artifacts, "good")))
        assert len(good.latencies_us) == 3 and not good.gave_up
        slow = kernels.request(kernels.built(artifacts, "slow"))
        glanced = await fleet.measure(dataclasses.replace(slow, give_up_above_us=good.median_us))
        assert glanced.gave_up and len(glanced.latencies_us) == 1

    run(gpu, short_dir / "hopeless", body)


def test_a_killed_daemon_costs_no_trial(gpu: GpuInfo, artifacts: Path, short_dir: Path) -> None:
    async def hurt(_fleet: WorkerFleet, provider: MpsPartitions) -> None:
        assert provider.daemon.pid is not None
        os.kill(provider.daemon.pid, signal.SIGKILL)

    async def body(fleet: WorkerFleet, provider: MpsPartitions) -> None:
        await innocents_survive(fleet, provider, artifacts, hurt, DAEMON_RECOVERY_S)

    run(gpu, short_dir / "killed-daemon", body)
