"""What a client remembers of the jobs that it shards, so that it can go on after it was killed.

One folder per job below ``sharded/`` in the data directory: the request as it was sent, and the last known state.
Measured trials are not here but in the record store.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tuner_client.job import InstanceReport, JobReport, TaskReport
from tuner_core.datadir import lock_is_held
from tuner_core.errors import ConflictError, NotFoundError, StoreError
from tuner_core.model import JobState, TaskState
from tuner_core.proto.tuner.v1 import tuning_pb2

_FORMAT = 1


def journal_folder(data_dir: Path) -> Path:
    """Where the jobs are."""
    return data_dir / "sharded"


class ShardJournal:
    """One job, held by one process at a time.

    Args:
        data_dir: The data directory.
        job: The job.

    Raises:
        ConflictError: Another process runs the job.
        StoreError: The data directory cannot be written, or the journal is of a newer version.
    """

    def __init__(self, data_dir: Path, job: str) -> None:
        self.job = job
        self._folder = journal_folder(data_dir) / job
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StoreError(f"cannot write {self._folder} ({error.strerror}); choose another --data-dir") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise ConflictError(f"another tuner-client runs {job}; follow it with: tuner-client watch {job}") from None
        self.state = read_state(self._folder)
        with contextlib.suppress(FileNotFoundError):
            (self._folder / "cancel").unlink()

    def create(self, spec: tuning_pb2.JobSpec, facts: dict[str, Any], servers: list[str], store: str) -> None:
        """Write a new job."""
        self._write("spec.pb", spec.SerializeToString())
        self.state = {"format": _FORMAT, "epoch": 0, "facts": facts, "servers": servers, "store": store}

    @property
    def spec(self) -> tuning_pb2.JobSpec:
        """The request."""
        return tuning_pb2.JobSpec.FromString((self._folder / "spec.pb").read_bytes())

    def next_epoch(self) -> int:
        """Count that the job is taken up once more; durable when this returns, so that tokens always grow."""
        self.state["epoch"] = int(self.state.get("epoch", 0)) + 1
        self._save()
        return int(self.state["epoch"])

    def save(self, report: JobReport, **more: Any) -> None:
        """Write how far the job has come."""
        addresses = self.addresses | {one.name: one.address for one in report.instances if one.name}
        self.state |= {"report": asdict(report), "addresses": addresses, **more}
        self._save()

    @property
    def addresses(self) -> dict[str, str]:
        """Where instances are whose names are in the job's records; a server has a new name after every restart."""
        known: dict[str, str] = self.state.get("addresses") or {}
        return known

    @property
    def cancel_wanted(self) -> bool:
        """Whether ``tuner-client cancel`` was called."""
        return (self._folder / "cancel").exists()

    def close(self) -> None:
        """Let another process have the job."""
        os.close(self._lock)

    def _save(self) -> None:
        self._write("state.json", json.dumps(self.state, default=str).encode())

    def _write(self, name: str, data: bytes) -> None:
        partial = self._folder / f".{name}.new"
        try:
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(self._folder / name)
        except OSError as error:
            raise StoreError(f"cannot write {self._folder} ({error.strerror}); make room there") from None


def read_state(folder: Path) -> dict[str, Any]:
    """The last state of a job; empty when there is none."""
    try:
        state: dict[str, Any] = json.loads((folder / "state.json").read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise StoreError(f"cannot read {folder / 'state.json'} ({error})") from None
    if int(state.get("format", 0)) > _FORMAT:
        raise StoreError(f"{folder} was written by a newer tuner-client; upgrade")
    return state


def sharded_jobs(data_dir: Path) -> list[JobReport]:
    """The jobs that were sharded from this data directory, newest first."""
    found = []
    folder = journal_folder(data_dir)
    for entry in sorted(folder.iterdir()) if folder.is_dir() else []:
        with contextlib.suppress(StoreError, NotFoundError):
            found.append(sharded_job(data_dir, entry.name))
    return sorted(found, key=lambda report: -report.created_at)


def is_sharded(data_dir: Path, job: str) -> bool:
    """Whether this data directory has such a sharded job."""
    return "/" not in job and bool(job.strip(".")) and (journal_folder(data_dir) / job / "state.json").is_file()


def sharded_job(data_dir: Path, job: str) -> JobReport:
    """The last known state of a job; one that nobody works on is ``stopped``.

    Raises:
        NotFoundError: There is none.
    """
    folder = journal_folder(data_dir) / job
    report = _report(read_state(folder).get("report"))
    if report is None:
        raise NotFoundError(f"there is no job {job} here; see: tuner-client jobs")
    if not report.ended and not lock_is_held(folder / "lock"):
        return replace(report, status=JobState.STOPPED.value, phase="stopped")
    return report


def remembered_servers(data_dir: Path, job: str) -> list[str]:
    """The servers that the job was last given."""
    return [str(server) for server in read_state(journal_folder(data_dir) / job).get("servers", ())]


def cancel_sharded(data_dir: Path, job: str, timeout_s: float = 20.0) -> JobReport:
    """End a job: by the process that works on it, else here.

    Returns:
        Its state; ``running`` when that process did not answer in time.
    """
    folder = journal_folder(data_dir) / job
    report = sharded_job(data_dir, job)
    if report.status == JobState.STOPPED:
        journal = ShardJournal(data_dir, job)
        report = replace(report, status=JobState.CANCELLED.value, phase="ended")
        journal.save(report)
        journal.close()
        return report
    (folder / "cancel").touch()
    deadline = time.monotonic() + timeout_s
    while not report.ended and time.monotonic() < deadline:
        time.sleep(0.2)
        report = sharded_job(data_dir, job)
    return report


def _report(values: dict[str, Any] | None) -> JobReport | None:
    if values is None:
        return None
    tasks = tuple(TaskReport(**{**task, "state": TaskState(task["state"])}) for task in values["tasks"])
    instances = tuple(InstanceReport(**entry) for entry in values["instances"])
    return JobReport(**{**values, "tasks": tasks, "instances": instances})
