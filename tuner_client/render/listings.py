"""Tables of jobs, records and servers, and their JSON documents."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tuner_client.job import JobReport
from tuner_client.render import units
from tuner_core.model import Record

if TYPE_CHECKING:
    from tuner_core.proto.tuner.v1 import host_pb2

_COUNTS = ("records", "valid", "failed", "verified", "workloads")


def _table(*headings: str) -> Table:
    """A table; a heading that begins with ``>`` is of a column of numbers."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    for heading in headings:
        justify: Literal["left", "right"] = "right" if heading.startswith(">") else "left"
        table.add_column(heading.lstrip(">"), justify=justify, no_wrap=True, overflow="ellipsis")
    return table


def job_table(jobs: Sequence[JobReport]) -> Table:
    """One row per job."""
    table = _table("job", "model", "status", ">share", ">trials", ">failed", ">time", "begun")
    for job in jobs:
        table.add_row(
            job.job,
            job.model,
            job.status,
            f"{job.sm_percent} %",
            f"{job.measured + job.reused:,}/{job.budget:,}",
            str(job.failed),
            units.duration(job.elapsed_s),
            units.ago(job.created_at),
        )
    return table


def record_table(records: Sequence[Record]) -> Table:
    """One row per record."""
    table = _table("operator", ">latency", ">share", ">SMs", "device", "model", "team", "state", "age")
    for record in records:
        table.add_row(
            Text(record.description or record.workload_digest[:12]),
            units.latency(record.median_us),
            f"{record.sm_percent} %",
            str(record.sm_count),
            Text(record.device_model),
            Text(record.model),
            Text(record.team),
            _record_state(record),
            units.ago(record.created_at),
        )
    return table


def _record_state(record: Record) -> Text:
    if record.failure is not None:
        return Text(record.failure.value, style="red")
    return Text("verified", style="green") if record.verified else Text("shared")


def record_line(record: Record) -> Text:
    """One line for a log of records."""
    line = Text(time.strftime("%H:%M:%S ", time.localtime(record.created_at)), style="dim", no_wrap=True)
    line.append(f"{units.latency(record.median_us):>9} ", style="bold")
    line.append_text(_record_state(record))
    line.append(
        f"  {record.description or record.workload_digest[:12]}  {record.sm_percent} % of {record.device_model}"
    )
    if record.failure is not None and record.failure_message:
        line.append(f"  {' '.join(record.failure_message.split())[:120]}", style="dim")
    return line


def record_document(record: Record) -> dict[str, Any]:
    """Every field of a record."""
    document = dataclasses.asdict(record)
    document["partition_kind"] = record.partition_kind.value
    document["origin"] = record.origin.value
    document["failure"] = record.failure.value if record.failure is not None else None
    document["tags"] = dict(record.tags)
    return document


def host_document(host: host_pb2.GetHostResponse, address: str) -> dict[str, Any]:
    """Every field of what a server says of itself."""
    return {
        "address": address,
        "instance": host.instance,
        "version": host.version,
        "protocol": host.protocol,
        "tvm_version": host.tvm_version,
        "cuda_version": host.cuda_version,
        "devices": [
            {
                "kind": device.kind,
                "model": device.model,
                "arch": device.arch,
                "uuid": device.uuid,
                "sm_count": device.sm_count,
                "driver_version": device.driver_version,
                "target": json.loads(device.target_json) if device.target_json else None,
            }
            for device in host.devices
        ],
        "workers": [
            {
                "index": worker.index,
                "device_uuid": worker.device_uuid,
                "partition_kind": worker.partition_kind,
                "sm_percent": worker.sm_percent,
                "sm_count_seen": worker.sm_count_seen,
                "state": worker.state,
                "pid": worker.pid,
                "affinity": list(worker.affinity),
            }
            for worker in host.workers
        ],
        "running_jobs": list(host.running_jobs),
        "draining": host.draining,
        "store": host.store,
        "partition_kinds": list(host.partition_kinds),
        "target": json.loads(host.target_json) if host.target_json else None,
        "sm_count": host.sm_count,
        "trials_measured": host.trials_measured,
    }


def host_view(host: host_pb2.GetHostResponse, address: str) -> RenderableType:
    """A server for people: itself, its devices, its workers."""
    head = Text()
    head.append(address, style="bold")
    head.append(f"  {host.instance}  version {host.version}, TVM {host.tvm_version}")
    if host.draining:
        head.append("  draining", style="yellow")
    lines = [head]
    units_word = "SMs"
    for device in host.devices:
        units_word = "cores" if device.kind == "cpu" else "SMs"
        driver = f", driver {device.driver_version}" if device.driver_version else ""
        lines.append(Text(f"{device.kind}: {device.model} ({device.arch}), {device.sm_count} {units_word}{driver}"))
    jobs = ", ".join(host.running_jobs) or "none"
    lines.append(Text(f"jobs: {jobs}; {units.count(host.trials_measured, 'trial')} measured; store {host.store}"))
    table = _table(">worker", "partition", ">share", f">{units_word}", "state", ">pid", "pinned to")
    for worker in host.workers:
        table.add_row(
            str(worker.index),
            worker.partition_kind,
            f"{worker.sm_percent} %",
            str(worker.sm_count_seen),
            Text(worker.state, style="red" if worker.state == "lost" else ""),
            str(worker.pid),
            ", ".join(str(core) for core in worker.affinity),
        )
    return Group(*lines, table) if host.workers else Group(*lines)


def stats_view(stats: Mapping[str, Any]) -> RenderableType:
    """Counts for people."""
    counts = [f"{stats[name]:,} {name}" for name in _COUNTS if name in stats]
    parts: list[RenderableType] = [Text(", ".join(counts))]
    for name in ("by_device", "by_model", "by_team"):
        group = stats.get(name) or {}
        if group:
            table = _table(name.removeprefix("by_"), ">records")
            for key, value in sorted(group.items(), key=lambda item: str(item[0])):
                table.add_row(str(key) or "(none)", _cell(value))
            parts.append(table)
    return Group(*parts)


def _cell(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{number} {word}" for word, number in value.items())
    return f"{value:,}" if isinstance(value, int) else str(value)
