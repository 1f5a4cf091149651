"""Every backend of the record store, in process and behind the gRPC service. A new backend is one more entry here."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import secrets
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import grpc
import pytest

from tests.redis_server import DURABLE, RedisServer
from tuner_core.proto.tuner.v1 import records_pb2_grpc
from tuner_core.store.interface import RecordStore
from tuner_core.store.open import open_server_store, open_store
from tuner_core.store.remote import RemoteStore
from tuner_server.services.auth import Authenticator
from tuner_server.services.records import RecordServicer


@contextlib.contextmanager
def serving(store: RecordStore, tokens: Mapping[str, str] | None = None) -> Iterator[str]:
    """A real grpc.aio server on a free port, in a thread of its own; yields its address. ``tokens``: token to team."""
    authenticator = Authenticator(tokens or {})
    address: list[str] = []
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()
    ready = threading.Event()

    async def serve() -> None:
        server = grpc.aio.server(interceptors=[authenticator], options=[("grpc.max_receive_message_length", 64 << 20)])
        records_pb2_grpc.add_RecordServiceServicer_to_server(RecordServicer(store, authenticator), server)
        address.append(f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}")
        await server.start()
        ready.set()
        await stop.wait()
        await server.stop(None)

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),), daemon=True)
    thread.start()
    assert ready.wait(30)
    try:
        yield address[0]
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(30)
        loop.close()


@contextlib.contextmanager
def sqlite_backend(directory: Path) -> Iterator[RecordStore]:
    """A store file of its own."""
    store = open_store(f"sqlite://{directory / 'records.db'}")
    try:
        yield store
    finally:
        store.close()


@contextlib.contextmanager
def remote(
    backend: Callable[[Path], contextlib.AbstractContextManager[RecordStore]], directory: Path
) -> Iterator[RecordStore]:
    """The same backend behind the service."""
    with backend(directory) as store, serving(store) as address, grpc.insecure_channel(address) as channel:
        yield RemoteStore(channel, timeout_s=30)


@functools.cache
def redis_server() -> RedisServer:
    """One server for the whole run; every test has a key space of its own in it."""
    directory = Path(tempfile.mkdtemp(prefix="tuner-redis-"))
    server = RedisServer(directory, *DURABLE)
    server.start()

    def stop() -> None:
        server.kill()
        shutil.rmtree(directory, ignore_errors=True)

    atexit.register(stop)
    return server


@contextlib.contextmanager
def redis_backend(directory: Path) -> Iterator[RecordStore]:
    """A key space of its own in a real redis-server."""
    store = open_store(f"{redis_server().url}?prefix={secrets.token_hex(8)}")
    try:
        yield store
    finally:
        store.close()


@contextlib.contextmanager
def spooled_backend(directory: Path) -> Iterator[RecordStore]:
    """The same behind a spool."""
    url = f"{redis_server().url}?prefix={secrets.token_hex(8)}"
    store = open_server_store(url, directory / "spool.sqlite")
    try:
        yield store
    finally:
        store.close()


BACKENDS = {"sqlite": sqlite_backend, "redis": redis_backend, "spooled": spooled_backend}
# where the claims tests find a store of each kind that several processes can open
CLAIM_URLS: dict[str, Callable[[Path, pytest.FixtureRequest], str]] = {
    "sqlite": lambda directory, request: f"sqlite://{directory / 'records.db'}",
    "redis": lambda directory, request: f"{redis_server().url}?prefix={secrets.token_hex(8)}",
}


@pytest.fixture(params=[f"{place}-{name}" for name in BACKENDS for place in ("local", "remote")])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RecordStore]:
    """An empty store of each kind in turn."""
    place, name = request.param.split("-", 1)
    opened = BACKENDS[name](tmp_path) if place == "local" else remote(BACKENDS[name], tmp_path)
    with opened as found:
        yield found
