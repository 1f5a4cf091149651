"""What a record and a workload must look like before any backend stores them."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import re
from collections.abc import Mapping

from tuner_core.errors import InvalidRecordError, UsageError
from tuner_core.model import Record, Workload, canonical_json, sha256_hex, target_digest, trial_id_of_digest
from tuner_core.store.compression import MAX_BODY_BYTES, MAX_TRACE_BYTES

_MAX_TAG = 200
_HEX = re.compile(r"[0-9a-f]{64}\Z")
_INSTRUCTIONS_END = "]]],[["
_INSTRUCTIONS_KEPT = 256
_INSTRUCTIONS_BYTES = 65_536
_target_digest = functools.lru_cache(maxsize=256)(target_digest)
# beginnings of traces up to the end of the instructions, known to be canonical JSON
_canonical_heads: set[str] = set()


def check_workload(workload: Workload) -> None:
    """Raise InvalidRecordError unless the digest is that of the body."""
    if len(workload.body) > MAX_BODY_BYTES:
        raise InvalidRecordError(f"workload {workload.digest[:12]}: its body is larger than {MAX_BODY_BYTES} bytes")
    if sha256_hex(workload.body) != workload.digest:
        raise InvalidRecordError(f"workload {workload.digest[:12]}: its digest is not the sha256 of its body")


def check_tags(tags: Mapping[str, str | None]) -> None:
    """Raise UsageError unless these are tags that a record may be given; None removes one."""
    if not tags:
        raise UsageError("no tag was given: KEY=VALUE sets one")
    for name, value in tags.items():
        if not name or len(name) > _MAX_TAG or not name.isprintable():
            raise UsageError(f"a tag's name is one printable line of 1 to {_MAX_TAG} characters, not {name[:60]!r}")
        if value is not None and (len(value) > _MAX_TAG or not (value.isprintable() or not value)):
            raise UsageError(f"the value of tag {name} must be one printable line of at most {_MAX_TAG} characters")


def check_record(record: Record) -> str:
    """Check that a record is whole and that its content addresses are true.

    A false ``trial_id`` would keep the true trial of that id out of the store for ever; a false target digest would
    answer look-ups for another target.

    Returns:
        The digest of the record's trace.

    Raises:
        InvalidRecordError: Says what is wrong with which record.
    """
    name = f"record {record.trial_id[:12]}"
    if not _HEX.match(record.trial_id) or not _HEX.match(record.workload_digest):
        raise InvalidRecordError(f"{name}: trial_id and workload_digest must be sha256 in lower-case hex")
    if len(record.trace) > MAX_TRACE_BYTES:
        raise InvalidRecordError(f"{name}: its trace is larger than {MAX_TRACE_BYTES} bytes")
    digest = _checked_address(record, name)
    check_figures(record)
    return digest


def _checked_address(record: Record, name: str) -> str:
    try:
        digest = _trace_digest(record.trace)
    except (ValueError, RecursionError):
        raise InvalidRecordError(f"{name}: its trace is not JSON") from None
    try:
        if _target_digest(record.target_json) != record.target_digest:
            raise InvalidRecordError(f"{name}: its target digest is not that of its target")
    except (ValueError, RecursionError):
        raise InvalidRecordError(f"{name}: its target is not JSON") from None
    if trial_id_of_digest(record.key, digest, record.job, record.verified) != record.trial_id:
        raise InvalidRecordError(f"{name}: its trial_id is not the address of its content")
    return digest


def _trace_digest(trace: str) -> str:
    """:func:`trace_digest`, quicker for a canonical trace whose instructions another one had before.

    All schedules of one design space have the same instructions and differ by their decisions, a tenth of the text.
    """
    end = trace.find(_INSTRUCTIONS_END) + 3
    head = trace[:end]
    if end > 2 and head in _canonical_heads and trace[-1:] == "]":
        decisions = trace[end + 1 : -1]
        with contextlib.suppress(ValueError):  # something else follows the instructions
            if canonical_json(json.loads(decisions)) == decisions:
                return sha256_hex(trace)
    parsed = json.loads(trace)
    canonical = canonical_json(parsed)
    small = 2 < end <= _INSTRUCTIONS_BYTES
    if small and canonical == trace and isinstance(parsed, list) and head == "[" + canonical_json(parsed[0]):
        if len(_canonical_heads) >= _INSTRUCTIONS_KEPT:
            _canonical_heads.clear()
        _canonical_heads.add(head)
    return sha256_hex(canonical)


def check_figures(record: Record) -> None:
    """The part of :func:`check_record` that costs nothing: what a message could not even carry.

    Raises:
        InvalidRecordError: Says what is wrong with which record.
    """
    name = f"record {record.trial_id[:12]}"
    if not 1 <= record.sm_percent <= 100:
        raise InvalidRecordError(f"{name}: sm_percent {record.sm_percent} is not in 1..100")
    if record.sm_count < 1 or record.neighbours < 0:
        raise InvalidRecordError(f"{name}: sm_count must be positive and neighbours not negative")
    if not math.isfinite(record.created_at):
        raise InvalidRecordError(f"{name}: its time is not a number")
    if record.failure is None:
        if record.median_us is None:
            raise InvalidRecordError(f"{name}: it has neither a latency nor a failure")
        if not math.isfinite(record.median_us) or record.median_us <= 0:
            raise InvalidRecordError(f"{name}: its latency {record.median_us} us is not a positive number")
    elif record.median_us is not None:
        raise InvalidRecordError(f"{name}: a failed trial has no latency")
