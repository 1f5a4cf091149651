"""``tuner-client query``."""

from __future__ import annotations

import dataclasses

import click

from tuner_client.cli.ending import print_document
from tuner_client.cli.filters import filter_options
from tuner_client.cli.session import Session, session_options
from tuner_core.store.interface import RecordFilter


@click.command("query", epilog="Example: tuner-client query --op conv2d --max-sm-percent 50 --verified --top 1")
@filter_options
@click.option("--top", type=click.IntRange(1), metavar="K", help="Only the best K for each operator, target and share.")
@click.option("--failed", is_flag=True, help="Failed trials too.")
@click.option("--order", type=click.Choice(["latency", "newest"]), default="latency", show_default=True, help="Order.")
@click.option("--limit", type=click.IntRange(1, 10_000), default=50, show_default=True, metavar="N", help="Page size.")
@click.option("--cursor", metavar="CURSOR", help="Go on where the page before ended.")
@session_options
def query_command(
    session: Session,
    where: RecordFilter,
    top: int | None,
    failed: bool,
    order: str,
    limit: int,
    cursor: str | None,
) -> None:
    """Look records up: has anyone tuned this operator, for this device, at this share?"""
    where = dataclasses.replace(where, include_failed=failed)
    with session.client() as client:
        page = client.query(where, limit=limit, cursor=cursor, order=order, top_per_key=top or 0)
    from tuner_client.render.listings import record_document, record_table

    if session.as_json:
        print_document({"records": [record_document(record) for record in page.records], "next": page.next_cursor})
        return
    session.show(record_table(page.records) if page.records else "no records match")
    if page.next_cursor:
        session.show(f"more: add --cursor {page.next_cursor}")
