"""How a job that was followed is shown at its end."""

from __future__ import annotations

from collections.abc import Callable

import click

from tuner_client.cli.ending import INTERRUPTED, print_document
from tuner_client.cli.session import Session
from tuner_client.job import DETACHED, JobInterrupted, JobReport
from tuner_client.render.tasks import final_view
from tuner_core.errors import ExitCode
from tuner_core.model import JobState


def run_job(session: Session, work: Callable[[], JobReport]) -> int:
    """Do the work that follows a job, show how it ended.

    Returns:
        The exit code.
    """
    try:
        report = work()
    except JobInterrupted as interruption:
        session.close_view()
        report = interruption.report
        if session.as_json:
            print_document(report.document())
        click.echo(_after_interrupt(session, report), err=session.as_json)
        return INTERRUPTED
    session.close_view()
    if session.as_json:
        print_document(report.document())
    elif report.status == DETACHED:
        click.echo(_after_detach(session, report))
    else:
        session.show(final_view(report))
        if report.outputs_match is False:
            click.echo("warning: the tuned model's outputs differ from the untuned one's: do not use it", err=True)
    if report.error and report.exit_code is ExitCode.FAILED:
        click.echo(f"error: {' '.join(report.error.split())}", err=True)
    return int(report.exit_code)


def _flag(session: Session) -> str:
    return f" --server {session.connection.address}" if session.connection else ""


def _after_interrupt(session: Session, report: JobReport) -> str:
    flag = _flag(session)
    if report.status == DETACHED:
        return (
            f"detached: {report.job} goes on at the server\n"
            f"  follow it again:  tuner-client watch {report.job}{flag}\n"
            f"  resume it, should the server stop:  tuner-client resume {report.job}{flag}\n"
            f"  end it:  tuner-client cancel {report.job}{flag}"
        )
    if report.status == JobState.STOPPED:
        return f"stopped: {report.job} is saved; go on with: tuner-client resume {report.job}{flag}"
    return f"{report.job} had ended: {report.status}"


def _after_detach(session: Session, report: JobReport) -> str:
    flag = _flag(session)
    return (
        f"{report.job} runs on the server\n"
        f"  follow it:  tuner-client watch {report.job}{flag}\n"
        f"  end it:  tuner-client cancel {report.job}{flag}"
    )
