"""A client that follows a job says what happened to its server."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tuner_client import follow as following
from tuner_client.job import JobReport
from tuner_client.progress import Silent
from tuner_core.errors import UnavailableError
from tuner_core.proto.tuner.v1 import tuning_pb2


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
