"""A fleet whose partitions come from MPS: the daemon is a stand-in, the workers are real ones on the CPU."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import signal
import sys
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.gpu import kernels
from tests.integration import measured_libraries as libraries
from tests.integration.measured_libraries import VECTOR_ARGS
from tuner_core.model import FailureKind
from tuner_server.gpu.inventory import GpuInfo
from tuner_server.gpu.lock import LOCK_DIRECTORY
from tuner_server.measure import neighbours
from tuner_server.measure.fleet import Measurement, MeasureRequest, WorkerFleet
from tuner_server.measure.gate import CoreGate
from tuner_server.partitions.interface import Partition
from tuner_server.partitions.mps import MpsPartitions
from tuner_server.processes.spawner import Spawner
from tuner_server.trial import TrialFailed

STANDIN = Path(__file__).parents[1] / "gpu_standin"
CPU = '{"kind": "llvm"}'


class OnTheCpu(MpsPartitions):
    """Its daemon, plans and stops are those of MPS; a worker measures on one core."""

    def plan_shares(self, shares: Sequence[int]) -> list[Partition]:
        core = min(os.sched_getaffinity(0))
        return [
            dataclasses.replace(part, tvm_device="cpu:0", expected_sm_count=1, affinity=(core,))
            for part in super().plan_shares(shares)
        ]


@contextlib.asynccontextmanager
async def two_workers(directory: Path) -> AsyncIterator[tuple[WorkerFleet, OnTheCpu]]:
    gpu = GpuInfo(0, f"GPU-{uuid.uuid4()}", "NVIDIA H200", "sm_90", 139 << 30, "default", False, "580", "13.0")
    spawner = Spawner(directory / "logs")
    probe = (sys.executable, str(STANDIN / "mps_client.py"), "probe")
    provider = OnTheCpu(gpu, directory / "mps", control=str(STANDIN / "nvidia-cuda-mps-control"), probe=probe)
    fleet = WorkerFleet(spawner, provider, CoreGate(spare=True))
    await spawner.start()
    try:
        await provider.start()
        await fleet.start(provider.plan(50, 2))
        yield fleet, provider
    finally:
        await fleet.stop()
        await provider.stop()
        await spawner.stop()
        (LOCK_DIRECTORY / f"tuner-{gpu.uuid}.lock").unlink()


async def all_back(fleet: WorkerFleet) -> set[int]:
    while fleet.capacity < 2:
        await asyncio.sleep(0.01)
    return {worker.pid for worker in fleet.workers()}


def test_after_the_daemons_death_all_workers_return_and_neither_trial_nor_promotion_is_lost(tmp_path: Path) -> None:
    good = kernels.build("good", tmp_path, CPU)
    slow = MeasureRequest(libraries.build(libraries.calling("usleep", 300_000), tmp_path / "s.so"), VECTOR_ARGS)

    async def body() -> None:
        async with two_workers(tmp_path) as (fleet, provider):

            async def measured_despite(kill: Callable[[], None], measuring: Coroutine[Any, Any, Measurement]) -> None:
                in_flight = asyncio.create_task(measuring)
                await until_measuring(fleet)
                kill()
                measured = await in_flight  # void, and measured again
                assert measured.median_us > 0 and measured.neighbours == 0

            def kill_daemon() -> None:
                assert provider.daemon.pid is not None
                os.kill(provider.daemon.pid, signal.SIGKILL)

            before = await all_back(fleet)
            await measured_despite(kill_daemon, fleet.measure(slow))
            assert before.isdisjoint(await all_back(fleet))
            assert await provider.daemon.healthy()

            async with fleet.exclusive() as alone:
                outside = asyncio.create_task(fleet.measure(kernels.request(good)))
                await measured_despite(kill_daemon, alone.measure(slow))
                await measured_despite(lambda: os.kill(busy(fleet), signal.SIGKILL), alone.measure(slow))
                assert (await alone.check(good, kernels.ARGS_INFO, None, fallback=good)).verdict == "ok"
                assert not outside.done(), "a neighbour measured during the promotion"
            assert (await outside).median_us > 0

    asyncio.run(body())


async def until_measuring(fleet: WorkerFleet) -> None:
    """Some worker measures."""
    while not any(worker.state == "measuring" for worker in fleet.workers()):
        await asyncio.sleep(0.01)


def busy(fleet: WorkerFleet) -> int:
    """Process id of the worker that measures."""
    return next(worker.pid for worker in fleet.workers() if worker.state == "measuring")


def test_a_worker_that_hangs_is_replaced_and_its_neighbour_is_not(tmp_path: Path) -> None:
    endless = kernels.build("endless", tmp_path, CPU)

    async def body() -> None:
        async with two_workers(tmp_path) as (fleet, _provider):
            before = await all_back(fleet)
            with pytest.raises(TrialFailed) as failure:
                await fleet.measure(kernels.request(endless, 0.5))
            assert failure.value.kind is FailureKind.RUN_TIMEOUT
            assert len(before & await all_back(fleet)) == 1

    asyncio.run(body())


async def one_ended_beside_another(
    fleet: WorkerFleet, tmp_path: Path
) -> tuple[Path, asyncio.Task[Measurement], asyncio.Task[Measurement]]:
    """A kernel, its measurement, which has freed its worker, and the longer one that ran beside it and goes on."""
    good = kernels.build("good", tmp_path, CPU)
    slow = MeasureRequest(libraries.build(libraries.calling("usleep", 300_000), tmp_path / "s.so"), VECTOR_ARGS)
    neighbour = asyncio.create_task(fleet.measure(slow))
    await until_measuring(fleet)
    free = asyncio.Event()
    measured = asyncio.create_task(fleet.measure(kernels.request(good), free.set))
    await free.wait()
    return good, measured, neighbour


def test_a_worker_is_free_before_its_measurement_counts_and_right_outputs_count_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbours, "SETTLE_S", 3600.0)  # so it is the neighbour's end that makes it count

    async def body() -> None:
        async with two_workers(tmp_path) as (fleet, _provider):
            good, measured, neighbour = await one_ended_beside_another(fleet, tmp_path)
            assert not measured.done() and not neighbour.done(), "the neighbour may still spoil it"
            checked = await fleet.check(good, kernels.ARGS_INFO, None, fallback=good)
            assert checked.verdict == "ok" and not neighbour.done()
            assert (await neighbour).neighbours == (await measured).neighbours == 1

    asyncio.run(body())


def test_a_neighbours_end_makes_a_finished_measurement_void_and_it_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbours, "SETTLE_S", 3600.0)

    async def body() -> None:
        async with two_workers(tmp_path) as (fleet, _provider):
            _good, measured, neighbour = await one_ended_beside_another(fleet, tmp_path)
            os.kill(busy(fleet), signal.SIGKILL)
            assert (await measured).neighbours == 0, "what was measured beside the lost one counts"
            assert (await neighbour).median_us > 0
            assert fleet.facts().voided == 1

    asyncio.run(body())
