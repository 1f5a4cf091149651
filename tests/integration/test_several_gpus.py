"""A server with several GPUs: drivers and MPS daemons are stand-ins, the workers are real and measure on a core."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import sys
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.gpu import kernels
from tests.integration.process_state import until
from tuner_core.errors import ConflictError
from tuner_server.check import run_checks
from tuner_server.config import DeviceSettings, ServerConfig
from tuner_server.engine import Engine
from tuner_server.gpu.inventory import GpuInfo, Inventory
from tuner_server.gpu.lock import LOCK_DIRECTORY
from tuner_server.partitions import select
from tuner_server.partitions.interface import Partition
from tuner_server.partitions.mps import MpsPartitions

STANDIN = Path(__file__).parents[1] / "gpu_standin"
PROBE = (sys.executable, str(STANDIN / "mps_client.py"), "probe")


class OnTheCpu(MpsPartitions):
    """Its daemon, plans and stops are those of MPS; a worker measures on one core, for a target of its GPU's model."""

    def __init__(self, gpu: GpuInfo, directory: Path, **options: Any) -> None:
        super().__init__(gpu, directory, **{**options, "probe": PROBE})
        self._model = gpu.name

    def plan_shares(self, shares: Sequence[int]) -> list[Partition]:
        core = min(os.sched_getaffinity(0))
        return [
            dataclasses.replace(part, tvm_device="cpu:0", expected_sm_count=1, affinity=(core,))
            for part in super().plan_shares(shares)
        ]

    async def target_json(self, sm_percent: int) -> str:
        return json.dumps({"kind": "llvm", "num-cores": 1 if "H200" in self._model else 2})


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[GpuInfo]]:
    found = [
        GpuInfo(index, f"GPU-{uuid.uuid4()}", name, "sm_90", 139 << 30, "default", False, "580", "13.0")
        for index, name in enumerate(("NVIDIA H200", "NVIDIA L4", "NVIDIA H200"))
    ]
    monkeypatch.setattr(select, "find_gpus", lambda: Inventory(tuple(found)))
    monkeypatch.setattr(select, "MpsPartitions", OnTheCpu)
    monkeypatch.setenv("PATH", f"{STANDIN}:{os.environ['PATH']}")
    yield found
    for gpu in found:
        (LOCK_DIRECTORY / f"tuner-{gpu.uuid}.lock").unlink(missing_ok=True)


@contextlib.asynccontextmanager
async def engine(directory: Path, *devices: DeviceSettings) -> AsyncIterator[Engine]:
    running = Engine(ServerConfig(data_dir=directory, devices=devices))
    try:
        await running.start()
        yield running
    finally:
        await running.stop()


def test_a_job_runs_on_every_gpu_with_its_share_and_target_and_each_measurement_says_where(
    gpus: list[GpuInfo], tmp_path: Path
) -> None:
    good = kernels.request(kernels.build("good", tmp_path, '{"kind": "llvm"}'), 60)
    h200, l4, other = gpus

    async def body() -> None:
        async with engine(
            tmp_path,
            DeviceSettings("cuda:0", partitions=(50, 25, 25)),
            DeviceSettings(f"cuda:{l4.uuid}", sm_percent=25, workers=1),
            DeviceSettings("cuda:2", partitions=(50, 25)),
        ) as server:
            assert [(device.name, device.configured) for device in server.devices] == [
                ("cuda:0", (50, 25, 25)),
                ("cuda:1", (25,)),
                ("cuda:2", (50, 25)),
            ]
            on_h200 = await server.offer(25)  # the first device's model, when none is asked for
            assert {device.name for device in on_h200.devices} == {"cuda:0", "cuda:2"}
            target = await server.devices[1].provider.target_json(25)
            offers = [(one.device.model, len(one.devices), one.on_offer) for one in await server.offers(25)]
            assert offers == [("NVIDIA H200", 2, True), ("NVIDIA L4", 1, True)]
            offers = [(one.device.model, len(one.devices), one.on_offer) for one in await server.offers(10)]
            assert offers == [("NVIDIA H200", 2, False), ("NVIDIA L4", 1, False)]
            with pytest.raises(ConflictError, match="measures for the target"):
                await server.offer(50, '{"kind": "cuda"}')

            async with server.lane(25) as lane, server.lane(25, target) as small, server.lane(50) as half:
                assert (lane.device.model, lane.device_uuids) == ("NVIDIA H200", (h200.uuid, other.uuid))
                assert (small.device.model, small.device_uuids) == ("NVIDIA L4", (l4.uuid,))
                assert half.device_uuids == (h200.uuid, other.uuid)
                assert (lane.fleet.capacity, small.fleet.capacity, half.fleet.capacity) == (3, 1, 2)
                measured = await asyncio.gather(*(lane.fleet.measure(good) for _ in range(6)))
                places = {(one.partition.device_uuid, one.partition.index) for one in measured}
                assert places == {(h200.uuid, 1), (h200.uuid, 2), (other.uuid, 1)}
                on_l4 = await small.fleet.measure(good)
                assert on_l4.partition.device_uuid == l4.uuid

            async with server.lane(100) as whole:  # not on offer: the free GPUs are divided anew
                assert whole.device_uuids == (h200.uuid, other.uuid)
                assert [device.shares for device in server.devices] == [(100,), (25,), (100,)]
            async with server.lane(50):
                assert [device.shares for device in server.devices] == [(50, 25, 25), (25,), (50, 25)]

    asyncio.run(body())


@pytest.mark.parametrize("lend", [True, False])
def test_builds_get_the_idle_time_of_a_gpu_workers_core_unless_told_not_to(
    gpus: list[GpuInfo], tmp_path: Path, lend: bool
) -> None:
    del gpus[1:]  # which would get their parts of the cores
    config = ServerConfig(
        data_dir=tmp_path, devices=(DeviceSettings("cuda:0", sm_percent=25, workers=1),), lend_cores=lend
    )

    async def body() -> None:
        running = Engine(config)
        try:
            await running.start()
            (worker,) = running.workers()
            running.build.prestart()
            await asyncio.gather(*running.build._coming)
            processes = [child.pid for child in running.build._children]

            def on_the_workers_core() -> list[int]:
                """Scheduling classes of the build processes there."""
                there = [pid for pid in processes if os.sched_getaffinity(pid) & set(worker.affinity)]
                return [os.sched_getscheduler(pid) for pid in there]

            # a process takes its place shortly after the fork
            assert await until(lambda: on_the_workers_core() == ([os.SCHED_IDLE] if lend else [])), (
                on_the_workers_core()
            )
            assert len(processes) == (2 if lend else 1)
            assert os.sched_getscheduler(worker.pid) == os.SCHED_OTHER
        finally:
            await running.stop()

    asyncio.run(body())


def test_check_lists_every_gpu_with_mps_its_shares_and_one_measurement(gpus: list[GpuInfo], tmp_path: Path) -> None:
    config = ServerConfig(data_dir=tmp_path, devices=(DeviceSettings(partitions=(50, 25)),))
    findings = asyncio.run(run_checks(config))
    assert all(finding.ok for finding in findings), findings
    lines = [f"{finding.what}: {finding.text}" for finding in findings]

    def count(text: str) -> int:
        return sum(text in line for line in lines)

    for gpu in (gpus[0], gpus[2]):
        assert count(f"cuda:{gpu.index}: NVIDIA H200 (sm_90), 132 SMs, driver 580, CUDA 13.0, {gpu.uuid}") == 1
        assert count(f"measurement: cuda:{gpu.index} at 50 %, ") == 1
    assert count("left out, as jobs run on GPUs of one model: cuda:1 (NVIDIA L4)") == 1
    assert count("MPS: stand-in") == count("partitions: mps: 50 + 25 %") == 2
    assert count("SMs seen: 12 at 10 %, 32 at 25 %, 66 at 50 %, 132 at 100 %") == 2
    assert count("mps 50 %: sees 1 SMs") == count("mps 25 %: sees 1 SMs") == 2
