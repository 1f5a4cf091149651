"""``tuner-client servers`` and ``drain``."""

from __future__ import annotations

import click

from tuner_client.cli.ending import print_document
from tuner_client.cli.session import Session, session_options
from tuner_core.errors import TunerError, UsageError


@click.command("servers", epilog="Example: tuner-client servers --server gpu1:50061")
@session_options
def servers_command(session: Session) -> None:
    """What each server offers (devices, shares, workers) and is doing."""
    from tuner_client.render.listings import host_document, host_view

    documents = []
    failures: list[TunerError] = []
    for one, named in session.each_client():
        try:
            with one as client:
                host = client.host()
                address = client.connection.address
        except TunerError as error:
            if not session.several:
                raise
            failures.append(error)
            documents.append({"address": named, "error": str(error)})
            session.show(f"{named}: {error}")
            continue
        documents.append(host_document(host, address))
        session.show(host_view(host, address))
    if session.as_json:
        print_document({"servers": documents})
    if failures and len(failures) == len(documents):
        raise failures[0]


@click.command("drain", epilog="Example: tuner-client drain --server gpu1:50061")
@session_options
def drain_command(session: Session) -> None:
    """Let a server finish what it holds and take no more jobs and leases, until it is restarted."""
    if not session.servers:
        raise UsageError("drain needs to know which server: give --server HOST:PORT (or set TUNER_SERVER)")
    held: dict[str, list[str]] = {}
    for one, named in session.each_client():
        with one as client:
            held[named] = client.drain()
    if session.as_json:
        print_document({"draining": True, "running_jobs": [job for jobs in held.values() for job in jobs]})
        return
    for named, jobs in held.items():
        what = f"finishes {', '.join(jobs)} first" if jobs else "holds no job"
        session.show(f"{named} takes no more jobs until it is restarted; it {what}")
