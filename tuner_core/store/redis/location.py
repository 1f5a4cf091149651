"""From a Redis URL to connection settings."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlsplit

from tuner_core.errors import UsageError

SCHEMES = ("redis", "rediss", "redis+cluster", "rediss+cluster", "redis+sentinel", "rediss+sentinel")
DEFAULT_PREFIX = "tuner"
_FORM = "redis[s][+cluster]://[USER:PASSWORD@]HOST[:PORT][/DATABASE]"
_SENTINEL_FORM = "redis[s]+sentinel://[USER:PASSWORD@]HOST[:PORT][,HOST[:PORT]...]/NAME[/DATABASE]"
_PREFIX = re.compile(r"[A-Za-z0-9_.:-]{1,64}\Z")
_SERVICE = re.compile(r"[A-Za-z0-9_.-]{1,64}\Z")
_PORT, _SENTINEL_PORT = 6379, 26379
_FILES = ("ca", "cert", "key", "sentinel_password_file")
_OPTIONS = (*_FILES, "prefix", "sentinel_username", "timeout_s", "wait_aof", "wait_replicas")


@dataclass(frozen=True)
class RedisLocation:
    """Where a Redis store is and how to reach it.

    Attributes:
        hosts: (host, port); more than one only for a cluster, as places to begin at, and for sentinels.
        cluster: Whether these are nodes of a cluster.
        service: What the sentinels call the master; empty: the hosts are no sentinels.
        sentinel_username, sentinel_password: Where the sentinels ask for them.
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
    service: str = ""
    sentinel_username: str | None = None
    sentinel_password: str | None = field(default=None, repr=False)
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
        scheme = "rediss" if self.tls else "redis"
        places = ",".join(f"{host}:{port}" for host, port in self.hosts)
        if self.service:
            return f"{scheme}+sentinel://{places}/{self.service}/{self.database}"
        return f"{scheme}{'+cluster' if self.cluster else ''}://{places}/{self.database}"


def parse_location(url: str) -> RedisLocation:
    """Read a URL.

    ``redis[s]://[USER:PASSWORD@]HOST[:PORT][/DATABASE]``, ``redis[s]+cluster://...HOST[:PORT][,HOST[:PORT]...]``, or
    ``redis[s]+sentinel://...HOST[:PORT][,HOST[:PORT]...]/NAME[/DATABASE]`` for the master that sentinels call ``NAME``;
    then ``?OPTION=VALUE&...``: ``ca``, ``cert``, ``key`` (PEM files), ``prefix``, ``timeout_s``, ``wait_replicas``,
    ``wait_aof``, and for sentinels ``sentinel_username`` and ``sentinel_password_file``.

    Raises:
        UsageError: Says which part is wrong; never repeats the password.
    """
    parts = urlsplit(url)
    if parts.scheme not in SCHEMES:
        raise UsageError(f"a Redis store is given as {_FORM} or {_SENTINEL_FORM}")
    cluster, sentinels = parts.scheme.endswith("+cluster"), parts.scheme.endswith("+sentinel")
    credentials, _, places = parts.netloc.rpartition("@")
    username, colon, password = credentials.partition(":")
    hosts = tuple(_host(place, _SENTINEL_PORT if sentinels else _PORT) for place in places.split(","))
    if len(hosts) > 1 and not cluster and not sentinels:
        raise UsageError(
            "several hosts are given for a cluster or for sentinels only: redis+cluster://HOST:PORT,HOST:PORT or "
            "redis+sentinel://HOST:PORT,HOST:PORT/NAME"
        )
    path = parts.path.strip("/")
    service = ""
    if sentinels:
        service, _, path = path.partition("/")
        if not _SERVICE.match(service):
            raise UsageError(
                f"with sentinels the URL says which master: {_SENTINEL_FORM}, NAME as in the sentinels' "
                "'sentinel monitor NAME ...'"
            )
    database = path or "0"
    if not database.isdigit() or (cluster and database != "0"):
        raise UsageError(f"the database of a Redis store is a number, in a cluster always 0, not {database!r}")
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    if unknown := sorted(set(options) - set(_OPTIONS)):
        raise UsageError(f"a Redis store has no option {unknown[0]!r}; known: {', '.join(sorted(_OPTIONS))}")
    if of_sentinels := sorted(name for name in options if name.startswith("sentinel_") and not sentinels):
        raise UsageError(f"the option {of_sentinels[0]} of a Redis store is for redis+sentinel://")
    tls = parts.scheme.startswith("rediss")
    files = {name: options.get(name) for name in _FILES}
    for name, file in files.items():
        if file is not None and not tls and name in ("ca", "cert", "key"):
            raise UsageError(f"the option {name} is for TLS: use rediss:// instead of redis://")
        if file is not None and not Path(file).is_file():
            raise UsageError(f"the option {name} of the Redis store names no file: {file}")
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
        service=service,
        sentinel_username=options.get("sentinel_username") or None,
        sentinel_password=_password(files["sentinel_password_file"]),
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


def _password(file: str | None) -> str | None:
    if file is None:
        return None
    try:
        return Path(file).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text"
        raise UsageError(f"cannot read sentinel_password_file {file} of the Redis store: {reason}") from None


def _host(place: str, default_port: int) -> tuple[str, int]:
    try:
        parts = urlsplit(f"//{place}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if not host:
        raise UsageError(f"a Redis store is given as {_FORM}: the host or its port is missing or wrong")
    return host, port or default_port
