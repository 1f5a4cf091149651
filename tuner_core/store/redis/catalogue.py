"""The groups of all workloads, kept in the memory of each process and brought up to date before every query.

A million records are some ten thousand groups: batches of trials that share everything but the schedule. Filters are
answered from here. Bringing it up to date reads only what changed since the last time.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from tuner_core.model import Record
from tuner_core.store.interface import RecordFilter
from tuner_core.store.redis import entries
from tuner_core.store.redis.connection import Connection
from tuner_core.store.shapes import parse_shape, shape_matches

_DEAD_WRITER_US = 30_000_000
_FACTS_CACHED = 50_000

ArgsInfo = tuple[tuple[str, str, tuple[int, ...]], ...]


class Group:
    """Records that share everything but the schedule and its measurement."""

    __slots__ = ("args_info", "digest", "head", "key", "name", "shared")

    def __init__(self, digest: str, name: bytes, shared: Record, head: entries.Head, args_info: ArgsInfo) -> None:
        self.digest = digest
        self.name = name
        self.shared = shared
        self.head = head
        self.key = entries.key_id(shared.key)
        self.args_info = args_info


class Catalogue:
    """The groups of one store. Thread-safe.

    Args:
        connection: Of the store.

    Attributes:
        repair: Called with the digest of a workload that a dead writer has left unfinished.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.repair: Callable[[str], None] = lambda digest: None
        self._lock = threading.Lock()
        self._sync_lock = threading.Lock()
        self._started = 0
        self._change = 0
        self._stamp = 0.0
        self._history = b""
        self._unseen: set[bytes] = set()
        self._stamps: dict[str, bytes] = {}
        self._args_info: dict[str, ArgsInfo] = {}
        self._groups: dict[bytes, Group] = {}
        self._index: dict[str, dict[Any, set[Group]]] = {name: {} for name in (*entries.EXACT, "described", "tag")}
        self._facts: OrderedDict[bytes, Record] = OrderedDict()
        self._texts: dict[str, str] = {}
        self._named: dict[tuple[Any, ...], tuple[bytes, bytes]] = {}

    def synchronised(self) -> Catalogue:
        """Itself, with everything that was acknowledged before the call."""
        wanted = self._started + 1
        with self._sync_lock:
            # somebody else has begun and ended a synchronisation since this call
            if self._started < wanted:
                self._started += 1
                self._synchronise()
        return self

    @property
    def stamp(self) -> float:
        """Stamp of a snapshot as of the last synchronisation: whatever is stored later has a larger one."""
        return self._stamp

    def everything(self) -> list[Group]:
        """All groups."""
        with self._lock:
            return list(self._groups.values())

    @property
    def workloads(self) -> int:
        """How many workloads there are."""
        return len(self._args_info)

    def digests(self) -> list[str]:
        """All workloads."""
        with self._lock:
            return list(self._args_info)

    def select(self, where: RecordFilter) -> list[Group]:
        """The groups whose records may match."""
        with self._lock:
            sets: list[set[Group]] = []
            for name in entries.EXACT:
                value = getattr(where, name)
                if value not in ("", None):
                    sets.append(self._index[name].get(value, set()))
            if where.min_sm_percent is not None or where.max_sm_percent is not None:
                low, high = where.min_sm_percent or 0, where.max_sm_percent or 100
                sets.append(self._union("sm_percent", lambda percent: low <= percent <= high))
            if where.text:
                part = where.text.lower()
                sets.append(self._union("described", lambda described: part in described[1].lower()))
            if where.dtype:
                dtype = where.dtype
                sets.append(self._union("described", lambda d: any(kind[1] == dtype for kind in self._args_info[d[0]])))
            if where.shape:
                wanted = parse_shape(where.shape)
                sets.append(self._union("described", lambda d: shape_matches(wanted, self._args_info[d[0]], d[1])))
            sets.extend(self._index["tag"].get(item, set()) for item in where.tags.items())
            if not sets:
                return list(self._groups.values())
            sets.sort(key=len)
            return list(sets[0].intersection(*sets[1:]))

    def shared(self, digest: str, names: Iterable[bytes]) -> dict[bytes, Record]:
        """What the records of groups of a workload have in common; a group that was just deleted is missing."""
        found: dict[bytes, Record] = {}
        missing = []
        with self._lock:
            for name in names:
                record = self._facts.get(name)
                if record is None:
                    missing.append(name)
                else:
                    found[name] = record
        if missing:
            keys = self._connection.keys.of(digest)
            for name, facts in zip(missing, self._connection.one("HMGET", keys.facts, *missing), strict=True):
                if facts is not None:
                    found[name] = self._remember(name, facts)
        return found

    def facts_of(self, record: Record) -> tuple[bytes, bytes]:
        """:func:`entries.facts_of`, remembered for the records of a batch."""
        mark = tuple(
            tuple(sorted(value.items())) if isinstance(value, Mapping) else value
            for value in (getattr(record, name) for name in entries.SHARED)
        )
        found = self._named.get(mark)
        if found is None:
            if len(self._named) > 1_000:
                self._named.clear()
            found = self._named[mark] = entries.facts_of(record)
        return found

    def _union(self, name: str, wanted: Callable[[Any], bool]) -> set[Group]:
        found: set[Group] = set()
        for value, groups in self._index[name].items():
            if wanted(value):
                found |= groups
        return found

    def _remember(self, name: bytes, facts: bytes) -> Record:
        record = entries.group_record(facts)
        with self._lock:
            # one object for the same target in thousands of groups
            text = self._texts.setdefault(record.target_json, record.target_json)
            object.__setattr__(record, "target_json", text)
            self._facts[name] = record
            while len(self._facts) > _FACTS_CACHED:
                self._facts.popitem(last=False)
        return record

    def _synchronise(self) -> None:
        keys = self._connection.keys
        while True:
            stamp, changed, dead, history = self._connection.script(
                "changes", [keys.catalogue, keys.intents], [self._change, _DEAD_WRITER_US]
            )
            if history != self._history:
                # what was read may have been lost since, and its numbers be given again
                self._history, self._change = history, 0
                self._stamps.clear()
                self._unseen = set(self._groups)
                continue
            if not dead:
                break
            for intent in dead:
                self.repair(intent[:32].hex())
                self._connection.one("ZREM", keys.intents, intent)
        self._stamp = max(self._stamp, float(stamp))
        for digest, number in zip(changed[::2], changed[1::2], strict=True):
            self._read(digest.hex())
            self._change = max(self._change, int(float(number)))
        while self._unseen:
            self._remove(self._unseen.pop())

    def _read(self, digest: str) -> None:
        keys = self._connection.keys.of(digest)
        found = self._connection.script(
            "heads", [keys.changes, keys.heads, keys.facts, keys.workload], [self._stamps.get(digest, b"0")]
        )
        args_info, stamp = found[0], found[1]
        if digest not in self._args_info:
            self._args_info[digest] = read_args_info(args_info)
        for name, head, facts in zip(found[2::3], found[3::3], found[4::3], strict=True):
            self._put(digest, name, entries.read_head(head), facts)
        self._stamps[digest] = stamp
        self._stamp = max(self._stamp, float(stamp))

    def _put(self, digest: str, name: bytes, head: entries.Head, facts: bytes) -> None:
        group = self._groups.get(name)
        self._unseen.discard(name)
        if group is not None:
            group.head = head
            if head.records == 0:
                self._remove(name)
            return
        if head.records == 0 or not facts:
            return
        group = Group(digest, name, self._remember(name, facts), head, self._args_info[digest])
        with self._lock:
            self._groups[name] = group
            for index, value in self._places(group):
                self._index[index].setdefault(value, set()).add(group)

    def _remove(self, name: bytes) -> None:
        with self._lock:
            group = self._groups.pop(name)
            for index, value in self._places(group):
                self._index[index][value].discard(group)
                if not self._index[index][value]:
                    del self._index[index][value]

    @staticmethod
    def _places(group: Group) -> list[tuple[str, Any]]:
        shared = group.shared
        places: list[tuple[str, Any]] = [(name, getattr(shared, name)) for name in entries.EXACT]
        places.append(("described", (group.digest, shared.description)))
        places.extend(("tag", item) for item in shared.tags.items())
        return places


def read_args_info(stored: bytes | None) -> ArgsInfo:
    """Arguments of a workload in their stored form."""
    return tuple((kind, dtype, tuple(shape)) for kind, dtype, shape in json.loads(stored or b"[]"))
