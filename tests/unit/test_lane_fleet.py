"""Where a lane's requests go when its share is on several devices, and one of them is busy, taken alone, or lost."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from tuner_core.errors import UnavailableError
from tuner_server.lanes import fleet as lane_fleet
from tuner_server.lanes.fleet import LaneFleet
from tuner_server.measure.requests import MeasureRequest, WorkerSnapshot

REQUEST = MeasureRequest(Path("unused"), ())


class Device:
    """As a lane sees a device: workers in states, and measurements that end when the test says so."""

    def __init__(self, name: str, *shares: int) -> None:
        self.name = name
        self.wanted_alone = 0
        self.states = ["idle"] * len(shares)
        self.shares = shares
        self.running: list[asyncio.Future[str]] = []
        self.freed: list[Callable[[], None]] = []
        self.fleet = self

    def workers(self) -> list[WorkerSnapshot]:
        return [
            WorkerSnapshot(index, self.name, "mps", share, 32, state, 1, ())
            for index, (share, state) in enumerate(zip(self.shares, self.states, strict=True))
        ]

    async def measure(self, request: MeasureRequest, freed: Callable[[], None] | None = None) -> str:
        assert request.sm_percent == 25
        end: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.running.append(end)
        if freed is not None:
            self.freed.append(freed)
        try:
            return await end
        finally:
            self.running.remove(end)

    async def check(self, *_asked: object, sm_percent: int) -> str:
        return await self.measure(MeasureRequest(Path("unused"), (), sm_percent=sm_percent))

    @contextlib.asynccontextmanager
    async def exclusive(self, sm_percent: int) -> AsyncIterator[str]:
        yield self.name


def lane(*devices: Device) -> LaneFleet:
    return LaneFleet(devices, 25)  # type: ignore[arg-type]


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def ask(fleet: LaneFleet, count: int) -> list[asyncio.Task[Any]]:
    return [asyncio.create_task(fleet.measure(REQUEST)) for _ in range(count)]


async def finish(*devices: Device) -> None:
    for device in devices:
        for end in list(device.running):
            end.set_result(device.name)
    await settle()


def test_each_device_gets_as_many_requests_as_it_has_workers_of_the_share() -> None:
    async def body() -> None:
        one, two = Device("one", 50, 25, 25), Device("two", 25)
        asked = ask(lane(one, two), 6)
        await settle()
        assert (len(one.running), len(two.running)) == (2, 1)
        await finish(two)
        assert (len(one.running), len(two.running)) == (2, 1), "the next one takes the place"
        await finish(one, two)
        await finish(one, two)
        done = await asyncio.gather(*asked)
        assert {"one", "two"} == set(done)

    asyncio.run(body())


def test_a_worker_that_is_free_gets_the_next_request_before_the_answer_to_the_last_is_there() -> None:
    async def body() -> None:
        one, two = Device("one", 25), Device("two", 25)
        asked = ask(lane(one, two), 4)
        await settle()
        assert (len(one.running), len(two.running)) == (1, 1)
        one.freed[0]()  # its answer waits until no neighbour's fault can make it void
        await settle()
        assert (len(one.running), len(two.running)) == (2, 1)
        one.freed[0]()
        await settle()
        assert (len(one.running), len(two.running)) == (2, 1), "a place is given back once"
        await finish(one, two)
        await finish(one, two)
        assert len(await asyncio.gather(*asked)) == 4

    asyncio.run(body())


def test_nothing_is_sent_to_wait_behind_a_promotion_while_another_device_is_free() -> None:
    async def body() -> None:
        one, two = Device("one", 25, 25), Device("two", 25, 25)
        fleet = lane(one, two)
        async with fleet.exclusive() as first, fleet.exclusive() as second:
            assert {first, second} == {"one", "two"}, "each promotion has a device of its own"
            asked = ask(fleet, 1)
            await settle()
            assert not one.running and not two.running
        await settle()
        async with fleet.exclusive() as held:
            more = ask(fleet, 3)
            await settle()
            (free,) = [device for device in (one, two) if device.name != held]
            assert len(free.running) == 2
        await settle()
        assert len(one.running) + len(two.running) == 4
        await finish(one, two)
        await asyncio.gather(*asked, *more)

    asyncio.run(body())


def test_a_device_that_lost_its_workers_gets_nothing_until_they_are_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lane_fleet, "_RECHECK_S", 0.01)

    async def body() -> None:
        one, two = Device("one", 25), Device("two", 25)
        one.states = ["lost"]
        fleet = lane(one, two)
        assert fleet.capacity == 1
        asked = ask(fleet, 2)
        await settle()
        assert (len(one.running), len(two.running)) == (0, 1)
        one.states = ["idle"]
        async with asyncio.timeout(5):
            while not one.running:
                await asyncio.sleep(0.005)
        await finish(one, two)
        await asyncio.gather(*asked)

    asyncio.run(body())


def test_a_device_that_gives_up_fails_a_request_only_when_no_other_has_a_worker() -> None:
    async def body() -> None:
        one, two = Device("one", 25), Device("two", 25)
        (asked,) = ask(lane(one, two), 1)
        await settle()
        holder, other = (one, two) if one.running else (two, one)
        holder.states = ["lost"]
        holder.running[0].set_exception(UnavailableError("no worker can be started"))
        await settle()
        assert len(other.running) == 1
        other.states = ["lost"]
        other.running[0].set_exception(UnavailableError("no worker can be started"))
        with pytest.raises(UnavailableError):
            await asked

    asyncio.run(body())


def test_a_promotion_begins_anew_on_another_device_when_its_own_gives_up() -> None:
    async def body() -> None:
        one, two = Device("one", 25), Device("two", 25)
        fleet = lane(one, two)
        tried: list[str] = []

        async def promote(alone: Any) -> str:
            tried.append(alone)
            if len(tried) == 1:
                (one if alone == "one" else two).states = ["lost"]
                raise UnavailableError("no worker can be started")
            return str(alone)

        assert await fleet.alone(promote) == tried[1] != tried[0]
        one.states = two.states = ["lost"]
        tried.clear()
        with pytest.raises(UnavailableError):
            await fleet.alone(promote)
        assert len(tried) == 1 and one.wanted_alone == two.wanted_alone == 0

    asyncio.run(body())


def test_a_check_goes_to_another_device_when_its_own_gives_up() -> None:
    async def body() -> None:
        one, two = Device("one", 25), Device("two", 25)
        asked = asyncio.create_task(lane(one, two).check(Path("unused"), (), None))
        await settle()
        holder, other = (one, two) if one.running else (two, one)
        holder.states = ["lost"]
        holder.running[0].set_exception(UnavailableError("no worker can be started"))
        await settle()
        await finish(other)
        assert await asked == other.name

    asyncio.run(body())


def test_a_cancelled_request_gives_its_place_back() -> None:
    async def body() -> None:
        one, two = Device("one", 25), Device("two", 25)
        asked = ask(lane(one, two), 4)
        await settle()
        for task in asked[:3]:
            task.cancel()
        await settle()
        assert len(one.running) + len(two.running) == 1
        await finish(one, two)
        assert asked[3].result() in ("one", "two")

    asyncio.run(body())
