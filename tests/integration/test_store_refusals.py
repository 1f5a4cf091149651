"""A store that cannot be used is one clear line of the real commands, with its exit code."""

from __future__ import annotations

import contextlib
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from redis import Redis

from tests.integration.client_process import client, environment
from tests.redis_server import DURABLE, RedisServer, running
from tuner_core.errors import TunerError
from tuner_core.store.open import open_store

ACL = ("--requirepass", "secret", "--user", "tuner", "on", ">secret", "~tuner:*", "+@all", "-@dangerous", "+info")


class OldRedis(socketserver.StreamRequestHandler):
    """Answers like a Redis of 2020: what it is, and OK to everything else."""

    def handle(self) -> None:
        while line := self.rfile.readline():
            command = [self.rfile.read(int(self.rfile.readline()[1:]) + 2)[:-2] for _ in range(int(line[1:]))]
            answer = b"+OK\r\n"
            if command[0].upper() == b"INFO":
                text = b"# Server\r\nredis_version:6.0.16\r\nredis_mode:standalone\r\n"
                answer = b"$%d\r\n%s\r\n" % (len(text), text)
            self.wfile.write(answer)


@contextlib.contextmanager
def old_redis() -> Iterator[int]:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), OldRedis) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with running(tmp_path_factory.mktemp("redis"), *DURABLE, *ACL) as found:
        yield found


@pytest.fixture(scope="module")
def refusals(redis: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[tuple[str, int, str]]]:
    """URLs, with the exit code and a part of what is said."""
    place = f"127.0.0.1:{redis.port}"
    admin = Redis(port=redis.port, password="secret")
    admin.set("theirs", "1")
    admin.hset("newer:{index}:about", mapping={"product": "gpu-autotuner records", "schema": 99})
    with old_redis() as old:
        yield [
            (f"redis://tuner:wrong@{place}", 1, f"Redis redis://{place}/0 refuses the user or the password"),
            (f"redis://{place}", 1, "wants a password: give redis://USER:PASSWORD@HOST"),
            (f"redis://:secret@{place}", 1, "holds keys of another program: choose an empty database"),
            (f"redis://:secret@{place}?prefix=newer", 1, "has schema 99, and this version knows schemas up to"),
            (f"redis://tuner:secret@{place}?prefix=other", 1, "may not do what the store needs"),
            (f"redis://127.0.0.1:{old}", 1, "has version 6.0.16: the store needs 6.2 or newer"),
            (f"redis://:secret@{place}?prefix=a&wait_aof=1", 1, "wait_aof needs 7.2 or newer"),
            (f"redis+cluster://:secret@{place}", 1, "is no cluster: use redis:// instead of redis+cluster://"),
            ("redis://:secret@127.0.0.1:1", 1, "redis://127.0.0.1:1/0 cannot be reached"),
            (f"redis://:secret@{place}?colour=red", 2, "has no option 'colour'"),
        ]


def check(said: list[tuple[int, str]], refusals: list[tuple[str, int, str]]) -> None:
    for (code, text), (url, wanted, part) in zip(said, refusals, strict=True):
        assert code == wanted, (url, text)
        assert part in text, (url, text)
        assert "secret" not in text and "Traceback" not in text, (url, text)
        lines = [line for line in text.splitlines() if " WARNING " not in line]
        assert len(lines) == 1 and lines[0].startswith("error: "), (url, text)


def test_a_server_whose_store_is_refused_says_why_in_one_line(
    refusals: list[tuple[str, int, str]], tmp_path: Path
) -> None:
    def start(url: str, number: int) -> tuple[int, str]:
        data = ("--data-dir", str(tmp_path / str(number)), "--lazy", "--listen", "127.0.0.1:0")
        run = subprocess.run(
            [sys.executable, "-m", "tuner_server", "--store", url, *data],
            env=environment(),
            capture_output=True,
            text=True,
            timeout=60,
        )
        return run.returncode, run.stderr.strip()

    with ThreadPoolExecutor(2) as pool:
        check(list(pool.map(start, [url for url, _, _ in refusals], range(len(refusals)))), refusals)


def test_a_job_over_several_servers_is_not_begun_with_such_a_store(
    refusals: list[tuple[str, int, str]], tmp_path: Path
) -> None:
    (tmp_path / "model.onnx").touch()
    some = [refusals[0], refusals[2], refusals[5], refusals[-1]]

    def tune(url: str) -> tuple[int, str]:
        servers = ("--server", "127.0.0.1:1", "--server", "127.0.0.1:2")
        run = client("tune", "model.onnx", *servers, "--store", url, data_dir=tmp_path)
        return run.returncode, run.stderr.strip()

    with ThreadPoolExecutor(2) as pool:
        check(list(pool.map(tune, [url for url, _, _ in some])), some)


def test_what_was_refused_is_left_alone(redis: RedisServer, refusals: list[tuple[str, int, str]]) -> None:
    for url, _, _ in refusals:
        with pytest.raises(TunerError):
            open_store(url)
    assert sorted(Redis(port=redis.port, password="secret").keys()) == [b"newer:{index}:about", b"theirs"]
