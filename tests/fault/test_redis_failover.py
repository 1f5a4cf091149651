"""Masters that are killed while their replicas take over: what was acknowledged is there once, for everybody."""

from __future__ import annotations

import contextlib
import itertools
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from tests.contract.record_values import make_record, make_workload
from tests.fault.test_redis_outages import EVERYTHING, all_ids, followed, wait_for
from tests.redis_server import DURABLE, RedisServer, running, running_cluster, running_with_sentinel
from tuner_core.errors import StoreError, UnavailableError
from tuner_core.model import Record
from tuner_core.store.interface import RecordFilter, RecordStore
from tuner_core.store.open import open_server_store, open_store
from tuner_core.store.redis import parse_location
from tuner_core.store.redis.connection import Connection
from tuner_core.store.redis.writing import RecordWriter
from tuner_core.store.spooled import SpooledStore

WORKLOADS = [make_workload(f"operator {number}") for number in range(6)]


class Writers:
    """Threads that commit one record after the other, to all workloads in turn, and note what was acknowledged."""

    def __init__(self, store: RecordStore) -> None:
        self.acknowledged: list[Record] = []
        self.failed: list[BaseException] = []
        self._store = store
        self._numbers = itertools.count()
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._write) for _ in range(2)]

    def _write(self) -> None:
        try:
            while not self._stop.is_set():
                number = next(self._numbers)
                record = make_record(WORKLOADS[number % len(WORKLOADS)], number)
                self._store.commit([record])
                self.acknowledged.append(record)
                self._stop.wait(0.01)
        except BaseException as error:
            self.failed.append(error)

    def __enter__(self) -> Writers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        assert not self.failed, self.failed

    def go_on(self, count: int) -> None:
        """Return when so many more records were acknowledged."""
        wanted = len(self.acknowledged) + count
        wait_for(lambda: bool(self.failed) or len(self.acknowledged) >= wanted)


def follow_to_the_end(store: RecordStore, cursor: str) -> set[str]:
    found: set[str] = set()
    while records := (answer := store.follow(EVERYTHING, cursor)).records:
        found |= {record.trial_id for record in records}
        cursor = answer.cursor
    return found


def role(port: int, password: str | None = None) -> tuple[str, int]:
    """What a server is, and how many replicas it has that are up to date."""
    try:
        with contextlib.closing(redis.Redis(port=port, password=password)) as client:
            info = client.info("replication")
    except redis.RedisError:
        return "down", 0
    return info["role"], sum(info[f"slave{n}"]["state"] == "online" for n in range(info["connected_slaves"]))


def survive_the_death_of(
    master: RedisServer,
    replicas: list[RedisServer],
    url: str,
    spool: Path,
    *,
    password: str | None = None,
    returns: bool = False,
) -> None:
    """Kill the master while records are committed; see that all of them are there once in the end.

    Args:
        master: Is killed.
        replicas: One of them is promoted.
        url: Of the store.
        spool: Of the store.
        password: Of the servers.
        returns: Whether the master comes back, as a replica of the new one.
    """
    opened = open_server_store(url, spool)
    assert isinstance(opened, SpooledStore)
    with contextlib.closing(opened) as store:
        store.commit([], WORKLOADS)
        wait_for(lambda: store.waiting == 0)
        with Writers(store) as writers:
            writers.go_on(30)
            assert len(store.query(RecordFilter(), limit=10).records) == 10
            cursor, before = store.follow(EVERYTHING).cursor, len(writers.acknowledged)
            writers.go_on(10)
            master.kill()
            wait_for(lambda: store.waiting > 0)
            writers.go_on(20)
            wait_for(lambda: any(role(one.port, password)[0] == "master" for one in replicas), 60)
            writers.go_on(20)
            if returns:
                master.start()
                wait_for(lambda: role(master.port, password)[0] == "slave", 60)
                writers.go_on(20)
        wait_for(lambda: store.waiting == 0, 60)
        wanted = sorted(record.trial_id for record in writers.acknowledged)
        assert sorted(all_ids(store)) == wanted  # to a reader that has seen both masters
        late = {record.trial_id for record in writers.acknowledged[before + 2 :]}
        assert late <= follow_to_the_end(store, cursor)
    with contextlib.closing(open_store(url)) as direct:
        assert sorted(all_ids(direct)) == wanted
        assert sorted(followed(direct)) == wanted
        assert direct.stats()["records"] == len(wanted)
        assert all(direct.get(trial) is not None for trial in wanted)


class TestFailover:
    def test_a_cluster_whose_master_is_killed(self, tmp_path: Path) -> None:
        with running_cluster(tmp_path / "redis", replicas=1, node_timeout_ms=500) as servers:
            wait_for(lambda: sum(role(one.port) == ("master", 1) for one in servers) == 3, 60)
            places = ",".join(f"127.0.0.1:{one.port}" for one in servers)
            url = f"redis+cluster://{places}?wait_replicas=1&timeout_s=1"
            with contextlib.closing(Connection(parse_location(url))) as connection:
                port = connection._client.get_node_from_key(connection.keys.about).port
            master = next(one for one in servers if one.port == port)
            replicas = [one for one in servers if role(one.port)[0] == "slave"]
            survive_the_death_of(master, replicas, url, tmp_path / "spool.sqlite", returns=True)
            with contextlib.closing(open_store(url)) as store:
                for server in servers:
                    server.kill()
                with pytest.raises(UnavailableError):
                    store.commit([make_record(WORKLOADS[0], 99_999)])
                with pytest.raises(UnavailableError, match="no node of the Redis cluster .* can be reached"):
                    open_store(url)

    def test_sentinels_promote_a_replica(self, tmp_path: Path) -> None:
        with running_with_sentinel(tmp_path / "redis", "secret", "hush") as (sentinel, servers):
            wait_for(lambda: role(servers[0].port, "secret") == ("master", 2))
            (tmp_path / "password").write_text("hush\n")
            # the first sentinel of the two is not there
            places = f"127.0.0.1:1,127.0.0.1:{sentinel.port}"
            options = f"timeout_s=1&sentinel_password_file={tmp_path / 'password'}"
            url = f"redis+sentinel://:secret@{places}/main?wait_replicas=1&{options}"
            survive_the_death_of(servers[0], servers[1:], url, tmp_path / "spool.sqlite", password="secret")
            for wrong, says in (
                (f"redis+sentinel://:secret@{places}/other?{options}", "no sentinel names a master"),
                (f"redis+sentinel://:secret@{places}/main", "sentinel refuses the user or the password"),
                (f"redis://:hush@127.0.0.1:{sentinel.port}", "is a sentinel"),
            ):
                with pytest.raises((StoreError, UnavailableError), match=says) as error:
                    open_store(wrong)
                assert "\n" not in str(error.value)
                assert "secret" not in str(error.value)
                assert "hush" not in str(error.value)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with running(tmp_path_factory.mktemp("redis"), *DURABLE, "--repl-diskless-sync-delay", "0") as found:
        yield found


def test_a_server_that_is_no_sentinel_is_said_to_be_none(server: RedisServer) -> None:
    with pytest.raises(StoreError, match="is no sentinel"):
        open_store(f"redis+sentinel://127.0.0.1:{server.port}/main")


class TestAsynchronousReplication:
    """A replica that is promoted without the master's last writes: its data are those of a moment before."""

    def test_who_has_seen_what_was_lost_sees_what_comes_after(self, server: RedisServer) -> None:
        data, copy = server.directory / "appendonlydir", server.directory / "copy"
        kept, lost, new = (
            [make_record(WORKLOADS[0], number) for number in range(at, at + count)]
            for at, count in ((0, 3), (10, 4), (20, 2))
        )
        with contextlib.closing(open_store(server.url)) as store:
            store.commit(kept, WORKLOADS[:1])
            assert len(all_ids(store)) == 3
            shutil.copytree(data, copy)
            begun = store.follow(EVERYTHING).cursor
            store.commit(lost)
            begun = store.follow(EVERYTHING, begun, limit=2).cursor  # two of four
            store.commit([make_record(WORKLOADS[1])], [WORKLOADS[1]])
            assert len(all_ids(store)) == 8
            start = store.follow(EVERYTHING).cursor
            server.kill()
            shutil.rmtree(data)
            copy.rename(data)
            server.start()
            assert not store.follow(EVERYTHING, start).records
            store.commit(new)
            for cursor in (start, begun):
                assert follow_to_the_end(store, cursor) == {record.trial_id for record in new}
            wanted = [record.trial_id for record in (*kept, *new)]
            assert sorted(all_ids(store)) == sorted(wanted)
            assert store.stats()["records"] == len(wanted)
            assert followed(store) == wanted

    def test_followers_see_what_a_cluster_node_numbers_anew(self, server: RedisServer) -> None:
        """The node of a workload has lost what that of the events has."""
        first, lost, new = (make_record(WORKLOADS[2], number) for number in range(3))
        with contextlib.closing(open_store(f"{server.url}?prefix=numbers")) as store:
            store.commit([first], [WORKLOADS[2]])
            dumped = self.dump(server, "numbers")
            store.commit([lost])
            self.restore(server, dumped)
            store.commit([new])
            store.commit([lost])
            assert set(followed(store)) == {one.trial_id for one in (first, lost, new)}

    def test_a_commit_that_the_new_master_has_not_got_is_not_acknowledged(
        self, server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """WAIT speaks for the new master and its replicas, which are complete without the commit."""
        with running(tmp_path, *DURABLE, "--replicaof", f"127.0.0.1 {server.port}"):
            wait_for(lambda: role(server.port) == ("master", 1))
            url = f"{server.url}?prefix=proof&wait_replicas=1&timeout_s=2"
            with contextlib.closing(open_store(url)) as store:
                store.commit([make_record(WORKLOADS[3], 0)], [WORKLOADS[3]])
                dumped = self.dump(server, "proof")
                confirm = RecordWriter._confirm

                def fail_over(self: RecordWriter, *arguments: object) -> None:
                    TestAsynchronousReplication.restore(server, dumped)
                    confirm(self, *arguments)  # type: ignore[arg-type]

                with monkeypatch.context() as patch:
                    patch.setattr(RecordWriter, "_confirm", fail_over)
                    with pytest.raises(UnavailableError, match="has not got the commit"):
                        store.commit([make_record(WORKLOADS[3], 1)])
                assert store.commit([make_record(WORKLOADS[3], 1)]).stored == 1

    @staticmethod
    def dump(server: RedisServer, prefix: str) -> dict[Any, Any]:
        """Keys of all workloads."""
        client = server.client()
        keys = [key for key in client.keys(f"{prefix}:{{*") if b"{index}" not in key]
        return {key: client.dump(key) for key in keys}

    @staticmethod
    def restore(server: RedisServer, dumped: dict[Any, Any]) -> None:
        client = server.client()
        for key, value in dumped.items():
            client.restore(key, 0, value, replace=True)


def test_records_of_a_workload_that_redis_has_lost_take_it_along(server: RedisServer, tmp_path: Path) -> None:
    opened = open_server_store(f"{server.url}?prefix=workload", tmp_path / "spool.sqlite")
    with contextlib.closing(opened) as store:
        store.commit([], [WORKLOADS[4]])
        for key in server.client().keys("workload:{*"):
            if b"{index}" not in key:
                server.client().delete(key)
        record = make_record(WORKLOADS[4])
        assert store.commit([record]).stored == 1
        assert store.top(record.key) == [record]
