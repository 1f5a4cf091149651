"""Records on this host's disk that wait for the shared store to answer again."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from pathlib import Path

from tuner_core.model import Record, RecordKey, trace_digest
from tuner_core.store.sqlite import SqliteStore
from tuner_core.store.sqlite.rows import RECORD_COLUMNS, read_records


class Spool(SqliteStore):
    """A record store that is also a queue: records leave it in the order in which they came.

    Workloads stay, as this host's own copies: what waits can always be replayed with them.

    Args:
        path: The file.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self._writer.run(
            lambda connection: connection.execute(
                "CREATE TABLE IF NOT EXISTS refused (record_id INTEGER PRIMARY KEY, reason TEXT NOT NULL)"
            )
        )

    def waiting(self) -> int:
        """How many records wait."""
        with self._readers.reading() as connection:
            count = connection.execute(
                "SELECT count(*) FROM records WHERE id NOT IN (SELECT record_id FROM refused)"
            ).fetchone()
            return int(count[0])

    def empty(self) -> bool:
        """Whether no record waits."""
        return not self.oldest_ids(1)

    def oldest_ids(self, limit: int) -> list[int]:
        """Queue numbers of the records that wait longest, in order."""
        with self._readers.reading() as connection:
            rows = connection.execute(
                "SELECT id FROM records WHERE id NOT IN (SELECT record_id FROM refused) ORDER BY id LIMIT ?", (limit,)
            )
            return [row[0] for row in rows]

    def oldest(self, limit: int) -> list[tuple[int, Record]]:
        """The records that wait longest, in order, with their queue numbers."""
        with self._readers.reading() as connection:
            rows = connection.execute(
                f"SELECT r.id, {RECORD_COLUMNS} FROM records r "
                "WHERE r.id NOT IN (SELECT record_id FROM refused) ORDER BY r.id LIMIT ?",
                (limit,),
            ).fetchall()
            records = read_records(connection, self._catalogue, [row[1:] for row in rows])
        return [(row[0], record) for row, record in zip(rows, records, strict=True)]

    def remove(self, numbers: Sequence[int]) -> None:
        """Forget records that the shared store has."""
        given = json.dumps(list(numbers))

        def work(connection: sqlite3.Connection) -> None:
            chosen = "(SELECT value FROM json_each(?))"
            connection.execute(f"DELETE FROM condemned WHERE record_id IN {chosen}", (given,))
            connection.execute(f"DELETE FROM records WHERE id IN {chosen}", (given,))
            connection.execute("DELETE FROM groups WHERE NOT EXISTS (SELECT 1 FROM records WHERE group_id = groups.id)")

        self._writer.run(work)

    def set_aside(self, number: int, reason: str) -> None:
        """Keep a record that the shared store refuses, out of the way of the others."""
        self._writer.run(
            lambda connection: connection.execute("INSERT OR REPLACE INTO refused VALUES (?, ?)", (number, reason))
        )

    def condemns(self, key: RecordKey, trace: str) -> bool:
        """Whether a record that waits says that this schedule is wrong."""
        with self._readers.reading() as connection:
            found = connection.execute(
                "SELECT 1 FROM condemned c JOIN keys k ON k.id = c.key_id JOIN workloads w ON w.id = k.workload_id "
                "JOIN targets t ON t.id = k.target_id WHERE c.trace_digest = ? AND w.digest = ? AND t.digest = ? "
                "AND k.device_model = ? AND k.sm_count = ? AND k.tvm_version = ?",
                (
                    bytes.fromhex(trace_digest(trace)),
                    bytes.fromhex(key.workload_digest),
                    bytes.fromhex(key.target_digest),
                    key.device_model,
                    key.sm_count,
                    key.tvm_version,
                ),
            ).fetchone()
            return found is not None
