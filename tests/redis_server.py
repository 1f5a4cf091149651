"""Real Redis servers on free ports for tests: alone, with TLS, as a cluster, with replicas and a sentinel."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import redis

DURABLE = ("--appendonly", "yes", "--appendfsync", "always")


def free_ports(count: int) -> list[int]:
    """Ports that are free now, also 10000 above (a cluster's bus).

    Below the range that clients get theirs from: one that connects while nobody listens could meet itself.
    """
    found: list[int] = []
    while len(found) < count:
        port = random.randrange(11_000, 22_000)
        with socket.socket() as first, socket.socket() as second, contextlib.suppress(OSError):
            first.bind(("127.0.0.1", port))
            second.bind(("127.0.0.1", port + 10_000))
            if port not in found:
                found.append(port)
    return found


class RedisServer:
    """One redis-server in a directory of its own. ``start`` again after ``kill`` keeps port and data."""

    def __init__(self, directory: Path, *options: str, port: int | None = None, tls: bool = False) -> None:
        self.directory = directory
        self.port = port or free_ports(1)[0]
        self.options = options
        self.tls = tls
        self.process: subprocess.Popen[bytes] | None = None
        directory.mkdir(parents=True, exist_ok=True)

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def client(self) -> redis.Redis:
        """A client without credentials."""
        return redis.Redis(port=self.port, socket_timeout=10)

    def start(self, *more: str) -> None:
        executable = shutil.which("redis-server")
        assert executable, "redis-server is not installed"
        places = ("--port", "0", "--tls-port", str(self.port)) if self.tls else ("--port", str(self.port))
        common = ("--bind", "127.0.0.1", "--dir", str(self.directory), "--save", "", "--loglevel", "warning")
        self.process = subprocess.Popen(
            [executable, *places, *common, *self.options, *more],
            stdout=(self.directory / "log").open("ab"),
            stderr=subprocess.STDOUT,
        )
        self.wait_until_up()

    def wait_until_up(self) -> None:
        """Return when it answers at all, with an error too, and has loaded its data."""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            assert self.process is not None
            assert self.process.poll() is None, (self.directory / "log").read_text()
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1) as connection:
                if self.tls:
                    return
                connection.sendall(b"PING\r\n")
                if not connection.recv(64).startswith(b"-LOADING"):
                    return
            time.sleep(0.005)
        raise AssertionError("redis-server does not answer")

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        """SIGKILL, and wait for its end."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()
            self.process.wait()
            self.process = None


@contextlib.contextmanager
def running(directory: Path, *options: str, tls: bool = False) -> Iterator[RedisServer]:
    """A server until the end of the block."""
    server = RedisServer(directory, *options, tls=tls)
    server.start()
    try:
        yield server
    finally:
        server.kill()


@contextlib.contextmanager
def running_cluster(directory: Path, *, replicas: int = 0, node_timeout_ms: int = 2000) -> Iterator[list[RedisServer]]:
    """Three masters that share the slots, each with so many replicas."""
    cluster = ("--cluster-enabled", "yes", "--cluster-node-timeout", str(node_timeout_ms))
    servers = [
        RedisServer(directory / str(port), *DURABLE, *cluster, "--repl-diskless-sync-delay", "0", port=port)
        for port in free_ports(3 * (1 + replicas))
    ]
    places = [f"127.0.0.1:{server.port}" for server in servers]
    try:
        for server in servers:
            server.start()
        subprocess.run(
            ["redis-cli", "--cluster", "create", *places, "--cluster-replicas", str(replicas), "--cluster-yes"],
            check=True,
            capture_output=True,
            timeout=60,
        )
        for server in servers:
            command = ["redis-cli", "-p", str(server.port), "cluster", "info"]
            deadline = time.monotonic() + 30
            while b"cluster_state:ok" not in subprocess.run(command, capture_output=True, check=True).stdout:
                assert time.monotonic() < deadline, "the cluster does not come up"
                time.sleep(0.05)
        yield servers
    finally:
        for server in servers:
            server.kill()


class SentinelServer(RedisServer):
    """A sentinel that alone decides on the failover of ``main``.

    Args:
        directory: Of its configuration, which it writes to.
        master: What it watches.
        password: Of the master and its replicas.
        own_password: Its own.
    """

    def __init__(self, directory: Path, master: RedisServer, password: str, own_password: str) -> None:
        super().__init__(directory)
        (directory / "sentinel.conf").write_text(
            f"port {self.port}\nbind 127.0.0.1\ndir {directory}\nrequirepass {own_password}\n"
            f"sentinel monitor main 127.0.0.1 {master.port} 1\nsentinel auth-pass main {password}\n"
            "sentinel down-after-milliseconds main 500\nsentinel failover-timeout main 5000\n"
        )

    def start(self, *more: str) -> None:
        self.process = subprocess.Popen(
            ["redis-server", str(self.directory / "sentinel.conf"), "--sentinel", *more],
            stdout=(self.directory / "log").open("ab"),
            stderr=subprocess.STDOUT,
        )
        self.wait_until_up()


@contextlib.contextmanager
def running_with_sentinel(
    directory: Path, password: str, own_password: str
) -> Iterator[tuple[SentinelServer, list[RedisServer]]]:
    """A master, two replicas of it, and a sentinel that knows all of them."""
    secret = (*DURABLE, "--requirepass", password, "--masterauth", password, "--repl-diskless-sync-delay", "0")
    ports = free_ports(3)
    servers = [RedisServer(directory / str(port), *secret, port=port) for port in ports]
    servers[1].options = servers[2].options = (*secret, "--replicaof", f"127.0.0.1 {ports[0]}")
    sentinel = SentinelServer(directory / "sentinel", servers[0], password, own_password)
    try:
        deadline = time.monotonic() + 30
        for server in servers:
            server.start()
        with contextlib.closing(redis.Redis(port=ports[0], password=password)) as client:
            while client.info("replication")["connected_slaves"] < 2:  # or the sentinel looks again after 10 s only
                assert time.monotonic() < deadline, "the replicas do not find their master"
                time.sleep(0.02)
        sentinel.start()
        with contextlib.closing(redis.Redis(port=sentinel.port, password=own_password)) as client:
            while client.sentinel_master("main")["num-slaves"] < 2:  # type: ignore[index]
                assert time.monotonic() < deadline, "the sentinel does not find the replicas"
                time.sleep(0.02)
        yield sentinel, servers
    finally:
        for server in (sentinel, *servers):
            server.kill()


def make_certificates(directory: Path) -> tuple[Path, Path, Path]:
    """An authority, and a certificate of it for 127.0.0.1 with its key: (ca, cert, key)."""
    directory.mkdir(parents=True, exist_ok=True)
    ca, ca_key, cert, key, request = (directory / name for name in ("ca.pem", "ca.key", "cert.pem", "key.pem", "csr"))
    extension = directory / "extension"
    extension.write_text("subjectAltName=IP:127.0.0.1,DNS:localhost\n")
    new_key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]

    def openssl(*arguments: str | Path) -> None:
        subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True, timeout=30)

    openssl("req", "-x509", *new_key, "-keyout", ca_key, "-out", ca, "-days", "2", "-subj", "/CN=test authority")
    openssl("req", *new_key, "-keyout", key, "-out", request, "-subj", "/CN=127.0.0.1")
    openssl(
        "x509", "-req", "-in", request, "-CA", ca, "-CAkey", ca_key, "-CAcreateserial", "-out", cert, "-days", "2",
        "-extfile", extension,
    )  # fmt: skip
    return ca, cert, key
