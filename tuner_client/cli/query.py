"""``tuner-client query``."""

from __future__ import annotations

import dataclasses
from typing import Any

import click

from tuner_client.cli.ending import print_document
from tuner_client.cli.filters import filter_options
from tuner_client.cli.session import Session, session_options
from tuner_core.errors import UsageError
from tuner_core.store.interface import RecordFilter


@click.command("query", epilog="Example: tuner-client query --op conv2d --shape 1x?x56x56 --verified --top 1")
@filter_options
@click.option("--top", type=click.IntRange(1), metavar="K", help="Only the best K for each operator, target and share.")
@click.option("--failed", is_flag=True, help="Failed trials too.")
@click.option(
    "--order",
    "--sort",
    "order",
    type=click.Choice(["latency", "newest"]),
    default="latency",
    show_default=True,
    help="Fastest or newest first.",
)
@click.option("--limit", type=click.IntRange(1, 10_000), default=50, show_default=True, metavar="N", help="Page size.")
@click.option("--cursor", metavar="CURSOR", help="Go on where the page before ended.")
@click.option("--ids", is_flag=True, help="Show trial ids in the table, as tag takes them.")
@click.option(
    "--format",
    "output",
    type=click.Choice(["table", "json", "csv"]),
    help="CSV has every field but the trace.  [default: table]",
)
@session_options
def query_command(
    session: Session,
    where: RecordFilter,
    top: int | None,
    failed: bool,
    order: str,
    limit: int,
    cursor: str | None,
    ids: bool,
    output: str | None,
) -> None:
    """Look records up: has anyone tuned this operator, for this device, at this share?"""
    if session.as_json and output in ("table", "csv"):
        raise UsageError(f"give --json or --format {output}, not both")
    output = "json" if session.as_json else output or "table"
    if output != "table":
        session.reserve_stdout()
    where = dataclasses.replace(where, include_failed=failed)
    with session.client() as client:
        page = client.page(where, limit=limit, cursor=cursor, order=order, top_per_key=top or 0)
    if output == "json":
        from tuner_client.render.listings import record_document

        documents = [record_document(record) for record in page.records]
        document: dict[str, Any] = {"records": documents, "next": page.next_cursor}
        if where.nearest_sm_percent is not None:
            document["nearest_sm_percent"] = where.nearest_sm_percent
        print_document(document)
        return
    if output == "csv":
        from tuner_client.render.spreadsheet import record_csv

        click.echo(record_csv(page.records), nl=False)
        if page.next_cursor:
            click.echo(f"more: add --cursor {page.next_cursor}", err=True)
        return
    from tuner_client.render.listings import nearest_line, record_table

    session.show(record_table(page.records, ids=ids) if page.records else "no records match")
    if where.nearest_sm_percent is not None and page.records:
        session.show(nearest_line(page.records, where.nearest_sm_percent))
    if page.next_cursor:
        session.show(f"more: add --cursor {page.next_cursor}")
