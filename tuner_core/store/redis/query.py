"""Filtered, ordered, paged queries: groups from the catalogue, their records by merging sorted sets.

The head of a group says how good (or how new) its first record is, so a page of a hundred records is found in the
hundred groups with the best heads at most, however many match. Every command is a range of one sorted set or fields of
one hash: nothing grows with the store.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from tuner_core.model import Record
from tuner_core.store.groups import Selection, nearest_first
from tuner_core.store.interface import Page, RecordFilter
from tuner_core.store.paging import Cursor, QueryArguments
from tuner_core.store.redis import entries
from tuner_core.store.redis.catalogue import Catalogue, RedisGroup
from tuner_core.store.redis.connection import Connection
from tuner_core.store.redis.entries import FAILED, VERIFIED, Entry

_SOURCES_AT_ONCE = 64
_KEYS_AT_ONCE = 64

_Position = tuple[float, bytes]


@dataclass(frozen=True, slots=True)
class _Found:
    """A record that matches: its place in the order, its entry, its group."""

    value: float
    entry: Entry
    group: RedisGroup

    @property
    def place(self) -> _Position:
        return self.value, self.entry.trial

    @property
    def rank(self) -> tuple[bool, float, bytes]:
        """As ``top`` ranks; only for entries ordered by latency."""
        return not self.entry.flags & VERIFIED, self.entry.value, self.entry.trial


class _Source:
    """A sorted set of a group that is being read from its beginning or from a position on.

    Attributes:
        bound: No further entry has a smaller value.
        done: Whether there is no further entry up to the end of the last range.
    """

    __slots__ = ("at", "bound", "done", "group", "index", "seen", "unverified")

    def __init__(self, group: RedisGroup, index: str, bound: float, *, unverified: bool = False) -> None:
        self.group = group
        self.index = index
        self.bound = bound
        self.unverified = unverified
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
        self, sources: Sequence[_Source], chunk: int, start: _Position | None = None, end: float = float("inf")
    ) -> list[tuple[_Source, Entry]]:
        """The next entries of each source that match, behind ``start`` and up to the value ``end``."""
        commands = []
        for source in sources:
            low = source.at if source.at is not None else (start[0] if start else float("-inf"))
            key = self._key(source)
            high = self._high(source.index, end)
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
                if source.unverified and entry.flags & VERIFIED:
                    continue
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
        latency, dated, best = self._connection.keys.of(source.group.digest).group(source.group.id)
        return {"latency": latency, "time": dated, "best": best}[source.index]

    def _high(self, index: str, end: float) -> str:
        if index == "time" and self._where.since is not None:
            end = min(end, -self._where.since)
        if end != float("inf"):
            return repr(end)
        return "+inf" if index == "time" or self._where.include_failed else "(+inf"


def run_query(connection: Connection, catalogue: Catalogue, arguments: QueryArguments) -> Page:
    """One page."""
    where, cursor = arguments.where, arguments.cursor
    catalogue.synchronised()
    snapshot = float(cursor.snapshot) if cursor else catalogue.stamp
    start = (cursor.sort_value, bytes.fromhex(cursor.trial_id)) if cursor else None
    reader = _Reader(connection, where, snapshot)
    selection = catalogue.select(where, arguments.order)
    nearest = _NearestShare(reader, catalogue, selection, where, snapshot)
    if arguments.top_per_key:
        found = _best_of_keys(reader, arguments, selection, nearest, start)
    else:
        found = _merged(reader, arguments, nearest.only(selection), start)
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


class _NearestShare:
    """Which groups are of the nearest share among those of their workload and device that have a record that matches.

    Args:
        reader: Of the query.
        catalogue: Of the store.
        selection: The groups that may match.
        where: The filter; without a share to be near to, every group is.
        snapshot: Stamp behind which nothing counts.
    """

    def __init__(
        self,
        reader: _Reader,
        catalogue: Catalogue,
        selection: Selection[RedisGroup],
        where: RecordFilter,
        snapshot: float,
    ) -> None:
        self._reader = reader
        self._catalogue = catalogue
        self._selection = selection
        self._where = where
        self._snapshot = snapshot
        self._chosen: dict[tuple[str, str], int | None] = {}

    def only(self, groups: Iterable[tuple[float, RedisGroup]]) -> Iterator[tuple[float, RedisGroup]]:
        """Those of them, in the same order."""
        if self._where.nearest_sm_percent is None:
            yield from groups
            return
        groups = iter(groups)
        while batch := list(itertools.islice(groups, _SOURCES_AT_ONCE)):
            self._choose({group.place for _, group in batch})
            yield from ((b, group) for b, group in batch if self._chosen[group.place] == group.shared.sm_percent)

    def _choose(self, places: set[tuple[str, str]]) -> None:
        """Choose the share of each place, for all of them at once: nearest shares first, then the next."""
        waiting: dict[tuple[str, str], list[list[RedisGroup]]] = {}
        for place in places - self._chosen.keys():
            shares: dict[int, list[RedisGroup]] = {}
            for group in self._selection.of_place(place):
                shares.setdefault(group.shared.sm_percent, []).append(group)
            ordered = nearest_first(self._where.nearest_sm_percent or 0, shares)
            waiting[place] = [shares[share] for share in ordered]
            self._chosen[place] = None
        while waiting:
            known = {place: self._said_by_heads(shares[0]) for place, shares in waiting.items() if shares}
            unsaid = [group for place, said in known.items() if said is None for group in waiting[place][0]]
            index = "best" if self._where.verified_only else "latency"
            read = self._reader.read_best([_Source(group, index, 0.0) for group in unsaid], 1) if unsaid else []
            there = {source.group.place for source, _ in read}
            for place, said in known.items():
                if said or place in there:
                    self._chosen[place] = waiting.pop(place)[0][0].shared.sm_percent
                else:
                    del waiting[place][0]
            waiting = {place: shares for place, shares in waiting.items() if shares}

    def _said_by_heads(self, groups: Sequence[RedisGroup]) -> bool | None:
        """Whether a record of one of these groups of a workload matches, or None where their heads cannot say."""
        where = self._where
        if where.since is not None:
            return None
        heads = [group.head for group in groups]
        if not self._catalogue.unchanged_since(groups[0].digest, self._snapshot):
            return None
        if where.verified_only:
            return any(head.verified if where.include_failed else head.live_verified for head in heads)
        return any(head.records if where.include_failed else head.live for head in heads)


def _merged(
    reader: _Reader,
    arguments: QueryArguments,
    groups: Iterator[tuple[float, RedisGroup]],
    start: _Position | None,
) -> list[_Found]:
    """The first ``limit + 1`` records behind ``start``; ``groups`` by ascending bound."""
    index = "time" if arguments.order == "newest" else "best" if arguments.where.verified_only else "latency"
    wanted = arguments.limit + 1
    again: list[tuple[float, int, _Source]] = []
    numbers = itertools.count()
    ahead = next(groups, None)
    found: list[_Found] = []
    while ahead is not None or again:
        end = found[wanted - 1].value if len(found) >= wanted else float("inf")
        batch: list[_Source] = []
        while len(batch) < max(_SOURCES_AT_ONCE, wanted // 16):
            if again and (ahead is None or again[0][0] <= ahead[0]):
                if again[0][0] > end:
                    break
                batch.append(heapq.heappop(again)[2])
            elif ahead is not None and ahead[0] <= end:
                batch.append(_Source(ahead[1], index, ahead[0]))
                ahead = next(groups, None)
            else:
                break
        if not batch:
            break
        chunk = min(max(4, 2 * wanted // len(batch)), wanted)
        found += [_Found(entry.value, entry, source.group) for source, entry in reader.read(batch, chunk, start, end)]
        found.sort(key=lambda one: one.place)
        del found[wanted:]
        for source in batch:
            if not source.done:
                heapq.heappush(again, (source.bound, next(numbers), source))
    return found


class _Best:
    """The best few records of a look-up key, found by reading as few of its groups as that takes.

    Args:
        groups: Of the key, that may have records that match.
        count: How many.
        newest: Whether the page is ordered by time.
    """

    def __init__(self, groups: Iterable[RedisGroup], count: int, *, newest: bool) -> None:
        self._count = count
        self._newest = newest
        self._groups = sorted(groups, key=lambda group: group.best_us, reverse=True)
        self._verified = [group for group in self._groups if group.head.verified]
        self._first: list[_Found] = []
        self._then: list[_Found] = []

    def next(self) -> list[_Source]:
        """What to read next: verified records before others, groups by their bounds; nothing when all is found."""
        groups = self._pop(self._verified, self._first, self._count)
        if groups:
            return [_Source(group, "best", 0.0) for group in groups]
        groups = self._pop(self._groups, self._then, self._count - len(self._first))
        return [_Source(group, "latency", 0.0, unverified=True) for group in groups]

    def take(self, source: _Source, entry: Entry) -> None:
        """Add what a source had."""
        value = -entry.created_at if self._newest else entry.value
        kept = self._then if source.unverified else self._first
        kept.append(_Found(value, entry, source.group))
        kept.sort(key=lambda one: one.rank)

    @property
    def found(self) -> list[_Found]:
        """The best of what was read."""
        return [*self._first, *self._then][: self._count]

    @staticmethod
    def _pop(groups: list[RedisGroup], found: Sequence[_Found], wanted: int) -> list[RedisGroup]:
        """Take the groups without which ``wanted`` records cannot be known, as many as surely take part."""
        if len(found) < wanted:
            return [groups.pop() for _ in range(min(wanted - len(found), len(groups)))]
        if wanted > 0 and groups and groups[-1].best_us <= found[wanted - 1].entry.value:
            return [groups.pop()]
        return []


def _best_of_keys(
    reader: _Reader,
    arguments: QueryArguments,
    selection: Selection[RedisGroup],
    nearest: _NearestShare,
    start: _Position | None,
) -> list[_Found]:
    """Of the best few of every look-up key among the records that match, the first ``limit + 1`` behind ``start``."""
    wanted, count = arguments.limit + 1, arguments.top_per_key
    known: set[object] = set()
    found: list[_Found] = []
    groups = nearest.only(selection)
    ahead = next(groups, None)
    while ahead is not None and (len(found) < wanted or ahead[0] <= found[wanted - 1].value):
        batch: list[_Best] = []
        while ahead is not None and len(batch) < _KEYS_AT_ONCE:
            group = ahead[1]
            if group.key not in known:
                known.add(group.key)
                of_key = [other for _, other in nearest.only((0.0, one) for one in selection.of_key(group.key))]
                batch.append(_Best(of_key, count, newest=arguments.order == "newest"))
            ahead = next(groups, None)
        while reading := {id(source): (best, source) for best in batch for source in best.next()}:
            for source, entry in reader.read_best([source for _, source in reading.values()], count):
                reading[id(source)][0].take(source, entry)
        found += [one for best in batch for one in best.found if start is None or one.place > start]
        found.sort(key=lambda one: one.place)
        del found[wanted:]
    return found
