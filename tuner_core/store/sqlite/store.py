"""The SQLite backend of the record store."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tuner_core.errors import StoreError, UsageError
from tuner_core.model import Record, RecordKey, Workload
from tuner_core.store.interface import CommitResult, Page, RecordFilter, RecordStore
from tuner_core.store.paging import MAX_LIMIT, check_query
from tuner_core.store.sqlite.connections import ReaderPool, Writer, connect, switch_to_wal
from tuner_core.store.sqlite.failures import explained
from tuner_core.store.sqlite.query import run_query
from tuner_core.store.sqlite.rows import RECORD_COLUMNS, RecordWriter, read_records, read_workload
from tuner_core.store.sqlite.schema import upgrade
from tuner_core.store.validation import check_record, check_workload

_PRUNE_CHUNK = 5_000


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
            return sum(map(writer.put_record, records, digests))

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
            return next(iter(read_records(connection, rows)), None)

    def get_workload(self, digest: str) -> Workload | None:
        """See :meth:`RecordStore.get_workload`."""
        with self._readers.reading() as connection:
            return read_workload(connection, digest)

    def top(self, key: RecordKey, limit: int = 1, *, verified_only: bool = False) -> list[Record]:
        """See :meth:`RecordStore.top`."""
        if not 1 <= limit <= MAX_LIMIT:
            raise UsageError(f"limit {limit} is not in 1..{MAX_LIMIT}")
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
            return read_records(connection, rows)

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
            return run_query(connection, arguments)

    def stats(self) -> dict[str, Any]:
        """See :meth:`RecordStore.stats`."""
        with self._readers.reading() as connection:
            counts = connection.execute(
                "SELECT group_id, count(*), total(sort_us < 9e999) FROM records INDEXED BY records_group_latency "
                "GROUP BY group_id"
            ).fetchall()
            verified = connection.execute("SELECT count(*) FROM records WHERE verified = 1").fetchone()[0]
            workloads = connection.execute("SELECT count(*) FROM workloads").fetchone()[0]
            groups = {
                row[0]: row[1:]
                for row in connection.execute(
                    "SELECT g.id, k.device_model, g.model, g.team FROM groups g JOIN keys k ON k.id = g.key_id"
                )
            }
        records = sum(count for _, count, _ in counts)
        valid = sum(int(good) for _, _, good in counts)
        found: dict[str, Any] = {
            "records": records,
            "valid": valid,
            "failed": records - valid,
            "verified": verified,
            "workloads": workloads,
        }
        for position, name in enumerate(("by_device", "by_model", "by_team")):
            tally: dict[str, int] = {}
            for group, count, _ in counts:
                value = groups[group][position]
                tally[value] = tally.get(value, 0) + count
            found[name] = tally
        return found

    def prune(self, older_than: float, team: str = "") -> int:
        """See :meth:`RecordStore.prune`. A schedule once found wrong stays known as wrong.

        Works in chunks, so that commits get in between.
        """
        deleted = 0
        last = 0
        while True:
            count, last = self._writer.run(partial(_prune_chunk, older_than=older_than, team=team, after=last))
            deleted += count
            if not last:
                return deleted

    def close(self) -> None:
        """See :meth:`RecordStore.close`."""
        self._readers.close()
        self._writer.close()


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
    # the best of a key stands first in records_top; condemned and failed records are never the best
    deleted = connection.execute(
        "DELETE FROM records WHERE id > ? AND id <= ? AND created_at < ? AND verified = 0 "
        "AND (? = '' OR group_id IN (SELECT id FROM groups WHERE team = ?)) "
        "AND id IS NOT (SELECT b.id FROM records b WHERE b.key_id = records.key_id AND b.failure IS NULL "
        "AND b.condemned_by IS NULL ORDER BY b.verified DESC, b.sort_us, b.trial_id LIMIT 1)",
        (after, ids[-1], older_than, team, team),
    ).rowcount
    return deleted, ids[-1]
