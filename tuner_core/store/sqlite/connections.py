"""Connections to the store file: one writer that merges concurrent commits, and readers that never wait for it."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from tuner_core.errors import StoreError
from tuner_core.store.sqlite.failures import explain, explained

_BUSY_TIMEOUT_MS = 30_000
_IDLE_READERS = 8
_CACHE_KIB = 4_096

T = TypeVar("T")


def connect(path: str) -> sqlite3.Connection:
    """A connection in autocommit mode with the store's settings (https://www.sqlite.org/pragma.html)."""
    connection = sqlite3.connect(path, timeout=_BUSY_TIMEOUT_MS / 1000, isolation_level=None, check_same_thread=False)
    connection.execute(f"PRAGMA busy_timeout = {_BUSY_TIMEOUT_MS}")
    connection.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
    connection.execute("PRAGMA temp_store = MEMORY")
    # WAL with FULL: the log is synced at every commit, so an acknowledged commit survives a power cut
    connection.execute("PRAGMA synchronous = FULL")
    return connection


def switch_to_wal(connection: sqlite3.Connection) -> None:
    """Write ahead from now on. SQLite does not wait for this lock as its busy timeout says, so this does.

    Raises:
        sqlite3.OperationalError: Another process holds the file for longer than the busy timeout.
    """
    deadline = time.monotonic() + _BUSY_TIMEOUT_MS / 1000
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
        time.sleep(0.01)


class ReaderPool:
    """Read connections for many threads; each borrower sees one consistent state of the store."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._idle: list[sqlite3.Connection] = []
        self._closed = False

    @contextlib.contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """A connection inside a read transaction."""
        with self._lock:
            if self._closed:
                raise StoreError(f"the store {self._path} is closed")
            connection = self._idle.pop() if self._idle else None
        with explained(self._path):
            if connection is None:
                connection = connect(self._path)
            try:
                connection.execute("BEGIN")
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                connection.close()
                raise
        with self._lock:
            if not self._closed and len(self._idle) < _IDLE_READERS:
                self._idle.append(connection)
                return
        connection.close()

    def close(self) -> None:
        """Close idle connections now, borrowed ones when they come back."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()


class _Pending:
    def __init__(self, work: Callable[[sqlite3.Connection], Any]) -> None:
        self.work = work
        self.done = False
        self.result: Any = None
        self.error: BaseException | None = None


class Writer:
    """Group commit: whoever gets the write lock first commits everybody's pending work in one transaction.

    One sync of the disk then serves many threads. Work that raises is rolled back alone, by its savepoint.
    """

    def __init__(self, path: str, connection: sqlite3.Connection) -> None:
        self._path = path
        self._connection = connection
        self._write_lock = threading.Lock()
        self._queue_lock = threading.Lock()
        self._queue: deque[_Pending] = deque()
        self._closed = False

    def run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Run ``work`` inside a write transaction; return its result when that is durable.

        Raises:
            StoreError: The store is closed, or SQLite refused.
            Exception: Whatever ``work`` raised; nothing of it is stored then.
        """
        pending = _Pending(work)
        with self._queue_lock:
            self._queue.append(pending)
        with self._write_lock:
            if not pending.done:
                with self._queue_lock:
                    batch = list(self._queue)
                    self._queue.clear()
                self._commit(batch)
        if pending.error is not None:
            raise pending.error
        result: T = pending.result
        return result

    def _commit(self, batch: list[_Pending]) -> None:
        try:
            if self._closed:
                raise StoreError(f"the store {self._path} is closed")
            self._connection.execute("BEGIN IMMEDIATE")
            for pending in batch:
                self._savepoint(pending)
            self._connection.execute("COMMIT")
        except BaseException as error:
            with contextlib.suppress(sqlite3.Error):
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
            cause = explain(error, self._path) if isinstance(error, sqlite3.Error) else StoreError(str(error))
            for pending in batch:
                if pending.error is None:
                    pending.error = type(cause)(str(cause))
                    pending.error.__cause__ = error
            if not isinstance(error, Exception):
                raise
        finally:
            for pending in batch:
                pending.done = True

    def _savepoint(self, pending: _Pending) -> None:
        self._connection.execute("SAVEPOINT work")
        try:
            pending.result = pending.work(self._connection)
        except sqlite3.Error:
            raise  # the transaction itself may be gone, for example on a full disk
        except Exception as error:
            pending.error = error
            self._connection.execute("ROLLBACK TO work")
        self._connection.execute("RELEASE work")

    def close(self) -> None:
        """Wait for a running commit, then close; later work is refused."""
        with self._write_lock:
            if not self._closed:
                self._closed = True
                self._connection.close()
