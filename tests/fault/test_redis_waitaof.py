"""``wait_aof``: a real Redis behind a proxy that says 7.2 and answers WAITAOF, which the installed one lacks."""

from __future__ import annotations

import contextlib
import socket
import socketserver
import threading
from collections.abc import Iterator
from io import BufferedIOBase
from pathlib import Path

import pytest

from tests.contract.record_values import make_record, make_workload
from tests.fault.test_redis_outages import EVERYTHING, followed, wait_for
from tests.redis_server import DURABLE, running
from tuner_core.errors import UnavailableError
from tuner_core.store.open import open_server_store, open_store
from tuner_core.store.spooled import SpooledStore

MATMUL = make_workload("matmul")


class Proxy(socketserver.ThreadingTCPServer):
    """Answers WAITAOF itself, as ``local`` and ``replicas`` say, and passes everything else on."""

    daemon_threads = True
    local, replicas = 1, 0

    def __init__(self, upstream: int) -> None:
        super().__init__(("127.0.0.1", 0), Link)
        self.upstream = upstream
        self.asked: list[list[bytes]] = []

    def command(self, words: list[bytes]) -> bytes | None:
        if words[0].upper() != b"WAITAOF":
            return None
        self.asked.append(words[1:])
        return b"*2\r\n:%d\r\n:%d\r\n" % (self.local, self.replicas)


class Link(socketserver.StreamRequestHandler):
    server: Proxy

    def handle(self) -> None:
        with socket.create_connection(("127.0.0.1", self.server.upstream)) as there, there.makefile("rb") as answers:
            while sent := read_value(self.rfile):
                words = [part.split(b"\r\n", 1)[1][:-2] for part in sent[1:]]
                answer = self.server.command(words)
                if answer is None:
                    there.sendall(b"".join(sent))
                    answer = b"".join(read_value(answers)).replace(b"redis_version:7.0.", b"redis_version:7.2.")
                self.wfile.write(answer)


def read_value(stream: BufferedIOBase) -> list[bytes]:
    """One value of the protocol, in its parts: https://redis.io/docs/latest/develop/reference/protocol-spec/"""
    line = stream.readline()
    count = int(line[1:]) if line[:1] in b"*$" and line else -1
    if line[:1] == b"$" and count >= 0:
        return [line + stream.read(count + 2)]
    parts = [line] if line else []
    for _ in range(count if line[:1] == b"*" else 0):
        parts.append(b"".join(read_value(stream)))
    return parts


@pytest.fixture
def proxy(tmp_path: Path) -> Iterator[Proxy]:
    with running(tmp_path / "redis", *DURABLE) as server, Proxy(server.port) as found:
        if not server.client().info()["redis_version"].startswith("7.0."):
            pytest.skip("the proxy stands in for 7.2 before a 7.0")
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield found
        found.shutdown()


def test_a_commit_waits_for_the_disks_and_is_spooled_when_they_are_late(proxy: Proxy, tmp_path: Path) -> None:
    url = f"redis://127.0.0.1:{proxy.server_address[1]}"
    store = open_server_store(f"{url}?wait_aof=1&wait_replicas=1&timeout_s=2", tmp_path / "spool.sqlite")
    assert isinstance(store, SpooledStore)
    with contextlib.closing(store):
        proxy.replicas = 1
        store.commit([make_record(MATMUL, 0)], [MATMUL])
        assert store.waiting == 0
        assert proxy.asked[-1] == [b"1", b"1", b"1800"]  # one local disk, one replica's, in milliseconds
        proxy.local = 0
        store.commit([make_record(MATMUL, 1)])
        assert store.waiting == 1
        proxy.local, proxy.replicas = 1, 0
        with (
            contextlib.closing(open_store(f"{url}?wait_aof=1&wait_replicas=1")) as direct,
            pytest.raises(UnavailableError, match="0 of 1 replicas and 1 of 1 local disks have the commit"),
        ):
            direct.commit([make_record(MATMUL, 2)])
        proxy.replicas = 1
        wait_for(lambda: store.waiting == 0)
        assert set(followed(store)) == {make_record(MATMUL, number).trial_id for number in range(3)}
        assert len(store.query(EVERYTHING).records) == 3
