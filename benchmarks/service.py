"""This service on given tasks: a real ``tuner-server`` with its defaults, driven through the client API."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timeline

from tuner_client import Client, RecordFilter
from tuner_client.job import JobReport
from tuner_client.model.prepare import ExtractedTask
from tuner_core.model import EvaluatorSettings, Origin, Record
from tuner_core.proto.tuner.v1 import host_pb2, tuning_pb2
from tuner_core.store.wire import workload_to_message

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class RunningServer:
    """A server process, its address, and when it was launched (seconds since the epoch)."""

    pid: int
    address: str
    launched_at: float


@contextmanager
def running_server(
    arguments: Sequence[str] = (), data_dir: Path | None = None, cores: Sequence[int] = ()
) -> Iterator[RunningServer]:
    """A ``tuner-server`` on a free port and a data directory of its own, stopped with SIGTERM at the end.

    Args:
        arguments: More of its command-line arguments.
        data_dir: Its data directory; None: a temporary one.
        cores: Cores that it may use; empty: all.

    Raises:
        RuntimeError: It did not start, with its own error line.
    """
    with tempfile.TemporaryDirectory() as temporary:
        directory = data_dir or Path(temporary) / "data"
        ready, writer = os.pipe()
        launched_at = time.time()
        log_path = Path(temporary) / "server.log"
        with log_path.open("wb") as log:
            process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "tuner_server", "--listen", "127.0.0.1:0", "--data-dir", str(directory)),
                    *("--ready-fd", str(writer), *arguments),
                ],
                pass_fds=[writer],
                stdout=log,
                stderr=log,
                preexec_fn=(lambda: os.sched_setaffinity(0, cores)) if cores else None,
            )
        os.close(writer)
        try:
            with os.fdopen(ready) as lines:
                said = json.loads(lines.readline() or "{}")
            if "address" not in said:
                raise RuntimeError(said.get("error") or f"the server did not start:\n{log_path.read_text()[-2000:]}")
            yield RunningServer(process.pid, said["address"], launched_at)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@dataclass(frozen=True)
class ServiceRun:
    """What a run gave.

    Attributes:
        started_at: When the server was launched (seconds since the epoch).
        tuning_from, tuning_to: When the job was submitted, and when it had ended.
        report: The job's own report.
        records: Everything that the store holds of the job, failed trials too.
        timeline: Busy shares and processor time by stage, see ``timeline.py``.
    """

    started_at: float
    tuning_from: float
    tuning_to: float
    report: JobReport
    records: tuple[Record, ...] = field(repr=False)
    timeline: dict[str, Any]

    @property
    def trials(self) -> list[Record]:
        """Valid new trials of the search: no failed, reused, fallback or re-measured ones."""
        seen = {}
        for record in sorted(self.records, key=lambda record: record.created_at):
            if record.valid and not record.verified and record.origin is Origin.SEARCH:
                seen.setdefault((record.workload_digest, record.trace), record)
        return list(seen.values())

    def winner(self, digest: str) -> Record:
        """The record that the job would publish for a workload: the best verified one.

        Raises:
            LookupError: Nothing valid was measured.
        """
        valid = [record for record in self.records if record.workload_digest == digest and record.valid]
        if not valid:
            raise LookupError(f"no valid record of workload {digest}")
        return min(valid, key=lambda record: (not record.verified, record.median_us))


def tune_with_service(
    tasks: Sequence[ExtractedTask],
    *,
    target_json: str,
    trials: int,
    seed: int,
    evaluator: EvaluatorSettings | None = None,
    server_arguments: Sequence[str] = (),
    picture: Path | None = None,
    options: Mapping[str, Any] | None = None,
    data_dir: Path | None = None,
) -> ServiceRun:
    """One job on a fresh server, with an empty store unless a data directory is given.

    Args:
        tasks: What to tune.
        target_json: For which target.
        trials: Budget of the whole job.
        seed: Of the search.
        evaluator: Replaces the server's own evaluator settings.
        server_arguments: Nothing for the defaults.
        picture: The timeline is drawn there, as ``FOLDER/timeline-NAME.svg`` for ``FOLDER/NAME``; None: not at all.
        options: More fields of the job's message.
        data_dir: Of the server, whose store keeps the records; None: a temporary one.
    """
    with (
        tempfile.TemporaryDirectory() as temporary,
        _traced(Path(temporary) / "trace.json", picture) as (arguments, figures),
        running_server([*server_arguments, *arguments], data_dir) as server,
        Client(server.address) as client,
    ):
        spec = tuning_pb2.JobSpec(
            model="benchmark",
            tasks=[
                tuning_pb2.TaskSpec(
                    name=task.name, workload=workload_to_message(task.workload), weight=task.weight, tunable=True
                )
                for task in tasks
            ],
            target_json=target_json,
            sm_percent=client.host().workers[0].sm_percent,
            trials=trials,
            seed=seed,
            request_id=uuid.uuid4().hex,
            **(options or {}),
        )
        if evaluator is not None:
            spec.evaluator.number = evaluator.number
            spec.evaluator.repeat = evaluator.repeat
            spec.evaluator.min_repeat_ms = evaluator.min_repeat_ms
        tuning_from = time.time()
        submitted: Any = client.connection.call(
            client.connection.tuning.SubmitJob, tuning_pb2.SubmitJobRequest(spec=spec), 120.0
        )
        report = client.watch(submitted.job)
        tuning_to = time.time()
        records = tuple(client.query(RecordFilter(job=submitted.job, include_failed=True)))
    return ServiceRun(server.launched_at, tuning_from, tuning_to, report, records, figures)


@contextmanager
def _traced(path: Path, picture: Path | None) -> Iterator[tuple[list[str], dict[str, Any]]]:
    """Arguments for a server that writes a trace, and what the trace says when the server has ended."""
    figures: dict[str, Any] = {}
    yield ["--trace", str(path)], figures
    try:
        workers, queues, server_cpu_s = timeline.read(path)
        found = timeline.analyse(workers, queues, server_cpu_s)
        figures.update(timeline.document(found))
        if picture is not None:
            figures["picture"] = timeline.draw(workers, found, picture.parent, picture.name).name
    except ValueError as error:
        figures["error"] = str(error)


def server_target(server_arguments: Sequence[str] = ()) -> tuple[str, host_pb2.Device]:
    """What a server with these arguments tunes for: the target as JSON, and the device."""
    with running_server(server_arguments) as server, Client(server.address) as client:
        host = client.host()
        return host.target_json, host.devices[0]
