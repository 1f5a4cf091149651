"""The groups of a store file in the memory of each process, brought up to date before every query.

Bringing it up to date reads only what changed since the last time: groups whose bounds were written, groups that were
deleted, and the records behind the last one that the written bounds know of (see ``schema``).
"""

from __future__ import annotations

import contextlib
import functools
import json
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tuner_core.model import EvaluatorSettings, Origin, PartitionKind, Record
from tuner_core.store.groups import ArgsInfo, Change, Group, GroupIndex, Selection, SharedFacts
from tuner_core.store.interface import RecordFilter

# records that every process reads by itself before a writer accounts for them in the bounds of their groups
_ACCOUNT_EVERY = 256

_GROUP_COLUMNS = (
    "g.id, w.digest, t.json, t.digest, k.device_model, k.sm_count, k.tvm_version, g.op, g.description, g.model, "
    "g.team, g.job, g.sm_percent, g.tags, g.facts"
)
_GROUP_TABLES = (
    "groups g JOIN keys k ON k.id = g.key_id JOIN workloads w ON w.id = k.workload_id "
    "JOIN targets t ON t.id = k.target_id"
)


@dataclass
class _Bounds:
    best_us: float
    newest: float
    verified: bool

    def reach(self, best_us: float, newest: float, verified: bool) -> None:
        """Hold for these records too."""
        self.best_us = min(self.best_us, best_us)
        self.newest = max(self.newest, newest)
        self.verified = self.verified or verified


class Catalogue:
    """The groups of one store file. Thread-safe."""

    def __init__(self) -> None:
        self._index: GroupIndex[Group] = GroupIndex()
        self._lock = threading.Lock()
        self._seen = -1
        self._shared: SharedFacts[int, Group] = SharedFacts(self._index)

    @contextlib.contextmanager
    def selecting(self, connection: sqlite3.Connection, where: RecordFilter, order: str) -> Iterator[Selection[Group]]:
        """The groups whose records may match in what the caller's transaction sees.

        Args:
            connection: In a read transaction that has read nothing yet: one older than what another thread's saw begins
                anew.
            where, order: Of the query.
        """
        with contextlib.ExitStack() as reading:
            with self._lock:
                clock = last_id(connection)
                if clock < self._seen:
                    connection.execute("COMMIT")
                    connection.execute("BEGIN")
                    clock = last_id(connection)
                if clock != self._seen:
                    self._read(connection, self._seen)
                    self._seen = clock
                reading.enter_context(self._index.reading())
                selection = self._index.select(where, order)
            yield selection

    def shared(self, connection: sqlite3.Connection, groups: Iterable[int]) -> dict[int, Record]:
        """What the records of groups have in common, by group id."""

        def read(names: list[int]) -> dict[int, Record]:
            rows = connection.execute(
                f"SELECT {_GROUP_COLUMNS} FROM {_GROUP_TABLES} WHERE g.id IN (SELECT value FROM json_each(?))",
                (json.dumps(names),),
            )
            return {row[0]: _shared(row) for row in rows}

        return self._shared.of(groups, read)

    def _read(self, connection: sqlite3.Connection, seen: int) -> None:
        removed = connection.execute("SELECT id FROM deleted_groups WHERE changed > ?", (seen,)).fetchall()
        bounds = {
            name: _Bounds(best_us, newest, bool(verified))
            for name, best_us, newest, verified in connection.execute(
                "SELECT id, best_us, newest, verified FROM groups WHERE changed > ?", (seen,)
            ).fetchall()
        }
        recent = connection.execute(
            "SELECT group_id, sort_us, created_at, verified FROM records NOT INDEXED "
            "WHERE id > max(?, (SELECT record_id FROM accounted))",
            (seen,),
        ).fetchall()
        for name, sort_us, created_at, verified in recent:
            bounds.setdefault(name, _Bounds(sort_us, created_at, False)).reach(sort_us, created_at, bool(verified))
        groups = {name: group for name in bounds if (group := self._index.get(name)) is not None}
        for name, group in groups.items():
            bounds[name].reach(group.best_us, group.newest, group.verified)
        new = json.dumps([name for name in bounds if name not in groups])
        rows = connection.execute(
            f"SELECT {_GROUP_COLUMNS}, g.key_id, w.args_info FROM {_GROUP_TABLES} "
            "WHERE g.id IN (SELECT value FROM json_each(?))",
            (new,),
        )
        for *columns, key, args_info in rows:
            groups[columns[0]] = Group(columns[0], key, _shared(columns), read_args_info(args_info))
        self._index.change(
            [
                Change(group, bounds[name].best_us, bounds[name].newest, bounds[name].verified)
                for name, group in groups.items()
            ],
            [row[0] for row in removed],
        )


def last_id(connection: sqlite3.Connection) -> int:
    """The clock: the highest id of a record so far, of deleted ones too."""
    row = connection.execute("SELECT seq FROM sqlite_sequence WHERE name = 'records'").fetchone()
    return int(row[0]) if row else 0


def account(connection: sqlite3.Connection) -> None:
    """Write the bounds of groups whose records no bound knows of yet, once these are many; in a write transaction."""
    last, accounted = connection.execute(
        "SELECT coalesce((SELECT seq FROM sqlite_sequence WHERE name = 'records'), 0), record_id FROM accounted"
    ).fetchone()
    if last - accounted < _ACCOUNT_EVERY:
        return
    connection.execute(
        "UPDATE groups SET best_us = min(best_us, r.sort_us), newest = max(newest, r.created_at), "
        "verified = max(groups.verified, r.verified), changed = max(changed, r.id) "
        "FROM (SELECT group_id, min(sort_us) AS sort_us, max(created_at) AS created_at, max(verified) AS verified, "
        "max(id) AS id FROM records NOT INDEXED WHERE id > ? GROUP BY group_id) r WHERE groups.id = r.group_id",
        (accounted,),
    )
    connection.execute("UPDATE accounted SET record_id = ?", (last,))


@functools.lru_cache(maxsize=4_096)
def read_args_info(stored: str) -> ArgsInfo:
    """Arguments of a workload in their stored form."""
    return tuple((kind, dtype, tuple(shape)) for kind, dtype, shape in json.loads(stored))


def _shared(row: Sequence[Any]) -> Record:
    """What the records of a group have in common, as a record with the rest left blank."""
    return Record(
        trial_id="",
        workload_digest=row[1].hex(),
        trace="",
        target_json=row[2],
        target_digest=row[3].hex(),
        device_model=row[4],
        sm_count=row[5],
        tvm_version=row[6],
        op=row[7],
        description=row[8],
        model=row[9],
        team=row[10],
        job=row[11],
        sm_percent=row[12],
        tags=json.loads(row[13]),
        **_facts(row[14]),
    )


@functools.lru_cache(maxsize=1_024)
def _facts(stored: str) -> dict[str, Any]:
    facts = json.loads(stored)
    return {
        "device_arch": facts["device_arch"],
        "partition_kind": PartitionKind(facts["partition_kind"]),
        "evaluator": EvaluatorSettings(**facts["evaluator"]),
        "cuda_version": facts["cuda_version"],
        "driver_version": facts["driver_version"],
        "origin": Origin(facts["origin"]),
        "instance": facts["instance"],
        "affinity": tuple(facts["affinity"]),
        "layout": facts.get("layout", ""),  # which rows from before layouts were noted lack
    }
