"""Claims of jobs on tasks, over a real store."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.contract.record_values import make_record, make_workload
from tuner_core.errors import UnavailableError
from tuner_core.store.interface import RecordStore
from tuner_core.store.open import open_store
from tuner_server.scheduler.single_flight import SingleFlight

A = make_record(make_workload("a")).key
B = make_record(make_workload("b")).key


class _Job:
    def __init__(self, store: RecordStore, name: str, ttl_s: float = 5.0) -> None:
        self.taken: asyncio.Queue[int] = asyncio.Queue()
        self.flight = SingleFlight(store, name, self.taken.put, ttl_s=ttl_s, poll_s=0.02)


@pytest.fixture
def store(tmp_path: Path) -> RecordStore:
    return open_store(f"sqlite:///{tmp_path / 'records.sqlite'}")


def test_the_second_job_waits_until_the_first_lets_go(store: RecordStore) -> None:
    async def run() -> None:
        first, second = _Job(store, "host-a/job-1"), _Job(store, "host-b/job-2")
        assert await first.flight.begin({0: A}) == {}
        assert await second.flight.begin({3: A, 4: B}) == {3: "host-a/job-1"}
        await asyncio.sleep(0.1)
        assert second.taken.empty()
        await first.flight.let_go(0)
        assert await asyncio.wait_for(second.taken.get(), 5) == 3
        await second.flight.stop()
        assert await first.flight.begin({0: A, 1: B}) == {}  # stop() released both
        await first.flight.stop()

    asyncio.run(run())


def test_a_job_that_lives_keeps_its_claim_and_one_that_died_loses_it(store: RecordStore) -> None:
    async def run() -> None:
        living, dead = _Job(store, "host-a/job-1", ttl_s=0.3), _Job(store, "host-c/job-3", ttl_s=0.3)
        second = _Job(store, "host-b/job-2")
        await living.flight.begin({0: A})
        await dead.flight.begin({0: B})
        assert dead.flight._keeper is not None
        dead.flight._keeper.cancel()
        assert len(await second.flight.begin({0: A, 1: B})) == 2
        assert await asyncio.wait_for(second.taken.get(), 5) == 1
        await asyncio.sleep(0.6)  # two lifetimes of a claim
        assert second.taken.empty()
        await living.flight.stop()
        await second.flight.stop()

    asyncio.run(run())


def test_a_job_that_is_resumed_finds_its_own_claim(store: RecordStore) -> None:
    async def run() -> None:
        await _Job(store, "host-a/job-1").flight.begin({0: A})
        again = _Job(store, "host-a/job-1")
        assert await again.flight.begin({0: A}) == {}
        await again.flight.stop()

    asyncio.run(run())


def test_a_store_out_of_reach_holds_nothing_up(store: RecordStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise UnavailableError("the store is down")

    claims = store.claims
    monkeypatch.setattr(type(claims), "claim", fail)

    async def run() -> None:
        job = _Job(store, "host-a/job-1")
        assert await job.flight.begin({0: A}) == {}
        await job.flight.let_go(0)
        await job.flight.stop()

    asyncio.run(run())
