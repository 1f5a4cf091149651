"""Nothing that was acknowledged is lost or doubled while Redis is down, stopped, full, failing over or killed."""

from __future__ import annotations

import contextlib
import itertools
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.contract.record_values import make_record, make_workload
from tests.redis_server import DURABLE, RedisServer, running
from tuner_core.errors import UnavailableError
from tuner_core.model import FailureKind, Record
from tuner_core.store.interface import RecordFilter, RecordStore
from tuner_core.store.open import open_server_store, open_store
from tuner_core.store.spooled import SpooledStore

MATMUL = make_workload("matmul")
OTHERS = [make_workload(f"operator {number}") for number in range(3)]
EVERYTHING = RecordFilter(include_failed=True)


def wait_for(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.005)


def followed(store: RecordStore) -> list[str]:
    """Trial ids in the order in which they were committed, from the first on."""
    found: list[str] = []
    cursor = "redis-0.0"
    while True:
        answer = store.follow(EVERYTHING, cursor)
        if not answer.records:
            return found
        found += [record.trial_id for record in answer.records]
        cursor = answer.cursor


def all_ids(store: RecordStore, limit: int = 500) -> list[str]:
    found: list[str] = []
    cursor = None
    while True:
        page = store.query(EVERYTHING, limit=limit, cursor=cursor)
        found += [record.trial_id for record in page.records]
        cursor = page.next_cursor
        if cursor is None:
            return found


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    with running(tmp_path / "redis", *DURABLE) as found:
        yield found


@pytest.fixture
def store(server: RedisServer, tmp_path: Path) -> Iterator[SpooledStore]:
    opened = open_server_store(f"{server.url}?timeout_s=0.3", tmp_path / "spool.sqlite")
    assert isinstance(opened, SpooledStore)
    yield opened
    opened.close()


def records(first: int, last: int) -> list[Record]:
    return [make_record(MATMUL, number) for number in range(first, last)]


def check_replayed(store: SpooledStore, server: RedisServer, expected: list[Record]) -> None:
    """The spool empties, and Redis has every record once, in the order of the commits."""
    wait_for(lambda: store.waiting == 0)
    with contextlib.closing(open_store(server.url)) as direct:
        assert followed(direct) == [record.trial_id for record in expected]
        assert sorted(all_ids(direct)) == sorted(record.trial_id for record in expected)


def commit_one_by_one(store: RecordStore, some: list[Record]) -> None:
    for record in some:
        assert store.commit([record]).stored == 1


class TestOutages:
    def test_commits_while_redis_is_down_are_replayed_in_order(self, store: SpooledStore, server: RedisServer) -> None:
        store.commit(records(0, 5), [MATMUL])
        server.kill()
        commit_one_by_one(store, records(5, 30))
        assert store.waiting == 25
        assert store.get(records(7, 8)[0].trial_id) == records(7, 8)[0]
        server.start()
        check_replayed(store, server, records(0, 30))

    def test_a_stopped_redis_delays_one_commit_and_then_none(self, store: SpooledStore, server: RedisServer) -> None:
        store.commit(records(0, 5), [MATMUL])
        server.signal(signal.SIGSTOP)
        commit_one_by_one(store, records(5, 40))
        assert store.waiting == 35
        server.signal(signal.SIGCONT)
        check_replayed(store, server, records(0, 40))

    def test_a_full_redis_is_read_on_and_gets_the_rest_when_it_has_space(
        self, store: SpooledStore, server: RedisServer
    ) -> None:
        store.commit(records(0, 5), [MATMUL])
        client = server.client()
        client.config_set("maxmemory", client.info()["used_memory"] // 2)
        commit_one_by_one(store, records(5, 20))
        wait_for(lambda: store._readable)
        expected = records(0, 20)
        assert store.waiting == 15
        assert all_ids(store, limit=3) == [record.trial_id for record in expected]
        assert store.top(expected[0].key, 12) == expected[:12]
        assert [store.get(record.trial_id) for record in expected] == expected
        wrong = make_record(MATMUL, 0, failure=FailureKind.WRONG_RESULT, job="check")
        store.commit([wrong])
        assert store.top(expected[0].key, 2) == expected[1:3]
        pages = store.query(EVERYTHING, limit=4)
        client.config_set("maxmemory", 0)
        wait_for(lambda: store.waiting == 0)
        rest = []
        while pages.next_cursor:  # the spool has moved into Redis between two pages
            rest += [record.trial_id for record in pages.records]
            pages = store.query(EVERYTHING, limit=4, cursor=pages.next_cursor)
        rest += [record.trial_id for record in pages.records]
        assert rest == [record.trial_id for record in [*expected, wrong]]
        check_replayed(store, server, [*expected, wrong])

    def test_what_waits_when_the_server_ends_is_replayed_after_its_next_start(
        self, store: SpooledStore, server: RedisServer, tmp_path: Path
    ) -> None:
        store.commit(records(0, 5), [MATMUL])
        server.kill()
        commit_one_by_one(store, records(5, 10))
        store.close()
        with pytest.raises(UnavailableError) as error:
            open_server_store(server.url, tmp_path / "spool.sqlite")
        assert "cannot be reached" in str(error.value)
        server.start()
        again = open_server_store(server.url, tmp_path / "spool.sqlite")
        assert isinstance(again, SpooledStore)
        with contextlib.closing(again):
            check_replayed(again, server, records(0, 10))

    def test_what_waits_for_redis_goes_to_sqlite_when_the_server_is_set_to_that(
        self, store: SpooledStore, server: RedisServer, tmp_path: Path
    ) -> None:
        store.commit([], [MATMUL])
        server.kill()
        commit_one_by_one(store, records(0, 5))
        store.close()
        with contextlib.closing(
            open_server_store(f"sqlite://{tmp_path / 'records.db'}", tmp_path / "spool.sqlite")
        ) as other:
            assert all_ids(other) == [record.trial_id for record in records(0, 5)]

    def test_reads_that_need_redis_say_so_and_how_much_waits(self, store: SpooledStore, server: RedisServer) -> None:
        store.commit(records(0, 5), [MATMUL])
        key = records(0, 1)[0].key
        assert store.top(key, 3) == records(0, 3)
        server.kill()
        faster = make_record(MATMUL, 99, median_us=1.0)
        store.commit([faster])
        assert store.top(key, 3) == [faster, *records(0, 2)]  # the last answer, and what waits
        assert store.get_workload(MATMUL.digest) == MATMUL
        for read in (
            lambda: store.query(RecordFilter()),
            lambda: store.top(make_record(MATMUL, sm_count=9).key),
            lambda: store.get("0" * 64),
            store.stats,
        ):
            with pytest.raises(UnavailableError) as error:
                read()
            assert "cannot be reached" in str(error.value)
        with pytest.raises(UnavailableError, match="1 records wait"):
            store.query(RecordFilter())
        with pytest.raises(UnavailableError):
            store.commit([make_record(OTHERS[0])])  # whether its workload is stored cannot be known
        server.start()
        wait_for(lambda: store.waiting == 0)
        assert store.top(key, 1) == [faster]

    def test_a_failover_loses_nothing_that_a_replica_had_to_have(self, server: RedisServer, tmp_path: Path) -> None:
        with running(tmp_path / "replica", *DURABLE, "--replicaof", f"127.0.0.1 {server.port}") as replica:
            server.client().config_set("repl-diskless-sync-delay", 0)
            replica.client().config_set("repl-diskless-sync-delay", 0)
            url = f"{server.url}?timeout_s=1&wait_replicas=1"
            wait_for(lambda: server.client().info()["connected_slaves"] == 1)
            wait_for(lambda: replica.client().info()["master_link_status"] == "up")
            store = open_server_store(url, tmp_path / "spool.sqlite")
            assert isinstance(store, SpooledStore)
            with contextlib.closing(store):
                store.commit(records(0, 20), [MATMUL])
                server.client().execute_command("FAILOVER")
                wait_for(lambda: server.client().info()["role"] == "slave")
                commit_one_by_one(store, records(20, 40))  # READONLY: spooled
                assert store.waiting
                wait_for(lambda: replica.client().info()["connected_slaves"] == 1)
                wait_for(lambda: server.client().info()["master_link_status"] == "up")
                with contextlib.closing(open_store(replica.url)) as promoted:
                    assert followed(promoted) == [record.trial_id for record in records(0, 20)]
                replica.client().execute_command("FAILOVER")
                check_replayed(store, server, records(0, 40))

    def test_a_commit_that_too_few_replicas_have_waits_in_the_spool(self, server: RedisServer, tmp_path: Path) -> None:
        store = open_server_store(f"{server.url}?timeout_s=0.2&wait_replicas=1", tmp_path / "spool.sqlite")
        assert isinstance(store, SpooledStore)
        with contextlib.closing(store):
            store.commit(records(0, 3), [MATMUL])
            assert store.waiting == 3


class TestKills:
    KILLS = 200

    def test_every_acknowledged_record_is_there_once_after_200_kills(self, tmp_path: Path) -> None:
        chance = random.Random(7)
        numbers = itertools.count()
        acknowledged: list[Record] = []
        failed: list[BaseException] = []
        stop = threading.Event()
        budget = threading.Semaphore(8)
        with running(tmp_path / "redis", *DURABLE) as server:
            opened = open_server_store(f"{server.url}?timeout_s=2", tmp_path / "spool.sqlite")
            assert isinstance(opened, SpooledStore)
            store: SpooledStore = opened
            store.commit([], OTHERS)

            def write(worker: int) -> None:
                choice = random.Random(worker)
                try:
                    while not stop.is_set():
                        # bounded, so that the data stay small and restarts fast
                        if not budget.acquire(timeout=0.05):
                            continue
                        some = [make_record(choice.choice(OTHERS), next(numbers)) for _ in range(choice.randint(1, 2))]
                        store.commit(some)
                        acknowledged.extend(some)
                except BaseException as error:
                    failed.append(error)

            writers = [threading.Thread(target=write, args=(worker,)) for worker in range(3)]
            for writer in writers:
                writer.start()
            direct = 0
            for _ in range(self.KILLS):
                budget.release(6)
                time.sleep(chance.uniform(0, 0.03))
                direct += store.waiting == 0
                server.kill()
                server.start()
                if chance.random() < 0.15:
                    wait_for(lambda: store.waiting == 0)
            stop.set()
            for writer in writers:
                writer.join()
            assert not failed, failed
            wait_for(lambda: store.waiting == 0)
            store.close()
            assert direct > self.KILLS // 10  # kills hit Redis while it was written to, not only the spool
            server.kill()
            server.start()
            with contextlib.closing(open_store(server.url)) as after:
                wanted = sorted(record.trial_id for record in acknowledged)
                assert len(wanted) > self.KILLS
                assert sorted(all_ids(after)) == wanted
                assert sorted(followed(after)) == wanted
                assert after.stats()["records"] == len(wanted)
