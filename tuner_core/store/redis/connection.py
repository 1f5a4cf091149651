"""A connection pool to one Redis, a cluster, or the master of sentinels; its scripts; the checks when it is opened."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from importlib import resources
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.cluster import ClusterNode, RedisCluster
from redis.retry import Retry
from redis.sentinel import Sentinel

from tuner_core.errors import StoreError, UnavailableError
from tuner_core.store.redis.failures import explained
from tuner_core.store.redis.keys import Keys
from tuner_core.store.redis.location import RedisLocation
from tuner_core.store.redis.settings import check_version, refusal, volatile_because

SCHEMA = 1
_PRODUCT = b"gpu-autotuner records"
Command = tuple[Any, ...]
Proof = tuple[Command, Callable[[Any], bool]]
"""A command, and what its answer satisfies on a node that has a commit."""

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

    def together(self, commands: Sequence[Command]) -> list[Any]:
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

    @property
    def confirms(self) -> bool:
        """Whether the URL asks that replicas or disks have a commit before it is acknowledged."""
        return bool(self.location.wait_replicas or self.location.wait_aof)

    def confirm(self, again: Sequence[Command], proofs: Sequence[Proof] = ()) -> None:
        """Return when replicas and disks have what was written, as far as the URL asks.

        ``WAIT`` speaks for its own connection, which may be another one than the commit's, to another node since a
        failover: what is written again there waits with it, and the rest is looked up there.

        Args:
            again: Commands that write the same once more, or any mark; at least one for each slot that was written to.
            proofs: What else must be there.

        Raises:
            UnavailableError: Too few of them have it in time, or a node has not got it any more.
        """
        if not self.confirms:
            return
        checks: list[Proof] = [(command, lambda answer: True) for command in again] + list(proofs)
        with self.using() as client:
            by_node: dict[Any, list[Proof]] = {}
            for check in checks:
                node = client.get_node_from_key(check[0][1]) if self.location.cluster else None
                by_node.setdefault(node, []).append(check)
            for node, mine in by_node.items():
                self._confirm(client if node is None else client.get_redis_connection(node), mine)

    def _confirm(self, node: Any, checks: Sequence[Proof]) -> None:
        wanted, aof = self.location.wait_replicas, self.location.wait_aof
        timeout_ms = int(self.location.timeout_s * 900)
        with node.pipeline(transaction=False) as pipeline:
            for command, _ in checks:
                pipeline.execute_command(*command)
            if aof:
                pipeline.execute_command("WAITAOF", 1, wanted, timeout_ms)
            else:
                pipeline.execute_command("WAIT", wanted, timeout_ms)
            *answers, reply = pipeline.execute()
        local, replicas = (int(reply[0]), int(reply[1])) if aof else (1, int(reply))
        if local < 1 or replicas < wanted:
            raise UnavailableError(
                f"Redis {self.name}: {replicas} of {wanted} replicas"
                + (f" and {local} of 1 local disks" if aof else "")
                + " have the commit in time"
            )
        if not all(holds(answer) for answer, (_, holds) in zip(answers, checks, strict=True)):
            raise UnavailableError(f"Redis {self.name} has failed over, and its new master has not got the commit")

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
            if info.get("redis_mode") == "sentinel":
                raise StoreError(
                    f"Redis {self.name} is a sentinel: use redis+sentinel://HOST:PORT/NAME instead of redis://"
                )
            check_version(str(info.get("redis_version", "0")), self.name, wait_aof=self.location.wait_aof)
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
    alive: dict[str, Any] = {"health_check_interval": 30, "db": location.database}
    if location.cluster:
        nodes = [ClusterNode(host, port) for host, port in location.hosts]  # type: ignore[no-untyped-call]
        return RedisCluster(startup_nodes=nodes, **options)
    if location.service:
        own = {"username": location.sentinel_username, "password": location.sentinel_password}
        sentinels = Sentinel(location.hosts, sentinel_kwargs=options | own)  # type: ignore[no-untyped-call]
        return sentinels.master_for(location.service, **options, **alive)  # type: ignore[no-untyped-call]
    host, port = location.hosts[0]
    return redis.Redis(host=host, port=port, **options, **alive)


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
