"""Planning of GPU shares, what workers are told, and how they are stopped; the device's side is a stand-in."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tuner_core.errors import TunerError, UsageError
from tuner_core.model import PartitionKind
from tuner_server.config import DeviceSettings
from tuner_server.gpu.inventory import GpuInfo, Inventory, choose_gpus, find_gpus
from tuner_server.gpu.lock import LOCK_DIRECTORY
from tuner_server.gpu.sm_share import SmShares, fit_shares
from tuner_server.partitions import select
from tuner_server.partitions.exclusive import ExclusivePartitions
from tuner_server.partitions.mps import MpsPartitions
from tuner_server.processes.spawner import Spawner

STANDIN = Path(__file__).parents[1] / "gpu_standin"
PROBE = (sys.executable, str(STANDIN / "mps_client.py"), "probe")


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """Short, since pipes are sockets: where a path is too long for one, the daemon takes another place for them."""
    with tempfile.TemporaryDirectory(prefix="mps-") as short:
        yield Path(short)


@pytest.fixture
def gpu() -> Iterator[GpuInfo]:
    name = f"GPU-{uuid.uuid4()}"
    yield GpuInfo(0, name, "NVIDIA H200", "sm_90", 139 << 30, "default", False, "580.159.03", "13.0")
    (LOCK_DIRECTORY / f"tuner-{name}.lock").unlink(missing_ok=True)


@contextlib.asynccontextmanager
async def provider(gpu: GpuInfo, directory: Path, **options: bool) -> AsyncIterator[MpsPartitions]:
    control = str(STANDIN / "nvidia-cuda-mps-control")
    partitions = MpsPartitions(gpu, directory, control=control, probe=PROBE, **options)
    await partitions.start()
    try:
        yield partitions
    finally:
        await partitions.stop()


def test_shares_are_planned_within_100_percent(gpu: GpuInfo, tmp_path: Path) -> None:
    async def body() -> None:
        async with provider(gpu, tmp_path / "mps") as partitions:
            assert partitions.device.sm_count == 132
            assert "SMs seen: 12 at 10 %, 32 at 25 %, 66 at 50 %, 132 at 100 %" in partitions.describe()
            plan = partitions.plan(25, 4)
            assert [part.expected_sm_count for part in plan] == [32] * 4
            assert len(partitions.plan(25)) == 4
            assert len(partitions.plan(1)) == 48  # MPS takes no more clients
            assert [part.expected_sm_count for part in partitions.plan_shares([50, 25, 12])] == [66, 32, 14]
            assert partitions.plan(100)[0].expected_sm_count == 132
            assert {part.kind for part in plan} == {PartitionKind.MPS}
            with pytest.raises(UsageError, match=r"25 \+ 25 \+ 25 \+ 25 \+ 25 sum to 125 %.*--oversubscribe"):
                partitions.plan(25, 5)
            with pytest.raises(UsageError, match="49 workers are too many"):
                partitions.plan(1, 49)
            with pytest.raises(UsageError, match="1 to 100"):
                partitions.plan(0)

    asyncio.run(body())


def test_oversubscription_is_granted_when_asked_for_and_says_what_it_costs(
    gpu: GpuInfo, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def body() -> None:
        async with provider(gpu, tmp_path / "mps", oversubscribe=True) as partitions:
            plan = partitions.plan(25, 8)
            assert len(plan) == 8
            assert sum(part.memory_bytes for part in plan) < gpu.memory_bytes

    with caplog.at_level(logging.WARNING):
        asyncio.run(body())
    assert any("200 %" in line and "rank correlation" in line for line in caplog.messages)


def test_a_worker_is_told_its_device_by_uuid_its_daemon_its_share_and_its_memory(gpu: GpuInfo, tmp_path: Path) -> None:
    async def body() -> None:
        async with provider(gpu, tmp_path / "mps") as partitions:
            env = partitions.plan_shares([50, 25])[1].env
            assert env["CUDA_VISIBLE_DEVICES"] == gpu.uuid
            assert env["CUDA_MPS_PIPE_DIRECTORY"] == str(partitions.daemon.pipe_directory)
            assert env["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] == "25"
            assert env["CUDA_MPS_PINNED_DEVICE_MEM_LIMIT"] == f"0={int(139 * 1024 * 0.9 * 0.25)}M"

    asyncio.run(body())


def test_a_driver_that_does_not_cap_is_refused_and_its_daemon_stopped(
    gpu: GpuInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STANDIN_IGNORES_CAPS", "1")

    async def body() -> None:
        with pytest.raises(TunerError, match="saw all 132 SMs: this driver's MPS does not cap its clients"):
            async with provider(gpu, tmp_path / "mps"):
                pass

    asyncio.run(body())
    assert list((tmp_path / "mps" / "pipe").iterdir()) == []


def test_the_target_is_the_devices_own_and_tvm_accepts_it(gpu: GpuInfo, tmp_path: Path) -> None:
    from tuner_core.compiler.tvm_setup import load_tvm

    load_tvm()
    from tvm.target import Target

    async def body() -> None:
        async with provider(gpu, tmp_path / "mps") as partitions:
            text = await partitions.target_json(25)
            assert text == await partitions.target_json(100)
            target = Target(json.loads(text))
            assert (target.attrs["arch"], target.attrs["l2_cache_size_bytes"]) == ("sm_90", 60 << 20)
            assert Target(json.loads(str(target))).attrs["registers_per_block"] == 65536

    asyncio.run(body())


class ChildOfTheServer:
    """The part of processes.spawner.Child that stopping needs, around a stand-in of a busy worker."""

    def __init__(self, env: dict[str, str], kind: str = "work") -> None:
        command = [sys.executable, str(STANDIN / "mps_client.py"), kind]
        self.process = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None and self.process.stdout.readline() == "attached\n"
        self.pid = self.process.pid
        self.exited = asyncio.ensure_future(asyncio.to_thread(self.process.wait))

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def hang_up(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()

    def kill(self) -> None:
        self.process.kill()


def test_a_busy_worker_is_stopped_without_harm_to_its_neighbour(gpu: GpuInfo, tmp_path: Path) -> None:
    async def body() -> None:
        async with provider(gpu, tmp_path / "mps") as partitions:
            plan = partitions.plan(50)
            hung, neighbour = (ChildOfTheServer({**os.environ, **part.env}) for part in plan)
            assert await partitions.stop_worker(hung)  # type: ignore[arg-type]
            assert hung.process.returncode == 3
            assert neighbour.alive
            neighbour.process.kill()
            neighbour.process.wait()
            assert not await partitions.stop_worker(neighbour)  # type: ignore[arg-type]

    asyncio.run(body())


def test_a_worker_that_leaves_in_order_harms_nobody_whatever_the_daemon_says(gpu: GpuInfo, tmp_path: Path) -> None:
    async def body() -> None:
        async with provider(gpu, tmp_path / "mps") as partitions:
            plan = partitions.plan(50)
            idle = ChildOfTheServer({**os.environ, **plan[0].env}, "idle")
            assert partitions.daemon.pid is not None
            os.kill(partitions.daemon.pid, signal.SIGSTOP)
            try:
                assert await partitions.stop_worker(idle)  # type: ignore[arg-type]
            finally:
                os.kill(partitions.daemon.pid, signal.SIGCONT)
            assert idle.process.returncode == 0

    asyncio.run(body())


def test_a_worker_that_does_not_exit_is_killed_once_it_is_off_the_device(gpu: GpuInfo, tmp_path: Path) -> None:
    async def body() -> None:
        async with provider(gpu, tmp_path / "mps") as partitions:
            plan = partitions.plan(50)
            stuck = ChildOfTheServer({**os.environ, **plan[0].env}, "stuck")
            neighbour = ChildOfTheServer({**os.environ, **plan[1].env})
            assert await partitions.stop_worker(stuck)  # type: ignore[arg-type]
            assert stuck.process.returncode == -signal.SIGKILL
            assert neighbour.alive
            neighbour.process.kill()

    asyncio.run(body())


def test_where_the_daemon_does_not_answer_a_worker_is_killed_and_its_neighbours_are_not_trusted(
    gpu: GpuInfo, tmp_path: Path
) -> None:
    async def body() -> None:
        async with provider(gpu, tmp_path / "mps") as partitions:
            hung = ChildOfTheServer({**os.environ, **partitions.plan(50)[0].env})
            assert partitions.daemon.pid is not None
            os.kill(partitions.daemon.pid, signal.SIGSTOP)
            try:
                assert not await partitions.stop_worker(hung)  # type: ignore[arg-type]
            finally:
                os.kill(partitions.daemon.pid, signal.SIGCONT)
            assert hung.process.returncode == -signal.SIGKILL

    asyncio.run(body())


def test_a_dead_daemon_comes_back_before_the_next_worker(gpu: GpuInfo, tmp_path: Path) -> None:
    async def body() -> None:
        async with provider(gpu, tmp_path / "mps") as partitions:
            (part, *_) = partitions.plan(25)
            assert partitions.daemon.pid is not None
            os.kill(partitions.daemon.pid, signal.SIGKILL)
            await partitions.prepare_worker(part)
            worker = ChildOfTheServer({**os.environ, **part.env})
            assert await partitions.stop_worker(worker)  # type: ignore[arg-type]

    asyncio.run(body())


def test_without_mps_one_exclusive_worker_is_on_offer_and_the_rest_is_refused_with_the_reason(gpu: GpuInfo) -> None:
    async def body() -> None:
        partitions = ExclusivePartitions(gpu, "nvidia-cuda-mps-control is not installed", probe=PROBE)
        await partitions.start()
        try:
            (part,) = partitions.plan(100)
            assert (part.kind, part.expected_sm_count) == (PartitionKind.EXCLUSIVE, 132)
            assert "CUDA_MPS_PIPE_DIRECTORY" not in part.env
            for share, workers in ((25, None), (100, 2)):
                with pytest.raises(UsageError, match=r"only one worker .*nvidia-cuda-mps-control is not installed"):
                    partitions.plan(share, workers)
        finally:
            await partitions.stop()

    asyncio.run(body())


@pytest.mark.parametrize(
    ("seen", "percent", "count"),
    [
        ({10: 12, 25: 32, 50: 66}, 30, 38),  # H200, as measured
        ({10: 12, 25: 32, 50: 66}, 12, 14),
        ({10: 12, 25: 32, 50: 66}, 1, 2),
        ({10: 14, 25: 34, 50: 66}, 30, 40),  # a device that rounds up
        ({10: 13, 25: 33, 50: 66}, 30, 39),  # one that grants single SMs
        ({10: 17, 25: 31, 50: 66}, 25, 31),  # no rule fits: what was read stands
    ],
)
def test_the_rule_of_shares_follows_what_was_read(seen: dict[int, int], percent: int, count: int) -> None:
    assert fit_shares(132, seen).at(percent) == count


def test_the_rule_gives_every_count_that_was_measured_on_an_h200() -> None:
    assert [SmShares(132).at(share) for share in (100, 50, 30, 25, 12, 10)] == [132, 66, 38, 32, 14, 12]


def test_a_host_without_a_driver_has_no_gpu_and_says_so() -> None:
    inventory = find_gpus()
    if inventory.gpus:
        pytest.skip("this host has a GPU")
    assert "NVIDIA driver" in inventory.reason
    with pytest.raises(TunerError, match=r"no GPU to use: .*NVIDIA driver"):
        choose_gpus(inventory, "cuda:0")
    assert choose_gpus(inventory, "auto") == ()


def test_where_mps_refuses_to_start_the_server_goes_on_with_one_exclusive_worker(
    gpu: GpuInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(select, "find_gpus", lambda: Inventory((gpu,)))
    monkeypatch.setenv("PATH", f"{STANDIN}:{os.environ['PATH']}")
    directory = tmp_path / "mps" / gpu.uuid[:12]
    directory.mkdir(parents=True)
    (directory / "refuse-start").touch()
    spawner = Spawner(tmp_path / "logs")

    async def body() -> None:
        (chosen,), notes = await select.select_providers([DeviceSettings()], tmp_path, spawner, probe=PROBE)
        assert isinstance(chosen.provider, ExclusivePartitions)
        assert "one exclusive worker on NVIDIA H200 (cuda:0): MPS does not work here (the MPS control" in notes[0]
        await chosen.provider.stop()
        with pytest.raises(TunerError, match="no MPS control daemon answers"):
            await select.select_providers([DeviceSettings(mps="external")], tmp_path, spawner, probe=PROBE)
        monkeypatch.setenv("PATH", "/nowhere")
        (chosen,), notes = await select.select_providers([DeviceSettings("cuda:0")], tmp_path, spawner, probe=PROBE)
        assert "nvidia-cuda-mps-control is not installed" in notes[0]
        await chosen.provider.stop()

    asyncio.run(body())
