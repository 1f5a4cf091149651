"""The schema of the store file, and the steps from each version to the next.

Laid out for a million records. A record row holds only what differs from trial to trial; everything that a batch of
trials has in common (look-up key, job, team, share, versions, ...) stands once in ``groups``, so that filters run over
thousands of groups instead of a million records. Trial ids and digests are raw bytes, traces and bodies zlib.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass

from tuner_core.errors import StoreError

APPLICATION_ID = 0x54554E52  # "TUNR"


@dataclass(frozen=True)
class Migration:
    """One step of the schema: its statements lead from ``version - 1`` to ``version``."""

    version: int
    statements: tuple[str, ...]


MIGRATIONS: tuple[Migration, ...] = (
    Migration(
        1,
        (
            """CREATE TABLE workloads (
                id INTEGER PRIMARY KEY, digest BLOB NOT NULL UNIQUE, body BLOB NOT NULL, structural_hash TEXT NOT NULL,
                op TEXT NOT NULL, description TEXT NOT NULL, args_info TEXT NOT NULL)""",
            """CREATE TABLE targets (
                id INTEGER PRIMARY KEY, digest BLOB NOT NULL UNIQUE, json TEXT NOT NULL)""",
            """CREATE TABLE keys (
                id INTEGER PRIMARY KEY, workload_id INTEGER NOT NULL REFERENCES workloads,
                target_id INTEGER NOT NULL REFERENCES targets, device_model TEXT NOT NULL, sm_count INTEGER NOT NULL,
                tvm_version TEXT NOT NULL,
                UNIQUE (workload_id, target_id, device_model, sm_count, tvm_version))""",
            # AUTOINCREMENT: ids are never used again, so a reader may cache what an id means
            """CREATE TABLE groups (
                id INTEGER PRIMARY KEY AUTOINCREMENT, digest BLOB NOT NULL UNIQUE,
                key_id INTEGER NOT NULL REFERENCES keys, op TEXT NOT NULL, description TEXT NOT NULL,
                model TEXT NOT NULL, team TEXT NOT NULL, job TEXT NOT NULL, sm_percent INTEGER NOT NULL,
                tags TEXT NOT NULL, facts TEXT NOT NULL)""",
            "CREATE INDEX groups_by_key ON groups (key_id)",
            "CREATE INDEX groups_by_job ON groups (job)",
            # sort_us: the median in microseconds, infinity for a failed trial, so that one index orders both.
            # condemned_by: id of the wrong_result record of the same schedule and key, if there is one.
            # AUTOINCREMENT: a page's snapshot is the highest id so far, even after the newest rows were pruned.
            """CREATE TABLE records (
                id INTEGER PRIMARY KEY AUTOINCREMENT, trial_id BLOB NOT NULL UNIQUE,
                key_id INTEGER NOT NULL REFERENCES keys, group_id INTEGER NOT NULL REFERENCES groups,
                verified INTEGER NOT NULL, sort_us REAL NOT NULL, created_at REAL NOT NULL, condemned_by INTEGER,
                neighbours INTEGER NOT NULL, ci_low_us REAL, ci_high_us REAL, latencies_us BLOB NOT NULL,
                failure TEXT, failure_message TEXT NOT NULL, trace_digest BLOB NOT NULL, trace BLOB NOT NULL)""",
            "CREATE INDEX records_top ON records (key_id, verified DESC, sort_us)",
            "CREATE INDEX records_group_latency ON records (group_id, sort_us)",
            "CREATE INDEX records_group_time ON records (group_id, created_at DESC)",
            "CREATE INDEX records_latency ON records (sort_us)",
            "CREATE INDEX records_time ON records (created_at DESC)",
            "CREATE INDEX records_verified ON records (group_id, sort_us) WHERE verified = 1",
            "CREATE INDEX records_verified_latency ON records (sort_us) WHERE verified = 1",
            # Outlives the record that says so: pruning must not bring a wrong kernel back.
            """CREATE TABLE condemned (
                key_id INTEGER NOT NULL, trace_digest BLOB NOT NULL, record_id INTEGER NOT NULL,
                PRIMARY KEY (key_id, trace_digest)) WITHOUT ROWID""",
        ),
    ),
    Migration(
        2,
        (
            # AUTOINCREMENT: a token is never given twice
            """CREATE TABLE claims (
                token INTEGER PRIMARY KEY AUTOINCREMENT, key TEXT NOT NULL UNIQUE, holder TEXT NOT NULL,
                ends_at REAL NOT NULL)""",
        ),
    ),
    # The bounds of every group, so that a process knows where to look first, and in which groups something changed
    # since it looked last. The clock is the sequence of records: it moves with every record, and by these triggers
    # with every other change. ``accounted``: bounds know the records up to this id; of later ones readers read what
    # they need, so that a commit need not write bounds, and a process of an older version may still commit.
    Migration(
        3,
        (
            "ALTER TABLE groups ADD COLUMN best_us REAL NOT NULL DEFAULT 9e999",
            "ALTER TABLE groups ADD COLUMN newest REAL NOT NULL DEFAULT -9e999",
            "ALTER TABLE groups ADD COLUMN verified INTEGER NOT NULL DEFAULT 0",
            "ALTER TABLE groups ADD COLUMN changed INTEGER NOT NULL DEFAULT 0",
            """UPDATE groups SET
                best_us = coalesce((SELECT min(sort_us) FROM records WHERE group_id = groups.id), 9e999),
                newest = coalesce((SELECT max(created_at) FROM records WHERE group_id = groups.id), -9e999),
                verified = EXISTS (SELECT 1 FROM records WHERE group_id = groups.id AND verified = 1)""",
            "CREATE INDEX groups_by_change ON groups (changed)",
            "CREATE TABLE deleted_groups (id INTEGER PRIMARY KEY, changed INTEGER NOT NULL)",
            "CREATE INDEX deleted_groups_by_change ON deleted_groups (changed)",
            "CREATE TABLE accounted (record_id INTEGER NOT NULL)",
            "INSERT INTO accounted SELECT coalesce((SELECT seq FROM sqlite_sequence WHERE name = 'records'), 0)",
            """CREATE TRIGGER group_gets AFTER UPDATE OF group_id ON records BEGIN
                UPDATE sqlite_sequence SET seq = seq + 1 WHERE name = 'records';
                UPDATE groups SET best_us = min(best_us, new.sort_us), newest = max(newest, new.created_at),
                    verified = max(verified, new.verified),
                    changed = (SELECT seq FROM sqlite_sequence WHERE name = 'records') WHERE id = new.group_id;
            END""",
            """CREATE TRIGGER group_ends AFTER DELETE ON groups BEGIN
                UPDATE sqlite_sequence SET seq = seq + 1 WHERE name = 'records';
                INSERT INTO deleted_groups VALUES (
                    old.id, (SELECT seq FROM sqlite_sequence WHERE name = 'records'));
            END""",
        ),
    ),
)


def upgrade(connection: sqlite3.Connection, path: str, migrations: Sequence[Migration] = MIGRATIONS) -> None:
    """Bring a file to the last version, each step in one transaction; an empty file gets all steps.

    Args:
        connection: In autocommit mode.
        path: For the error texts.
        migrations: Steps in order.

    Raises:
        StoreError: The file has a newer schema, or belongs to another program.
    """
    while True:
        connection.execute("BEGIN IMMEDIATE")  # two processes may open the same old file
        try:
            version = _version(connection, path, newest=migrations[-1].version)
            step = next((m for m in migrations if m.version == version + 1), None)
            if step is not None:
                for statement in step.statements:
                    connection.execute(statement)
                connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                connection.execute(f"PRAGMA user_version = {step.version}")
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
        if step is None:
            return


def _version(connection: sqlite3.Connection, path: str, newest: int) -> int:
    version: int = connection.execute("PRAGMA user_version").fetchone()[0]
    application: int = connection.execute("PRAGMA application_id").fetchone()[0]
    empty = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0
    if application != APPLICATION_ID and not (empty and version == 0):
        raise StoreError(f"{path} is not a record store but a database of another program; choose another file")
    if version > newest:
        raise StoreError(
            f"the store {path} has schema {version}, and this version knows schemas up to {newest}; "
            "upgrade this installation or choose another store"
        )
    return version
