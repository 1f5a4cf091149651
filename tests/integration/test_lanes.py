"""Several shares and several devices in one server: who measures on what, at the same time as whom. Real processes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.gpu import kernels
from tuner_core.errors import ConflictError, TunerError
from tuner_server.config import DeviceSettings, ServerConfig
from tuner_server.engine import Engine
from tuner_server.lanes.lane import Lane
from tuner_server.measure.requests import Measurement, MeasureRequest
from tuner_server.partitions.host import usable_cores

CPU = '{"kind": "llvm"}'
CORES = usable_cores()[:2]
pytestmark = pytest.mark.skipif(len(CORES) < 2, reason="needs two cores")


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> MeasureRequest:
    return kernels.request(kernels.build("good", tmp_path_factory.mktemp("kernels"), CPU), 30)


@contextlib.asynccontextmanager
async def engine(directory: Path, *devices: DeviceSettings, repartition: bool = True) -> AsyncIterator[Engine]:
    running = Engine(ServerConfig(data_dir=directory, devices=devices, repartition=repartition))
    try:
        await running.start()
        yield running
    finally:
        await running.stop()


def two_cores(*shares: int, oversubscribe: bool = False) -> DeviceSettings:
    cores = ",".join(str(core) for core in CORES)
    return DeviceSettings(f"cpu:{cores}", partitions=shares, oversubscribe=oversubscribe)


async def until(condition: asyncio.Event) -> None:
    await asyncio.wait_for(condition.wait(), 60)


def test_lanes_of_one_device_run_side_by_side_and_an_exclusive_turn_drains_them_all(
    tmp_path: Path, good: MeasureRequest
) -> None:
    async def body() -> None:
        async with (
            engine(tmp_path, two_cores(50, 25)) as server,
            server.lane(50) as half,
            server.lane(25) as quarter,
        ):
            assert [worker.sm_percent for worker in server.workers()] == [50, 25]
            stop = asyncio.Event()

            async def keep_measuring(lane: Lane) -> list[Measurement]:
                done = []
                while not stop.is_set():
                    done.append(await lane.fleet.measure(good))
                return done

            loops = [asyncio.create_task(keep_measuring(lane)) for lane in (half, quarter)]
            await asyncio.sleep(1)
            async with half.fleet.exclusive() as alone:
                assert all(worker.state == "idle" for worker in server.workers())
                verified = await alone.measure(good)
                assert all(worker.state == "idle" for worker in server.workers())
            await asyncio.sleep(0.5)
            stop.set()
            for lane, measured in zip((half, quarter), await asyncio.gather(*loops), strict=True):
                assert {one.partition.sm_percent for one in measured} == {lane.sm_percent}
                assert {one.sm_count for one in measured} == {lane.sm_count}
                assert max(one.neighbours for one in measured) == 1, "they were never at work together"
            assert (verified.neighbours, verified.partition.sm_percent) == (0, 50)

    asyncio.run(body())


def test_jobs_of_one_share_take_turns_and_a_free_device_is_divided_anew_for_another_share_and_back(
    tmp_path: Path, good: MeasureRequest
) -> None:
    order: list[str] = []

    async def body() -> None:
        async with engine(tmp_path, two_cores(50, 25)) as server:
            release = {name: asyncio.Event() for name in ("first", "second", "whole", "last")}
            begun = {name: asyncio.Event() for name in release}

            async def job(name: str, share: int) -> None:
                async with server.lane(share) as lane:
                    order.append(name)
                    begun[name].set()
                    measured = await lane.fleet.measure(good)
                    assert (measured.partition.sm_percent, measured.sm_count) == (share, lane.sm_count)
                    await release[name].wait()

            jobs = []
            for name, share in (("first", 50), ("second", 50), ("whole", 100), ("last", 25)):
                jobs.append(asyncio.create_task(job(name, share)))
                await asyncio.sleep(0.05)
            await until(begun["first"])
            assert order == ["first"], "one at a time, and nobody overtakes the job that needs the whole device"
            release["first"].set()
            await until(begun["second"])
            release["second"].set()
            await until(begun["whole"])
            assert [(worker.sm_percent, worker.sm_count_seen) for worker in server.workers()] == [(100, 2)]
            release["whole"].set()
            await until(begun["last"])
            assert order == ["first", "second", "whole", "last"]
            assert [worker.sm_percent for worker in server.workers()] == [50, 25], "back as configured"
            release["last"].set()
            await asyncio.gather(*jobs)

    asyncio.run(body())


def test_what_cannot_be_had_is_refused_with_what_is_on_offer(tmp_path: Path) -> None:
    async def body() -> None:
        async with engine(tmp_path, two_cores(50, 25), repartition=False) as server:
            with pytest.raises(ConflictError, match=r"offers 50 %, 25 % only, not 30 %"):
                await server.offer(30)
            with pytest.raises(ConflictError, match=r"measures for the target .*, not for .*sm_90"):
                await server.offer(50, kernels.H200_TARGET)

    asyncio.run(body())


def test_oversubscribed_shares_are_granted_when_asked_for(tmp_path: Path, good: MeasureRequest) -> None:
    async def body() -> None:
        async with (
            engine(tmp_path, two_cores(50, 50, 50, oversubscribe=True)) as server,
            server.lane(50) as lane,
        ):
            assert [worker.affinity for worker in server.workers()] == [(CORES[0],), (CORES[1],), (CORES[0],)]
            measured = await asyncio.gather(*(lane.fleet.measure(good) for _ in range(6)))
            assert {one.partition.index for one in measured} == {0, 1, 2}

    asyncio.run(body())


def test_a_job_runs_on_all_devices_of_its_target_and_a_promotion_stops_only_one_of_them(
    tmp_path: Path, good: MeasureRequest
) -> None:
    async def body() -> None:
        each = [DeviceSettings(f"cpu:{core}") for core in CORES]
        async with engine(tmp_path, *each) as server, server.lane(100) as lane:
            names = {f"cpu:{core}" for core in CORES}
            assert set(lane.device_uuids) == names
            assert lane.sm_count == 1
            measured = await asyncio.gather(*(lane.fleet.measure(good) for _ in range(8)))
            assert {one.partition.device_uuid for one in measured} == names

            async with lane.fleet.exclusive() as alone:
                verified = await alone.measure(good)
                beside = await asyncio.gather(*(lane.fleet.measure(good) for _ in range(3)))
            (other,) = {one.partition.device_uuid for one in beside}
            assert {verified.partition.device_uuid, other} == names

            async with lane.fleet.exclusive() as one, lane.fleet.exclusive() as two:  # each on a device of its own
                both = await asyncio.gather(one.measure(good), two.measure(good))
            assert {alone.partition.device_uuid for alone in both} == names

            victim = server.workers()[0]
            os.kill(victim.pid, signal.SIGKILL)
            assert len(await asyncio.gather(*(lane.fleet.measure(good) for _ in range(6)))) == 6

    asyncio.run(body())


def test_a_worker_without_its_share_is_not_used_and_the_next_job_finds_the_device_as_configured(
    tmp_path: Path, good: MeasureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body() -> None:
        async with engine(tmp_path, two_cores(50, 25)) as server:
            provider = server.devices[0].provider
            lies = provider.plan_shares([100])[0].__class__
            monkeypatch.setattr(
                provider,
                "plan_shares",
                lambda shares: [
                    lies(0, "cpu", server.devices[0].partitions[0].kind, share, 64, CORES) for share in shares
                ],
            )
            with pytest.raises(TunerError, match="sees 2 cores instead of the 64 of its share of 100 %"):
                async with server.lane(100):
                    pytest.fail("a lane without its share")
            assert server.workers() == []
            monkeypatch.undo()
            async with server.lane(25) as lane:
                assert (await lane.fleet.measure(good)).partition.sm_percent == 25

    asyncio.run(body())
