"""The spool's own troubles: a full disk, a file that cannot be used, two stores on one file; a Redis that hangs."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.contract.record_values import make_record, make_workload
from tests.fault.test_redis_outages import all_ids, wait_for
from tests.redis_server import DURABLE, RedisServer, running
from tuner_core.errors import StoreError
from tuner_core.model import Record
from tuner_core.store.open import open_server_store, open_store
from tuner_core.store.spooled import SpooledStore
from tuner_core.store.sqlite.schema import MIGRATIONS
from tuner_server.scheduler.committer import Committer

MATMUL, CONV = make_workload("matmul"), make_workload("conv")


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with running(tmp_path_factory.mktemp("redis"), *DURABLE) as found:
        yield found


@pytest.fixture
def server(started: RedisServer) -> RedisServer:
    if started.process is None:
        started.start()
    return started


@contextlib.contextmanager
def spooled(server: RedisServer, path: Path, options: str = "timeout_s=0.5") -> Iterator[SpooledStore]:
    """A store whose keys in Redis are those of this path."""
    opened = open_server_store(url_of(server, path, options), path)
    assert isinstance(opened, SpooledStore)
    with contextlib.closing(opened):
        yield opened


def url_of(server: RedisServer, path: Path, options: str = "timeout_s=0.5") -> str:
    return f"{server.url}?prefix={path.parent.name[-40:]}&{options}"


def in_redis(server: RedisServer, path: Path) -> list[str]:
    with contextlib.closing(open_store(url_of(server, path))) as direct:
        return sorted(all_ids(direct))


def ids(records: list[Record]) -> list[str]:
    return sorted(record.trial_id for record in records)


def set_spool(store: SpooledStore, pragma: str) -> None:
    """Let SQLite refuse the spool's writes, or take them again."""
    store._spool._writer._connection.execute(f"PRAGMA {pragma}").fetchall()


class TestFullDisk:
    def test_a_full_spool_refuses_in_one_line_and_loses_nothing(self, server: RedisServer, tmp_path: Path) -> None:
        path = tmp_path / "spool.sqlite"
        with spooled(server, path) as store:
            acknowledged = [make_record(MATMUL, number) for number in range(5)]
            store.commit(acknowledged, [MATMUL])
            set_spool(store, "max_page_count = 1")  # SQLite takes the present size for the least
            server.kill()
            with pytest.raises(StoreError) as error:
                for number in range(5, 10_000):
                    record = make_record(MATMUL, number)
                    store.commit([record])
                    acknowledged.append(record)
            assert "\n" not in str(error.value)
            assert "no space left" in str(error.value)
            assert str(path) in str(error.value)
            assert "cannot be reached" in str(error.value)
            assert len(acknowledged) > 5
            assert store.get(acknowledged[-1].trial_id) == acknowledged[-1]
            server.start()
            wait_for(lambda: store.waiting == 0)
            late = make_record(MATMUL, 20_000)
            store.commit([late])
        assert in_redis(server, path) == ids([*acknowledged, late])

    def test_redis_goes_on_without_a_spool_that_cannot_be_written(self, server: RedisServer, tmp_path: Path) -> None:
        path = tmp_path / "spool.sqlite"
        with spooled(server, path) as store:
            store.commit([make_record(MATMUL, 0)], [MATMUL])
            set_spool(store, "query_only = 1")
            assert store.commit([make_record(CONV, 0)], [CONV]).stored == 1  # no copy of the workload is kept here
            server.kill()
            with pytest.raises(StoreError, match="cannot be reached"):
                store.commit([make_record(CONV, 1)])
            set_spool(store, "query_only = 0")
            store.commit([make_record(CONV, 2)])  # the workload's copy goes along
            set_spool(store, "query_only = 1")
            server.start()
            wait_for(lambda: len(in_redis(server, path)) == 3)
            assert store.waiting == 1  # what Redis has cannot be taken out
            assert store.commit([make_record(MATMUL, 3)]).stored == 1
            set_spool(store, "query_only = 0")
            wait_for(lambda: store.waiting == 0)
            assert store.commit([make_record(CONV, 1)]).stored == 1
        committed = [
            *(make_record(CONV, number) for number in range(3)),
            make_record(MATMUL, 0),
            make_record(MATMUL, 3),
        ]
        assert in_redis(server, path) == ids(committed)


class TestRefusal:
    @pytest.mark.parametrize("what", ["newer", "other", "directory"])
    def test_a_spool_that_cannot_be_used_is_refused_at_the_start_and_left_alone(
        self, server: RedisServer, tmp_path: Path, what: str
    ) -> None:
        path = tmp_path / "spool.sqlite"
        if what == "newer":
            with spooled(server, path):
                pass
            with contextlib.closing(sqlite3.connect(path)) as file:
                file.execute(f"PRAGMA user_version = {MIGRATIONS[-1].version + 1}")
        elif what == "other":
            path.write_text("these are not records\n" * 100)
        else:
            path.mkdir()
        before = None if path.is_dir() else path.read_bytes()
        with pytest.raises(StoreError) as error:
            open_server_store(url_of(server, path), path)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)
        assert before is None or path.read_bytes() == before


def test_two_stores_on_one_spool_lose_and_double_nothing(server: RedisServer, tmp_path: Path) -> None:
    path = tmp_path / "spool.sqlite"
    with spooled(server, path) as one, spooled(server, path) as other:
        one.commit([], [MATMUL])
        server.kill()
        records = [make_record(MATMUL, number) for number in range(60)]
        for first, second in zip(records[::2], records[1::2], strict=True):
            one.commit([first])
            other.commit([second])
        assert one.waiting == other.waiting == 60
        server.start()
        wait_for(lambda: one.waiting == 0)
        more = make_record(MATMUL, 99)
        other.commit([more])
        wait_for(lambda: other.waiting == 0)
    assert in_redis(server, path) == ids([*records, more])


def test_a_commit_does_not_wait_for_a_redis_that_hangs(server: RedisServer, tmp_path: Path) -> None:
    """Else nothing would be measured meanwhile: trials that are not stored count as under way."""
    path = tmp_path / "spool.sqlite"
    records = [make_record(MATMUL, number) for number in range(30)]

    async def measure(store: SpooledStore) -> None:
        committer = Committer(store)
        await asyncio.gather(*(committer.commit(record) for record in records[:10]))
        server.signal(signal.SIGSTOP)
        await asyncio.gather(*(committer.commit(record) for record in records[10:20]))
        await asyncio.gather(*(committer.commit(record) for record in records[20:]))
        await committer.stop()

    with spooled(server, path, "timeout_s=600") as store:
        store.commit([], [MATMUL])
        measuring = threading.Thread(target=lambda: asyncio.run(measure(store)), daemon=True)
        measuring.start()
        measuring.join(60)
        stuck = measuring.is_alive()
        waiting = store.waiting
        server.signal(signal.SIGCONT)
        assert not stuck
        assert waiting == 20
        wait_for(lambda: store.waiting == 0)
    assert in_redis(server, path) == ids(records)
