"""``tuner-client export`` and ``import``: TVM JSONDatabase folders."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import click

from tuner_client.cli.ending import print_document
from tuner_client.cli.filters import filter_options
from tuner_client.cli.session import Session, session_options
from tuner_client.request import check_sm_percent
from tuner_core.errors import ExitCode, UsageError
from tuner_core.store.interface import RecordFilter


def _document(report: Any) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        if isinstance(value, Path):
            return str(value)
        if isinstance(value, dict):
            return {str(key): plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return value

    document: dict[str, Any] = plain(dataclasses.asdict(report))
    return document


@click.command("export", epilog="Example: tuner-client export ./database --verified --sm-percent 25")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--split", is_flag=True, help="A folder in DIR for each target, device and SM count.")
@filter_options
@session_options
def export_command(session: Session, folder: Path, where: RecordFilter, split: bool) -> None:
    """Write valid records to DIR as stock TVM's ms.database.JSONDatabase reads them.

    Stock look-ups ignore target and share, so DIR takes records of one target, device and SM count: choose them with
    --device and --sm-count, or use --split.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is not a directory")
    with session.client() as client:
        report = client.export_records(folder, where, split=split)
    if session.as_json:
        print_document(_document(report))
    else:
        session.show(report.line())


@click.command("import", epilog="Example: tuner-client import ./database --sm-percent 100 --team vision")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--sm-percent", type=int, metavar="P", help="Share that DIR was measured at.  [default: 100]")
@click.option("--device", metavar="NAME", help="Model, UUID or name (cuda:1), where the server has several models.")
@click.option("--team", default="", envvar="TUNER_TEAM", metavar="TEAM", help="Team that the records belong to.")
@session_options
def import_command(session: Session, folder: Path, sm_percent: int | None, device: str | None, team: str) -> None:
    """Read DIR, written by stock TVM's ms.database.JSONDatabase on a device like the server's.

    Lines that cannot be read are named; the rest is imported, and the exit code is 3.
    """
    check_sm_percent(sm_percent)
    if not folder.is_dir():
        raise UsageError(f"there is no folder {folder}")
    with session.client() as client:
        report = client.import_records(folder, sm_percent=sm_percent, device=device, team=team)
    if session.as_json:
        print_document(_document(report))
    else:
        session.show(report.line())
        for problem in report.problems:
            click.echo(f"skipped: {problem}", err=True)
    sys.exit(ExitCode.PARTLY if report.problems else ExitCode.DONE)
