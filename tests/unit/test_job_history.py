"""What the scheduler makes of the records that the store already holds."""

from __future__ import annotations

from pathlib import Path

from tuner_core.model import (
    FailureKind,
    Origin,
    PartitionKind,
    Record,
    RecordKey,
    Workload,
    canonical_json,
    sha256_hex,
    trial_id,
)
from tuner_core.store.open import open_store
from tuner_server.scheduler.history import known_trials

BODY = canonical_json({"an": "operator"})
WORKLOAD = Workload(sha256_hex(BODY), BODY, op="dense", description="dense")
KEY = RecordKey(WORKLOAD.digest, sha256_hex('{"kind":"llvm"}'), "a cpu", 2)


def record(trace: int, job: str, us: float | None, *, verified: bool = False, **fields: object) -> Record:
    text = canonical_json([[["Step", trace]], []])
    return Record(
        trial_id=trial_id(KEY, text, job, verified),
        workload_digest=KEY.workload_digest,
        trace=text,
        target_json='{"kind":"llvm"}',
        target_digest=KEY.target_digest,
        device_model=KEY.device_model,
        device_arch="x",
        sm_percent=100,
        sm_count=KEY.sm_count,
        partition_kind=PartitionKind.CPU,
        verified=verified,
        latencies_us=(us,) if us else (),
        median_us=us,
        job=job,
        failure=None if us else FailureKind.RUN_ERROR,
        **fields,  # type: ignore[arg-type]
    )


def test_own_and_other_trials_published_record_and_baseline_are_told_apart(tmp_path: Path) -> None:
    store = open_store(f"sqlite:///{tmp_path / 'r.sqlite'}")
    wrong = record(3, "other", None, verified=True)
    wrong = Record(**{**wrong.__dict__, "failure": FailureKind.WRONG_RESULT})
    records = [
        record(1, "other", 50.0),
        record(2, "mine", 40.0),
        record(3, "other", 10.0),
        wrong,
        record(4, "mine", None),
        record(1, "other", 52.0, verified=True),
        record(9, "other", 90.0, origin=Origin.FALLBACK),
    ]
    store.commit(records, [WORKLOAD])
    known = known_trials(store, KEY, "mine")
    by_latency = {trial.median_us for trial in known.trials}
    assert len(known.trials) == 4 and by_latency == {50.0, 40.0, None}  # the wrong one counts as failed
    assert (known.own, dict(known.own_failed)) == (2, {FailureKind.RUN_ERROR: 1})
    assert known.best_verified is not None and known.best_verified.median_us == 52.0
    assert known.baseline is not None and known.baseline.median_us == 90.0
    fresh = known_trials(store, KEY, "mine", refresh=True)
    assert len(fresh.trials) == 2 and fresh.best_verified is None and fresh.baseline is None
    store.close()


def test_another_sm_count_is_another_history(tmp_path: Path) -> None:
    store = open_store(f"sqlite:///{tmp_path / 'r.sqlite'}")
    store.commit([record(1, "other", 50.0)], [WORKLOAD])
    assert known_trials(store, RecordKey(KEY.workload_digest, KEY.target_digest, "a cpu", 1), "mine").trials == ()
    store.close()
