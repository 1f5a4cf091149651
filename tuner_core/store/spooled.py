"""A shared store with a spool in front of it: what was measured is kept while the shared store does not answer.

Commits go to the shared store as long as it answers. When it does not (down, stopped, failing over, full), they go to
the spool and are acknowledged there, as durable as SQLite is, until a thread has replayed the spool in order. Trial ids
are content-addressed, so a record that reached the shared store before its answer was lost is stored once.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tuner_core.errors import InvalidRecordError, StoreError, TunerError, UnavailableError, UsageError
from tuner_core.model import Record, RecordKey, Workload
from tuner_core.store.claims import Claim, Claims
from tuner_core.store.interface import CommitResult, Followed, Page, RecordFilter, RecordStore
from tuner_core.store.paging import MAX_LIMIT, Cursor, QueryArguments, check_query
from tuner_core.store.spool import Spool
from tuner_core.store.validation import check_record, check_workload

log = logging.getLogger(__name__)

_BATCH = 200
_RETRY_S = (0.05, 5.0)
_DRAIN_S = 2.0
_ANSWERS = 4_096
_PATIENCE_S = 2.0
"""So long a commit waits for the shared store. Trials are not done before they are stored: a server has some six
seconds of them under way, and so goes on measuring."""
_PATIENCE_PER_RECORD_S = 0.01
_NO_SNAPSHOT = 1 << 62


class SpooledStore(RecordStore):
    """A record store that takes commits also while the shared one does not answer.

    Reads see every acknowledged record as long as the shared store can be read: they wait for a replay that is under
    way, and :meth:`get`, :meth:`get_workload`, :meth:`top` and plain :meth:`query` also look into the spool. Queries
    for the best of keys or the nearest share, counts, followers, tags and retention concern what was replayed. While
    the shared store cannot be read, :meth:`get` and :meth:`get_workload` know the spool, :meth:`top` its last answer
    and the spool, and everything else raises UnavailableError.

    Args:
        shared: The store behind; closed with this one.
        path: File of the spool.

    Raises:
        StoreError: The spool cannot be opened.
    """

    def __init__(self, shared: RecordStore, path: str | Path) -> None:
        self._shared = shared
        self._spool = Spool(path)
        self._down = False
        self._readable = True
        self._said = ""
        self._copied: set[str] = set()
        self._owed: dict[str, Workload] = {}
        self._warned = False
        self._answers: OrderedDict[tuple[RecordKey, bool], tuple[int, list[Record]]] = OrderedDict()
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._tried = threading.Condition()
        self._committing = ThreadPoolExecutor(thread_name_prefix="store-commit")
        self._replaying = threading.Thread(target=self._replay, name="store-replay", daemon=True)
        self._replaying.start()

    @property
    def waiting(self) -> int:
        """How many records wait for the shared store."""
        return self._spool.waiting()

    def commit(self, records: Sequence[Record], workloads: Iterable[Workload] = ()) -> CommitResult:
        """See :meth:`RecordStore.commit`. A record in the spool counts as new unless the spool has it already."""
        self._check_open()
        workloads = list(workloads)
        for workload in workloads:
            check_workload(workload)
        for record in records:
            check_record(record)
        self._drain()  # or commits might fill the spool as fast as the replay empties it
        if not self._down and self._spool.empty():
            try:
                return self._commit_in_time(records, workloads)
            except (UnavailableError, StoreError) as error:
                self._check_open()
                self._fails(error)
        workloads += self._owing()
        self._know({record.workload_digest for record in records} - {workload.digest for workload in workloads})
        try:
            result = self._spool.commit(records, workloads)
        except StoreError as error:
            return self._commit_past_spool(records, workloads, error)
        self._wake.set()
        return result

    def get(self, trial_id: str) -> Record | None:
        """See :meth:`RecordStore.get`."""
        self._check_open()
        return self._spool.get(trial_id) or self._reading().get(trial_id)

    def get_workload(self, digest: str) -> Workload | None:
        """See :meth:`RecordStore.get_workload`."""
        self._check_open()
        return self._spool.get_workload(digest) or self._reading().get_workload(digest)

    def top(self, key: RecordKey, limit: int = 1, *, verified_only: bool = False) -> list[Record]:
        """See :meth:`RecordStore.top`."""
        self._check_open()
        self._drain()
        spooled = [] if self._spool.empty() else self._spool.top(key, limit, verified_only=verified_only)
        try:
            found = self._top_shared(key, limit, verified_only=verified_only)
            self._remember(key, limit, found, verified_only=verified_only)
        except UnavailableError as error:
            answer = self._answers.get((key, verified_only))
            if answer is None or (answer[0] < limit and len(answer[1]) == answer[0]):
                raise self._unavailable(error) from error
            found = answer[1]
        if not spooled and self._spool.empty():
            return found[:limit]
        merged = {record.trial_id: record for record in spooled}
        merged |= {record.trial_id: record for record in self._not_condemned(key, found)}
        return sorted(merged.values(), key=lambda r: (not r.verified, r.median_us, r.trial_id))[:limit]

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
        self._check_open()
        arguments = check_query(where, limit, cursor, order, top_per_key)
        both = arguments.cursor is not None and arguments.cursor.snapshot == _NO_SNAPSHOT
        if arguments.cursor is None:
            self._drain()
            both = not top_per_key and where.nearest_sm_percent is None and not self._spool.empty()
        try:
            if both:
                return self._query_both(arguments, cursor)
            return self._reading().query(where, limit=limit, cursor=cursor, order=order, top_per_key=top_per_key)
        except UnavailableError as error:
            raise self._unavailable(error) from error

    def follow(
        self, where: RecordFilter, after: str | None = None, *, limit: int = 1_000, wait_s: float = 0.0
    ) -> Followed:
        """See :meth:`RecordStore.follow`. Records of the spool come when they were replayed."""
        self._check_open()
        return self._reading().follow(where, after, limit=limit, wait_s=wait_s)

    def tag(self, trial_id: str, tags: Mapping[str, str | None]) -> Record:
        """See :meth:`RecordStore.tag`."""
        self._check_open()
        self._drain()
        return self._reading().tag(trial_id, tags)

    def stats(self) -> dict[str, Any]:
        """See :meth:`RecordStore.stats`."""
        self._check_open()
        self._drain()
        return self._reading().stats()

    def prune(self, older_than: float, team: str = "", *, dry_run: bool = False) -> int:
        """See :meth:`RecordStore.prune`."""
        self._check_open()
        self._drain()
        return self._reading().prune(older_than, team, dry_run=dry_run)

    @property
    def claims(self) -> Claims:
        """See :attr:`RecordStore.claims`. They need the shared store: nobody else knows what others hold."""
        return _ClaimsOf(self._reading)

    def close(self) -> None:
        """See :meth:`RecordStore.close`. What waits stays on the disk and is replayed after the next start."""
        if self._closing.is_set():
            return
        self._closing.set()
        self._wake.set()
        self._replaying.join(timeout=30)
        self._committing.shutdown(wait=True, cancel_futures=True)
        self._shared.close()
        self._spool.close()

    def _reading(self) -> RecordStore:
        """The shared store, unless it is known not to answer: nobody needs to wait for that twice.

        Raises:
            UnavailableError: It does not.
        """
        if self._down and not self._readable:
            raise UnavailableError(self._said)
        return self._shared

    def _check_open(self) -> None:
        if self._closing.is_set():
            raise StoreError("the store is closed")

    def _commit_in_time(self, records: Sequence[Record], workloads: Sequence[Workload]) -> CommitResult:
        """Commit to the shared store, unless it takes too long: it may still do it, and the replay repeats it.

        Raises:
            UnavailableError, StoreError: It failed, or has not answered.
        """
        patience_s = _PATIENCE_S + len(records) * _PATIENCE_PER_RECORD_S
        committing = self._committing.submit(self._commit_shared, records, workloads)
        try:
            result = committing.result(patience_s)
        except TimeoutError:
            committing.cancel()
            raise UnavailableError(f"the shared store has not answered within {patience_s:.1f} s") from None
        self._keep(workloads)
        return result

    def _commit_past_spool(
        self, records: Sequence[Record], workloads: Sequence[Workload], refusal: StoreError
    ) -> CommitResult:
        """The spool takes nothing, so the order of commits gives way: the shared store may answer again.

        Raises:
            StoreError: It does not.
        """
        try:
            return self._commit_shared(records, workloads)
        except (UnavailableError, StoreError) as error:
            raise StoreError(f"{refusal}; and {error}") from refusal

    def _commit_shared(self, records: Sequence[Record], workloads: Sequence[Workload]) -> CommitResult:
        try:
            return self._shared.commit(records, workloads)
        except InvalidRecordError:
            # a restart or a failover may have lost a workload that the shared store had acknowledged
            missing = {record.workload_digest for record in records} - {workload.digest for workload in workloads}
            copies = [copy for digest in missing if (copy := self._spool.get_workload(digest)) is not None]
            if not copies:
                raise
            return self._shared.commit(records, [*workloads, *copies])

    def _keep(self, workloads: Sequence[Workload]) -> None:
        """Copy workloads here, so that records of them can be spooled and replayed.

        What cannot be copied (the disk is full) is tried again with the next commit: the shared store has it.
        """
        with self._lock:
            self._owed |= {one.digest: one for one in workloads if one.digest not in self._copied}
        owed = self._owing()
        if not owed:
            return
        try:
            self._spool.commit([], owed)
        except (StoreError, UnavailableError) as error:
            if not self._warned:
                log.warning("%s; were the shared store to fail now, records could not wait here", error)
            self._warned = True
            return
        with self._lock:
            self._warned = False
            self._copied.update(workload.digest for workload in owed)
            for workload in owed:
                self._owed.pop(workload.digest, None)

    def _owing(self) -> list[Workload]:
        with self._lock:
            return list(self._owed.values())

    def _know(self, digests: set[str]) -> None:
        """Have copies of these workloads.

        Raises:
            InvalidRecordError: One is not in the shared store.
            UnavailableError: One has no copy here, and the shared store cannot be asked.
        """
        for digest in digests:
            if digest in self._copied or self._spool.get_workload(digest) is not None:
                continue
            workload = self._reading().get_workload(digest)
            if workload is None:
                raise InvalidRecordError(f"workload {digest[:12]} of a record is neither stored nor given with it")
            self._keep([workload])

    def _fails(self, error: TunerError) -> None:
        with self._lock:
            if not self._down or self._said != str(error):
                log.warning("%s; what is measured waits in the spool", error)
            if not self._down:
                self._down, self._readable = True, False
            self._said = str(error)

    def _unavailable(self, error: TunerError) -> UnavailableError:
        waiting = self._spool.waiting()
        return UnavailableError(f"{error} ({waiting} records wait here)" if waiting else str(error))

    def _answers_reads(self) -> bool:
        """Whether the shared store can be read: one that is full refuses commits only."""
        try:
            self._shared.get("0" * 64)
        except (UnavailableError, StoreError):
            return False
        return True

    def _remember(self, key: RecordKey, limit: int, found: list[Record], *, verified_only: bool) -> None:
        with self._lock:
            self._answers[key, verified_only] = limit, found
            self._answers.move_to_end((key, verified_only))
            while len(self._answers) > _ANSWERS:
                self._answers.popitem(last=False)

    def _top_shared(self, key: RecordKey, limit: int, *, verified_only: bool) -> list[Record]:
        """The shared store's best, as many as it takes for ``limit`` that the spool does not say are wrong."""
        asked = limit
        while True:
            found = self._reading().top(key, asked, verified_only=verified_only)
            if len(found) < asked or asked == MAX_LIMIT or len(self._not_condemned(key, found)) >= limit:
                return found
            asked = min(2 * asked, MAX_LIMIT)

    def _not_condemned(self, key: RecordKey, records: Sequence[Record]) -> list[Record]:
        if self._spool.empty():
            return list(records)
        return [record for record in records if not self._spool.condemns(key, record.trace)]

    def _query_both(self, arguments: QueryArguments, cursor: str | None) -> Page:
        """A page merged of the spool's and the shared store's.

        The spool is read first: a record that is replayed meanwhile is seen twice and shown once. Later pages have no
        snapshot, since a replayed record is new to the shared store.
        """
        limit, order = arguments.limit, arguments.order
        found: dict[str, Record] = {}
        more = False
        for side in (self._spool, self._reading()):
            page = side.query(arguments.where, limit=limit, cursor=cursor, order=order)
            found |= {record.trial_id: record for record in page.records}
            more = more or page.next_cursor is not None
        merged = sorted(found.values(), key=lambda record: _place(record, order))
        taken = merged[:limit]
        if not taken or (not more and len(merged) <= limit):
            return Page(tuple(taken), None)
        return Page(tuple(taken), arguments.next_cursor(Cursor(_NO_SNAPSHOT, *_place(taken[-1], order))))

    def _drain(self) -> None:
        """Wait for a replay that is under way, a little."""
        if self._down or self._spool.empty():
            return
        with self._tried:
            self._wake.set()
            self._tried.wait_for(lambda: self._closing.is_set() or self._down or self._spool.empty(), timeout=_DRAIN_S)

    def _replay(self) -> None:
        pause_s = _RETRY_S[0]
        while not self._closing.is_set():
            try:
                more = self._replay_batch()
                pause_s = _RETRY_S[0]
            except TunerError as error:
                if self._closing.is_set():
                    return
                self._fails(error)
                self._readable = self._answers_reads()
                more, pause_s = False, min(2 * pause_s, _RETRY_S[1])
            except Exception:
                log.exception("replaying the spool failed")
                more, pause_s = False, _RETRY_S[1]
            with self._tried:
                self._tried.notify_all()
            if more:
                continue
            if self._down:
                self._closing.wait(pause_s)  # commits must not shorten it
            else:
                self._wake.wait()
                self._wake.clear()

    def _replay_batch(self) -> bool:
        """Replay what waits longest; returns whether there may be more."""
        batch = self._spool.oldest(_BATCH)
        if batch:
            self._replay_records(batch)
        elif self._down:
            self._shared.get("0" * 64)  # does it answer again?
        if self._down:
            log.warning("the shared store answers again")
            with self._lock:
                self._down, self._said = False, ""
        return bool(batch)

    def _replay_records(self, batch: Sequence[tuple[int, Record]]) -> None:
        records = [record for _, record in batch]
        digests = {record.workload_digest for record in records}
        workloads = [self._spool.get_workload(digest) for digest in digests]
        try:
            self._shared.commit(records, [workload for workload in workloads if workload is not None])
        except (InvalidRecordError, UsageError) as error:
            if len(batch) == 1:
                log.error("the shared store refuses record %s, kept in the spool: %s", records[0].trial_id[:12], error)
                self._spool.set_aside(batch[0][0], str(error))
                return
            for one in batch:
                self._replay_records([one])
            return
        self._spool.remove([number for number, _ in batch])


class _ClaimsOf(Claims):
    """The claims of a store that may be away.

    Args:
        store: Returns the store, or raises when it is known not to answer.
    """

    def __init__(self, store: Callable[[], RecordStore]) -> None:
        self._store = store

    def claim(self, key: str, holder: str, ttl_s: float) -> Claim:
        return self._store().claims.claim(key, holder, ttl_s)

    def renew(self, key: str, token: int, ttl_s: float) -> bool:
        return self._store().claims.renew(key, token, ttl_s)

    def release(self, key: str, token: int) -> bool:
        return self._store().claims.release(key, token)


def replay_into(store: RecordStore, path: Path) -> None:
    """Move what an earlier configuration of this host has left in a spool into another store."""
    if not path.exists():
        return
    spool = Spool(path)
    try:
        while batch := spool.oldest(_BATCH):
            workloads = [spool.get_workload(digest) for digest in {record.workload_digest for _, record in batch}]
            store.commit([record for _, record in batch], [workload for workload in workloads if workload is not None])
            spool.remove([number for number, _ in batch])
    finally:
        spool.close()


def _place(record: Record, order: str) -> tuple[float, str]:
    if order == "newest":
        return -record.created_at, record.trial_id
    return (float("inf") if record.median_us is None else record.median_us), record.trial_id
