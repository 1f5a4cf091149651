"""``tuner-client jobs``, ``watch``, ``cancel`` and ``resume``."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from tuner_client.cli.ending import print_document
from tuner_client.cli.session import Session, session_options
from tuner_client.cli.sharded import resume_sharded, sharding_options, watch_sharded
from tuner_client.request import check_model_path, check_output, parse_input_shapes
from tuner_core.errors import UsageError

_BUILD_OPTIONS = [
    click.option("--output", "-o", type=click.Path(path_type=Path), metavar="FILE", help="Build the model at the end."),
    click.option("--model", type=click.Path(path_type=Path), metavar="MODEL", help="The file that was tuned."),
    click.option("--input-shape", multiple=True, metavar="NAME=SHAPE", help="As given to tune; repeatable."),
]


@click.command("jobs", epilog="Example: tuner-client jobs --server gpu1:50061")
@click.option("--limit", type=click.IntRange(1, 10_000), default=20, show_default=True, metavar="N", help="Newest N.")
@session_options
def jobs_command(session: Session, limit: int) -> None:
    """List jobs, newest first: the server's, and those that were sharded over several servers from here."""
    from tuner_client.sharding.journal import sharded_jobs

    jobs = sharded_jobs(session.data_dir)
    if not session.several:
        with session.client() as client:
            jobs += client.jobs(limit)
    jobs = sorted(jobs, key=lambda job: -job.created_at)[:limit]
    if session.as_json:
        print_document({"jobs": [job.document() for job in jobs]})
        return
    from tuner_client.render.listings import job_table

    session.show(job_table(jobs) if jobs else "no jobs; start one with: tuner-client tune MODEL")


def _follow(
    session: Session,
    job: str,
    output: Path | None,
    model: Path | None,
    input_shape: tuple[str, ...],
    *,
    resume: bool,
    store: str | None = None,
    wait: float | None = None,
    heartbeat_s: float = 5.0,
) -> None:
    if (output is None) != (model is None):
        raise UsageError("--output and --model go together: the weights to build with are only in the model's file")
    if model is not None and output is not None:
        check_model_path(model)
        check_output(output)
    shapes = parse_input_shapes(input_shape)
    from tuner_client.cli.results import run_job
    from tuner_client.sharding.journal import is_sharded

    if is_sharded(session.data_dir, job):
        if resume:
            sys.exit(resume_sharded(session, job, output, model, shapes, store, wait, heartbeat_s))
        sys.exit(watch_sharded(session, job, output, model, shapes))
    with session.client(lines=True) as client:
        code = run_job(
            session,
            lambda: client.watch(job, output=output, model=model, input_shapes=shapes, resume=resume),
        )
    sys.exit(code)


@click.command("watch", epilog="Example: tuner-client watch job-3f2a91c0 --server gpu1:50061")
@click.argument("job")
@_BUILD_OPTIONS[0]
@_BUILD_OPTIONS[1]
@_BUILD_OPTIONS[2]
@session_options
def watch_command(
    session: Session, job: str, output: Path | None, model: Path | None, input_shape: tuple[str, ...]
) -> None:
    """Follow JOB to its end; with --output and --model, build the model then.

    Exit codes: 0 done, 1 failed, 2 usage, 3 some operators failed, 130 interrupted.
    """
    _follow(session, job, output, model, input_shape, resume=False)


@click.command("resume", epilog="Example: tuner-client resume job-3f2a91c0 --output model.so --model model.onnx")
@click.argument("job")
@_BUILD_OPTIONS[0]
@_BUILD_OPTIONS[1]
@_BUILD_OPTIONS[2]
@sharding_options
@session_options
def resume_command(
    session: Session,
    job: str,
    output: Path | None,
    model: Path | None,
    input_shape: tuple[str, ...],
    store: str | None,
    wait: float | None,
    heartbeat_s: float,
) -> None:
    """Go on with a stopped, cancelled or failed JOB from what it measured, and follow it.

    A job over several servers goes on with those that it had, unless --server names others.
    """
    _follow(
        session,
        job,
        output,
        model,
        input_shape,
        resume=True,
        store=store,
        wait=wait,
        heartbeat_s=heartbeat_s,
    )


@click.command("cancel", epilog="Example: tuner-client cancel job-3f2a91c0")
@click.argument("job")
@session_options
def cancel_command(session: Session, job: str) -> None:
    """End JOB; what it measured stays in the store."""
    from tuner_client.sharding.journal import cancel_sharded, is_sharded

    if is_sharded(session.data_dir, job):
        report = cancel_sharded(session.data_dir, job)
    else:
        with session.client() as client:
            report = client.cancel(job)
    if session.as_json:
        print_document(report.document())
    elif report.status == "cancelled":
        session.show(f"{job} is cancelled; {report.measured} trials measured are kept")
    else:
        session.show(f"{job} had ended: {report.status}")
