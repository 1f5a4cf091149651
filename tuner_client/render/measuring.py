"""What measuring on a device has cost: pauses for exclusive measurement, lost workers, measurements made again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tuner_client.render import units

if TYPE_CHECKING:
    from tuner_core.proto.tuner.v1 import host_pb2


def measuring_document(measuring: host_pb2.Measuring) -> dict[str, Any]:
    """Every count, in seconds where it is a time."""
    return {
        "pauses": _spans(measuring.pauses),
        "pause_bound_s": measuring.pause_bound_s,
        "recoveries": _spans(measuring.recoveries),
        "worker_restarts": measuring.worker_restarts,
        "voided_measurements": measuring.voided_measurements,
        "faults": dict(sorted(measuring.faults.items())),
    }


def _spans(spans: host_pb2.Spans) -> dict[str, Any]:
    return {
        "count": spans.count,
        "last_s": round(spans.last_s, 6),
        "longest_s": round(spans.longest_s, 6),
        "total_s": round(spans.total_s, 6),
    }


def measuring_line(measuring: host_pb2.Measuring) -> str:
    """For people; empty when nothing has happened."""
    parts = []
    pauses, recoveries = measuring.pauses, measuring.recoveries
    if pauses.count:
        parts.append(
            f"{units.count(pauses.count, 'pause')} for exclusive measurement, {pauses.total_s:.2f} s in all "
            f"(last {pauses.last_s:.2f} s, longest {pauses.longest_s:.2f} s of {measuring.pause_bound_s:g} s allowed)"
        )
    if measuring.faults:
        faults = ", ".join(f"{kind} {count}" for kind, count in sorted(measuring.faults.items()))
        longest = f", all back within {recoveries.longest_s:.2f} s" if recoveries.count else ""
        parts.append(f"faults: {faults}; {units.count(measuring.worker_restarts, 'worker')} restarted{longest}")
    if measuring.voided_measurements:
        parts.append(f"{units.count(measuring.voided_measurements, 'measurement')} made again")
    return "; ".join(parts)
