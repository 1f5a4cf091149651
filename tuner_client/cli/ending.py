"""How a command ends: one error line, one JSON document, an exit code."""

from __future__ import annotations

import itertools
import json
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from tuner_core.errors import ExitCode, TunerError

INTERRUPTED = 130  # 128 + SIGINT, as shells have it


def print_document(document: Any) -> None:
    """The one JSON document of a command, on standard output."""
    click.echo(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False))


def fail(error: Exception, arguments: Sequence[str]) -> int:
    """Say the one line that an error comes down to; under ``--json`` also as a document.

    A traceback only with ``--debug``; that of an unexpected error also goes to the log.

    Returns:
        The exit code.
    """
    if "--debug" in arguments:
        traceback.print_exception(error, file=sys.stderr)
    if isinstance(error, TunerError):
        text, code = " ".join(str(error).split()), error.exit_code
    else:
        from tuner_client.logfile import log_path, log_traceback

        data_dir = _data_dir(arguments)
        log_traceback(data_dir, error)
        what = " ".join(str(error).split())[:300]
        text = f"internal error: {type(error).__name__}: {what} (traceback in {log_path(data_dir)}, or with --debug)"
        code = ExitCode.FAILED
    click.echo(f"error: {text}", err=True)
    if _wants_json(arguments):
        print_document({"status": "failed", "error": text, "exit_code": int(code)})
    return int(code)


def interrupted(arguments: Sequence[str]) -> int:
    """Ctrl-C before there was a job, or in a command without one."""
    click.echo("interrupted", err=True)
    if _wants_json(arguments):
        print_document({"status": "cancelled", "error": "interrupted", "exit_code": INTERRUPTED})
    return INTERRUPTED


def _wants_json(arguments: Sequence[str]) -> bool:
    formats = [after for name, after in itertools.pairwise(arguments) if name == "--format"]
    return "--json" in arguments or "--format=json" in arguments or "json" in formats


def _data_dir(arguments: Sequence[str]) -> Path:
    from tuner_core.datadir import default_data_dir

    for index, argument in enumerate(arguments):
        if argument == "--data-dir" and index + 1 < len(arguments):
            return Path(arguments[index + 1])
        if argument.startswith("--data-dir="):
            return Path(argument.partition("=")[2])
    return default_data_dir()


def environment_server() -> list[str]:
    """Servers named by ``TUNER_SERVER``, separated by spaces or commas."""
    return os.environ.get("TUNER_SERVER", "").replace(",", " ").split()
