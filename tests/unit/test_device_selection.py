"""Which GPUs a server takes, and how the host's cores are split between them; drivers and daemons are stand-ins."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tuner_core.errors import ConflictError, TunerError, UsageError
from tuner_server.config import DeviceSettings
from tuner_server.gpu.inventory import GpuInfo, Inventory
from tuner_server.gpu.lock import LOCK_DIRECTORY, GpuLock
from tuner_server.partitions import select
from tuner_server.partitions.exclusive import ExclusivePartitions
from tuner_server.partitions.mps import MpsPartitions
from tuner_server.processes.spawner import Spawner

STANDIN = Path(__file__).parents[1] / "gpu_standin"
PROBE = (sys.executable, str(STANDIN / "mps_client.py"), "probe")


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[GpuInfo]]:
    """Two H200 and, between them, a T4; with MPS."""
    names = ("NVIDIA H200", "Tesla T4", "NVIDIA H200")
    gpus = [
        GpuInfo(index, f"GPU-{uuid.uuid4()}", name, "sm_90", 139 << 30, "default", False, "580", "13.0")
        for index, name in enumerate(names)
    ]
    monkeypatch.setattr(select, "find_gpus", lambda: Inventory(tuple(gpus)))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(16)))
    monkeypatch.setenv("PATH", f"{STANDIN}:{os.environ['PATH']}")
    yield gpus
    for gpu in gpus:
        (LOCK_DIRECTORY / f"tuner-{gpu.uuid}.lock").unlink(missing_ok=True)


@contextlib.asynccontextmanager
async def selected(
    directory: Path, *devices: DeviceSettings
) -> AsyncIterator[tuple[list[select.Chosen], tuple[str, ...]]]:
    chosen, notes = await select.select_providers(devices, directory, Spawner(directory / "logs"), probe=PROBE)
    try:
        yield chosen, notes
    finally:
        for one in chosen:
            await one.provider.stop()


def test_with_no_option_every_gpu_of_the_model_that_there_is_most_of_is_used(
    host: list[GpuInfo], tmp_path: Path
) -> None:
    async def body() -> None:
        async with selected(tmp_path, DeviceSettings(sm_percent=25)) as (chosen, notes):
            assert [one.name for one in chosen] == ["cuda:0", "cuda:2"]
            assert [one.provider.device.uuid for one in chosen] == [host[0].uuid, host[2].uuid]
            assert notes == (
                "left out, as jobs run on GPUs of one model: cuda:1 (Tesla T4); name devices with --device to use them",
            )
            first, second = (one.provider for one in chosen)
            assert isinstance(first, MpsPartitions) and isinstance(second, MpsPartitions)
            assert first.daemon.pid != second.daemon.pid  # a daemon for each
            assert first.daemon.pipe_directory != second.daemon.pipe_directory
            plans = [provider.plan_shares([50, 25, 25]) for provider in (first, second)]
            for gpu, plan in zip((host[0], host[2]), plans, strict=True):
                assert {part.device_uuid for part in plan} == {gpu.uuid}
                assert {part.env["CUDA_VISIBLE_DEVICES"] for part in plan} == {gpu.uuid}
                assert [part.env["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] for part in plan] == ["50", "25", "25"]
                assert [part.expected_sm_count for part in plan] == [66, 32, 32]
            pinned = [core for plan in plans for core in {core for part in plan for core in part.affinity}]
            assert len(pinned) == len(set(pinned)), "workers of two GPUs share cores"
            spare = [
                core
                for provider, plan in zip((first, second), plans, strict=True)
                for core in provider.spare_cores(plan)
            ]
            assert sorted([*pinned, *spare]) == list(range(16))

    asyncio.run(body())


def test_devices_that_are_named_are_used_whatever_their_model_each_with_its_own_settings(
    host: list[GpuInfo], tmp_path: Path
) -> None:
    async def body() -> None:
        named = (
            DeviceSettings("cuda:1", mps="off"),
            DeviceSettings(f"cuda:{host[0].uuid}", partitions=(50, 25, 25)),
            DeviceSettings("cpu:0-7", sm_percent=50),
        )
        async with selected(tmp_path, *named) as (chosen, notes):
            assert [one.name for one in chosen] == ["cuda:1", "cuda:0", "cpu:0-7"]
            off, shared, cpu = (one.provider for one in chosen)
            assert isinstance(off, ExclusivePartitions) and isinstance(shared, MpsPartitions)
            assert notes == ("one exclusive worker on Tesla T4 (cuda:1): MPS is off",)
            assert [one.settings for one in chosen] == list(named)
            assert sorted(cpu.cores) == list(range(8))
            assert sorted([*off.cores, *shared.cores]) == list(range(8, 16)), "the CPU that is measured stays alone"
        async with selected(tmp_path, DeviceSettings("cuda", mps="off")) as (chosen, _):
            assert [one.name for one in chosen] == ["cuda:0", "cuda:1", "cuda:2"]

    asyncio.run(body())


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        (("cuda:0", "cuda:0"), "is named 2 times: give all of its shares in one entry"),
        (("cuda:0", "auto"), "is named 2 times"),
        (("cuda:0", "cpu"), r"say which cores to measure, e.g. --device cpu:0-3"),
        (("cpu:0-3", "cpu:3"), "cpu:3 has cores that another device of this server has"),
        (("cpu:64",), "this process may not use core 64"),
        (("cuda:9",), "cuda:9 names no GPU of this host"),
        (("gpu0",), "--device wants auto, cpu"),
    ],
)
def test_contradictions_are_refused_and_nothing_is_left_running(
    devices: tuple[str, ...], message: str, host: list[GpuInfo], tmp_path: Path
) -> None:
    async def body() -> None:
        with pytest.raises(UsageError, match=message):
            await select.select_providers(
                [DeviceSettings(device) for device in devices], tmp_path, Spawner(tmp_path / "logs"), probe=PROBE
            )

    asyncio.run(body())
    for gpu in host:
        GpuLock(gpu.uuid).release()  # nobody holds it


def test_of_several_gpus_those_of_another_server_are_left_out_but_not_when_they_are_named(
    host: list[GpuInfo], tmp_path: Path
) -> None:
    async def body() -> None:
        held = GpuLock(host[0].uuid)
        async with selected(tmp_path, DeviceSettings()) as (chosen, notes):
            assert [one.name for one in chosen] == ["cuda:2"]
            assert "left out: another tuner-server" in notes[-1]
        named = [DeviceSettings("cuda:2"), DeviceSettings("cuda:0")]
        with pytest.raises(ConflictError, match="another tuner-server"):
            await select.select_providers(named, tmp_path, Spawner(tmp_path / "logs"), probe=PROBE)
        other = GpuLock(host[2].uuid)  # the refusal has given it back
        with pytest.raises(ConflictError, match="another tuner-server"):
            await select.select_providers([DeviceSettings()], tmp_path, Spawner(tmp_path / "logs"), probe=PROBE)
        for lock in (held, other):
            lock.release()

    asyncio.run(body())


def test_caps_that_are_not_applied_leave_one_exclusive_worker_with_the_reason(
    host: list[GpuInfo], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STANDIN_IGNORES_CAPS", "1")

    async def body() -> None:
        async with selected(tmp_path, DeviceSettings("cuda:0")) as (chosen, notes):
            assert isinstance(chosen[0].provider, ExclusivePartitions)
            assert "does not cap its clients" in notes[0]
            with pytest.raises(
                UsageError, match="only one worker with 100 % of the GPU is on offer here: MPS does not"
            ):
                chosen[0].provider.plan_shares([50, 25, 25])
        with pytest.raises(TunerError):
            await select.select_providers(
                [DeviceSettings("cuda:0", mps="external")], tmp_path, Spawner(tmp_path / "logs"), probe=PROBE
            )

    asyncio.run(body())
