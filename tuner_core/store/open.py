"""From a store's URL to the store."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from tuner_core.errors import UsageError
from tuner_core.store.interface import RecordStore

REDIS_SCHEMES = tuple(f"{scheme}{kind}" for scheme in ("redis", "rediss") for kind in ("", "+cluster", "+sentinel"))


def open_store(url: str, *, allow_volatile: bool = False) -> RecordStore:
    """Open the store of a URL.

    Args:
        url: ``sqlite:///ABSOLUTE/PATH`` (further slashes do not matter), or ``redis://`` in the form of
            :func:`tuner_core.store.redis.parse_location`.
        allow_volatile: Accept a Redis that may evict or forget records.

    Raises:
        UsageError: Not a URL of a store.
        StoreError: The backend refuses, see :class:`RecordStore`.
        UnavailableError: Redis cannot be reached.
    """
    parts = urlsplit(url)
    if parts.scheme == "sqlite":
        path = unquote(parts.path)
        if parts.netloc or not path.strip("/"):
            raise UsageError(
                f"store {url!r}: give the absolute path of a file, as in sqlite:///var/lib/tuner/records.db"
            )
        from tuner_core.store.sqlite import SqliteStore

        return SqliteStore("/" + path.lstrip("/"))
    if parts.scheme in REDIS_SCHEMES:
        from tuner_core.store.redis import RedisStore, parse_location

        return RedisStore(parse_location(url), allow_volatile=allow_volatile)
    raise UsageError(f"store {url.partition('@')[2] or url!r}: use sqlite:///PATH or redis://HOST")


def open_server_store(url: str, spool: Path, *, allow_volatile: bool = False) -> RecordStore:
    """Open a server's store: with a spool in front of Redis; see :class:`SpooledStore`.

    Args:
        url: As for :func:`open_store`.
        spool: File of the spool; what an earlier run has left there goes to the store.
        allow_volatile: As for :func:`open_store`.

    Raises:
        UsageError, StoreError, UnavailableError: As :func:`open_store`.
    """
    from tuner_core.store.spooled import SpooledStore, replay_into

    store = open_store(url, allow_volatile=allow_volatile)
    try:
        if urlsplit(url).scheme in REDIS_SCHEMES:
            return SpooledStore(store, spool)
        replay_into(store, spool)
    except BaseException:
        store.close()
        raise
    return store
