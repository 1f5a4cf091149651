"""What the store already knows of a job's tasks, in the terms of the state machine."""

from __future__ import annotations

from collections import Counter

from tuner_core.model import FailureKind, Origin, Record, RecordKey
from tuner_core.store.interface import RecordFilter, RecordStore
from tuner_server.scheduler.messages import Known, KnownTrial

MAX_KNOWN = 10_000


def known_trials(store: RecordStore, key: RecordKey, job: str, *, refresh: bool = False) -> Known:
    """Look up what is known of one task.

    Args:
        store: The record store; the call blocks.
        key: The task's strict key.
        job: The job that asks; its own records are told apart from those of others.
        refresh: Leave out what other jobs measured.

    Returns:
        Search trials (one per trace), the published record, the baseline.
    """
    where = RecordFilter.of_key(key, job if refresh else "")
    records = store.query(where, limit=MAX_KNOWN).records
    wrong = {record.trace for record in records if record.failure is FailureKind.WRONG_RESULT}
    search = [record for record in records if record.origin is not Origin.FALLBACK and not record.verified]
    trials: dict[str, Record] = {}
    for record in search:
        known = trials.get(record.trace)
        if known is None or (record.job == job and known.job != job):
            trials[record.trace] = record
    own = [record for record in trials.values() if record.job == job]
    verified = [r for r in records if r.verified and r.valid and r.trace not in wrong]
    best = min(verified, key=lambda record: record.median_us or 0.0, default=None)
    baselines = [r for r in records if r.origin is Origin.FALLBACK and r.valid]
    baseline = min(baselines, key=lambda record: (not record.verified, -record.created_at), default=None)
    return Known(
        trials=tuple(
            KnownTrial(record.trace, None if record.trace in wrong else record.median_us) for record in trials.values()
        ),
        own=len(own),
        own_failed=Counter(record.failure for record in own if record.failure is not None),
        best_verified=None if best is None else KnownTrial(best.trace, best.median_us),
        best_trial_id="" if best is None else best.trial_id,
        best_is_fallback=best is not None and best.origin is Origin.FALLBACK,
        baseline=None if baseline is None else KnownTrial(baseline.trace, baseline.median_us),
        baseline_trial_id="" if baseline is None else baseline.trial_id,
    )
