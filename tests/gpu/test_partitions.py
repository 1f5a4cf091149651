"""A server's engine on real GPUs: shares of different sizes at once, re-partitioning, several GPUs, the check."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.gpu import kernels
from tuner_server.check import run_checks
from tuner_server.config import DeviceSettings, ServerConfig
from tuner_server.engine import Engine
from tuner_server.gpu.inventory import GpuInfo, find_gpus
from tuner_server.lanes.lane import Lane
from tuner_server.measure.requests import Measurement
from tuner_server.partitions.host import LAUNCH_BOUND_US, physical_core, usable_cores
from tuner_server.partitions.mps import MpsPartitions


@contextlib.asynccontextmanager
async def engine(directory: Path, *devices: DeviceSettings) -> AsyncIterator[Engine]:
    running = Engine(ServerConfig(data_dir=directory, devices=devices))
    try:
        await running.start()
        yield running
    finally:
        await running.stop()


def seen(server: Engine) -> list[tuple[int, int]]:
    return [(worker.sm_percent, worker.sm_count_seen) for worker in server.workers()]


async def measured_for(lane: Lane, artifact: Path, seconds: float) -> list[Measurement]:
    """Measure with every worker of the lane for a while."""
    until = asyncio.get_running_loop().time() + seconds

    async def loop() -> list[Measurement]:
        done = []
        while asyncio.get_running_loop().time() < until:
            done.append(await lane.fleet.measure(kernels.request(artifact)))
        return done

    return [one for each in await asyncio.gather(*(loop() for _ in lane.fleet.workers())) for one in each]


def test_a_gpu_is_shared_as_50_25_25_and_divided_anew_for_another_share_and_back(
    gpu: GpuInfo, short_dir: Path, artifacts: Path
) -> None:
    async def body() -> None:
        settings = DeviceSettings(f"cuda:{gpu.uuid}", partitions=(50, 25, 25))
        async with engine(short_dir / "mixed", settings) as server:
            total = server.devices[0].info.sm_count
            (half_sms, quarter_sms) = (server.devices[0].sm_count_at(share) for share in (50, 25))
            assert seen(server) == [(50, half_sms), (25, quarter_sms), (25, quarter_sms)]
            assert total * 0.4 < half_sms <= total * 0.5 and total * 0.2 < quarter_sms <= total * 0.25
            async with server.lane(50) as half, server.lane(25) as quarter:
                of_half, of_quarter = await asyncio.gather(
                    measured_for(half, kernels.built(artifacts, "good"), 2),
                    measured_for(quarter, kernels.built(artifacts, "good"), 2),
                )
                assert {one.sm_count for one in of_half} == {half_sms}
                assert {one.sm_count for one in of_quarter} == {quarter_sms}
                assert max(one.neighbours for one in (*of_half, *of_quarter)) == 2
                print(f"\n{len(of_half)} measurements at 50 %, {len(of_quarter)} at 25 % in 2 s", flush=True)
                async with quarter.fleet.exclusive() as alone:
                    assert (await alone.measure(kernels.request(kernels.built(artifacts, "good")))).neighbours == 0
            async with server.lane(30) as odd:
                assert [share for share, _ in seen(server)] == [30, 30, 30]
                assert (
                    await odd.fleet.measure(kernels.request(kernels.built(artifacts, "good")))
                ).sm_count == odd.sm_count
            async with server.lane(25):
                assert seen(server) == [(50, half_sms), (25, quarter_sms), (25, quarter_sms)]

    asyncio.run(body())


def test_without_mps_one_worker_measures_on_the_whole_gpu_and_says_why(
    gpu: GpuInfo, short_dir: Path, artifacts: Path
) -> None:
    async def body() -> None:
        async with engine(short_dir / "whole", DeviceSettings(f"cuda:{gpu.uuid}", mps="off")) as server:
            assert seen(server) == [(100, server.devices[0].info.sm_count)]
            assert any("MPS is off" in note for note in server.notes)
            async with server.lane(100) as lane:
                assert (await lane.fleet.measure(kernels.request(kernels.built(artifacts, "good")))).neighbours == 0

    asyncio.run(body())


def test_builds_do_not_share_a_physical_core_with_workers(gpu: GpuInfo, short_dir: Path) -> None:
    if len({physical_core(core) for core in usable_cores()}) < 4:
        pytest.skip("needs four physical cores")

    async def body() -> None:
        settings = DeviceSettings(f"cuda:{gpu.uuid}", sm_percent=25, workers=4)
        async with engine(short_dir / "apart", settings) as server:
            (device,) = server.devices
            assert {part.quiet_below_us for part in device.partitions} == {LAUNCH_BOUND_US}
            builds = {physical_core(core) for core in device.provider.spare_cores(device.partitions)}
            for worker in server.workers():
                assert worker.affinity and builds.isdisjoint(physical_core(core) for core in worker.affinity)

    asyncio.run(body())


@pytest.mark.skipif(len(find_gpus().gpus) < 2, reason="needs two GPUs")
def test_two_gpus_measure_together_and_a_fault_on_one_leaves_the_other_alone(short_dir: Path, artifacts: Path) -> None:
    async def body() -> None:
        async with engine(short_dir / "two", DeviceSettings(sm_percent=25, workers=4)) as server:
            assert len({device.info.model for device in server.devices}) == 1 and len(server.devices) >= 2
            async with server.lane(25) as lane:
                assert lane.fleet.capacity == 4 * len(server.devices)
                uuids = set(lane.device_uuids)
                measured = await measured_for(lane, kernels.built(artifacts, "good"), 2)
                by_device = {uuid: sum(one.partition.device_uuid == uuid for one in measured) for uuid in uuids}
                print(f"\nmeasurements by GPU in 2 s: {by_device}", flush=True)
                assert min(by_device.values()) > 0.5 * max(by_device.values())

                async with lane.fleet.exclusive() as alone:
                    verified = await alone.measure(kernels.request(kernels.built(artifacts, "good")))
                    beside = await lane.fleet.measure(kernels.request(kernels.built(artifacts, "good")))
                assert beside.partition.device_uuid != verified.partition.device_uuid

                others = {worker.pid for worker in server.devices[1].fleet.workers()}
                provider = server.devices[0].provider
                assert isinstance(provider, MpsPartitions) and provider.daemon.pid is not None
                os.kill(provider.daemon.pid, signal.SIGKILL)
                assert await measured_for(lane, kernels.built(artifacts, "good"), 5)
                assert {worker.pid for worker in server.devices[1].fleet.workers()} == others
                for _ in range(100):
                    if lane.fleet.capacity == 4 * len(server.devices):
                        break
                    await asyncio.sleep(0.1)
                assert lane.fleet.capacity == 4 * len(server.devices)

    asyncio.run(body())


def test_check_prints_every_gpu_its_mps_its_partitions_and_a_measurement(short_dir: Path) -> None:
    config = ServerConfig(data_dir=short_dir / "check", devices=(DeviceSettings(partitions=(50, 25, 25)),))
    findings = asyncio.run(run_checks(config))
    lines = [f"{finding.what}: {finding.text}" for finding in findings]
    print("\n" + "\n".join(lines), flush=True)
    assert all(finding.ok for finding in findings)
    gpus = sum(line.startswith("device: cuda:") for line in lines)
    assert gpus >= 1
    for text in ("measurement: cuda:", "partitions: mps: 50 + 25 + 25 %", "partitions: MPS: ", " at 25 %, "):
        assert sum(text in line for line in lines) >= gpus, text
