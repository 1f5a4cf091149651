"""Filtered, ordered, paged queries over the groups and records of the store.

The catalogue knows which groups match and what their bounds are; a page is merged from the index ranges of those
groups whose best record is good enough: however many match, a page of a hundred records opens a hundred of them. Deep
in a large part of the store, where that would open every group again, a page is walked along the index of all records.
"""

from __future__ import annotations

import heapq
import itertools
import json
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from tuner_core.model import Record
from tuner_core.store.groups import Group, Selection, nearest_first
from tuner_core.store.interface import Page, RecordFilter
from tuner_core.store.paging import Cursor, QueryArguments
from tuner_core.store.sqlite.catalogue import Catalogue, last_id
from tuner_core.store.sqlite.rows import RECORD_COLUMNS, read_records

_FIRST_CHUNK = 4
# a later page walks along all records when at least one in so many may match, and through so many per record at most
_WALK = 16

# (sort value, trial_id, row id); the sort value ascends: latency in microseconds, or minus the time
_Entry = tuple[float, bytes, int]
_Bounded = Iterator[tuple[float, Group]]


@dataclass(frozen=True)
class _Conditions:
    """SQL conditions on ``records`` and their parameters."""

    sql: str
    parameters: tuple[Any, ...]

    def and_(self, sql: str, *parameters: Any) -> _Conditions:
        return _Conditions(f"{self.sql} AND {sql}", (*self.parameters, *parameters))


def run_query(connection: sqlite3.Connection, catalogue: Catalogue, arguments: QueryArguments) -> Page:
    """One page, read in the caller's transaction."""
    cursor = arguments.cursor
    with catalogue.selecting(connection, arguments.where, arguments.order) as selection:
        snapshot = cursor.snapshot if cursor else last_id(connection)
        entries = _Query(connection, selection, arguments, snapshot).entries()
        page = list(itertools.islice(entries, arguments.limit + 1))
    records = _fetch(connection, catalogue, [row_id for _, _, row_id in page[: arguments.limit]])
    if len(page) <= arguments.limit:
        return Page(tuple(records), None)
    sort_value, trial_id, _ = page[arguments.limit - 1]
    return Page(tuple(records), arguments.next_cursor(Cursor(snapshot, sort_value, trial_id.hex())))


def run_follow(
    connection: sqlite3.Connection, catalogue: Catalogue, where: RecordFilter, after: int, limit: int
) -> tuple[list[Record], int]:
    """Records behind row ``after`` in the order of their commits, and the row up to which that was looked at."""
    with catalogue.selecting(connection, where, "newest") as selection:
        last = last_id(connection)
        if after >= last:
            return [], after
        conditions = _record_conditions(where, last).and_("id > ?", after)
        if selection.share < 1.0:
            names = [group.name for _, group in selection]
            conditions = conditions.and_("group_id IN (SELECT value FROM json_each(?))", json.dumps(names))
        rows = connection.execute(
            f"SELECT id FROM records NOT INDEXED WHERE {conditions.sql} ORDER BY id LIMIT ?",
            (*conditions.parameters, limit),
        ).fetchall()
    return _fetch(connection, catalogue, [row[0] for row in rows]), rows[-1][0] if len(rows) == limit else last


class _Query:
    """One query in one read transaction.

    Args:
        connection: In that transaction.
        selection: Groups as it sees them.
        arguments: The query.
        snapshot: Row id behind which nothing counts.
    """

    def __init__(
        self, connection: sqlite3.Connection, selection: Selection[Group], arguments: QueryArguments, snapshot: int
    ) -> None:
        self._connection = connection
        self._where = arguments.where
        self._order = arguments.order
        self._limit = arguments.limit
        self._top_per_key = arguments.top_per_key
        self._selection = selection
        self._conditions = _record_conditions(self._where, snapshot)
        self._nearest: dict[tuple[str, str], int | None] = {}
        cursor = arguments.cursor
        self._start = (cursor.sort_value, bytes.fromhex(cursor.trial_id)) if cursor else None

    def entries(self) -> Iterator[_Entry]:
        """The entries that match, in order, behind the cursor."""
        if self._top_per_key:
            return self._best_of_keys()
        deep = self._start is not None and self._where.nearest_sm_percent is None
        if deep and self._selection.share * _WALK > 1 and (walked := self._walked()) is not None:
            return iter(walked)
        groups = ((bound, group) for bound, group in self._selection if self._is_of_nearest_share(group))
        return _merged(groups, self._of_group)

    def _is_of_nearest_share(self, group: Group) -> bool:
        """Whether no group of another share, nearer to the one asked for, has a record that matches."""
        wanted = self._where.nearest_sm_percent
        if wanted is None:
            return True
        place = group.place
        if place not in self._nearest:
            shares: dict[int, list[Group]] = {}
            for other in self._selection.of_place(place):
                shares.setdefault(other.shared.sm_percent, []).append(other)
            ordered = nearest_first(wanted, shares)
            self._nearest[place] = next((share for share in ordered if any(map(self._any, shares[share]))), None)
        return self._nearest[place] == group.shared.sm_percent

    def _any(self, group: Group) -> bool:
        """Whether a record of a group matches."""
        found = self._conditions.and_("group_id = ?", group.name)
        index = "records_verified" if self._where.verified_only else "records_group_latency"
        sql = f"SELECT 1 FROM records INDEXED BY {index} WHERE {found.sql} LIMIT 1"
        return self._connection.execute(sql, found.parameters).fetchone() is not None

    def _of_group(self, group: Group) -> Iterator[_Entry]:
        """The entries of one group in order, read in chunks."""
        index = "records_group_latency" if self._order == "latency" else "records_group_time"
        if self._where.verified_only and self._order == "latency":
            index = "records_verified"
        of_group = self._conditions.and_("group_id = ?", group.name)
        last = self._start
        chunk = min(_FIRST_CHUNK, self._limit + 1)
        while True:
            found = _after(of_group, self._order, last)
            rows = self._read(index, found, chunk)
            yield from rows
            if len(rows) < chunk:
                return
            last = (rows[-1][0], rows[-1][1])
            chunk = min(chunk * 4, self._limit + 1)

    def _walked(self) -> list[_Entry] | None:
        """A page along the index of all records, or None where that leads through too many that do not match."""
        index = "records_latency" if self._order == "latency" else "records_time"
        if self._where.verified_only and self._order == "latency":
            index = "records_verified_latency"
        found = _after(self._conditions, self._order, self._start)
        if self._selection.share < 1.0:
            wanted = {group.name for _, group in self._selection}
            self._connection.create_function("wanted", 1, wanted.__contains__, deterministic=True)
            found = found.and_("wanted(group_id)")
        column, sign = ("sort_us", ">=") if self._order == "latency" else ("created_at", "<=")
        value = self._start[0] if self._start else 0.0
        start = value if self._order == "latency" else -value
        far = self._connection.execute(
            f"SELECT {column} FROM records INDEXED BY {index} WHERE {column} {sign} ? "
            f"{'AND verified = 1' if index == 'records_verified_latency' else ''} "
            f"ORDER BY {column} {'DESC' if self._order == 'newest' else ''} LIMIT 1 OFFSET ?",
            (start, _WALK * (self._limit + 1)),
        ).fetchone()
        if far is not None:
            found = found.and_(f"{column} {'<=' if self._order == 'latency' else '>='} ?", far[0])
        rows = self._read(index, found, self._limit + 1)
        return rows if far is None or len(rows) > self._limit else None

    def _best_of_keys(self) -> Iterator[_Entry]:
        """The best few of every look-up key among the records that match, in order."""
        known: set[Any] = set()

        def first_of_keys() -> _Bounded:
            for bound, group in self._selection:
                if group.key not in known:
                    known.add(group.key)
                    yield bound, group

        def of_key(first: Group) -> Iterator[_Entry]:
            groups = filter(self._is_of_nearest_share, self._selection.of_key(first.key))
            wanted = {group.name for group in groups}
            rows = self._connection.execute(
                f"SELECT {_sort_column(self._order)}, trial_id, id, group_id FROM records INDEXED BY records_top "
                f"WHERE {self._conditions.sql} AND key_id = ? ORDER BY verified DESC, sort_us, trial_id",
                (*self._conditions.parameters, first.key),
            )
            matching = (row[:3] for row in rows if row[3] in wanted)
            best = sorted(itertools.islice(matching, self._top_per_key))
            rows.close()
            return iter([entry for entry in best if self._start is None or entry[:2] > self._start])

        return _merged(first_of_keys(), of_key)

    def _read(self, index: str, found: _Conditions, limit: int) -> list[_Entry]:
        return self._connection.execute(
            f"SELECT {_sort_column(self._order)}, trial_id, id FROM records INDEXED BY {index} WHERE {found.sql} "
            f"ORDER BY {_ordering(self._order)} LIMIT ?",
            (*found.parameters, limit),
        ).fetchall()


def _merged(groups: _Bounded, entries_of: Callable[[Group], Iterator[_Entry]]) -> Iterator[_Entry]:
    """Merge the entries of groups; a group is opened when its bound is reached.

    Args:
        groups: By ascending bound; no entry of a group has a smaller sort value.
        entries_of: The entries of a group in order.
    """
    heap: list[tuple[_Entry, int, Iterator[_Entry]]] = []
    opened = itertools.count()
    ahead = next(groups, None)
    while True:
        while ahead is not None and (not heap or ahead[0] <= heap[0][0][0]):
            entries = entries_of(ahead[1])
            first = next(entries, None)
            if first is not None:
                heapq.heappush(heap, (first, next(opened), entries))
            ahead = next(groups, None)
        if not heap:
            return
        entry, number, entries = heap[0]
        yield entry
        following = next(entries, None)
        if following is None:
            heapq.heappop(heap)
        else:
            heapq.heapreplace(heap, (following, number, entries))


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


def _fetch(connection: sqlite3.Connection, catalogue: Catalogue, ids: Iterable[int]) -> list[Record]:
    ids = list(ids)
    rows = connection.execute(
        f"SELECT r.id, {RECORD_COLUMNS} FROM json_each(?) j JOIN records r ON r.id = j.value", (json.dumps(ids),)
    )
    by_id = {row[0]: row[1:] for row in rows}
    return read_records(connection, catalogue, [by_id[row_id] for row_id in ids])
