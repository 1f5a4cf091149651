"""Records and workloads to and from rows. Writing interns what trials share; reading puts it back."""

from __future__ import annotations

import hashlib
import json
import math
import operator
import sqlite3
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from typing import Any

from tuner_core.errors import InvalidRecordError, NotFoundError
from tuner_core.model import (
    FailureKind,
    Record,
    RecordKey,
    Workload,
    canonical_json,
)
from tuner_core.store.compression import MAX_BODY_BYTES, MAX_TRACE_BYTES, pack, unpack
from tuner_core.store.sqlite.catalogue import Catalogue, read_args_info

RECORD_COLUMNS = (
    "r.trial_id, r.group_id, r.verified, r.sort_us, r.created_at, r.neighbours, r.ci_low_us, r.ci_high_us, "
    "r.latencies_us, r.failure, r.failure_message, r.trace"
)
# what differs from trial to trial; everything else is the group's
_OF_A_TRIAL = frozenset(
    {
        "trial_id",
        "trace",
        "verified",
        "latencies_us",
        "median_us",
        "ci_low_us",
        "ci_high_us",
        "created_at",
        "neighbours",
        "failure",
        "failure_message",
    }
)
_shared_facts = operator.attrgetter(
    *(field.name for field in fields(Record) if field.name not in _OF_A_TRIAL and field.name != "tags")
)


class RecordWriter:
    """Writes into one open transaction. What it interned is good only as long as that transaction is."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._workloads: dict[str, tuple[int, str, str]] = {}
        self._targets: dict[str, int] = {}
        self._keys: dict[RecordKey, int] = {}
        self._groups: dict[tuple[Any, ...], int] = {}

    def put_workload(self, workload: Workload) -> None:
        """Store a workload unless its digest is there already."""
        self._connection.execute(
            "INSERT INTO workloads (digest, body, structural_hash, op, description, args_info) "
            "VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (digest) DO NOTHING",
            (
                bytes.fromhex(workload.digest),
                pack(workload.body),
                workload.structural_hash,
                workload.op,
                workload.description,
                json.dumps(workload.args_info),
            ),
        )

    def put_record(self, record: Record, trace_digest: str) -> bool:
        """Store a record unless its trial_id is there already; returns whether it was new.

        Raises:
            InvalidRecordError: Its workload is not stored.
        """
        key_id = self._key(record)
        group_id = self._group(record, key_id)
        digest = bytes.fromhex(trace_digest)
        condemned = self._connection.execute(
            "SELECT record_id FROM condemned WHERE key_id = ? AND trace_digest = ?", (key_id, digest)
        ).fetchone()
        cursor = self._connection.execute(
            "INSERT INTO records (trial_id, key_id, group_id, verified, sort_us, created_at, condemned_by, neighbours, "
            "ci_low_us, ci_high_us, latencies_us, failure, failure_message, trace_digest, trace) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (trial_id) DO NOTHING",
            (
                bytes.fromhex(record.trial_id),
                key_id,
                group_id,
                record.verified,
                math.inf if record.median_us is None else record.median_us,
                record.created_at,
                condemned[0] if condemned else None,
                record.neighbours,
                record.ci_low_us,
                record.ci_high_us,
                struct.pack(f"<{len(record.latencies_us)}d", *record.latencies_us),
                record.failure,
                record.failure_message,
                digest,
                pack(record.trace),
            ),
        )
        if cursor.rowcount == 0:
            return False
        if record.failure is FailureKind.WRONG_RESULT and not condemned:
            self._condemn(key_id, digest, cursor.lastrowid)
        return True

    def put_tags(self, trial_id: str, tags: Mapping[str, str | None]) -> None:
        """Set tags of a record, remove those whose value is None: the record moves to the group that has them.

        Raises:
            NotFoundError: There is no such record.
        """
        row = self._connection.execute(
            "SELECT r.id, g.id, g.key_id, g.op, g.description, g.model, g.team, g.job, g.sm_percent, g.tags, g.facts "
            "FROM records r JOIN groups g ON g.id = r.group_id WHERE r.trial_id = ?",
            (digest_bytes(trial_id),),
        ).fetchone()
        if row is None:
            raise NotFoundError(f"there is no record {trial_id[:64]}; see: tuner-client query --ids")
        merged = {**json.loads(row[9]), **tags}
        kept = canonical_json({name: value for name, value in merged.items() if value is not None})
        group = self._group_of([*row[2:9], kept, row[10]])
        if group == row[1]:
            return
        self._connection.execute("UPDATE records SET group_id = ? WHERE id = ?", (group, row[0]))
        self._connection.execute(
            "DELETE FROM groups WHERE id = ? AND NOT EXISTS (SELECT 1 FROM records WHERE group_id = ?)",
            (row[1], row[1]),
        )

    def _condemn(self, key_id: int, trace_digest: bytes, record_id: int | None) -> None:
        self._connection.execute("INSERT INTO condemned VALUES (?, ?, ?)", (key_id, trace_digest, record_id))
        self._connection.execute(
            "UPDATE records SET condemned_by = ? WHERE key_id = ? AND trace_digest = ?",
            (record_id, key_id, trace_digest),
        )

    def _workload(self, digest: str) -> tuple[int, str, str]:
        found = self._workloads.get(digest)
        if found is None:
            found = self._connection.execute(
                "SELECT id, op, description FROM workloads WHERE digest = ?", (bytes.fromhex(digest),)
            ).fetchone()
            if found is None:
                raise InvalidRecordError(f"workload {digest[:12]} of a record is neither stored nor given with it")
            self._workloads[digest] = found
        return found

    def _target(self, digest: str, target_json: str) -> int:
        found = self._targets.get(digest)
        if found is None:
            raw = bytes.fromhex(digest)
            self._connection.execute(
                "INSERT INTO targets (digest, json) VALUES (?, ?) ON CONFLICT (digest) DO NOTHING", (raw, target_json)
            )
            found = int(self._connection.execute("SELECT id FROM targets WHERE digest = ?", (raw,)).fetchone()[0])
            self._targets[digest] = found
        return found

    def _key(self, record: Record) -> int:
        found = self._keys.get(record.key)
        if found is None:
            row = (
                self._workload(record.workload_digest)[0],
                self._target(record.target_digest, record.target_json),
                record.device_model,
                record.sm_count,
                record.tvm_version,
            )
            self._connection.execute(
                "INSERT INTO keys (workload_id, target_id, device_model, sm_count, tvm_version) VALUES (?, ?, ?, ?, ?) "
                "ON CONFLICT DO NOTHING",
                row,
            )
            found = int(
                self._connection.execute(
                    "SELECT id FROM keys WHERE workload_id = ? AND target_id = ? AND device_model = ? AND sm_count = ? "
                    "AND tvm_version = ?",
                    row,
                ).fetchone()[0]
            )
            self._keys[record.key] = found
        return found

    def _group(self, record: Record, key_id: int) -> int:
        shared = (*_shared_facts(record), *sorted(record.tags.items()))
        found = self._groups.get(shared)
        if found is None:
            found = self._groups[shared] = self._new_or_known_group(record, key_id)
        return found

    def _new_or_known_group(self, record: Record, key_id: int) -> int:
        _, op, description = self._workload(record.workload_digest)
        op, description = record.op or op, record.description or description
        tags, facts = canonical_json(dict(record.tags)), canonical_json(_facts(record))
        return self._group_of(
            [key_id, op, description, record.model, record.team, record.job, record.sm_percent, tags, facts]
        )

    def _group_of(self, content: Sequence[Any]) -> int:
        """The group of these columns, made when there is none."""
        digest = hashlib.sha256(canonical_json(list(content)).encode()).digest()
        found = self._connection.execute("SELECT id FROM groups WHERE digest = ?", (digest,)).fetchone()
        if found is not None:
            return int(found[0])
        cursor = self._connection.execute(
            "INSERT INTO groups (digest, key_id, op, description, model, team, job, sm_percent, tags, facts) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (digest, *content),
        )
        return cursor.lastrowid or 0


def digest_bytes(text: str) -> bytes:
    """The bytes of a digest in hex; of anything else, bytes that no digest has."""
    try:
        return bytes.fromhex(text)
    except ValueError:
        return b""


def _facts(record: Record) -> dict[str, Any]:
    return {
        "device_arch": record.device_arch,
        "partition_kind": record.partition_kind,
        "evaluator": asdict(record.evaluator),
        "cuda_version": record.cuda_version,
        "driver_version": record.driver_version,
        "origin": record.origin,
        "instance": record.instance,
        "affinity": list(record.affinity),
        "layout": record.layout,
    }


def read_workload(connection: sqlite3.Connection, digest: str) -> Workload | None:
    """The stored workload, or None."""
    try:
        raw = bytes.fromhex(digest)
    except ValueError:
        return None
    row = connection.execute(
        "SELECT body, structural_hash, op, description, args_info FROM workloads WHERE digest = ?", (raw,)
    ).fetchone()
    if row is None:
        return None
    return Workload(
        digest=digest,
        body=unpack(row[0], limit=MAX_BODY_BYTES, what="stored workload"),
        structural_hash=row[1],
        op=row[2],
        description=row[3],
        args_info=read_args_info(row[4]),
    )


def read_records(connection: sqlite3.Connection, catalogue: Catalogue, rows: Sequence[tuple[Any, ...]]) -> list[Record]:
    """Records of rows of ``RECORD_COLUMNS``, in their order."""
    groups = catalogue.shared(connection, {row[1] for row in rows})
    return [_record(row, groups[row[1]]) for row in rows]


def _record(row: tuple[Any, ...], shared: Record) -> Record:
    latencies = row[8]
    return replace(
        shared,
        trial_id=row[0].hex(),
        verified=bool(row[2]),
        median_us=None if math.isinf(row[3]) else row[3],
        created_at=row[4],
        neighbours=row[5],
        ci_low_us=row[6],
        ci_high_us=row[7],
        latencies_us=struct.unpack(f"<{len(latencies) // 8}d", latencies),
        failure=FailureKind(row[9]) if row[9] is not None else None,
        failure_message=row[10],
        trace=unpack(row[11], limit=MAX_TRACE_BYTES, what="stored trace"),
    )
