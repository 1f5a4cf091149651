"""Redis as it is found: with passwords, TLS, three nodes, settings that forget, foreign keys, dead writers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.contract.record_values import make_record, make_workload
from tests.redis_server import DURABLE, RedisServer, make_certificates, running, running_cluster
from tuner_core.errors import StoreError, TunerError, UnavailableError, UsageError
from tuner_core.model import FailureKind
from tuner_core.store.interface import RecordFilter, RecordStore
from tuner_core.store.open import open_store
from tuner_core.store.redis import catalogue, parse_location
from tuner_core.store.redis.settings import check_version, volatile_because
from tuner_core.store.redis.store import RedisStore
from tuner_core.store.redis.writing import RecordWriter

MATMUL = make_workload("matmul")
WORKLOADS = [make_workload(f"operator {number}") for number in range(12)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with running(tmp_path_factory.mktemp("redis"), *DURABLE) as found:
        yield found


def use(store: RecordStore) -> None:
    """Commit to many workloads, condemn, tag, prune, follow, claim; look at all of it."""
    records = [make_record(workload, number) for workload in WORKLOADS for number in range(5)]
    start = store.follow(RecordFilter()).cursor
    with ThreadPoolExecutor(4) as pool:
        assert (
            sum(r.stored for r in pool.map(lambda at: store.commit(records[at : at + 9], WORKLOADS), range(0, 60, 9)))
            == 60
        )
    wrong = make_record(WORKLOADS[0], 0, failure=FailureKind.WRONG_RESULT, job="check")
    store.commit([wrong])
    assert store.top(wrong.key) == [records[1]]
    assert len(store.query(RecordFilter(), limit=100).records) == 59
    tagged = store.tag(records[7].trial_id, {"keep": "yes"})
    assert store.query(RecordFilter(tags={"keep": "yes"})).records == (tagged,)
    assert len(store.follow(RecordFilter(include_failed=True), start).records) == 61
    assert store.claims.claim("k", "a", 30).mine
    assert store.prune(2_000_000_000.0) == 61 - 12
    assert store.stats()["records"] == 12


class TestWays:
    def test_a_cluster_of_three_nodes(self, tmp_path: Path) -> None:
        with running_cluster(tmp_path) as servers:
            places = ",".join(f"127.0.0.1:{one.port}" for one in servers)
            with contextlib.closing(open_store(f"redis+cluster://{places}?prefix=mine")) as store:
                use(store)
            assert all(one.client().dbsize() for one in servers)  # every node holds a part
            with pytest.raises(StoreError, match="redis\\+cluster://"):
                open_store(servers[0].url)

    def test_a_user_with_a_password(self, tmp_path: Path) -> None:
        acl = (
            "--requirepass",
            "secret",
            "--user",
            "tuner",
            "on",
            ">pass:w@rd",
            "~tuner:*",
            "+@all",
            "-@dangerous",
            "+info",
            "+config|get",
        )
        with running(tmp_path, *DURABLE, *acl) as server:
            place = f"127.0.0.1:{server.port}"
            with contextlib.closing(open_store(f"redis://tuner:pass%3Aw%40rd@{place}")) as store:
                use(store)
            with contextlib.closing(open_store(f"redis://:secret@{place}")) as store:
                assert store.stats()["records"] == 12
            for url, says in (
                (f"redis://tuner:no@{place}", "refuses the user or the password"),
                (f"redis://{place}", "wants a password"),
                (f"redis://tuner:pass%3Aw%40rd@{place}?prefix=other", "may not do"),
            ):
                assert says in refused(url)
                assert "pass" not in refused(url).replace("password", "")

    def test_tls(self, tmp_path: Path) -> None:
        ca, cert, key = make_certificates(tmp_path / "certificates")
        tls = ("--tls-cert-file", str(cert), "--tls-key-file", str(key), "--tls-ca-cert-file", str(ca))
        with running(tmp_path / "redis", *DURABLE, *tls, "--tls-auth-clients", "no", tls=True) as server:
            url = f"rediss://127.0.0.1:{server.port}"
            with contextlib.closing(open_store(f"{url}?ca={ca}")) as store:
                use(store)
            assert "not trusted" in refused(url)
            assert "TLS" in refused(server.url)

    def test_a_password_that_nobody_asked_for_and_tls_where_there_is_none(self, server: RedisServer) -> None:
        assert "wants no password" in refused(f"redis://:x@127.0.0.1:{server.port}")
        assert "TLS" in refused(f"rediss://127.0.0.1:{server.port}?timeout_s=1")

    def test_nobody_there(self) -> None:
        with pytest.raises(UnavailableError) as error:
            open_store("redis://u:secret@127.0.0.1:1/3")
        assert "redis://127.0.0.1:1/3 cannot be reached" in str(error.value)
        assert "secret" not in str(error.value)

    @pytest.mark.parametrize(
        ("url", "says"),
        [
            ("redis://", "host"),
            ("redis://h:port", "host or its port"),
            ("redis://h/x", "number"),
            ("redis://a,b", "sentinels only"),
            ("redis+sentinel://a,b", "which master"),
            ("redis+sentinel://a/na%20me/0", "which master"),
            ("redis+sentinel://a/name/x", "number"),
            ("redis+sentinel://a/name?sentinel_password_file=/nowhere", "names no file"),
            ("redis://a?sentinel_username=me", "for redis\\+sentinel"),
            ("redis+cluster://a,b/1", "always 0"),
            ("redis://h?colour=red", "no option 'colour'"),
            ("redis://h?ca=/nowhere", "for TLS"),
            ("rediss://h?ca=/nowhere", "names no file"),
            ("redis://h?prefix={x}", "prefix"),
            ("redis://h?timeout_s=soon", "numbers"),
        ],
    )
    def test_a_wrong_url_is_a_usage_error(self, url: str, says: str) -> None:
        with pytest.raises(UsageError, match=says):
            open_store(url)

    def test_the_parts_of_a_url(self) -> None:
        location = parse_location("rediss+cluster://me:a%40b@one:7000,[::1]:7001?wait_replicas=2")
        assert location.hosts == (("one", 7000), ("::1", 7001))
        assert (location.username, location.password, location.tls, location.cluster) == ("me", "a@b", True, True)
        assert "a@b" not in repr(location)

    def test_the_parts_of_a_url_with_sentinels(self, tmp_path: Path) -> None:
        (tmp_path / "password").write_text("hidden\n")
        location = parse_location(
            "redis+sentinel://me:pw@one,two:7000/main/2?sentinel_username=you"
            f"&sentinel_password_file={tmp_path / 'password'}"
        )
        assert location.hosts == (("one", 26379), ("two", 7000))
        assert (location.service, location.database, location.cluster) == ("main", 2, False)
        assert (location.sentinel_username, location.sentinel_password) == ("you", "hidden")
        assert location.name == "redis+sentinel://one:26379,two:7000/main/2"
        assert "hidden" not in repr(location)


def refused(url: str) -> str:
    with pytest.raises(TunerError) as error:
        open_store(url)
    assert "\n" not in str(error.value)
    return str(error.value)


class TestRefusal:
    @pytest.mark.parametrize(
        ("options", "says"),
        [
            ((), "save is empty"),
            (
                ("--appendonly", "yes", "--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru"),
                "maxmemory-policy is",
            ),
            (
                ("--appendonly", "yes", "--maxmemory", "100mb", "--maxmemory-policy", "volatile-ttl"),
                "maxmemory-policy is",
            ),
        ],
    )
    def test_a_server_that_may_forget_is_refused_unless_allowed(
        self, tmp_path: Path, options: tuple[str, ...], says: str
    ) -> None:
        with running(tmp_path, *options) as server:
            text = refused(server.url)
            assert says in text
            assert "--allow-volatile-store" in text
            with contextlib.closing(open_store(server.url, allow_volatile=True)) as store:
                store.commit([make_record(MATMUL)], [MATMUL])

    def test_what_is_safe_is_accepted(self) -> None:
        safe = {"maxmemory": "0", "maxmemory-policy": "allkeys-lru", "save": "", "appendonly": "yes"}
        assert volatile_because(safe, {}) is None
        assert volatile_because({**safe, "appendonly": "no", "save": "3600 1"}, {}) is None
        assert volatile_because(None, {"aof_enabled": 1, "maxmemory": 5, "maxmemory_policy": "noeviction"}) is None
        assert "save cannot be read" in (volatile_because(None, {"aof_enabled": 0}) or "")
        assert "noeviction" in (
            volatile_because(None, {"aof_enabled": 1, "maxmemory": 5, "maxmemory_policy": "allkeys-lfu"}) or ""
        )

    def test_an_old_redis_is_refused(self) -> None:
        check_version("6.2.14", "r")
        with pytest.raises(StoreError, match="needs 6.2"):
            check_version("6.0.16", "r")
        check_version("7.2.0", "r", wait_aof=True)
        with pytest.raises(StoreError, match="wait_aof needs 7.2"):
            check_version("7.0.15", "r", wait_aof=True)

    def test_another_programs_keys_are_refused_and_left_alone(self, server: RedisServer) -> None:
        client = server.client()
        client.flushall()
        client.set("theirs", "1")
        assert "another program" in refused(server.url)
        assert client.keys() == [b"theirs"]
        open_store(f"{server.url}?prefix=ours").close()  # knowingly
        client.set("taken:{index}:about", "a text")
        assert "another program" in refused(f"{server.url}?prefix=taken")
        client.hset("ours:{index}:about", "schema", 99)
        assert "schema 99" in refused(f"{server.url}?prefix=ours")


class TestDeadWriters:
    @pytest.mark.parametrize("step", ["_publish", "_condemn"])
    def test_what_a_dead_writer_left_is_finished_by_the_next_reader(
        self, server: RedisServer, monkeypatch: pytest.MonkeyPatch, step: str
    ) -> None:
        url = f"{server.url}?prefix=dead-{step}"
        wrong = make_record(MATMUL, 0, failure=FailureKind.WRONG_RESULT, job="check")
        with contextlib.closing(open_store(url)) as reader, contextlib.closing(open_store(url)) as writer:
            start = reader.follow(RecordFilter()).cursor
            writer.commit([make_record(MATMUL, 0), make_record(MATMUL, 1)], [MATMUL])

            def die(*arguments: object) -> None:
                raise KeyboardInterrupt

            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(RecordWriter, step, die)
                writer.commit([wrong, make_record(MATMUL, 2)])
            assert reader.top(wrong.key) == [make_record(MATMUL, 1)]  # looking up by key is right at once
            monkeypatch.setattr(catalogue, "_DEAD_WRITER_US", -60_000_000)
            found = reader.query(RecordFilter()).records
            assert found == (make_record(MATMUL, 1), make_record(MATMUL, 2))
            everything = RecordFilter(include_failed=True)
            assert len(reader.query(everything).records) == 4
            assert len(reader.follow(everything, start).records) == 4
            assert writer.commit([wrong]).known == 1
            assert len(reader.follow(everything, start).records) == 4

    def test_a_follower_is_told_when_the_store_has_forgotten(
        self, server: RedisServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("tuner_core.store.redis.writing.EVENTS_KEPT", 1)
        with contextlib.closing(open_store(f"{server.url}?prefix=forgets")) as store:
            assert isinstance(store, RedisStore)
            start = store.follow(RecordFilter()).cursor
            for number in range(300):  # Redis trims in whole nodes of a hundred
                store.commit([make_record(MATMUL, number)], [MATMUL])
            with pytest.raises(UsageError, match="too old"):
                store.follow(RecordFilter(), start)
            with pytest.raises(UsageError, match="not one of this store"):
                store.follow(RecordFilter(), "redis-999999999999999999.0")
