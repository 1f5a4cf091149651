"""Filtered, ordered, paged queries over the groups and records of the store.

A filter is answered in two steps. First the groups that match: thousands of small rows. Then their records in order:
when the groups are few, by merging one index range per group; when they are many, by walking the index over all
records, where every few rows one matches. Neither step reads all records.
"""

from __future__ import annotations

import functools
import heapq
import itertools
import json
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tuner_core.model import Record
from tuner_core.store.interface import Page, RecordFilter
from tuner_core.store.paging import Cursor, QueryArguments
from tuner_core.store.shapes import parse_shape, shape_matches
from tuner_core.store.sqlite.rows import RECORD_COLUMNS, digest_bytes, read_records

_MERGE_AT_MOST = 4_000
_CHUNK = 16

# (sort value, trial_id, row id); the sort value ascends: latency in microseconds, or minus the time
_Entry = tuple[float, bytes, int]


@dataclass(frozen=True)
class _Conditions:
    """SQL conditions on ``records`` and their parameters."""

    sql: str
    parameters: tuple[Any, ...]

    def and_(self, sql: str, *parameters: Any) -> _Conditions:
        return _Conditions(f"{self.sql} AND {sql}", (*self.parameters, *parameters))


def run_query(connection: sqlite3.Connection, arguments: QueryArguments) -> Page:
    """One page, read in the caller's transaction."""
    cursor = arguments.cursor
    snapshot = cursor.snapshot if cursor else last_id(connection)
    groups = _matching_groups(connection, arguments.where)
    conditions = _record_conditions(arguments.where, snapshot)
    if arguments.where.nearest_sm_percent is not None:
        groups = _nearest_groups(connection, arguments.where.nearest_sm_percent, conditions, groups)
    if groups == 0:
        return Page((), None)
    if arguments.top_per_key:
        entries = _best_of_keys(connection, arguments, conditions, groups)
    elif groups is not None and groups <= _MERGE_AT_MOST:
        wanted = connection.execute("SELECT id FROM temp.wanted").fetchall()
        chunk = max(2, min(_CHUNK, 2 * arguments.limit // groups))
        entries = heapq.merge(*(_of_group(connection, arguments, conditions, group, chunk) for (group,) in wanted))
    else:
        entries = _of_all(connection, arguments, conditions, groups)
    page = list(itertools.islice(entries, arguments.limit + 1))
    records = _fetch(connection, [row_id for _, _, row_id in page[: arguments.limit]])
    if len(page) <= arguments.limit:
        return Page(tuple(records), None)
    sort_value, trial_id, _ = page[arguments.limit - 1]
    return Page(tuple(records), arguments.next_cursor(Cursor(snapshot, sort_value, trial_id.hex())))


def last_id(connection: sqlite3.Connection) -> int:
    """The highest row id so far, of deleted rows too."""
    row = connection.execute("SELECT seq FROM sqlite_sequence WHERE name = 'records'").fetchone()
    return int(row[0]) if row else 0


def run_follow(connection: sqlite3.Connection, where: RecordFilter, after: int, limit: int) -> tuple[list[Record], int]:
    """Records behind row ``after`` in the order of their commits, and the row up to which that was looked at."""
    last = last_id(connection)
    if after >= last:
        return [], after
    conditions = _record_conditions(where, last).and_("id > ?", after)
    if _matching_groups(connection, where) is not None:
        conditions = conditions.and_("group_id IN (SELECT id FROM temp.wanted)")
    rows = connection.execute(
        f"SELECT id FROM records NOT INDEXED WHERE {conditions.sql} ORDER BY id LIMIT ?",
        (*conditions.parameters, limit),
    ).fetchall()
    return _fetch(connection, [row[0] for row in rows]), rows[-1][0] if len(rows) == limit else last


def _matching_groups(connection: sqlite3.Connection, where: RecordFilter) -> int | None:
    """Put the ids of the groups that match into ``temp.wanted``.

    Returns:
        How many match, or None when the filter restricts no group.
    """
    terms: list[tuple[str, Any]] = [
        ("g.op = ?", where.op or None),
        ("instr(lower(g.description), ?) > 0", where.text.lower() or None),
        ("g.model = ?", where.model or None),
        (
            "EXISTS (SELECT 1 FROM json_each(w.args_info) a WHERE json_extract(a.value, '$[1]') = ?)",
            where.dtype or None,
        ),
        ("k.device_model = ?", where.device_model or None),
        ("g.sm_percent = ?", where.sm_percent),
        ("g.sm_percent >= ?", where.min_sm_percent),
        ("g.sm_percent <= ?", where.max_sm_percent),
        ("k.sm_count = ?", where.sm_count),
        ("g.team = ?", where.team or None),
        ("g.job = ?", where.job or None),
        ("w.digest = ?", _digest(where.workload_digest)),
        ("t.digest = ?", _digest(where.target_digest)),
        ("k.tvm_version = ?", where.tvm_version or None),
    ]
    terms = [(sql, value) for sql, value in terms if value is not None]
    if where.shape:
        connection.create_function("has_shape", 3, _has_shape, deterministic=True)
        terms.append(("has_shape(?, w.args_info, g.description)", where.shape))
    for name, value in where.tags.items():
        terms.append(("EXISTS (SELECT 1 FROM json_each(g.tags) e WHERE e.key = ? AND e.value = ?)", (name, value)))
    if not terms:
        return None
    parameters: list[Any] = []
    for _, value in terms:
        parameters.extend(value if isinstance(value, tuple) else (value,))
    connection.execute("CREATE TEMP TABLE IF NOT EXISTS wanted (id INTEGER PRIMARY KEY)")
    connection.execute("DELETE FROM temp.wanted")
    return connection.execute(
        "INSERT INTO temp.wanted SELECT g.id FROM groups g JOIN keys k ON k.id = g.key_id "
        "JOIN workloads w ON w.id = k.workload_id JOIN targets t ON t.id = k.target_id "
        f"WHERE {' AND '.join(sql for sql, _ in terms)}",
        parameters,
    ).rowcount


def _nearest_groups(
    connection: sqlite3.Connection, sm_percent: int, conditions: _Conditions, groups: int | None
) -> int:
    """Of the groups that match and have a record that does, keep those of each workload's and device's nearest share.

    Returns:
        How many are left in ``temp.wanted``.
    """
    if groups is None:
        connection.execute("CREATE TEMP TABLE IF NOT EXISTS wanted (id INTEGER PRIMARY KEY)")
        connection.execute("DELETE FROM temp.wanted")
        connection.execute("INSERT INTO temp.wanted SELECT id FROM groups")
    connection.execute(
        "DELETE FROM temp.wanted WHERE id NOT IN (SELECT id FROM (SELECT g.id, rank() OVER ("
        "PARTITION BY k.workload_id, k.device_model ORDER BY abs(g.sm_percent - ?), g.sm_percent) AS place "
        "FROM groups g JOIN keys k ON k.id = g.key_id WHERE g.id IN (SELECT id FROM temp.wanted) AND EXISTS "
        f"(SELECT 1 FROM records INDEXED BY records_group_latency WHERE group_id = g.id AND {conditions.sql})"
        ") WHERE place = 1)",
        (sm_percent, *conditions.parameters),
    )
    return int(connection.execute("SELECT count(*) FROM temp.wanted").fetchone()[0])


@functools.lru_cache(maxsize=16_384)
def _has_shape(shape: str, args_info: str, description: str) -> bool:
    return shape_matches(parse_shape(shape), json.loads(args_info), description)


def _digest(text: str) -> bytes | None:
    return digest_bytes(text) if text else None


def _record_conditions(where: RecordFilter, snapshot: int) -> _Conditions:
    conditions = _Conditions("id <= ?", (snapshot,))
    if not where.include_failed:
        # condemned after the first page was read: still on the later pages, as it stood then
        conditions = conditions.and_("failure IS NULL AND (condemned_by IS NULL OR condemned_by > ?)", snapshot)
    if where.verified_only:
        conditions = conditions.and_("verified = 1")
    if where.since is not None:
        conditions = conditions.and_("created_at >= ?", where.since)
    return conditions


def _sort_column(order: str) -> str:
    return "sort_us" if order == "latency" else "-created_at"


def _ordering(order: str) -> str:
    return "sort_us, trial_id" if order == "latency" else "created_at DESC, trial_id"


def _after(conditions: _Conditions, order: str, last: tuple[float, bytes] | None) -> _Conditions:
    """Only what stands behind ``last`` in the order."""
    if last is None:
        return conditions
    value, trial_id = last
    if order == "latency":
        return conditions.and_("sort_us >= ? AND (sort_us > ? OR trial_id > ?)", value, value, trial_id)
    return conditions.and_("created_at <= ? AND (created_at < ? OR trial_id > ?)", -value, -value, trial_id)


def _start(arguments: QueryArguments) -> tuple[float, bytes] | None:
    cursor = arguments.cursor
    return (cursor.sort_value, bytes.fromhex(cursor.trial_id)) if cursor else None


def _of_group(
    connection: sqlite3.Connection, arguments: QueryArguments, conditions: _Conditions, group: int, chunk: int
) -> Iterator[_Entry]:
    """The entries of one group in order, read in chunks."""
    order = arguments.order
    index = "records_group_latency" if order == "latency" else "records_group_time"
    if arguments.where.verified_only and order == "latency":
        index = "records_verified"
    last = _start(arguments)
    while True:
        found = _after(conditions.and_("group_id = ?", group), order, last)
        rows = connection.execute(
            f"SELECT {_sort_column(order)}, trial_id, id FROM records INDEXED BY {index} WHERE {found.sql} "
            f"ORDER BY {_ordering(order)} LIMIT ?",
            (*found.parameters, chunk),
        ).fetchall()
        yield from rows
        if len(rows) < chunk:
            return
        last = (rows[-1][0], rows[-1][1])
        chunk = min(chunk * 4, arguments.limit + 1)


def _of_all(
    connection: sqlite3.Connection, arguments: QueryArguments, conditions: _Conditions, groups: int | None
) -> Iterator[_Entry]:
    """The entries of all records in order, or of very many groups."""
    order = arguments.order
    index = "records_latency" if order == "latency" else "records_time"
    if arguments.where.verified_only and order == "latency":
        index = "records_verified_latency"
    found = _after(conditions, order, _start(arguments))
    if groups is not None:
        found = found.and_("group_id IN (SELECT id FROM temp.wanted)")
    yield from connection.execute(
        f"SELECT {_sort_column(order)}, trial_id, id FROM records INDEXED BY {index} WHERE {found.sql} "
        f"ORDER BY {_ordering(order)} LIMIT ?",
        (*found.parameters, arguments.limit + 1),
    )


def _best_of_keys(
    connection: sqlite3.Connection, arguments: QueryArguments, conditions: _Conditions, groups: int | None
) -> Iterator[_Entry]:
    """The best few of every look-up key among the records that match, in order."""
    found = conditions
    if groups is None:
        keys = connection.execute("SELECT id FROM keys").fetchall()
    else:
        keys = connection.execute(
            "SELECT DISTINCT key_id FROM groups WHERE id IN (SELECT id FROM temp.wanted)"
        ).fetchall()
        found = found.and_("group_id IN (SELECT id FROM temp.wanted)")
    value = _sort_column(arguments.order)
    best: list[_Entry] = []
    for (key_id,) in keys:
        best += connection.execute(
            f"SELECT {value}, trial_id, id FROM records INDEXED BY records_top WHERE {found.sql} AND key_id = ? "
            "ORDER BY verified DESC, sort_us, trial_id LIMIT ?",
            (*found.parameters, key_id, arguments.top_per_key),
        ).fetchall()
    start = _start(arguments)
    return iter(sorted(entry for entry in best if start is None or entry[:2] > start))


def _fetch(connection: sqlite3.Connection, ids: list[int]) -> list[Record]:
    rows = connection.execute(
        f"SELECT r.id, {RECORD_COLUMNS} FROM json_each(?) j JOIN records r ON r.id = j.value", (json.dumps(ids),)
    )
    by_id = {row[0]: row[1:] for row in rows}
    return read_records(connection, [by_id[row_id] for row_id in ids])
