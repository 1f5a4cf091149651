"""The record store as its users see it. Every backend runs the suite in ``tests/contract``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tuner_core.errors import StoreError
from tuner_core.model import Record, RecordKey, Workload
from tuner_core.store.claims import Claims


@dataclass(frozen=True)
class RecordFilter:
    """Which records a query wants; an unset field does not restrict.

    Attributes:
        text: Part of the description, in any case.
        since: Seconds since the epoch.
        shape: Extents joined by ``x``, ``?`` for any, e.g. ``1x56x56x64``: a parameter of the operator has this shape,
            or its description names it (``3x3``); see :mod:`tuner_core.store.shapes`.
        nearest_sm_percent: For each workload and device model, only the records of the one share that is nearest to
            this among the records that match otherwise; of two equally near shares the lower.
    """

    op: str = ""
    text: str = ""
    model: str = ""
    dtype: str = ""
    device_model: str = ""
    sm_percent: int | None = None
    min_sm_percent: int | None = None
    max_sm_percent: int | None = None
    sm_count: int | None = None
    team: str = ""
    job: str = ""
    workload_digest: str = ""
    target_digest: str = ""
    tvm_version: str = ""
    verified_only: bool = False
    include_failed: bool = False
    since: float | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    shape: str = ""
    nearest_sm_percent: int | None = None

    @classmethod
    def of_key(cls, key: RecordKey, job: str = "") -> RecordFilter:
        """Every record of a look-up key, failed ones included; of one job only where it is given."""
        return cls(
            workload_digest=key.workload_digest,
            target_digest=key.target_digest,
            device_model=key.device_model,
            sm_count=key.sm_count,
            tvm_version=key.tvm_version,
            job=job,
            include_failed=True,
        )


@dataclass(frozen=True)
class Page:
    """One page of a query; ``next_cursor`` is None when there is no more."""

    records: tuple[Record, ...]
    next_cursor: str | None


@dataclass(frozen=True)
class Followed:
    """Records in the order in which they were committed, and where to go on; see :meth:`RecordStore.follow`."""

    records: tuple[Record, ...]
    cursor: str


@dataclass(frozen=True)
class CommitResult:
    """How many of the committed records were new, and how many the store already had under their trial_id."""

    stored: int
    known: int


class RecordStore(ABC):
    """Durable, queryable records. Thread-safe; every method blocks (asyncio callers use a thread).

    Raises (any method):
        StoreError: The backend refuses: newer schema, disk full, read-only, wrong password.
        UnavailableError: The backend cannot be reached.
    """

    @abstractmethod
    def commit(self, records: Sequence[Record], workloads: Iterable[Workload] = ()) -> CommitResult:
        """Store workloads, then records; return only when durable. Idempotent by ``trial_id`` (the first stays).

        Raises:
            InvalidRecordError: A record's workload is neither stored nor given; nothing of the call is stored.
        """

    @abstractmethod
    def get(self, trial_id: str) -> Record | None:
        """The record of that id, or None."""

    @abstractmethod
    def get_workload(self, digest: str) -> Workload | None:
        """The workload of that digest, or None."""

    @abstractmethod
    def top(self, key: RecordKey, limit: int = 1, *, verified_only: bool = False) -> list[Record]:
        """Best valid records of a strict key: verified before shared, then by median latency, then by trial_id.

        A schedule with a ``wrong_result`` record under the same key is never returned, whatever its other records say.
        """

    @abstractmethod
    def query(
        self,
        where: RecordFilter,
        *,
        limit: int = 100,
        cursor: str | None = None,
        order: str = "latency",
        top_per_key: int = 0,
    ) -> Page:
        """One page of the records that match.

        Args:
            where: The filter.
            limit: Records per page, 1..10000.
            cursor: ``next_cursor`` of the page before; pages neither repeat nor skip what stood at the first page.
            order: ``latency`` (median, failed last) or ``newest``.
            top_per_key: When positive, only the best so many of each look-up key (as :meth:`top` ranks them).

        Raises:
            UsageError: An unknown order, a cursor that is not one, or a limit out of range.
        """

    @abstractmethod
    def follow(
        self, where: RecordFilter, after: str | None = None, *, limit: int = 1_000, wait_s: float = 0.0
    ) -> Followed:
        """The next records that were committed, in the order of their commits; waits for one when there is none.

        A cursor is a place in that order, between two commits or within one. Whoever begins anywhere and always goes on
        with the cursor of the answer before sees every record that is committed behind the beginning and matches
        exactly once, whichever process commits it, however many commit at a time, and over restarts of the store:
        nothing is skipped, nothing comes twice. A commit that finds a record known (same ``trial_id``) is none; a
        record that was deleted before it was read does not come; :meth:`tag` does not bring a record again.

        Args:
            where: As for :meth:`query`, judged when the record is read; ``nearest_sm_percent`` is refused.
            after: A ``cursor`` of an earlier answer of the same store, whatever its filter was; None: the present end.
            limit: Records in the answer, 1..10000.
            wait_s: How long to wait, at most, for the first record that matches; 0: not at all.

        Returns:
            As soon as there are any, up to ``limit`` records and the cursor behind the last one. When the time is up,
            no record and a cursor that stands behind everything that was looked at, so that an idle follower moves on.

        Raises:
            UsageError: Not a cursor of this store, or one so old that the store has forgotten what came behind it (it
                never skips in silence); a limit out of range; ``nearest_sm_percent``.
        """

    @abstractmethod
    def tag(self, trial_id: str, tags: Mapping[str, str | None]) -> Record:
        """Set tags of a record; durable when it returns. Other tags of the record and other records stay as they are.

        Args:
            trial_id: The record.
            tags: Value by name; None removes the tag.

        Returns:
            The record as it is now.

        Raises:
            NotFoundError: There is no such record.
        """

    @abstractmethod
    def stats(self) -> dict[str, Any]:
        """Counts: ``records``, ``valid``, ``failed``, ``verified``, ``workloads``.

        Records again by ``by_device``, ``by_model`` and ``by_team``, each a mapping from name to count.

        ``coverage``: how much of each model is tuned, one mapping for each model, device model, share and SM count that
        has a verified valid record for one of the model's operators: ``model``, ``device_model``, ``sm_percent``,
        ``sm_count``, ``operators`` (workloads of which the store has any record of that model) and ``verified`` (how
        many of these have a verified valid record there, of whichever model). In the order of these four names.

        ``growth``: records by the UTC day of ``created_at`` over the last 30 days, oldest first, today last, days
        without any included: mappings of ``day`` (``2026-11-21``) and ``records``.
        """

    @abstractmethod
    def prune(self, older_than: float, team: str = "", *, dry_run: bool = False) -> int:
        """Delete records created before ``older_than`` (seconds since the epoch); bests of a key and verified stay.

        Args:
            older_than: Limit.
            team: Only this team's records; empty: every team's.
            dry_run: Delete nothing, only count.

        Returns:
            How many were deleted, or would be.
        """

    @property
    def claims(self) -> Claims:
        """Claims of this store, for work that must not be done twice at once.

        Raises:
            StoreError: This kind of store keeps none.
        """
        raise StoreError("this store keeps no claims: open it on the server")

    @abstractmethod
    def close(self) -> None:
        """Release files and connections; further calls raise StoreError."""
