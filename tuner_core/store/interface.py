"""The record store as its users see it. Every backend runs the suite in ``tests/contract``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tuner_core.model import Record, RecordKey, Workload


@dataclass(frozen=True)
class RecordFilter:
    """Which records a query wants; an unset field does not restrict. ``since`` is seconds since the epoch."""

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


@dataclass(frozen=True)
class Page:
    """One page of a query; ``next_cursor`` is None when there is no more."""

    records: tuple[Record, ...]
    next_cursor: str | None


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
    def stats(self) -> dict[str, Any]:
        """Counts: ``records``, ``valid``, ``failed``, ``verified``, ``workloads``.

        Records again by ``by_device``, ``by_model`` and ``by_team``, each a mapping from name to count.
        """

    @abstractmethod
    def prune(self, older_than: float, team: str = "") -> int:
        """Delete records created before ``older_than`` (seconds since the epoch); bests of a key and verified stay.

        Args:
            older_than: Limit.
            team: Only this team's records; empty: every team's.

        Returns:
            How many were deleted.
        """

    @abstractmethod
    def close(self) -> None:
        """Release files and connections; further calls raise StoreError."""
