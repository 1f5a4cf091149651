"""The real MPS daemon keeps the promises that tests/unit/test_mps_daemon.py makes of the stand-in."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tuner_core.errors import ConflictError, UsageError
from tuner_server.gpu.inventory import GpuInfo
from tuner_server.gpu.mps import MpsDaemon, find_control
from tuner_server.gpu.mps_processes import find_mps_processes
from tuner_server.gpu.sm_share import SmShares
from tuner_server.gpu.target import read_device_facts
from tuner_server.partitions.exclusive import ExclusivePartitions
from tuner_server.partitions.mps import MpsPartitions

ROOT = Path(__file__).parents[2]


def make(gpu: GpuInfo, directory: Path) -> MpsDaemon:
    control = find_control()
    assert control is not None
    return MpsDaemon(gpu.uuid, directory, control=control)


def left(daemon: MpsDaemon) -> list[int]:
    return [process.pid for process in find_mps_processes(daemon.pipe_directory, "nvidia-cuda-mps-control")]


def test_it_starts_caps_its_clients_and_leaves_nothing_behind(gpu: GpuInfo, short_dir: Path) -> None:
    async def body() -> None:
        daemon = make(gpu, short_dir / "a")
        await daemon.start()
        try:
            assert await daemon.healthy()
            env = {**daemon.client_env, "CUDA_VISIBLE_DEVICES": gpu.uuid}
            whole = await read_device_facts(env)
            for share in (50, 25):
                part = await read_device_facts({**env, "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": str(share)})
                assert part.sm_count == SmShares(whole.sm_count).at(share)
            with pytest.raises(ConflictError, match="another tuner-server"):
                await make(gpu, short_dir / "b").start()
        finally:
            await daemon.stop()
        assert left(daemon) == []

    asyncio.run(body())


SERVER = """
import asyncio, sys
from pathlib import Path
from tuner_server.gpu.mps import MpsDaemon, find_control
async def main():
    daemon = MpsDaemon(sys.argv[1], Path(sys.argv[2]), control=find_control())
    await daemon.start()
    print("up", flush=True)
    await asyncio.sleep(3600)
asyncio.run(main())
"""


def test_a_killed_servers_leftovers_are_cleared_away(gpu: GpuInfo, short_dir: Path) -> None:
    directory = short_dir / "killed"
    owner = subprocess.Popen(
        [sys.executable, "-c", SERVER, gpu.uuid, str(directory)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert owner.stdout is not None and owner.stdout.readline() == "up\n"

    async def body() -> None:
        daemon = make(gpu, directory)
        await read_device_facts({**daemon.client_env, "CUDA_VISIBLE_DEVICES": gpu.uuid})  # starts an MPS server
        owner.kill()
        owner.wait()
        predecessors = left(daemon)
        assert predecessors
        await daemon.start()
        try:
            assert set(predecessors).isdisjoint(left(daemon))
            assert await daemon.healthy()
        finally:
            await daemon.stop()

    asyncio.run(body())


def test_an_operators_daemon_is_used_and_left_running(gpu: GpuInfo, short_dir: Path) -> None:
    async def body() -> None:
        operators = make(gpu, short_dir / "operator")
        await operators.start()
        try:
            control = find_control()
            assert control is not None
            environment = {**os.environ, **operators.client_env}
            external = MpsDaemon(gpu.uuid, short_dir / "x", control=control, external=True, environment=environment)
            await external.start()
            await external.stop()
            assert await operators.healthy()
        finally:
            await operators.stop()

    asyncio.run(body())


def test_shares_and_target_come_from_the_device(gpu: GpuInfo, short_dir: Path) -> None:
    async def body() -> None:
        partitions = MpsPartitions(gpu, short_dir / "plan")
        await partitions.start()
        try:
            assert [part.sm_percent for part in partitions.plan_shares([50, 25, 25])] == [50, 25, 25]
            with pytest.raises(UsageError, match="sum to 125"):
                partitions.plan(25, 5)
            target = json.loads(await partitions.target_json(25))
            assert target["arch"] == gpu.arch
            assert target["l2_cache_size_bytes"] > 1 << 20
            assert partitions.device.sm_count > partitions.plan(50)[0].expected_sm_count
        finally:
            await partitions.stop()

    asyncio.run(body())


def test_without_mps_the_whole_gpu_is_on_offer(gpu: GpuInfo) -> None:
    async def body() -> None:
        partitions = ExclusivePartitions(gpu, "MPS is off")
        await partitions.start()
        try:
            (part,) = partitions.plan(100)
            assert part.expected_sm_count == partitions.device.sm_count
        finally:
            await partitions.stop()

    asyncio.run(body())
