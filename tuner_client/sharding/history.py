"""What a store knows of a sharded job's tasks, in the terms of the lease state machine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from tuner_core.leases.state import TaskHistory
from tuner_core.model import FailureKind, Origin, Record, RecordKey
from tuner_core.store.interface import RecordFilter, RecordStore

_PAGE = 10_000


def records_of(store: RecordStore, key: RecordKey, job: str = "") -> list[Record]:
    """Records of a key, failed ones included, in no particular order; of one job only where it is given. Blocks."""
    where = RecordFilter.of_key(key, job)
    found: list[Record] = []
    cursor: str | None = None
    while True:
        page = store.query(where, limit=_PAGE, cursor=cursor)
        found += page.records
        cursor = page.next_cursor
        if cursor is None:
            return found


def task_history(records: list[Record], job: str, addresses: Mapping[str, str] | None = None) -> TaskHistory:
    """What is known of a task from the records of its key.

    Args:
        records: Of the key; those of other jobs count as reused.
        job: The job.
        addresses: Where instances are whose names are in the records.
    """
    wrong = {record.trace for record in records if record.failure is FailureKind.WRONG_RESULT}
    search = [r for r in records if r.origin is not Origin.FALLBACK and not r.verified]
    own = sorted((r for r in search if r.job == job), key=lambda r: (r.created_at, r.trial_id))
    known = {record.trace for record in own}
    others = {record.trace: record for record in search if record.trace not in known}
    valid = [r.median_us for r in (*own, *others.values()) if r.median_us is not None and r.trace not in wrong]
    verified = [r for r in records if r.verified and r.valid and r.trace not in wrong]
    best = min(verified, key=lambda record: record.median_us or 0.0, default=None)
    baselines = [r for r in records if r.origin is Origin.FALLBACK and r.valid]
    baseline = min(baselines, key=lambda record: (not record.verified, -record.created_at), default=None)
    return TaskHistory(
        trials={r.trial_id: r.median_us if r.trace not in wrong else None for r in own},
        failures=Counter(str(r.failure) for r in own if r.failure is not None),
        by_instance=Counter((addresses or {}).get(r.instance, r.instance) for r in own),
        reused=len(others),
        best_us=min(valid, default=None),
        baseline_us=baseline.median_us if baseline else None,
        published_us=best.median_us if best else None,
        published_id=best.trial_id if best else "",
        published_fallback=best is not None and best.origin is Origin.FALLBACK,
    )
