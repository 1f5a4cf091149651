"""Filtered, ordered, paged queries: groups from the catalogue, their records by merging sorted sets.

The head of a group says how good (or how new) its first record is, so a page of a hundred records is found in the
hundred groups with the best heads at most, however many match. Every command is a range of one sorted set or fields of
one hash: nothing grows with the store.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from tuner_core.model import Record
from tuner_core.store.interface import Page, RecordFilter
from tuner_core.store.paging import Cursor, QueryArguments
from tuner_core.store.redis import entries
from tuner_core.store.redis.catalogue import Catalogue, Group
from tuner_core.store.redis.connection import Connection
from tuner_core.store.redis.entries import FAILED, VERIFIED, Entry

_SOURCES_AT_ONCE = 128
_KEYS_AT_ONCE = 64
_CHUNK = 8

_Position = tuple[float, bytes]


@dataclass(frozen=True, slots=True)
class _Found:
    """A record that matches: its place in the order, its entry, its group."""

    value: float
    entry: Entry
    group: Group

    @property
    def place(self) -> _Position:
        return self.value, self.entry.trial

    @property
    def rank(self) -> tuple[bool, float, bytes]:
        """As ``top`` ranks; only for entries ordered by latency."""
        return not self.entry.flags & VERIFIED, self.entry.value, self.entry.trial


class _Source:
    """A sorted set of a group that is being read from its beginning or from a position on."""

    __slots__ = ("at", "bound", "done", "group", "index", "seen")

    def __init__(self, group: Group, index: str, bound: float) -> None:
        self.group = group
        self.index = index
        self.bound = bound
        self.at: float | None = None
        self.seen = 0
        self.done = False


class _Reader:
    """Reads sources of one query, many at a time.

    Args:
        connection: Of the store.
        where: Conditions on records.
        snapshot: Stamp behind which nothing counts.
    """

    def __init__(self, connection: Connection, where: RecordFilter, snapshot: float) -> None:
        self._connection = connection
        self._where = where
        self._snapshot = snapshot

    def read(
        self, sources: Sequence[_Source], chunk: int, start: _Position | None = None
    ) -> list[tuple[_Source, Entry]]:
        """The next entries of each source that match; sets where each goes on and whether it is done."""
        commands = []
        for source in sources:
            low = source.at if source.at is not None else (start[0] if start else float("-inf"))
            key = self._key(source)
            high = self._high(source.index)
            commands.append(("ZRANGE", key, repr(low), high, "BYSCORE", "LIMIT", source.seen, chunk, "WITHSCORES"))
        found: list[tuple[_Source, Entry]] = []
        for source, flat in zip(sources, self._connection.together(commands), strict=True):
            parse = entries.entry_by_time if source.index == "time" else entries.entry_by_latency
            for member, score in zip(flat[::2], flat[1::2], strict=True):
                value = float(score)
                if value == source.at:
                    source.seen += 1
                else:
                    source.at, source.seen = value, 1
                entry = parse(member, value)
                if self.matches(entry) and (start is None or (value, entry.trial) > start):
                    found.append((source, entry))
            source.done = len(flat) < 2 * chunk
            if source.at is not None:
                source.bound = source.at
        return found

    def read_best(self, sources: Sequence[_Source], count: int) -> list[tuple[_Source, Entry]]:
        """The first ``count`` matching entries of each source."""
        found: list[tuple[_Source, Entry]] = []
        have: dict[int, int] = {}
        open_sources = list(sources)
        chunk = count
        while open_sources:
            for source, entry in self.read(open_sources, chunk):
                if have.get(id(source), 0) < count:
                    have[id(source)] = have.get(id(source), 0) + 1
                    found.append((source, entry))
            open_sources = [s for s in open_sources if not s.done and have.get(id(s), 0) < count]
            chunk = min(max(2 * chunk, 32), 1_000)
        return found

    def matches(self, entry: Entry) -> bool:
        """Whether a record counts, as things stood at the snapshot."""
        if entry.stamp > self._snapshot:
            return False
        where = self._where
        if not where.include_failed and (entry.flags & FAILED or 0 < entry.condemned <= self._snapshot):
            return False
        if where.verified_only and not entry.flags & VERIFIED:
            return False
        return where.since is None or entry.created_at >= where.since

    def _key(self, source: _Source) -> str:
        latency, dated, best = self._connection.keys.of(source.group.digest).group(source.group.name)
        return {"latency": latency, "time": dated, "best": best}[source.index]

    def _high(self, index: str) -> str:
        if index == "time":
            return "+inf" if self._where.since is None else repr(-self._where.since)
        return "+inf" if self._where.include_failed else "(+inf"


def run_query(connection: Connection, catalogue: Catalogue, arguments: QueryArguments) -> Page:
    """One page."""
    where, cursor = arguments.where, arguments.cursor
    catalogue.synchronised()
    snapshot = float(cursor.snapshot) if cursor else catalogue.stamp
    start = (cursor.sort_value, bytes.fromhex(cursor.trial_id)) if cursor else None
    reader = _Reader(connection, where, snapshot)
    groups = [group for group in catalogue.select(where) if _may_match(group, where)]
    if where.nearest_sm_percent is not None:
        groups = _nearest(reader, groups, where)
    if arguments.top_per_key:
        found = _best_of_keys(reader, arguments, groups, start)
    else:
        found = _merged(reader, arguments, groups, start)
    records = fetch(connection, catalogue, [(one.group.digest, one.entry.trial) for one in found[: arguments.limit]])
    if len(found) <= arguments.limit:
        return Page(tuple(records), None)
    last = found[arguments.limit - 1]
    return Page(tuple(records), arguments.next_cursor(Cursor(int(snapshot), last.value, last.entry.trial.hex())))


def fetch(connection: Connection, catalogue: Catalogue, places: Sequence[tuple[str, bytes]]) -> list[Record]:
    """Records by workload and trial id, in that order; those that were deleted meanwhile are missing."""
    by_digest: dict[str, list[bytes]] = {}
    for digest, trial in places:
        by_digest.setdefault(digest, []).append(trial)
    replies = connection.together(
        [("HMGET", connection.keys.of(digest).records, *trials) for digest, trials in by_digest.items()]
    )
    found: dict[bytes, Record] = {}
    for (digest, trials), stored in zip(by_digest.items(), replies, strict=True):
        found |= read_records(catalogue, digest, zip(trials, stored, strict=True))
    return [found[trial] for _, trial in places if trial in found]


def read_records(
    catalogue: Catalogue, digest: str, stored: Iterable[tuple[bytes, bytes | None]]
) -> dict[bytes, Record]:
    """Records of a workload from their stored forms; None stands for one that is not there."""
    there = [(trial, record) for trial, record in stored if record is not None]
    shared = catalogue.shared(digest, {entries.group_of(record) for _, record in there})
    return {
        trial: entries.record_of(trial, record, shared[entries.group_of(record)])
        for trial, record in there
        if entries.group_of(record) in shared
    }


def _may_match(group: Group, where: RecordFilter) -> bool:
    head = group.head
    if where.verified_only and not head.verified:
        return False
    if not where.include_failed and not head.valid:
        return False
    return where.since is None or head.newest >= where.since


def _nearest(reader: _Reader, groups: Sequence[Group], where: RecordFilter) -> list[Group]:
    """Of groups that have a record that matches, those of each workload's and device's nearest share."""
    wanted = where.nearest_sm_percent or 0
    index = "best" if where.verified_only else "latency"
    sources = [_Source(group, index, 0.0) for group in groups]
    some = {id(source) for source, _ in reader.read_best(sources, 1)}
    matching = [source.group for source in sources if id(source) in some]
    nearest: dict[tuple[str, str], tuple[int, int]] = {}
    for group in matching:
        place = (group.digest, group.shared.device_model)
        distance = (abs(group.shared.sm_percent - wanted), group.shared.sm_percent)
        nearest[place] = min(nearest.get(place, distance), distance)
    return [g for g in matching if g.shared.sm_percent == nearest[(g.digest, g.shared.device_model)][1]]


def _bound(order: str) -> Callable[[Group], float]:
    if order == "latency":
        return lambda group: group.head.best_us
    return lambda group: -group.head.newest


def _merged(
    reader: _Reader, arguments: QueryArguments, groups: Sequence[Group], start: _Position | None
) -> list[_Found]:
    """The first ``limit + 1`` records behind ``start``."""
    index = "time" if arguments.order == "newest" else "best" if arguments.where.verified_only else "latency"
    bound = _bound(arguments.order)
    wanted = arguments.limit + 1
    heap = [(bound(group), number, _Source(group, index, bound(group))) for number, group in enumerate(groups)]
    heapq.heapify(heap)
    numbers = itertools.count(len(heap))
    at_once = max(_SOURCES_AT_ONCE, wanted // 16)
    found: list[_Found] = []
    chunk = _CHUNK
    while heap:
        threshold = found[wanted - 1].value if len(found) >= wanted else float("inf")
        batch: list[_Source] = []
        while heap and len(batch) < at_once and heap[0][0] <= threshold:
            batch.append(heapq.heappop(heap)[2])
        if not batch:
            break
        size = min(max(chunk, 2 * wanted // len(batch)), wanted)
        found += [_Found(entry.value, entry, source.group) for source, entry in reader.read(batch, size, start)]
        found.sort(key=lambda one: one.place)
        del found[wanted:]
        for source in batch:
            if not source.done:
                heapq.heappush(heap, (source.bound, next(numbers), source))
        chunk = min(2 * chunk, 512)
    return found


def _best_of_keys(
    reader: _Reader, arguments: QueryArguments, groups: Sequence[Group], start: _Position | None
) -> list[_Found]:
    """Of the best few of every look-up key among the records that match, the first ``limit + 1`` behind ``start``."""
    bound = _bound(arguments.order)
    newest = arguments.order == "newest"
    keys: dict[tuple[str, bytes], list[Group]] = {}
    for group in groups:
        keys.setdefault((group.digest, group.key), []).append(group)
    waiting = sorted(keys.values(), key=lambda of_key: min(map(bound, of_key)))
    wanted, count = arguments.limit + 1, arguments.top_per_key
    found: list[_Found] = []
    while waiting:
        if len(found) >= wanted and min(map(bound, waiting[0])) > found[wanted - 1].value:
            break
        batch, waiting = waiting[:_KEYS_AT_ONCE], waiting[_KEYS_AT_ONCE:]
        sources = [_Source(group, "latency", 0.0) for of_key in batch for group in of_key]
        sources += [_Source(group, "best", 0.0) for of_key in batch for group in of_key if group.head.verified]
        of_keys: dict[tuple[str, bytes], dict[bytes, _Found]] = {}
        for source, entry in reader.read_best(sources, count):
            value = -entry.created_at if newest else entry.value
            group = source.group
            of_keys.setdefault((group.digest, group.key), {})[entry.trial] = _Found(value, entry, group)
        for candidates in of_keys.values():
            best = heapq.nsmallest(count, candidates.values(), key=lambda one: one.rank)
            found += [one for one in best if start is None or one.place > start]
        found.sort(key=lambda one: one.place)
        del found[wanted:]
    return found
