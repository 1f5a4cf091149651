"""Records, workloads and filters to and from the messages of ``tuner.v1``. Bodies and traces travel as zlib."""

from __future__ import annotations

import functools
import json
import math
from dataclasses import asdict
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp

from tuner_core.errors import InvalidRecordError, UsageError
from tuner_core.model import (
    EvaluatorSettings,
    FailureKind,
    Origin,
    PartitionKind,
    Record,
    RecordKey,
    Workload,
    canonical_json,
)
from tuner_core.proto.tuner.v1 import records_pb2
from tuner_core.store.compression import MAX_BODY_BYTES, MAX_TRACE_BYTES, pack, unpack
from tuner_core.store.interface import RecordFilter

_SAME_FIELDS = (
    "trial_id",
    "workload_digest",
    "target_json",
    "target_digest",
    "device_model",
    "device_arch",
    "sm_percent",
    "sm_count",
    "neighbours",
    "verified",
    "tvm_version",
    "cuda_version",
    "driver_version",
    "job",
    "team",
    "model",
    "failure_message",
    "instance",
    "op",
    "description",
    "layout",
)
_KEY_FIELDS = ("workload_digest", "target_digest", "device_model", "sm_count", "tvm_version")
_FILTER_TEXTS = (
    "op",
    "text",
    "model",
    "dtype",
    "device_model",
    "team",
    "job",
    "workload_digest",
    "target_digest",
    "tvm_version",
    "verified_only",
    "include_failed",
    "shape",
)
_FILTER_NUMBERS = ("sm_percent", "min_sm_percent", "max_sm_percent", "sm_count", "nearest_sm_percent")


def timestamp(seconds: float) -> Timestamp:
    """Seconds since the epoch as a Timestamp; :func:`seconds` gives the same float back.

    Raises:
        UsageError: Outside the years 1 to 9999.
    """
    try:
        whole = math.floor(seconds)
        found = Timestamp(seconds=whole, nanos=min(round((seconds - whole) * 1e9), 999_999_999))
        found.ToJsonString()  # checks the range
    except (ValueError, OverflowError):
        raise UsageError(f"time {seconds} is out of range") from None
    return found


def seconds(stamp: Timestamp) -> float:
    """A Timestamp as seconds since the epoch."""
    return float(stamp.seconds + stamp.nanos / 1e9)


def workload_to_message(workload: Workload) -> records_pb2.Workload:
    """A workload as a message."""
    return records_pb2.Workload(
        digest=workload.digest,
        body_zlib=pack(workload.body),
        structural_hash=workload.structural_hash,
        op=workload.op,
        description=workload.description,
        args_info_json=json.dumps(workload.args_info),
    )


def workload_from_message(message: records_pb2.Workload) -> Workload:
    """The workload of a message.

    Raises:
        InvalidRecordError: Its body or its arguments are malformed or too large.
    """
    try:
        args_info = tuple(
            (str(kind), str(dtype), tuple(int(extent) for extent in shape))
            for kind, dtype, shape in json.loads(message.args_info_json or "[]")
        )
    except (ValueError, TypeError, RecursionError):
        raise InvalidRecordError(f"workload {message.digest[:12]}: args_info is malformed") from None
    return Workload(
        digest=message.digest,
        body=unpack(message.body_zlib, limit=MAX_BODY_BYTES, what=f"body of workload {message.digest[:12]}"),
        structural_hash=message.structural_hash,
        op=message.op,
        description=message.description,
        args_info=args_info,
    )


def record_to_message(record: Record, *, with_trace: bool = True) -> records_pb2.Record:
    """A record as a message; without its trace where nobody will apply it."""
    return records_pb2.Record(
        **{name: getattr(record, name) for name in _SAME_FIELDS},
        trace_zlib=pack(record.trace) if with_trace else b"",
        partition_kind=record.partition_kind.value,
        latencies_us=record.latencies_us,
        median_us=record.median_us,
        ci_low_us=record.ci_low_us,
        ci_high_us=record.ci_high_us,
        evaluator_json=_evaluator_json(record.evaluator),
        created_at=timestamp(record.created_at),
        failure=record.failure.value if record.failure else "",
        origin=record.origin.value,
        affinity=record.affinity,
        tags=dict(record.tags),
    )


def record_from_message(message: records_pb2.Record) -> Record:
    """The record of a message; its trace is empty where the message was made without.

    Raises:
        InvalidRecordError: A field is malformed or too large.
    """
    name = f"record {message.trial_id[:12]}"
    try:
        evaluator = _evaluator(message.evaluator_json)
        partition_kind = PartitionKind(message.partition_kind)
        failure = FailureKind(message.failure) if message.failure else None
        origin = Origin(message.origin)
    except (ValueError, TypeError, RecursionError) as error:
        raise InvalidRecordError(f"{name}: a field is malformed ({error})") from None
    trace = unpack(message.trace_zlib, limit=MAX_TRACE_BYTES, what=f"trace of {name}") if message.trace_zlib else ""
    same: dict[str, Any] = {field: getattr(message, field) for field in _SAME_FIELDS}
    return Record(
        **same,
        trace=trace,
        partition_kind=partition_kind,
        latencies_us=tuple(message.latencies_us),
        median_us=_optional(message, "median_us"),
        ci_low_us=_optional(message, "ci_low_us"),
        ci_high_us=_optional(message, "ci_high_us"),
        evaluator=evaluator,
        created_at=seconds(message.created_at),
        failure=failure,
        origin=origin,
        affinity=tuple(message.affinity),
        tags=dict(message.tags),
    )


def key_to_message(key: RecordKey) -> records_pb2.RecordKey:
    """A look-up key as a message."""
    return records_pb2.RecordKey(**{name: getattr(key, name) for name in _KEY_FIELDS})


def key_from_message(message: records_pb2.RecordKey) -> RecordKey:
    """The look-up key of a message."""
    return RecordKey(**{name: getattr(message, name) for name in _KEY_FIELDS})


def filter_to_message(where: RecordFilter) -> records_pb2.RecordFilter:
    """A filter as a message; unset stays unset."""
    return records_pb2.RecordFilter(
        **{name: getattr(where, name) for name in (*_FILTER_TEXTS, *_FILTER_NUMBERS)},
        since=None if where.since is None else timestamp(where.since),
        tags=dict(where.tags),
    )


def filter_from_message(message: records_pb2.RecordFilter) -> RecordFilter:
    """The filter of a message."""
    return RecordFilter(
        **{name: getattr(message, name) for name in _FILTER_TEXTS},
        **{name: _optional(message, name) for name in _FILTER_NUMBERS},
        since=seconds(message.since) if message.HasField("since") else None,
        tags=dict(message.tags),
    )


@functools.lru_cache(maxsize=64)
def _evaluator_json(evaluator: EvaluatorSettings) -> str:
    return canonical_json(asdict(evaluator))


@functools.lru_cache(maxsize=64)
def _evaluator(text: str) -> EvaluatorSettings:
    return EvaluatorSettings(**json.loads(text or "{}"))


def _optional(message: Any, name: str) -> Any:
    return getattr(message, name) if message.HasField(name) else None
