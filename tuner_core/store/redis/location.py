"""From a Redis URL to connection settings."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlsplit

from tuner_core.errors import UsageError

SCHEMES = ("redis", "rediss", "redis+cluster", "rediss+cluster")
DEFAULT_PREFIX = "tuner"
_FORM = "redis[s][+cluster]://[USER:PASSWORD@]HOST[:PORT][/DATABASE]"
_PREFIX = re.compile(r"[A-Za-z0-9_.:-]{1,64}\Z")


@dataclass(frozen=True)
class RedisLocation:
    """Where a Redis store is and how to reach it.

    Attributes:
        hosts: (host, port); more than one only for a cluster, as places to begin at.
        prefix: First part of every key.
        own_prefix: Whether the prefix was given, so that the database may hold other programs' keys too.
        ca, cert, key: PEM files for TLS; without ``ca`` the system's authorities are trusted.
        timeout_s: Limit of one command; a Redis that is slower counts as unreachable.
        wait_replicas: A commit is acknowledged only when so many replicas have it (``WAIT``); 0: not asked.
        wait_aof: A commit is acknowledged only when the append-only file of the server (and of ``wait_replicas``
            replicas) was synced (``WAITAOF``, Redis 7.2).
    """

    hosts: tuple[tuple[str, int], ...]
    cluster: bool = False
    tls: bool = False
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    database: int = 0
    prefix: str = DEFAULT_PREFIX
    own_prefix: bool = False
    ca: str | None = None
    cert: str | None = None
    key: str | None = None
    timeout_s: float = 5.0
    wait_replicas: int = 0
    wait_aof: bool = False

    @property
    def name(self) -> str:
        """The location without secrets, for texts."""
        scheme = ("rediss" if self.tls else "redis") + ("+cluster" if self.cluster else "")
        return f"{scheme}://{','.join(f'{host}:{port}' for host, port in self.hosts)}/{self.database}"


def parse_location(url: str) -> RedisLocation:
    """Read a URL ``redis[s][+cluster]://[USER:PASSWORD@]HOST[:PORT][,HOST:PORT...][/DATABASE][?OPTION=VALUE&...]``.

    Options: ``ca``, ``cert``, ``key`` (PEM files), ``prefix``, ``timeout_s``, ``wait_replicas``, ``wait_aof``.

    Raises:
        UsageError: Says which part is wrong; never repeats the password.
    """
    parts = urlsplit(url)
    if parts.scheme not in SCHEMES:
        raise UsageError(f"a Redis store is given as {_FORM}")
    credentials, _, places = parts.netloc.rpartition("@")
    username, colon, password = credentials.partition(":")
    hosts = tuple(_host(place) for place in places.split(","))
    cluster = parts.scheme.endswith("+cluster")
    if len(hosts) > 1 and not cluster:
        raise UsageError("several hosts are given for a cluster only: redis+cluster://HOST:PORT,HOST:PORT")
    database = parts.path.strip("/") or "0"
    if not database.isdigit() or (cluster and database != "0"):
        raise UsageError(f"the database of a Redis store is a number, in a cluster always 0, not {database!r}")
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    known = {"ca", "cert", "key", "prefix", "timeout_s", "wait_replicas", "wait_aof"}
    if unknown := sorted(set(options) - known):
        raise UsageError(f"a Redis store has no option {unknown[0]!r}; known: {', '.join(sorted(known))}")
    tls = parts.scheme.startswith("rediss")
    files = {name: options.get(name) for name in ("ca", "cert", "key")}
    for name, path in files.items():
        if path is not None and not tls:
            raise UsageError(f"the option {name} is for TLS: use rediss:// instead of redis://")
        if path is not None and not Path(path).is_file():
            raise UsageError(f"the option {name} of the Redis store names no file: {path}")
    prefix = options.get("prefix", DEFAULT_PREFIX)
    if not _PREFIX.match(prefix):
        raise UsageError("the prefix of a Redis store is 1 to 64 letters, digits or any of _ . : -")
    try:
        timeout_s = float(options.get("timeout_s", "5"))
        wait_replicas = int(options.get("wait_replicas", "0"))
    except ValueError:
        raise UsageError("timeout_s and wait_replicas of a Redis store are numbers") from None
    if not 0.05 <= timeout_s <= 600 or wait_replicas < 0:
        raise UsageError("timeout_s of a Redis store is 0.05 to 600, wait_replicas is not negative")
    if options.get("wait_aof", "0") not in ("0", "1"):
        raise UsageError("wait_aof of a Redis store is 0 or 1")
    return RedisLocation(
        hosts=hosts,
        cluster=cluster,
        tls=tls,
        username=unquote(username) or None,
        password=unquote(password) if colon else None,
        database=int(database),
        prefix=prefix,
        own_prefix="prefix" in options,
        ca=files["ca"],
        cert=files["cert"],
        key=files["key"],
        timeout_s=timeout_s,
        wait_replicas=wait_replicas,
        wait_aof=options.get("wait_aof") == "1",
    )


def _host(place: str) -> tuple[str, int]:
    try:
        parts = urlsplit(f"//{place}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if not host:
        raise UsageError(f"a Redis store is given as {_FORM}: the host or its port is missing or wrong")
    return host, port or 6379
