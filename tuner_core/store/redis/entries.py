"""The bytes in Redis: records, members of indexes, heads and facts of groups.

A stored record is a header that the scripts read (group, look-up key, schedule: 16 bytes each; stamp, creation time,
median, stamp of condemnation: doubles; flags) and a body that only this module reads. All numbers are big-endian.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tuner_core.model import (
    EvaluatorSettings,
    FailureKind,
    Origin,
    PartitionKind,
    Record,
    RecordKey,
    canonical_json,
)
from tuner_core.store.compression import MAX_TRACE_BYTES, pack, unpack

VERIFIED, FAILED, WRONG = 1, 2, 4

# what differs from trial to trial; everything else of a record stands once in its group
_OWN = frozenset(
    {
        "trial_id",
        "trace",
        "neighbours",
        "verified",
        "latencies_us",
        "median_us",
        "ci_low_us",
        "ci_high_us",
        "created_at",
        "failure",
        "failure_message",
    }
)
SHARED = tuple(field.name for field in dataclasses.fields(Record) if field.name not in _OWN)


@functools.lru_cache(maxsize=256)
def _evaluator(*facts: tuple[str, Any]) -> EvaluatorSettings:
    return EvaluatorSettings(**dict(facts))


_MADE: dict[str, Callable[[Any], Any]] = {
    "partition_kind": PartitionKind,
    "origin": Origin,
    "evaluator": lambda facts: _evaluator(*sorted(facts.items())),
    "affinity": tuple,
}

_HEADER = struct.Struct(">HHBddi")
_STORED = struct.Struct(">16s16s16sddddB")
_HEAD = struct.Struct(">5Iddd")
_DAY_S = 86_400


def short(text: str) -> bytes:
    """Sixteen bytes that stand for a text."""
    return hashlib.sha256(text.encode()).digest()[:16]


def key_id(key: RecordKey) -> bytes:
    """Sixteen bytes that stand for a look-up key among those of its workload."""
    return short(canonical_json([key.target_digest, key.device_model, key.sm_count, key.tvm_version]))


def facts_of(record: Record) -> tuple[bytes, bytes]:
    """Id and stored form of what a record has in common with others of its batch."""
    facts = {name: getattr(record, name) for name in SHARED}
    facts["evaluator"] = dataclasses.asdict(record.evaluator)
    facts["tags"] = dict(record.tags)
    text = canonical_json(facts)
    return short(text), zlib.compress(text.encode(), 6)


def group_record(facts: bytes) -> Record:
    """What the records of a group have in common, as a record with the rest left blank. New fields keep defaults."""
    stored: Mapping[str, Any] = json.loads(zlib.decompress(facts))
    given: dict[str, Any] = {
        name: _MADE[name](value) if name in _MADE else value for name, value in stored.items() if name in SHARED
    }
    return Record(trial_id="", trace="", **given)


def header(record: Record, trace_digest: str, group: int, key: int) -> bytes:
    """What the commit script reads of a record; ``group`` and ``key`` are numbers within the call."""
    flags = VERIFIED * record.verified + FAILED * (record.failure is not None)
    flags += WRONG * (record.failure is FailureKind.WRONG_RESULT)
    median = math.inf if record.median_us is None else record.median_us
    day = math.floor(record.created_at / _DAY_S)
    return (
        bytes.fromhex(record.trial_id)
        + bytes.fromhex(trace_digest)[:16]
        + _HEADER.pack(group, key, flags, median, record.created_at, max(-(2**31), min(day, 2**31 - 1)))
    )


def body(record: Record) -> bytes:
    """What only this module reads of a record."""
    latencies = record.latencies_us
    message = record.failure_message.encode()
    kind = (record.failure or "").encode()
    low = math.nan if record.ci_low_us is None else record.ci_low_us
    high = math.nan if record.ci_high_us is None else record.ci_high_us
    return (
        struct.pack(">IddHBI", record.neighbours, low, high, len(latencies), len(kind), len(message))
        + struct.pack(f">{len(latencies)}d", *latencies)
        + kind
        + message
        + pack(record.trace)
    )


def group_of(stored: bytes) -> bytes:
    """The group of a stored record."""
    return stored[:16]


def record_of(trial: bytes, stored: bytes, shared: Record) -> Record:
    """The record of its stored form and its group's."""
    _, _, _, _, created_at, median_us, _, flags = _STORED.unpack_from(stored)
    at = _STORED.size
    neighbours, low, high, samples, kind_bytes, message_bytes = struct.unpack_from(">IddHBI", stored, at)
    at += struct.calcsize(">IddHBI")
    latencies = struct.unpack_from(f">{samples}d", stored, at)
    at += 8 * samples
    kind = stored[at : at + kind_bytes].decode()
    at += kind_bytes
    message = stored[at : at + message_bytes].decode()
    trace = unpack(stored[at + message_bytes :], limit=MAX_TRACE_BYTES, what="stored trace")
    own: dict[str, Any] = {
        "trial_id": trial.hex(),
        "trace": trace,
        "neighbours": neighbours,
        "verified": bool(flags & VERIFIED),
        "latencies_us": latencies,
        "median_us": None if math.isinf(median_us) else median_us,
        "ci_low_us": None if math.isnan(low) else low,
        "ci_high_us": None if math.isnan(high) else high,
        "created_at": created_at,
        "failure": FailureKind(kind) if kind else None,
        "failure_message": message,
    }
    return dataclasses.replace(shared, **own)


@dataclass(frozen=True, slots=True)
class Head:
    """Counts and best of a group. ``live``: valid, and its schedule not found wrong. ``best_us`` may be condemned."""

    records: int
    valid: int
    verified: int
    live: int
    live_verified: int
    best_us: float
    newest: float


def read_head(stored: bytes) -> Head:
    """The head of its stored form."""
    records, valid, verified, live, live_verified, _, best, newest = _HEAD.unpack(stored)
    return Head(records, valid, verified, live, live_verified, best, newest)


@dataclass(frozen=True, slots=True)
class Entry:
    """A record in an index.

    Attributes:
        value: What the index orders by: latency in microseconds, or minus the creation time.
        trial: Its id, which breaks ties.
        stamp: When it was stored, in the server's microseconds.
        created_at: None in an index by time (``value`` says it).
        flags: ``VERIFIED``, ``FAILED``.
        condemned: When its schedule was found wrong; 0: never.
    """

    value: float
    trial: bytes
    stamp: float
    created_at: float
    flags: int
    condemned: float


_BY_LATENCY = struct.Struct(">32sddB")
_BY_TIME = struct.Struct(">32sdB")
_STAMP = struct.Struct(">d")


def entry_by_latency(member: bytes, score: float) -> Entry:
    """An entry of ``latency:`` or ``best:``."""
    trial, stamp, created_at, flags = _BY_LATENCY.unpack_from(member)
    condemned = _STAMP.unpack_from(member, _BY_LATENCY.size)[0] if len(member) > _BY_LATENCY.size else 0.0
    return Entry(score, trial, stamp, created_at, flags, condemned)


def entry_by_time(member: bytes, score: float) -> Entry:
    """An entry of ``time:``."""
    trial, stamp, flags = _BY_TIME.unpack_from(member)
    condemned = _STAMP.unpack_from(member, _BY_TIME.size)[0] if len(member) > _BY_TIME.size else 0.0
    return Entry(score, trial, stamp, -score, flags, condemned)


def is_condemned(stored: bytes | None) -> bool:
    """Whether the schedule of a stored record was found wrong."""
    return stored is not None and bool(_STORED.unpack_from(stored)[6])
