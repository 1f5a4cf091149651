"""The journal: jobs survive the server."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from tuner_core.errors import StoreError
from tuner_core.model import JobState
from tuner_core.proto.tuner.v1 import tuning_pb2
from tuner_server.scheduler.journal import SCHEMA_VERSION, JobJournal


def test_a_job_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    journal = JobJournal(tmp_path / "jobs.sqlite")
    spec = tuning_pb2.JobSpec(model="m", trials=5, request_id="r1")
    journal.add("job-1", spec, tuning_pb2.JobStatus(job="job-1", status="queued"))
    journal.update("job-1", JobState.RUNNING, tuning_pb2.JobStatus(job="job-1", status="running"), 12.5)
    journal.close()
    (entry,) = JobJournal(tmp_path / "jobs.sqlite").entries()
    assert (entry.job, entry.spec, entry.state, entry.elapsed_s) == ("job-1", spec, JobState.RUNNING, 12.5)
    assert entry.status.status == "running"


def test_entries_come_newest_first_and_by_request(tmp_path: Path) -> None:
    journal = JobJournal(tmp_path / "jobs.sqlite")
    for number in range(3):
        journal.add(f"job-{number}", tuning_pb2.JobSpec(request_id=f"r{number}"), tuning_pb2.JobStatus())
    assert [entry.job for entry in journal.entries(2)] == ["job-2", "job-1"]
    assert journal.by_request("r1") == "job-1"
    assert journal.by_request("other") is None


def test_a_journal_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "jobs.sqlite"
    database = sqlite3.connect(path)
    database.execute(f"PRAGMA user_version={SCHEMA_VERSION + 1}")
    database.close()
    with pytest.raises(StoreError, match="newer version"):
        JobJournal(path)


def test_a_shard_is_read_back_with_the_newest_token_of_each_task(tmp_path: Path) -> None:
    journal = JobJournal(tmp_path / "jobs.sqlite")
    journal.mark_shard("job-1", 15.0)
    for job in ("job-1", "job-2"):
        journal.add(job, tuning_pb2.JobSpec(), tuning_pb2.JobStatus())
    for task, token in (("a", 1 << 33), ("b", 2), ("a", 7)):
        journal.note_token("job-1", task, token)
    journal.close()
    own, shard = JobJournal(tmp_path / "jobs.sqlite").entries()
    assert (own.lease_s, own.tokens) == (None, {})
    assert (shard.lease_s, shard.tokens) == (15.0, {"a": 1 << 33, "b": 2})
