"""Jobs over several servers: the options they have, and how the commands drive, follow and list them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tuner_client.cli.session import Session
from tuner_core.errors import UsageError

if TYPE_CHECKING:
    from tuner_client.job import JobReport
    from tuner_client.request import TuneRequest
    from tuner_client.sharding.tuning import ShardedTuner

_WATCH_S = 0.5


def sharding_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of a job over several servers."""
    seconds = click.FloatRange(0, 86400)
    options = [
        click.option("--store", metavar="URL", help="Several servers: gather records there.  [default: the client's]"),
        click.option(
            "--wait",
            type=seconds,
            metavar="SECONDS",
            help="Several servers: wait so long when all are gone.  [default: for ever]",
        ),
        click.option(
            "--heartbeat-s",
            type=click.FloatRange(0.2, 600),
            default=5.0,
            show_default=True,
            metavar="SECONDS",
            help="Several servers: one silent for 1.5 times this loses its leases.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def wants_sharding(session: Session, store: str | None, wait: float | None) -> bool:
    """Whether a job is driven by this client.

    Raises:
        UsageError: Options of such a job without a server.
    """
    if not session.servers and (store or wait is not None):
        raise UsageError("--store and --wait are for jobs over several servers: give --server HOST:PORT for each")
    return session.several or (bool(session.servers) and (store is not None or wait is not None))


def sharded_tuner(
    session: Session, store: str | None, wait: float | None, heartbeat_s: float, *, remembered: Sequence[str] = ()
) -> ShardedTuner:
    """The tuner for the servers that were named, else for those of the job."""
    from tuner_client.sharding.addresses import expand
    from tuner_client.sharding.tuning import ShardedTuner, ShardingOptions

    named = session.servers or tuple(remembered)
    servers, notes = expand(named, session.options_of(named))
    for note in notes:
        session.progress.note(note)
    options = ShardingOptions(tuple(servers), store or "", wait, heartbeat_s)
    return ShardedTuner(options, session.data_dir, session.progress, session.quiet)


def tune_on_several(
    session: Session, request: TuneRequest, store: str | None, wait: float | None, heartbeat_s: float
) -> int:
    """``tune`` over several servers; the exit code."""
    from tuner_client.cli.results import run_job

    tuner = sharded_tuner(session, store, wait, heartbeat_s)
    return run_job(session, lambda: tuner.run(request))


def resume_sharded(
    session: Session,
    job: str,
    output: Path | None,
    model: Path | None,
    shapes: dict[str, tuple[int, ...]],
    store: str | None,
    wait: float | None,
    heartbeat_s: float,
) -> int:
    """``resume`` of a job over several servers; the exit code."""
    from tuner_client.cli.results import run_job
    from tuner_client.sharding.journal import remembered_servers

    remembered = remembered_servers(session.data_dir, job)
    tuner = sharded_tuner(session, store, wait, heartbeat_s, remembered=remembered)
    return run_job(session, lambda: tuner.resume(job, output=output, model=model, input_shapes=shapes))


def watch_sharded(
    session: Session, job: str, output: Path | None, model: Path | None, shapes: dict[str, tuple[int, ...]]
) -> int:
    """``watch`` of a job that another process drives; the exit code."""
    from tuner_client.cli.results import run_job
    from tuner_client.sharding.journal import remembered_servers, sharded_job

    def watch() -> JobReport:
        while True:
            report = sharded_job(session.data_dir, job)
            session.progress.job(report)
            if report.ended:
                break
            time.sleep(_WATCH_S)
        if output is None or model is None:
            return report
        remembered = remembered_servers(session.data_dir, job)
        tuner = sharded_tuner(session, None, None, 5.0, remembered=remembered)
        return tuner.resume(job, output=output, model=model, input_shapes=shapes, drive=False)

    return run_job(session, watch)
