"""``tuner-client servers`` and ``drain``."""

from __future__ import annotations

import click

from tuner_client.cli.ending import print_document
from tuner_client.cli.session import Session, session_options
from tuner_core.errors import UsageError


@click.command("servers", epilog="Example: tuner-client servers --server gpu1:50061")
@session_options
def servers_command(session: Session) -> None:
    """What a server offers (devices, shares, workers) and is doing."""
    with session.client() as client:
        host = client.host()
        address = client.connection.address
    from tuner_client.render.listings import host_document, host_view

    if session.as_json:
        print_document({"servers": [host_document(host, address)]})
    else:
        session.show(host_view(host, address))


@click.command("drain", epilog="Example: tuner-client drain --server gpu1:50061")
@session_options
def drain_command(session: Session) -> None:
    """Let a server finish what it holds and take no more jobs."""
    if session.connection is None:
        raise UsageError("drain needs to know which server: give --server HOST:PORT (or set TUNER_SERVER)")
    with session.client() as client:
        jobs = client.drain()
    if session.as_json:
        print_document({"draining": True, "running_jobs": jobs})
    else:
        held = f"finishes {', '.join(jobs)} first" if jobs else "holds no job"
        session.show(f"{session.connection.address} takes no more jobs; it {held}")
