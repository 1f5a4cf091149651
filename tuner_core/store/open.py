"""From a store's URL to the store."""

from __future__ import annotations

from urllib.parse import unquote, urlsplit

from tuner_core.errors import StoreError, UsageError
from tuner_core.store.interface import RecordStore


def open_store(url: str) -> RecordStore:
    """Open the store of a URL.

    Args:
        url: ``sqlite:///ABSOLUTE/PATH``. Further slashes do not matter.

    Raises:
        UsageError: Not a URL of a store.
        StoreError: The backend refuses, see :class:`RecordStore`.
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
    if parts.scheme in ("redis", "rediss"):
        raise StoreError("Redis stores are not supported yet in this version; use sqlite:///PATH")
    raise UsageError(f"store {url!r}: use sqlite:///PATH")
