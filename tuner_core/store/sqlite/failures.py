"""SQLite's errors as one-line errors of the product."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator

from tuner_core.errors import StoreError, TunerError, UnavailableError

_FULL = "no space left for the store {path}: free some space or choose another data directory"
_READ_ONLY = "cannot write the store {path} (read-only): change its permissions or choose another data directory"
_TEXTS: dict[int, str] = {
    sqlite3.SQLITE_FULL: _FULL,
    sqlite3.SQLITE_READONLY: _READ_ONLY,
    sqlite3.SQLITE_CANTOPEN: (
        "cannot open the store {path}: its directory cannot be written; choose another data directory"
    ),
    sqlite3.SQLITE_PERM: _READ_ONLY,
    sqlite3.SQLITE_IOERR: "reading or writing the store {path} failed ({error}): check the disk and its free space",
    sqlite3.SQLITE_NOTADB: "{path} is not a record store; choose another file",
    sqlite3.SQLITE_CORRUPT: "the store {path} is damaged ({error}): restore it from a copy",
}


def explain(error: sqlite3.Error, path: str) -> TunerError:
    """The product's error for one of SQLite's."""
    # the low byte is the primary result code, https://www.sqlite.org/rescode.html
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return UnavailableError(f"the store {path} is held by another process for too long; try again")
    if isinstance(error, sqlite3.ProgrammingError) and "closed" in str(error):
        return StoreError(f"the store {path} is closed")
    text = _TEXTS.get(code, "the store {path} failed: {error}")
    return StoreError(text.format(path=path, error=error))


@contextlib.contextmanager
def explained(path: str) -> Iterator[None]:
    """Turn SQLite's errors inside into the product's."""
    try:
        yield
    except sqlite3.Error as error:
        raise explain(error, path) from error
