"""Follow a job to its end, over broken connections and restarted servers."""

from __future__ import annotations

import time
from dataclasses import dataclass

from tuner_client.connection import Connection
from tuner_client.job import JobReport, job_report
from tuner_client.progress import Progress
from tuner_core.errors import ConflictError, DeadlineError, TunerError, UnavailableError
from tuner_core.model import JobState
from tuner_core.proto.tuner.v1 import tuning_pb2

RECONNECT_S = 60.0
_FIRST_PAUSE_S = 0.3
_LONGEST_PAUSE_S = 4.0
_MAX_RESTARTS = 3
_SETTLE_S = 0.5
"""A killed process closes its connections before it can be waited for: how long its end may take to show."""


@dataclass
class _Outage:
    """One stretch of time without a server at work on the job.

    Attributes:
        since: Monotonic seconds.
        stopping: The server said that it stops; it may still answer for a while.
        gone: It has stopped answering since.
    """

    since: float
    stopping: bool = False
    gone: bool = False


def follow(connection: Connection, job: str, progress: Progress, *, reconnect_s: float = RECONNECT_S) -> JobReport:
    """Report every change of a job until it has ended.

    A server that went away is tried again with growing pauses: one that restarts goes on with its jobs. The local
    server of this process is started again at once, and takes over from another command's that ends.

    Args:
        connection: Its server.
        job: The job.
        progress: Hears the changes.
        reconnect_s: For how long a server may stay away before this gives up.

    Returns:
        The job's last state; ``stopped`` when the server stopped and did not come back.

    Raises:
        UnavailableError: The server died and stayed away. What it measured is stored there.
        NotFoundError: The server does not know the job.
    """
    last: JobReport | None = None
    outage: _Outage | None = None
    pause_s = _FIRST_PAUSE_S
    restarts = 0
    reason: TunerError
    while True:
        try:
            for response in connection.stream(connection.tuning.WatchJob, tuning_pb2.WatchJobRequest(job=job)):
                report = job_report(response.status)
                if report.status == JobState.STOPPED and _will_go_on(connection, last, outage):
                    outage = outage or _Outage(time.monotonic())
                    outage.stopping = True
                    last = report
                    break
                progress.job(report, response.message)
                last, outage, pause_s = report, None, _FIRST_PAUSE_S
                if report.ended:
                    return report
            reason = UnavailableError(f"the server at {connection.address} is stopping")
        except (UnavailableError, DeadlineError) as error:
            reason = error
            outage = outage or _Outage(time.monotonic())
            outage.gone = True
        outage = outage or _Outage(time.monotonic())
        waited_s = time.monotonic() - outage.since
        if waited_s >= reconnect_s:
            if last is not None and last.status == JobState.STOPPED:
                progress.job(last)
                return last
            raise UnavailableError(_gave_up(connection, job, reconnect_s, reason))
        died = connection.death(settle_s=_SETTLE_S)
        if died is None:
            progress.reconnecting(str(reason), waited_s)
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            died = connection.death()
        if died is not None:
            restarts += 1
            if restarts > _MAX_RESTARTS:
                raise UnavailableError(
                    f"{died}, {restarts} times; what was measured is stored, "
                    f"go on with: {resume_command(connection, job)}"
                )
            progress.note(f"{died}; starting it again")
        try:
            if connection.reopen():
                _go_on(connection, job)
        except (UnavailableError, DeadlineError, ConflictError):
            continue  # not up yet, or not gone yet


def _will_go_on(connection: Connection, last: JobReport | None, outage: _Outage | None) -> bool:
    """Whether a stopped job is one whose server may come back: it stopped before our eyes, and is not back yet."""
    if not connection.named and not connection.embedded:
        return True  # another command's local server ends; the next attempt starts our own
    if outage is not None:
        return outage.stopping and not outage.gone
    return last is not None and not last.ended


def _go_on(connection: Connection, job: str) -> None:
    """Another server has taken over the data directory: the job goes on there, unless it had ended."""
    status = connection.call(connection.tuning.GetJob, tuning_pb2.GetJobRequest(job=job)).status
    if status.status == JobState.STOPPED:
        connection.call(connection.tuning.ResumeJob, tuning_pb2.ResumeJobRequest(job=job))


def resume_command(connection: Connection, job: str) -> str:
    """What to type to go on with a job."""
    return f"tuner-client resume {job}{server_flag(connection)}"


def server_flag(connection: Connection) -> str:
    """`` --server HOST:PORT`` when the server was named, else nothing."""
    return f" --server {connection.address}" if connection.named else ""


def _gave_up(connection: Connection, job: str, reconnect_s: float, reason: TunerError) -> str:
    return (
        f"lost the server at {connection.address} and it did not come back within {reconnect_s:g} s ({reason}); "
        f"what {job} measured is stored there, go on when it is up with: {resume_command(connection, job)}"
    )
