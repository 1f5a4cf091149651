"""``tuner-client logs``, ``stats`` and ``prune``: looking after the store."""

from __future__ import annotations

import dataclasses
import json
import time

import click

from tuner_client.cli.ending import print_document
from tuner_client.cli.filters import filter_options, parse_age
from tuner_client.cli.session import Session, session_options
from tuner_core.store.interface import RecordFilter

_POLL_S = 1.0


@click.command("logs", epilog="Example: tuner-client logs --follow --op conv2d")
@filter_options
@click.option("--follow", "-f", is_flag=True, help="Go on as records come, until Ctrl-C.")
@click.option("--lines", "-n", type=click.IntRange(0, 1000), default=20, show_default=True, metavar="N", help="Newest.")
@session_options
def logs_command(session: Session, where: RecordFilter, follow: bool, lines: int) -> None:
    """Show records in the order in which they came; with --json, one JSON object per line."""
    from tuner_client.render.listings import record_document, record_line

    where = dataclasses.replace(where, include_failed=True)
    seen: set[str] = set()
    with session.client() as client:
        first = True
        while True:
            page = client.query(where, limit=1000 if not first or lines == 0 else lines, order="newest")
            fresh = [record for record in reversed(page.records) if record.trial_id not in seen]
            seen = {record.trial_id for record in page.records}
            for record in fresh if not first or lines else ():
                if session.as_json:
                    click.echo(json.dumps(record_document(record), ensure_ascii=False))
                else:
                    session.show(record_line(record))
            first = False
            if not follow:
                return
            time.sleep(_POLL_S)


@click.command("stats", epilog="Example: tuner-client stats --json")
@session_options
def stats_command(session: Session) -> None:
    """Counts and coverage of the store."""
    with session.client() as client:
        stats = client.stats()
    if session.as_json:
        print_document(stats)
        return
    from tuner_client.render.listings import stats_view

    session.show(stats_view(stats))


@click.command("prune", epilog="Example: tuner-client prune --older-than 90d --team vision")
@click.option("--older-than", required=True, metavar="AGE", help="E.g. 90d or 12h.")
@click.option("--team", default="", metavar="TEAM", help="Only this team's records.")
@session_options
def prune_command(session: Session, older_than: str, team: str) -> None:
    """Delete old records; the best of each operator and verified ones stay."""
    limit = parse_age(older_than, "--older-than")
    with session.client() as client:
        deleted = client.prune(limit, team)
    if session.as_json:
        print_document({"deleted": deleted})
    else:
        session.show(f"{deleted} record{'' if deleted == 1 else 's'} deleted")
