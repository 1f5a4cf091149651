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
from tuner_client.render.measuring import measuring_document, measuring_line
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
    table = _table("job", "model", "team", "status", ">share", ">trials", ">failed", ">time", "begun")
    for job in jobs:
        table.add_row(
            job.job,
            job.model,
            Text(job.team),
            job.status,
            f"{job.sm_percent} %",
            f"{job.measured + job.reused:,}/{job.budget:,}",
            str(job.failed),
            units.duration(job.elapsed_s),
            units.ago(job.created_at),
        )
    return table


def record_table(records: Sequence[Record], *, ids: bool = False) -> Table:
    """One row per record; with its whole trial id in front for ``ids``."""
    headings = ("operator", ">latency", ">share", ">SMs", "device", "model", "team", "state", "age")
    table = _table(*(("trial id",) if ids else ()), *headings)
    if ids:
        table.columns[0].min_width = 64
    for column in table.columns:  # figures stay whole, long names take two lines
        column.no_wrap = column.header not in ("operator", "device", "model", "team")
    for record in records:
        table.add_row(
            *((record.trial_id,) if ids else ()),
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


def nearest_line(records: Sequence[Record], asked: int) -> str:
    """Says which shares stand for the one that was asked for."""
    counts: dict[int, int] = {}
    for record in records:
        counts[record.sm_percent] = counts.get(record.sm_percent, 0) + 1
    if set(counts) == {asked}:
        return f"all of exactly {asked} %"
    shares = ", ".join(f"{share} % ({units.count(count, 'record')})" for share, count in sorted(counts.items()))
    return f"nearest to {asked} % for each operator and device: {shares}"


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
                "name": device.name,
                "shares": list(device.shares),
                "present_shares": list(device.present_shares),
                "partition_kinds": list(device.partition_kinds),
                "cuda_version": device.cuda_version,
                "notes": list(device.notes),
                "measuring": measuring_document(device.measuring),
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
        "sm_percent": host.sm_percent,
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
        lines.append(
            Text(
                f"{device.name or device.kind}: {device.model} ({device.arch}), {device.sm_count} {units_word}{driver}"
            )
        )
        lines.append(Text(f"  {_division(device)}", style="dim"))
        if cost := measuring_line(device.measuring):
            lines.append(Text(f"  {cost}", style="dim"))
        lines += [Text(f"  {note}", style="dim") for note in device.notes]
    jobs = ", ".join(host.running_jobs) or "none"
    lines.append(Text(f"jobs: {jobs}; {units.count(host.trials_measured, 'trial')} measured; store {host.store}"))
    names = {device.uuid: device.name or device.kind for device in host.devices}
    table = _table("device", ">worker", "partition", ">share", f">{units_word}", "state", ">pid", "pinned to")
    for worker in host.workers:
        table.add_row(
            names.get(worker.device_uuid, worker.device_uuid),
            str(worker.index),
            worker.partition_kind,
            f"{worker.sm_percent} %",
            str(worker.sm_count_seen),
            Text(worker.state, style="red" if worker.state == "lost" else ""),
            str(worker.pid),
            ", ".join(str(core) for core in worker.affinity),
        )
    return Group(*lines, table) if host.workers else Group(*lines)


def _division(device: host_pb2.Device) -> str:
    """A device's shares, as configured and, where a job has it otherwise, at present."""
    configured = " + ".join(f"{share}" for share in device.shares) or "none"
    text = f"partitions: {configured} %"
    if list(device.present_shares) != list(device.shares):
        text += f", now {' + '.join(f'{share}' for share in device.present_shares) or 'none'} % for a job"
    return text


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
    if stats.get("coverage"):
        table = _table("model", "device", ">share", ">SMs", ">verified", ">operators")
        for row in stats["coverage"]:
            table.add_row(
                Text(row["model"] or "(none)"),
                Text(row["device_model"]),
                f"{row['sm_percent']} %",
                str(row["sm_count"]),
                str(row["verified"]),
                str(row["operators"]),
            )
        parts += [Text("operators of each model with a verified record:"), table]
    days = stats.get("growth") or []
    if any(day["records"] for day in days):
        table = _table("day", ">records")
        for day in days:
            if day["records"]:
                table.add_row(day["day"], f"{day['records']:,}")
        parts += [Text(f"new records in the last {len(days)} days (UTC):"), table]
    return Group(*parts)


def _cell(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{number} {word}" for word, number in value.items())
    return f"{value:,}" if isinstance(value, int) else str(value)
