"""What a server remembers of its jobs across restarts: the request as it came, and the last known status.

Measured trials are not here but in the record store; a job that goes on reads them from there.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tuner_core.errors import StoreError
from tuner_core.model import JobState
from tuner_core.proto.tuner.v1 import tuning_pb2

SCHEMA_VERSION = 2


@dataclass(frozen=True)
class JournalEntry:
    """One job as it was last written. Times are seconds since the epoch, ``elapsed_s`` is time spent running.

    ``lease_s`` is set for a shard: how long its leases last; ``tokens`` are then the newest ones seen, by task name.
    """

    job: str
    spec: tuning_pb2.JobSpec
    state: JobState
    status: tuning_pb2.JobStatus
    created_at: float
    elapsed_s: float
    lease_s: float | None = None
    tokens: Mapping[str, int] = field(default_factory=dict)


class JobJournal:
    """Jobs in one SQLite file. Thread-safe.

    Raises (any method):
        StoreError: The file cannot be written, or is of a newer version.
    """

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        try:
            self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            (version,) = self._db.execute("PRAGMA user_version").fetchone()
            if version > SCHEMA_VERSION:
                raise StoreError(
                    f"{path} was written by a newer version of tuner-server (schema {version}, this one knows "
                    f"{SCHEMA_VERSION}); upgrade, or use another --data-dir"
                )
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS jobs (job TEXT PRIMARY KEY, request_id TEXT, state TEXT NOT NULL, "
                "spec BLOB NOT NULL, status BLOB NOT NULL, created_at REAL NOT NULL, elapsed_s REAL NOT NULL)"
            )
            self._db.execute("CREATE INDEX IF NOT EXISTS jobs_by_request ON jobs (request_id)")
            self._db.execute("CREATE TABLE IF NOT EXISTS shards (job TEXT PRIMARY KEY, lease_s REAL NOT NULL)")
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS tokens (job TEXT NOT NULL, task TEXT NOT NULL, token INTEGER NOT NULL, "
                "PRIMARY KEY (job, task)) WITHOUT ROWID"
            )
            self._db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
        except sqlite3.Error as error:
            raise StoreError(f"cannot open the job journal {path}: {error}; check the data directory") from None

    def add(self, job: str, spec: tuning_pb2.JobSpec, status: tuning_pb2.JobStatus) -> None:
        """Write a new job, queued."""
        row = (job, spec.request_id or None, JobState.QUEUED, spec.SerializeToString(), status.SerializeToString())
        self._execute("INSERT INTO jobs VALUES (?, ?, ?, ?, ?, ?, 0)", (*row, time.time()))

    def mark_shard(self, job: str, lease_s: float) -> None:
        """Write that a job is a shard, before or after :meth:`add`."""
        self._execute("INSERT OR REPLACE INTO shards VALUES (?, ?)", (job, lease_s))

    def note_token(self, job: str, task: str, token: int) -> None:
        """Write the newest token seen of a shard's task; an older one changes nothing."""
        sql = "INSERT INTO tokens VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET token = max(token, excluded.token)"
        self._execute(sql, (job, task, token))

    def update(self, job: str, state: JobState, status: tuning_pb2.JobStatus, elapsed_s: float) -> None:
        """Write how far a job has come."""
        self._execute(
            "UPDATE jobs SET state = ?, status = ?, elapsed_s = ? WHERE job = ?",
            (state, status.SerializeToString(), elapsed_s, job),
        )

    def _execute(self, sql: str, values: tuple[object, ...]) -> None:
        with self._lock:
            try:
                self._db.execute(sql, values)
            except sqlite3.Error as error:
                raise StoreError(f"cannot write the job journal: {error}; check the data directory") from None

    def by_request(self, request_id: str) -> str | None:
        """The job that a request made, or None."""
        with self._lock:
            row = self._db.execute("SELECT job FROM jobs WHERE request_id = ?", (request_id,)).fetchone()
        return None if row is None else str(row[0])

    def entries(self, limit: int = 1000) -> list[JournalEntry]:
        """Jobs, newest first."""
        columns = "job, spec, state, status, created_at, elapsed_s, lease_s"
        sql = (
            f"SELECT {columns} FROM jobs LEFT JOIN shards USING (job) ORDER BY created_at DESC, jobs.rowid DESC LIMIT ?"
        )
        tokens: dict[str, dict[str, int]] = {}
        with self._lock:
            rows = self._db.execute(sql, (limit,)).fetchall()
            for job, task, token in self._db.execute("SELECT job, task, token FROM tokens"):
                tokens.setdefault(job, {})[task] = token
        return [
            JournalEntry(
                job,
                tuning_pb2.JobSpec.FromString(spec),
                JobState(state),
                tuning_pb2.JobStatus.FromString(status),
                created_at,
                elapsed_s,
                lease_s,
                tokens.get(job, {}),
            )
            for job, spec, state, status, created_at, elapsed_s, lease_s in rows
        ]

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()
