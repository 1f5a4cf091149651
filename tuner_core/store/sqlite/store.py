"""The SQLite backend of the record store."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tuner_core.errors import NotFoundError, StoreError, UsageError
from tuner_core.model import Record, RecordKey, Workload
from tuner_core.store.claims import Claims
from tuner_core.store.interface import CommitResult, Followed, Page, RecordFilter, RecordStore
from tuner_core.store.paging import check_follow, check_limit, check_query
from tuner_core.store.sqlite.catalogue import Catalogue, account, last_id
from tuner_core.store.sqlite.claims import SqliteClaims
from tuner_core.store.sqlite.connections import ReaderPool, Writer, connect, switch_to_wal
from tuner_core.store.sqlite.counts import read_stats
from tuner_core.store.sqlite.failures import explained
from tuner_core.store.sqlite.query import run_follow, run_query
from tuner_core.store.sqlite.rows import RECORD_COLUMNS, RecordWriter, read_records, read_workload
from tuner_core.store.sqlite.schema import upgrade
from tuner_core.store.validation import check_record, check_tags, check_workload

_PRUNE_CHUNK = 5_000
_POLL_S = 0.1
_CURSOR = "sqlite-"
# the best of a key stands first in records_top; condemned and failed records are never the best
_PRUNABLE = (
    "WHERE id > ? AND id <= ? AND created_at < ? AND verified = 0 "
    "AND (? = '' OR group_id IN (SELECT id FROM groups WHERE team = ?)) "
    "AND id IS NOT (SELECT b.id FROM records b WHERE b.key_id = records.key_id AND b.failure IS NULL "
    "AND b.condemned_by IS NULL ORDER BY b.verified DESC, b.sort_us, b.trial_id LIMIT 1)"
)


class SqliteStore(RecordStore):
    """Records in one SQLite file that any number of threads and processes may use at the same time.

    Durability: a commit returns after the write-ahead log was synced to disk. Readers never wait for writers.

    Args:
        path: The file; it and its directory are made when missing.

    Raises:
        StoreError: Newer schema, not a record store, unwritable, or no space.
        UnavailableError: Another process holds the file for longer than 30 s.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = str(path)
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise StoreError(f"cannot make the directory of the store {path} ({error.strerror})") from None
        with explained(self._path):
            connection = connect(self._path)
            try:
                switch_to_wal(connection)
                connection.execute("PRAGMA journal_size_limit = 67108864")
                upgrade(connection, self._path)
            except BaseException:
                connection.close()
                raise
        self._writer = Writer(self._path, connection)
        self._readers = ReaderPool(self._path)
        self._catalogue = Catalogue()

    def commit(self, records: Sequence[Record], workloads: Iterable[Workload] = ()) -> CommitResult:
        """See :meth:`RecordStore.commit`. Concurrent commits share one transaction."""
        workloads = list(workloads)
        for workload in workloads:
            check_workload(workload)
        digests = [check_record(record) for record in records]

        def write(connection: sqlite3.Connection) -> int:
            writer = RecordWriter(connection)
            for workload in workloads:
                writer.put_workload(workload)
            stored = sum(map(writer.put_record, records, digests))
            account(connection)
            return stored

        if not records and not workloads:
            return CommitResult(0, 0)
        stored = self._writer.run(write)
        return CommitResult(stored, len(records) - stored)

    def get(self, trial_id: str) -> Record | None:
        """See :meth:`RecordStore.get`."""
        try:
            raw = bytes.fromhex(trial_id)
        except ValueError:
            return None
        with self._readers.reading() as connection:
            rows = connection.execute(f"SELECT {RECORD_COLUMNS} FROM records r WHERE trial_id = ?", (raw,)).fetchall()
            return next(iter(read_records(connection, self._catalogue, rows)), None)

    def get_workload(self, digest: str) -> Workload | None:
        """See :meth:`RecordStore.get_workload`."""
        with self._readers.reading() as connection:
            return read_workload(connection, digest)

    def top(self, key: RecordKey, limit: int = 1, *, verified_only: bool = False) -> list[Record]:
        """See :meth:`RecordStore.top`."""
        check_limit(limit)
        try:
            workload, target = bytes.fromhex(key.workload_digest), bytes.fromhex(key.target_digest)
        except ValueError:
            return []
        only = "AND r.verified = 1" if verified_only else ""
        with self._readers.reading() as connection:
            rows = connection.execute(
                f"SELECT {RECORD_COLUMNS} FROM records r INDEXED BY records_top WHERE r.key_id = "
                "(SELECT k.id FROM keys k JOIN workloads w ON w.id = k.workload_id "
                "JOIN targets t ON t.id = k.target_id "
                "WHERE w.digest = ? AND t.digest = ? AND k.device_model = ? AND k.sm_count = ? AND k.tvm_version = ?) "
                f"AND r.failure IS NULL AND r.condemned_by IS NULL {only} "
                "ORDER BY r.verified DESC, r.sort_us, r.trial_id LIMIT ?",
                (workload, target, key.device_model, key.sm_count, key.tvm_version, limit),
            ).fetchall()
            return read_records(connection, self._catalogue, rows)

    def query(
        self,
        where: RecordFilter,
        *,
        limit: int = 100,
        cursor: str | None = None,
        order: str = "latency",
        top_per_key: int = 0,
    ) -> Page:
        """See :meth:`RecordStore.query`."""
        arguments = check_query(where, limit, cursor, order, top_per_key)
        with self._readers.reading() as connection:
            return run_query(connection, self._catalogue, arguments)

    def follow(
        self, where: RecordFilter, after: str | None = None, *, limit: int = 1_000, wait_s: float = 0.0
    ) -> Followed:
        """See :meth:`RecordStore.follow`. Row ids grow in the order of commits: one transaction writes at a time."""
        check_follow(where, limit)
        position = None if after is None else _position(after)
        deadline = time.monotonic() + wait_s
        while True:
            with self._readers.reading() as connection:
                if position is None:
                    position = last_id(connection)
                elif position > last_id(connection):
                    raise UsageError(f"the cursor {after!r} is not one of this store: begin anew, without a cursor")
                records, position = run_follow(connection, self._catalogue, where, position, limit)
            left_s = deadline - time.monotonic()
            if records or left_s <= 0:
                return Followed(tuple(records), f"{_CURSOR}{position}")
            time.sleep(min(_POLL_S, left_s))

    def tag(self, trial_id: str, tags: Mapping[str, str | None]) -> Record:
        """See :meth:`RecordStore.tag`."""
        check_tags(tags)
        self._writer.run(lambda connection: RecordWriter(connection).put_tags(trial_id, tags))
        record = self.get(trial_id)
        if record is None:
            raise NotFoundError(f"record {trial_id[:64]} was deleted meanwhile")
        return record

    def stats(self) -> dict[str, Any]:
        """See :meth:`RecordStore.stats`."""
        with self._readers.reading() as connection:
            return read_stats(connection, time.time())

    def prune(self, older_than: float, team: str = "", *, dry_run: bool = False) -> int:
        """See :meth:`RecordStore.prune`. A schedule once found wrong stays known as wrong.

        Works in chunks, so that commits get in between.
        """
        if dry_run:
            with self._readers.reading() as connection:
                values = (0, last_id(connection), older_than, team, team)
                return int(connection.execute(f"SELECT count(*) FROM records {_PRUNABLE}", values).fetchone()[0])
        deleted = 0
        last = 0
        while True:
            count, last = self._writer.run(partial(_prune_chunk, older_than=older_than, team=team, after=last))
            deleted += count
            if not last:
                return deleted

    @property
    def claims(self) -> Claims:
        """See :attr:`RecordStore.claims`."""
        return SqliteClaims(self._writer)

    def close(self) -> None:
        """See :meth:`RecordStore.close`."""
        self._readers.close()
        self._writer.close()


def _position(cursor: str) -> int:
    number = cursor.removeprefix(_CURSOR)
    if number == cursor or not number.isdigit() or len(number) > 18:
        raise UsageError(f"{cursor[:60]!r} is not a cursor of this store: begin anew, without a cursor")
    return int(number)


def _prune_chunk(connection: sqlite3.Connection, older_than: float, team: str, after: int) -> tuple[int, int]:
    """Delete among the next records behind row ``after``; returns how many, and where to go on (0: done)."""
    ids = [
        row[0]
        for row in connection.execute(
            "SELECT r.id FROM records r WHERE r.id > ? ORDER BY r.id LIMIT ?", (after, _PRUNE_CHUNK)
        )
    ]
    if not ids:
        connection.execute("DELETE FROM groups WHERE NOT EXISTS (SELECT 1 FROM records r WHERE r.group_id = groups.id)")
        return 0, 0
    deleted = connection.execute(f"DELETE FROM records {_PRUNABLE}", (after, ids[-1], older_than, team, team)).rowcount
    return deleted, ids[-1]
