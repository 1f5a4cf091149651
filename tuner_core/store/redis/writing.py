"""Commits, tags and retention.

A commit of one workload takes three steps: say that the workload is being written and where its trials will be found;
store the records (one script, one slot, all or nothing); publish what was stored to followers and to the catalogue.
Only then it is acknowledged. A writer that dies in between leaves its intent behind, and the next reader publishes for
it. Repeating any step changes nothing.
"""

from __future__ import annotations

import dataclasses
import json
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from functools import partial

import redis

from tuner_core.errors import InvalidRecordError, NotFoundError
from tuner_core.model import Record, Workload
from tuner_core.store.compression import pack
from tuner_core.store.redis import entries
from tuner_core.store.redis.catalogue import Catalogue
from tuner_core.store.redis.connection import Command, Connection, Proof

EVENTS_KEPT = 10_000
_RECORDS_PER_SCRIPT = 200
_PRUNE_CHUNK = 500
_KNOWN_WORKLOADS = 10_000


class RecordWriter:
    """Writes records of one store.

    Args:
        connection: Of the store.
        catalogue: Of the store; retention goes through its groups.
    """

    def __init__(self, connection: Connection, catalogue: Catalogue) -> None:
        self._connection = connection
        self._catalogue = catalogue
        self._lock = threading.Lock()
        # what this process knows of workloads: (operator, description), and how much of the outbox is published
        self._described: OrderedDict[str, tuple[str, str]] = OrderedDict()
        self._published: dict[str, int] = {}

    def commit(self, records: Sequence[tuple[Record, str]], workloads: Mapping[str, Workload]) -> int:
        """Store records, each with the digest of its trace, and workloads by digest; returns how many were new.

        Raises:
            InvalidRecordError: A workload is neither stored nor given; nothing is stored.
        """
        by_workload: dict[str, list[tuple[Record, str]]] = {digest: [] for digest in workloads}
        for record, trace_digest in records:
            by_workload.setdefault(record.workload_digest, []).append((record, trace_digest))
        described = self._describe(by_workload, workloads)
        stored = 0
        published: dict[str, int] = {}
        for digest, of_workload in by_workload.items():
            workload = workloads.get(digest)
            for at in range(0, max(1, len(of_workload)), _RECORDS_PER_SCRIPT):
                part = of_workload[at : at + _RECORDS_PER_SCRIPT]
                new, published[digest] = self._commit(digest, workload, part, described[digest])
                stored += new
        self._confirm(by_workload, published)
        # only now: a failover may have taken back what no replica had
        self._published.update(published)
        return stored

    def tag(self, trial_id: str, digest: str, tags: Mapping[str, str | None]) -> None:
        """Move a record to the group with these tags.

        Raises:
            NotFoundError: There is no such record.
        """
        keys = self._connection.keys.of(digest)
        trial = bytes.fromhex(trial_id)
        while True:
            stored = self._connection.one("HGET", keys.records, trial)
            if stored is None:
                raise NotFoundError(f"there is no record {trial_id[:64]}; see: tuner-client query --ids")
            old = entries.group_of(stored)
            shared = self._catalogue.shared(digest, [old]).get(old)
            if shared is None:
                continue
            merged = {name: value for name, value in {**shared.tags, **tags}.items() if value is not None}
            new, facts = entries.facts_of(dataclasses.replace(shared, tags=merged))
            if new == old:
                return
            moved = self._connection.script(
                "move",
                [keys.records, keys.heads, keys.changes, keys.facts, keys.meta, *keys.group(old), *keys.group(new)],
                [trial, old, new, facts],
            )
            if moved:
                published = self._publish(digest, 0, b"", "")
                there = ("HGET", keys.records, trial), partial(_is_of_group, new)
                again, proofs = self._announced({digest: published})
                self._connection.confirm([("HSET", keys.meta, "barrier", 1), *again], [there, *proofs])
                return

    def prune(self, older_than: float, team: str, *, dry_run: bool) -> int:
        """Delete by retention; returns how many."""
        total = 0
        for group in self._catalogue.synchronised().everything():
            if team and group.shared.team != team:
                continue
            total += self._prune_group(
                group.digest, group.id, entries.key_id(group.shared.key), older_than, dry_run=dry_run
            )
        return total

    def repair(self, digest: str) -> None:
        """Finish what a writer that died has left of a workload."""
        _, first, outbox, pending = self._connection.script("commit", *self._call(digest, None, [], ("", "")))
        self._finish(digest, int(first), outbox, pending, "")

    def _describe(self, digests: Collection[str], workloads: Mapping[str, Workload]) -> dict[str, tuple[str, str]]:
        """Operator and description of every workload; refuses those that are nowhere.

        What this process knows may be forgotten by another commit at any time, when it turns out never to have been
        stored: the caller goes by what is returned.
        """
        with self._lock:
            for digest, workload in workloads.items():
                self._described.setdefault(digest, (workload.op, workload.description))
            described = {digest: self._described[digest] for digest in digests if digest in self._described}
            while len(self._described) > _KNOWN_WORKLOADS + len(workloads):
                self._described.popitem(last=False)
        unknown = [digest for digest in digests if digest not in described]
        keys = [self._connection.keys.of(digest).workload for digest in unknown]
        found = self._connection.together([("HMGET", key, "op", "description") for key in keys])
        for digest, (op, description) in zip(unknown, found, strict=True):
            if op is None:
                raise _unknown(digest)
            described[digest] = (op.decode(), description.decode())
            with self._lock:
                self._described[digest] = described[digest]
        return described

    def _commit(
        self,
        digest: str,
        workload: Workload | None,
        records: Sequence[tuple[Record, str]],
        described: tuple[str, str],
    ) -> tuple[int, int]:
        """How many records are new, and how much of the workload's outbox is published."""
        keys = self._connection.keys
        raw = bytes.fromhex(digest)
        intent = raw + secrets.token_bytes(8)
        located: list[tuple[bytes | str, ...]] = [("ZADD", keys.intents, f"{time.time() * 1e6:.0f}", intent)]
        for record, _ in records:
            trial = bytes.fromhex(record.trial_id)
            located.append(("HSET", keys.locator(trial), trial[2:], raw))
        self._connection.together(located)
        call = self._call(digest, workload, records, described)
        try:
            stored, first, outbox, pending = self._connection.script("commit", *call)
        except Exception as error:
            if isinstance(error.__cause__, redis.ResponseError) and "UNKNOWN workload" in str(error.__cause__):
                with self._lock:
                    self._described.pop(digest, None)
                raise _unknown(digest) from None
            raise
        return int(stored), self._finish(digest, int(first), outbox, pending, intent, int(stored))

    def _confirm(self, by_workload: Mapping[str, Sequence[tuple[Record, str]]], published: Mapping[str, int]) -> None:
        """Return when replicas and disks have a commit, as far as the URL asks."""
        if not self._connection.confirms:
            return
        keys = self._connection.keys
        again, proofs = self._announced(published)
        for digest, records in by_workload.items():
            of_workload, raw = keys.of(digest), bytes.fromhex(digest)
            again.append(("HSET", of_workload.meta, "barrier", 1))
            trials = [bytes.fromhex(record.trial_id) for record, _ in records]
            again += [("HSET", keys.locator(trial), trial[2:], raw) for trial in trials]
            # a script's writes are replicated as a whole
            last = [*trials[_RECORDS_PER_SCRIPT - 1 :: _RECORDS_PER_SCRIPT], *trials[-1:]]
            proofs += [(("HEXISTS", of_workload.records, trial), bool) for trial in last]
            proofs.append((("EXISTS", of_workload.workload), bool))
        self._connection.confirm(again, proofs)

    def _announced(self, published: Mapping[str, int]) -> tuple[list[Command], list[Proof]]:
        """What :meth:`Connection.confirm` needs to know of what was published."""
        name = self._connection.keys.published
        proofs: list[Proof] = [
            (("HGET", name, bytes.fromhex(digest)), partial(_has_reached, number))
            for digest, number in published.items()
        ]
        return [("HSET", name, "barrier", 1)], proofs

    def _call(
        self,
        digest: str,
        workload: Workload | None,
        records: Sequence[tuple[Record, str]],
        described: tuple[str, str],
    ) -> tuple[list[str], list[bytes | str | int]]:
        keys = self._connection.keys.of(digest)
        groups: dict[bytes, int] = {}
        facts_of: list[bytes] = []
        lookups: dict[bytes, int] = {}
        packed: list[bytes | str | int] = []
        for record, trace_digest in records:
            op, description = described
            if not (record.op and record.description):
                record = dataclasses.replace(record, op=record.op or op, description=record.description or description)
            name, facts = self._catalogue.facts_of(record)
            if name not in groups:
                groups[name] = len(groups)
                facts_of.append(facts)
            key = entries.key_id(record.key)
            lookups.setdefault(key, len(lookups))
            packed += (entries.header(record, trace_digest, groups[name], lookups[key]), entries.body(record))
        names = [
            keys.workload,
            keys.records,
            keys.heads,
            keys.changes,
            keys.facts,
            keys.condemned,
            keys.outbox,
            keys.meta,
            keys.days,
            keys.pending,
        ]
        arguments: list[bytes | str | int] = [len(groups), len(lookups)]
        for (name, _), facts in zip(groups.items(), facts_of, strict=True):
            names += keys.group(name)
            arguments += (name, facts)
        for key in lookups:
            names += (keys.shared(key), keys.verified(key))
            arguments.append(key)
        fields = _workload_fields(workload) if workload else []
        arguments += [self._published.get(digest, 0), len(fields), *fields, *packed]
        return names, arguments

    def _finish(
        self, digest: str, first: int, outbox: bytes, pending: Sequence[bytes], intent: bytes | str, new: int = 0
    ) -> int:
        if pending:
            self._condemn(digest, pending[::2])
        return self._publish(digest, first, outbox, intent, new)

    def _condemn(self, digest: str, trials: Sequence[bytes]) -> None:
        keys = self._connection.keys.of(digest)
        while trials:
            batch, trials = trials[:_RECORDS_PER_SCRIPT], trials[_RECORDS_PER_SCRIPT:]
            stored = self._connection.one("HMGET", keys.records, *batch)
            groups = sorted({entries.group_of(record) for record in stored if record is not None})
            names = [keys.records, keys.heads, keys.changes, keys.meta, keys.pending]
            for group in groups:
                names += keys.group(group)
            self._connection.script("condemn", names, [len(groups), *groups, *batch])

    def _publish(self, digest: str, first: int, outbox: bytes, intent: bytes | str, new: int = 0) -> int:
        """Announce what was stored; returns how much of the outbox is published."""
        keys = self._connection.keys
        published = self._connection.script(
            "publish",
            [keys.events, keys.catalogue, keys.intents, keys.published],
            [bytes.fromhex(digest), first, outbox, intent, EVENTS_KEPT, new],
        )
        return int(published)

    def _prune_group(self, digest: str, group: bytes, key: bytes, older_than: float, *, dry_run: bool) -> int:
        keys = self._connection.keys.of(digest)
        latency, dated, _ = keys.group(group)
        names = [keys.records, keys.heads, keys.changes, keys.facts, keys.meta, keys.days, keys.pending]
        names += [latency, dated, keys.shared(key), keys.verified(key)]
        skip: int = 0
        total: int = 0
        while True:
            arguments = [group, repr(-older_than), skip, _PRUNE_CHUNK, 0 if dry_run else 1]
            kept, prunable, deleted, seen = self._connection.script("prune", names, arguments)
            total += prunable
            skip += kept + (prunable if dry_run else 0)
            if deleted:
                self._forget(digest, deleted)
            if seen < _PRUNE_CHUNK:
                break
        if total and not dry_run:
            self._publish(digest, 0, b"", "")
        return total

    def _forget(self, digest: str, trials: Sequence[bytes]) -> None:
        """Drop the way to deleted records; one that was stored again meanwhile gets its way back."""
        keys = self._connection.keys
        self._connection.together([("HDEL", keys.locator(trial), trial[2:]) for trial in trials])
        again = self._connection.together([("HEXISTS", keys.of(digest).records, trial) for trial in trials])
        self._connection.together(
            [
                ("HSET", keys.locator(trial), trial[2:], bytes.fromhex(digest))
                for trial, there in zip(trials, again, strict=True)
                if there
            ]
        )


def _is_of_group(group: bytes, stored: bytes | None) -> bool:
    return stored is not None and entries.group_of(stored) == group


def _has_reached(number: int, found: bytes | None) -> bool:
    return int(found or 0) >= number


def _unknown(digest: str) -> InvalidRecordError:
    return InvalidRecordError(f"workload {digest[:12]} of a record is neither stored nor given with it")


def _workload_fields(workload: Workload) -> list[bytes | str]:
    return [
        "body",
        pack(workload.body),
        "structural_hash",
        workload.structural_hash,
        "op",
        workload.op,
        "description",
        workload.description,
        "args_info",
        json.dumps(workload.args_info),
    ]
