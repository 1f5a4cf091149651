"""``tuner-client logs``, ``stats``, ``prune`` and ``tag``: looking after the store."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time

import click

from tuner_client.cli.ending import print_document
from tuner_client.cli.filters import filter_options, parse_age
from tuner_client.cli.session import Session, session_options
from tuner_client.request import parse_tags
from tuner_core.errors import UsageError
from tuner_core.model import Record
from tuner_core.store.interface import RecordFilter


@click.command("logs", epilog="Example: tuner-client logs --follow --op conv2d")
@filter_options
@click.option("--follow", "-f", is_flag=True, help="Go on as records come, until Ctrl-C.")
@click.option("--lines", "-n", type=click.IntRange(0, 1000), default=20, show_default=True, metavar="N", help="Newest.")
@session_options
def logs_command(session: Session, where: RecordFilter, follow: bool, lines: int) -> None:
    """Show records in the order in which they came; with --json, one JSON object per line."""
    if where.nearest_sm_percent is not None:
        raise UsageError("--nearest-share is for query: records that come are shown at their own share")
    from tuner_client.render.listings import record_document, record_line

    def show(record: Record) -> None:
        if session.as_json:
            click.echo(json.dumps(record_document(record), ensure_ascii=False))
        else:
            session.show(record_line(record))

    where = dataclasses.replace(where, include_failed=True)
    with session.client() as client:
        if not follow:
            for record in reversed(client.page(where, limit=lines, order="newest").records if lines else ()):
                show(record)
            return
        with contextlib.suppress(KeyboardInterrupt):  # how a log that is followed ends
            for record in client.follow(where, last=lines):
                show(record)


@click.command("stats", epilog="Example: tuner-client stats --json")
@session_options
def stats_command(session: Session) -> None:
    """Counts of the store, coverage of each model by device and share, and growth."""
    with session.client() as client:
        stats = client.stats()
    if session.as_json:
        print_document(stats)
        return
    from tuner_client.render.listings import stats_view

    session.show(stats_view(stats))


@click.command("prune", epilog="Example: tuner-client prune --older-than 90d --team vision")
@click.option("--older-than", required=True, metavar="AGE", help="E.g. 90d or 12h.")
@click.option(
    "--team", default="", envvar="TUNER_TEAM", metavar="TEAM", help="Only this team's records.  [default: the token's]"
)
@click.option("--dry-run", is_flag=True, help="Say what would go; delete nothing.")
@session_options
def prune_command(session: Session, older_than: str, team: str, dry_run: bool) -> None:
    """Delete your team's old records; the best of each operator, device and share and verified ones stay.

    On a server without tokens and without --team, every team's.
    """
    limit = parse_age(older_than, "--older-than")
    with session.client() as client:
        count = client.prune(limit, team, dry_run=dry_run)
    if session.as_json:
        print_document({"deleted": 0 if dry_run else count, "would_delete": count, "dry_run": dry_run})
        return
    whose = f" of team {team}" if team else ""
    what = f"{count:,} record{'' if count == 1 else 's'}{whose} from before {_moment(limit)}"
    if dry_run:
        session.show(f"would delete {what}; bests and verified ones would stay")
    else:
        session.show(f"deleted {what}; bests and verified ones stay")


def _moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


@click.command("tag", epilog="Example: tuner-client tag 4d7e...c1 release=1.2 reviewed=yes --remove draft")
@click.argument("trial_id", metavar="TRIAL_ID")
@click.argument("tags", metavar="[KEY=VALUE]...", nargs=-1)
@click.option("--remove", multiple=True, metavar="KEY", help="Take this tag off; repeatable.")
@click.option("--team", default="", envvar="TUNER_TEAM", metavar="TEAM", help="Your team, on a server without tokens.")
@session_options
def tag_command(session: Session, trial_id: str, tags: tuple[str, ...], remove: tuple[str, ...], team: str) -> None:
    """Set tags of a record of your team; query, export and logs find it by --tag KEY=VALUE.

    Trial ids are in: tuner-client query --ids (or --json).
    """
    changes: dict[str, str | None] = {**dict.fromkeys(remove), **parse_tags(tags, flag="")}
    if not changes:
        raise UsageError("give KEY=VALUE to set a tag, or --remove KEY")
    with session.client() as client:
        record = client.tag(trial_id, changes, team=team)
    if session.as_json:
        from tuner_client.render.listings import record_document

        print_document(record_document(record))
        return
    now = " ".join(f"{name}={value}" for name, value in sorted(record.tags.items())) or "no tags"
    session.show(f"{record.trial_id[:12]}  {record.description}: {now}")
