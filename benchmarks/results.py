"""Result files: JSON ``{schema, device, driver, date, command, commit, rows: [...]}``, with machine and versions."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

SCHEMA = 1
DIRECTORY = Path(__file__).parent / "results"
PACKAGES = ("apache-tvm", "apache-tvm-ffi", "xgboost-cpu", "numpy", "grpcio")


def cpu_model() -> str:
    """Model name of this machine's processor."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    """What the figures depend on besides the code."""
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_1min_before": round(os.getloadavg()[0], 2),
    }


def versions() -> dict[str, str]:
    """Versions of the packages that decide about speed; those installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The checkout's commit, with ``-dirty`` when tracked files differ from it; ``unknown`` outside a checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def write(
    name: str,
    rows: Sequence[Mapping[str, Any]],
    *,
    device: str,
    driver: str | None,
    machine_before: Mapping[str, Any],
    directory: Path = DIRECTORY,
    markdown: Sequence[str] = (),
    **more: Any,
) -> Path:
    """Write one result file.

    Args:
        name: Of the file, without suffix.
        rows: The figures.
        device: Model of the device that was measured.
        driver: Its driver's version; None on a CPU.
        machine_before: :func:`machine`, taken before the run.
        directory: Where to.
        markdown: Lines for people, written beside it with where they come from.
        more: Further fields.

    Returns:
        The file.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}.json"
    document = {
        "schema": SCHEMA,
        "device": device,
        "driver": driver,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "command": shlex.join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]]),
        "commit": commit(),
        "machine": dict(machine_before),
        "versions": versions(),
        **more,
        "rows": [dict(row) for row in rows],
    }
    path.write_text(json.dumps(document, indent=1) + "\n")
    if markdown:
        origin = (
            f"{device}, driver {driver}, {document['date'][:10]}: `{document['command']}` at {document['commit'][:7]}"
        )
        path.with_suffix(".md").write_text("\n".join([*markdown, origin, ""]))
    return path
