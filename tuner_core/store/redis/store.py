"""The Redis backend of the record store."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tuner_core.errors import NotFoundError
from tuner_core.model import Record, RecordKey, Workload
from tuner_core.store.claims import Claims
from tuner_core.store.compression import MAX_BODY_BYTES, unpack
from tuner_core.store.counts import coverage, growth
from tuner_core.store.interface import CommitResult, Followed, Page, RecordFilter, RecordStore
from tuner_core.store.paging import check_follow, check_limit, check_query
from tuner_core.store.redis import entries
from tuner_core.store.redis.catalogue import Catalogue, read_args_info
from tuner_core.store.redis.claims import RedisClaims
from tuner_core.store.redis.connection import Connection
from tuner_core.store.redis.events import Follower
from tuner_core.store.redis.location import RedisLocation
from tuner_core.store.redis.query import read_records, run_query
from tuner_core.store.redis.writing import RecordWriter
from tuner_core.store.validation import check_record, check_tags, check_workload


class RedisStore(RecordStore):
    """Records in one Redis server or cluster that any number of instances use at the same time.

    Durability: a commit returns when Redis has answered, so its promise is that of the server's ``appendfsync`` (see
    docs/stores.md), plus that of ``wait_replicas`` and ``wait_aof`` where the URL asks for them.

    Args:
        location: Where it is.
        allow_volatile: Accept a server that may evict or forget.

    Raises:
        StoreError: Wrong password, no TLS, too old, a foreign or newer key space, or a server that may forget.
        UnavailableError: Not reachable.
    """

    def __init__(self, location: RedisLocation, *, allow_volatile: bool = False) -> None:
        self._connection = Connection(location)
        try:
            if not allow_volatile:
                self._connection.refuse_volatile()
        except BaseException:
            self._connection.close()
            raise
        self._catalogue = Catalogue(self._connection)
        self._writer = RecordWriter(self._connection, self._catalogue)
        self._catalogue.repair = self._writer.repair
        self._follower = Follower(self._connection, self._catalogue)

    def commit(self, records: Sequence[Record], workloads: Iterable[Workload] = ()) -> CommitResult:
        """See :meth:`RecordStore.commit`. Records of one workload are stored as a whole, 200 at a time."""
        by_digest = {}
        for workload in workloads:
            check_workload(workload)
            by_digest[workload.digest] = workload
        checked = [(record, check_record(record)) for record in records]
        if not checked and not by_digest:
            return CommitResult(0, 0)
        stored = self._writer.commit(checked, by_digest)
        return CommitResult(stored, len(checked) - stored)

    def get(self, trial_id: str) -> Record | None:
        """See :meth:`RecordStore.get`."""
        trial = _digest(trial_id)
        digest = self._workload_of(trial) if trial else None
        if trial is None or digest is None:
            return None
        stored = self._connection.one("HGET", self._connection.keys.of(digest).records, trial)
        return read_records(self._catalogue, digest, [(trial, stored)]).get(trial)

    def get_workload(self, digest: str) -> Workload | None:
        """See :meth:`RecordStore.get_workload`."""
        if _digest(digest) is None:
            return None
        key = self._connection.keys.of(digest).workload
        body, structural_hash, op, description, args_info = self._connection.one(
            "HMGET", key, "body", "structural_hash", "op", "description", "args_info"
        )
        if body is None:
            return None
        return Workload(
            digest=digest,
            body=unpack(body, limit=MAX_BODY_BYTES, what="stored workload"),
            structural_hash=structural_hash.decode(),
            op=op.decode(),
            description=description.decode(),
            args_info=read_args_info(args_info),
        )

    def top(self, key: RecordKey, limit: int = 1, *, verified_only: bool = False) -> list[Record]:
        """See :meth:`RecordStore.top`."""
        check_limit(limit)
        if _digest(key.workload_digest) is None:
            return []
        keys, name = self._connection.keys.of(key.workload_digest), entries.key_id(key)
        ranges = [("ZRANGE", keys.verified(name), 0, limit - 1)]
        if not verified_only:
            ranges.append(("ZRANGE", keys.shared(name), 0, limit - 1))
        ranked = [member[:32] for members in self._connection.together(ranges) for member in members][:limit]
        if not ranked:
            return []
        stored = self._connection.one("HMGET", keys.records, *ranked)
        found = read_records(self._catalogue, key.workload_digest, zip(ranked, stored, strict=True))
        return [found[trial] for trial in ranked if trial in found]

    def query(
        self,
        where: RecordFilter,
        *,
        limit: int = 100,
        cursor: str | None = None,
        order: str = "latency",
        top_per_key: int = 0,
    ) -> Page:
        """See :meth:`RecordStore.query`."""
        arguments = check_query(where, limit, cursor, order, top_per_key)
        return run_query(self._connection, self._catalogue, arguments)

    def follow(
        self, where: RecordFilter, after: str | None = None, *, limit: int = 1_000, wait_s: float = 0.0
    ) -> Followed:
        """See :meth:`RecordStore.follow`. The last 10,000 commits are remembered, see ``EVENTS_KEPT``."""
        check_follow(where, limit)
        return self._follower.follow(where, after, limit, wait_s)

    def tag(self, trial_id: str, tags: Mapping[str, str | None]) -> Record:
        """See :meth:`RecordStore.tag`."""
        check_tags(tags)
        trial = _digest(trial_id)
        digest = self._workload_of(trial) if trial else None
        if digest is None:
            raise NotFoundError(f"there is no record {trial_id[:64]}; see: tuner-client query --ids")
        self._writer.tag(trial_id, digest, tags)
        record = self.get(trial_id)
        if record is None:
            raise NotFoundError(f"record {trial_id[:64]} was deleted meanwhile")
        return record

    def stats(self) -> dict[str, Any]:
        """See :meth:`RecordStore.stats`."""
        groups = self._catalogue.synchronised().everything()
        found: dict[str, Any] = {
            "records": sum(group.head.records for group in groups),
            "valid": sum(group.head.valid for group in groups),
            "failed": sum(group.head.records - group.head.valid for group in groups),
            "verified": sum(group.head.verified for group in groups),
            "workloads": self._catalogue.workloads,
        }
        for name, field in (("by_device", "device_model"), ("by_model", "model"), ("by_team", "team")):
            tally: dict[str, int] = {}
            for group in groups:
                value = getattr(group.shared, field)
                tally[value] = tally.get(value, 0) + group.head.records
            found[name] = tally
        operators: dict[str, set[str]] = {}
        for group in groups:
            operators.setdefault(group.shared.model, set()).add(group.digest)
        found["coverage"] = coverage(
            operators,
            (
                (group.digest, group.shared.device_model, group.shared.sm_percent, group.shared.sm_count)
                for group in groups
                if group.head.live_verified
            ),
        )
        keys = self._connection.keys
        days: dict[int, int] = {}
        counts = self._connection.together([("HGETALL", keys.of(d).days) for d in self._catalogue.digests()])
        for of_workload in counts:
            for day, count in of_workload.items():
                days[int(day)] = days.get(int(day), 0) + int(count)
        found["growth"] = growth(days, time.time())
        return found

    def prune(self, older_than: float, team: str = "", *, dry_run: bool = False) -> int:
        """See :meth:`RecordStore.prune`. A schedule once found wrong stays known as wrong."""
        return self._writer.prune(older_than, team, dry_run=dry_run)

    @property
    def claims(self) -> Claims:
        """See :attr:`RecordStore.claims`."""
        return RedisClaims(self._connection)

    def close(self) -> None:
        """See :meth:`RecordStore.close`."""
        self._connection.close()

    def _workload_of(self, trial: bytes) -> str | None:
        raw = self._connection.one("HGET", self._connection.keys.locator(trial), trial[2:])
        return raw.hex() if raw else None


def _digest(text: str) -> bytes | None:
    """The bytes of a digest in lower-case hex, or None."""
    try:
        raw = bytes.fromhex(text)
    except ValueError:
        return None
    return raw if len(raw) == 32 and text == raw.hex() else None
