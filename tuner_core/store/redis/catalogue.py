"""The groups of all workloads, kept in the memory of each process and brought up to date before every query.

A million records are some ten thousand groups: batches of trials that share everything but the schedule. Filters are
answered from here. Bringing it up to date reads only what changed since the last time.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from tuner_core.model import Record
from tuner_core.store.groups import ArgsInfo, Change, Group, GroupIndex, Selection, SharedFacts
from tuner_core.store.interface import RecordFilter
from tuner_core.store.redis import entries
from tuner_core.store.redis.connection import Connection

_DEAD_WRITER_US = 30_000_000


class RedisGroup(Group):
    """A group and its head; ``name`` is its id."""

    __slots__ = ("head",)

    def __init__(self, name: bytes, shared: Record, head: entries.Head, args_info: ArgsInfo) -> None:
        super().__init__(name, (shared.workload_digest, entries.key_id(shared.key)), shared, args_info)
        self.head = head

    @property
    def id(self) -> bytes:
        """Sixteen bytes."""
        assert isinstance(self.name, bytes)
        return self.name


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
        self._sync_lock = threading.Lock()
        self._started = 0
        self._change = 0
        self._stamp = 0.0
        self._history = b""
        self._unseen: set[bytes] = set()
        self._stamps: dict[str, bytes] = {}
        self._args_info: dict[str, ArgsInfo] = {}
        self._index: GroupIndex[RedisGroup] = GroupIndex()
        self._facts: SharedFacts[bytes, RedisGroup] = SharedFacts(self._index)
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

    def everything(self) -> list[RedisGroup]:
        """All groups."""
        return self._index.everything()

    @property
    def workloads(self) -> int:
        """How many workloads there are."""
        return len(self._args_info)

    def digests(self) -> list[str]:
        """All workloads."""
        return list(self._args_info)

    def select(self, where: RecordFilter, order: str) -> Selection[RedisGroup]:
        """The groups whose records may match, as of the last synchronisation."""
        return self._index.select(where, order)

    def unchanged_since(self, digest: str, stamp: float) -> bool:
        """Whether the heads of a workload's groups, read before this is asked, are those of that stamp."""
        return float(self._stamps.get(digest, b"inf")) <= stamp

    def shared(self, digest: str, names: Iterable[bytes]) -> dict[bytes, Record]:
        """What the records of groups of a workload have in common; a group that was just deleted is missing."""

        def read(missing: list[bytes]) -> dict[bytes, Record]:
            stored = self._connection.one("HMGET", self._connection.keys.of(digest).facts, *missing)
            return {
                name: entries.group_record(facts)
                for name, facts in zip(missing, stored, strict=True)
                if facts is not None
            }

        return self._facts.of(names, read)

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
                self._unseen = {group.id for group in self._index.everything()}
                continue
            if not dead:
                break
            for intent in dead:
                self.repair(intent[:32].hex())
                self._connection.one("ZREM", keys.intents, intent)
        self._stamp = max(self._stamp, float(stamp))
        changes: list[Change[RedisGroup]] = []
        removed: list[bytes] = []
        try:
            for digest, number in zip(changed[::2], changed[1::2], strict=True):
                self._read(digest.hex(), changes, removed)
                self._change = max(self._change, int(float(number)))
            removed += self._unseen
            self._unseen.clear()
        finally:
            self._index.change(changes, removed)

    def _read(self, digest: str, changes: list[Change[RedisGroup]], removed: list[bytes]) -> None:
        """Read the groups of a workload that have changed."""
        keys = self._connection.keys.of(digest)
        found = self._connection.script(
            "heads", [keys.changes, keys.heads, keys.facts, keys.workload], [self._stamps.get(digest, b"0")]
        )
        args_info, stamp = found[0], found[1]
        if digest not in self._args_info:
            self._args_info[digest] = read_args_info(args_info)
        self._stamps[digest] = stamp  # before the heads, see unchanged_since
        self._stamp = max(self._stamp, float(stamp))
        for name, stored, facts in zip(found[2::3], found[3::3], found[4::3], strict=True):
            self._unseen.discard(name)
            head = entries.read_head(stored)
            group = self._index.get(name)
            if head.records == 0:
                removed.append(name)
                continue
            if group is None:
                if not facts:
                    continue
                group = RedisGroup(name, entries.group_record(facts), head, self._args_info[digest])
            group.head = head
            changes.append(Change(group, head.best_us, head.newest, head.verified > 0))


def read_args_info(stored: bytes | None) -> ArgsInfo:
    """Arguments of a workload in their stored form."""
    return tuple((kind, dtype, tuple(shape)) for kind, dtype, shape in json.loads(stored or b"[]"))
