"""A client that follows a job says what happened to its server."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest

from tuner_client import Client, connection
from tuner_client import follow as following
from tuner_client.job import JobInterrupted, JobReport
from tuner_client.progress import Silent
from tuner_core.errors import UnavailableError
from tuner_core.proto.tuner.v1 import tuning_pb2, tuning_pb2_grpc


class _DyingServer:
    """A connection to a local server whose connections break before its process can be waited for."""

    address = "127.0.0.1:1"
    named = False
    embedded = True

    def __init__(self, *, shows_after_looks: int) -> None:
        self._looks_left = shows_after_looks
        self._restarted = False

    def stream(self, _method: object, _request: object) -> Iterator[tuning_pb2.WatchJobResponse]:
        if not self._restarted:
            raise UnavailableError("the connection broke")
        yield tuning_pb2.WatchJobResponse(status=tuning_pb2.JobStatus(job="job-1", status="done"))

    def death(self, *, settle_s: float = 0.0) -> str | None:
        self._looks_left -= 1
        return "the local server was killed by SIGKILL" if self._looks_left < 0 else None

    def reopen(self) -> bool:
        self._restarted = True
        return False

    def __getattr__(self, _name: str) -> Any:
        return self


class _Notes(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


@pytest.mark.parametrize("looks", [0, 1])
def test_a_killed_local_server_is_never_replaced_in_silence(monkeypatch: pytest.MonkeyPatch, looks: int) -> None:
    monkeypatch.setattr(following, "_FIRST_PAUSE_S", 0.0)
    notes = _Notes()
    report: JobReport = following.follow(_DyingServer(shows_after_looks=looks), "job-1", notes)  # type: ignore[arg-type]
    assert report.status == "done"
    assert notes.notes == ["the local server was killed by SIGKILL; starting it again"]


class _Killed:
    """The process of a local server that was killed."""

    exit_code = -9

    def ends_within(self, _seconds: float) -> bool:
        return True

    def describe_death(self) -> str:
        return "the local server was killed by SIGKILL"

    def stop(self) -> None:
        pass


class _Jobs(tuning_pb2_grpc.TuningServiceServicer):
    """A server whose first stream breaks; the job is done when it is asked for again."""

    def __init__(self) -> None:
        self.streams = 0

    def ListJobs(self, request: Any, context: grpc.ServicerContext) -> tuning_pb2.ListJobsResponse:
        return tuning_pb2.ListJobsResponse()

    def GetJob(self, request: Any, context: grpc.ServicerContext) -> tuning_pb2.GetJobResponse:
        return tuning_pb2.GetJobResponse(status=tuning_pb2.JobStatus(job="job-1", status="running"))

    def WatchJob(self, request: Any, context: grpc.ServicerContext) -> Iterator[tuning_pb2.WatchJobResponse]:
        self.streams += 1
        if self.streams == 1:
            context.abort(grpc.StatusCode.UNAVAILABLE, "the connection broke")
        yield tuning_pb2.WatchJobResponse(status=tuning_pb2.JobStatus(job="job-1", status="done"))


@pytest.fixture
def address() -> Iterator[str]:
    server = grpc.server(futures.ThreadPoolExecutor(2))
    tuning_pb2_grpc.add_TuningServiceServicer_to_server(_Jobs(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()


def client_of_killed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, address: str, *restarts: BaseException | str
) -> Client:
    """A client whose local server was killed, and what comes of every attempt to start it again."""
    outcomes = iter((address, *restarts))

    def start(_data_dir: Path, _arguments: object) -> tuple[str, Any]:
        outcome = next(outcomes)
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome, _Killed()

    monkeypatch.setattr(connection, "connect_or_start", start)
    monkeypatch.setattr(following, "_FIRST_PAUSE_S", 0.0)
    return Client(data_dir=tmp_path)


def test_ctrl_c_while_a_killed_local_server_is_started_again_says_that_the_job_has_stopped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, address: str
) -> None:
    client = client_of_killed(monkeypatch, tmp_path, address, KeyboardInterrupt())
    with pytest.raises(JobInterrupted) as interrupted:
        client.watch("job-1")
    assert interrupted.value.report.status == "stopped"  # nobody goes on with it: resume does


def test_a_local_server_that_does_not_start_at_once_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, address: str
) -> None:
    with client_of_killed(monkeypatch, tmp_path, address, UnavailableError("not up yet"), address) as client:
        assert client.watch("job-1").status == "done"
