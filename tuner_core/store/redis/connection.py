"""A connection pool to one Redis or a cluster, the scripts on it, and the checks when it is opened."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from functools import cache
from importlib import resources
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.cluster import ClusterNode, RedisCluster
from redis.retry import Retry

from tuner_core.errors import StoreError, UnavailableError
from tuner_core.store.redis.failures import explained
from tuner_core.store.redis.keys import Keys
from tuner_core.store.redis.location import RedisLocation
from tuner_core.store.redis.settings import check_version, refusal, volatile_because

SCHEMA = 1
_PRODUCT = b"gpu-autotuner records"
_SETTINGS = ("maxmemory", "maxmemory-policy", "save", "appendonly")


@cache
def _script(name: str) -> tuple[str, str]:
    text = resources.files("tuner_core.store.redis").joinpath(f"lua/{name}.lua").read_text()
    return text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()


class Connection:
    """Thread-safe access to the server or cluster of one location.

    Args:
        location: Where it is.

    Raises:
        StoreError: Wrong password, no TLS, too old, a foreign or newer key space.
        UnavailableError: Not reachable.
    """

    def __init__(self, location: RedisLocation) -> None:
        self.location = location
        self.name = location.name
        self.keys = Keys(location.prefix)
        self._closed = False
        with explained(self.name):
            self._client: Any = _connect(location)
            try:
                self._check()
            except BaseException:
                self._client.close()
                raise

    @contextlib.contextmanager
    def using(self) -> Iterator[Any]:
        """The client, its errors explained."""
        if self._closed:
            raise StoreError(f"the store {self.name} is closed")
        with explained(self.name):
            yield self._client

    def script(self, name: str, keys: Sequence[str], arguments: Sequence[Any] = ()) -> Any:
        """Run ``lua/NAME.lua``; all keys are of one slot."""
        text, digest = _script(name)
        with self.using() as client:
            try:
                return client.evalsha(digest, len(keys), *keys, *arguments)
            except redis.exceptions.NoScriptError:
                return client.eval(text, len(keys), *keys, *arguments)

    def together(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Send commands at once; not a transaction, and the keys may be of many slots."""
        if not commands:
            return []
        with self.using() as client, client.pipeline(transaction=False) as pipeline:
            for command in commands:
                pipeline.execute_command(*command)
            found: list[Any] = pipeline.execute()
            return found

    def one(self, *command: Any) -> Any:
        """Send one command."""
        with self.using() as client:
            return client.execute_command(*command)

    def barrier(self, key: str) -> None:
        """Return when replicas and disks have what was written to the key's node so far, as far as the URL asks.

        Raises:
            UnavailableError: Too few of them have it in time.
        """
        wanted, aof = self.location.wait_replicas, self.location.wait_aof
        if not wanted and not aof:
            return
        timeout_ms = int(self.location.timeout_s * 900)
        with self.using() as client:
            node = client.get_redis_connection(client.get_node_from_key(key)) if self.location.cluster else client
            with node.pipeline(transaction=False) as pipeline:
                # WAIT looks at the last write of its own connection, and that may be another one than the commit's
                pipeline.hset(key, "barrier", "1")
                if aof:
                    pipeline.execute_command("WAITAOF", 1, wanted, timeout_ms)
                else:
                    pipeline.execute_command("WAIT", wanted, timeout_ms)
                reply = pipeline.execute()[1]
        local, replicas = (int(reply[0]), int(reply[1])) if aof else (1, int(reply))
        if local < 1 or replicas < wanted:
            raise UnavailableError(
                f"Redis {self.name}: {replicas} of {wanted} replicas"
                + (f" and {local} of 1 local disks" if aof else "")
                + " have the commit in time"
            )

    def refuse_volatile(self) -> None:
        """Raise StoreError when a server of it might evict or forget records."""
        with self.using():
            for node, info in self._nodes():
                try:
                    config = {}
                    for setting in _SETTINGS:
                        config.update({_text(k): _text(v) for k, v in node.config_get(setting).items()})
                except redis.ResponseError:
                    config = None
                if reason := volatile_because(config, info):
                    raise refusal(reason, self.name)

    def close(self) -> None:
        """Close the pool."""
        self._closed = True
        self._client.close()

    def _nodes(self) -> list[tuple[Any, dict[str, Any]]]:
        if self.location.cluster:
            nodes = [self._client.get_redis_connection(node) for node in self._client.get_primaries()]
        else:
            nodes = [self._client]
        return [(node, node.info()) for node in nodes]

    def _check(self) -> None:
        nodes = self._nodes()
        for _, info in nodes:
            check_version(str(info.get("redis_version", "0")), self.name)
            if info.get("cluster_enabled") and not self.location.cluster:
                raise StoreError(f"Redis {self.name} is part of a cluster: use redis+cluster:// instead of redis://")
        about = self.keys.about
        try:
            found = self._client.hgetall(about)
        except redis.ResponseError as error:
            if "WRONGTYPE" not in str(error):
                raise
            raise StoreError(
                f"Redis {self.name}: the keys {self.location.prefix}:* belong to another program"
            ) from None
        if not found:
            if not self.location.own_prefix and any(node.dbsize() for node, _ in nodes):
                raise StoreError(
                    f"Redis {self.name} holds keys of another program: choose an empty database, "
                    "or share this one knowingly with ?prefix=NAME"
                )
            self._client.hset(about, mapping={"product": _PRODUCT, "schema": SCHEMA})
            return
        if found.get(b"product") != _PRODUCT:
            raise StoreError(f"Redis {self.name}: the keys {self.location.prefix}:* belong to another program")
        schema = int(found.get(b"schema", 0))
        if schema > SCHEMA:
            raise StoreError(
                f"Redis {self.name} has schema {schema}, and this version knows schemas up to {SCHEMA}; "
                "upgrade this installation or choose another store"
            )


def _connect(location: RedisLocation) -> Any:
    options: dict[str, Any] = {
        "username": location.username,
        "password": location.password,
        "socket_timeout": location.timeout_s,
        "socket_connect_timeout": min(location.timeout_s, 3.0),
        "socket_keepalive": True,
        # one more try at once: an idle connection may have been closed; every script may be repeated
        "retry": Retry(NoBackoff(), 1, supported_errors=(redis.ConnectionError,)),
        "protocol": 2,
    }
    if location.tls:
        options |= {
            "ssl": True,
            "ssl_ca_certs": location.ca,
            "ssl_certfile": location.cert,
            "ssl_keyfile": location.key,
        }
    if location.cluster:
        nodes = [ClusterNode(host, port) for host, port in location.hosts]  # type: ignore[no-untyped-call]
        return RedisCluster(startup_nodes=nodes, **options)
    host, port = location.hosts[0]
    return redis.Redis(host=host, port=port, db=location.database, health_check_interval=30, **options)


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
