"""The record store as a database that TVM's own passes apply."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import statistics
from collections.abc import Iterator
from typing import Any

from tuner_core.compiler.target import expanded_target
from tuner_core.compiler.tvm_setup import load_tvm
from tuner_core.compiler.workload import digest_of, normalise, workload_from_module
from tuner_core.errors import (
    AuthenticationError,
    DeadlineError,
    StoreError,
    TunerError,
    UnavailableError,
    UsageError,
)
from tuner_core.model import (
    TVM_VERSION,
    Origin,
    PartitionKind,
    Record,
    RecordKey,
    canonical_json,
    target_digest,
    trial_id,
)
from tuner_core.store.interface import RecordFilter, RecordStore

load_tvm()

from tvm.ir.utils import derived_object  # noqa: E402
from tvm.s_tir import meta_schedule as ms  # noqa: E402
from tvm.target import Target  # noqa: E402
from tvm_ffi import register_error  # noqa: E402

log = logging.getLogger(__name__)

# TVM's C++ calls this database: without registration, what it raises comes out of TVM as a RuntimeError
for _error in (StoreError, TunerError, UnavailableError, DeadlineError, UsageError, AuthenticationError):
    register_error(_error)

_CANDIDATES = 8


@derived_object
class RecordDatabase(ms.database.PyDatabase):
    """Records of one device, SM count and target, for ``with database:`` and ``MetaScheduleApplyDatabase``.

    TVM's own databases answer a query for any target with whatever they hold; this one answers only for its own.

    Args:
        store_or_address: A store, or ``HOST:PORT`` of a server.
        device_model: As records hold it, e.g. ``NVIDIA H200``.
        sm_count: SMs (or cores) that the model will run on.
        target: ``tvm.target.Target``, mapping or JSON.
        strict: Also require device, SM count and TVM version to be the same. When False, a workload without such a
            record gets the one of the nearest SM count, the same device and version preferred, and the log says so.
        sm_percent: Share that ``sm_count`` is of the device, for records that TVM commits into this database.

    Raises:
        UsageError: TVM does not know the target, or the address is not one.
        StoreError, UnavailableError (when queried): As the store raises them.
    """

    def __init__(
        self,
        store_or_address: RecordStore | str,
        *,
        device_model: str,
        sm_count: int,
        target: Any,
        strict: bool = True,
        sm_percent: int = 100,
    ) -> None:
        super().__init__()
        self._expanded = expanded_target(target)
        self._target_json = canonical_json(json.loads(target if isinstance(target, str) else _json(target)))
        self._target_digest = target_digest(self._target_json)
        self._device_model = device_model
        self._sm_count = sm_count
        self._strict = strict
        self._sm_percent = sm_percent
        self._channel: Any = None
        if isinstance(store_or_address, str):
            from tuner_core.store.remote import RemoteStore
            from tuner_core.transport.channel import open_channel
            from tuner_core.transport.options import ConnectionOptions

            self._channel = open_channel(ConnectionOptions(store_or_address))
            self._store: RecordStore = RemoteStore(self._channel, address=store_or_address)
        else:
            self._store = store_or_address

    def close(self) -> None:
        """Close the connection that this database opened; a store that was given stays open."""
        if self._channel is not None:
            self._channel.close()

    # Queries of TVM

    def has_workload(self, mod: Any) -> bool:
        """Whether there is a record that applies."""
        return bool(self._best(mod, 1))

    def query_tuning_record(self, mod: Any, target: Any, workload_name: str | None = None) -> Any:
        """The best record that applies to this workload on this target, or None.

        A record whose trace does not fit its workload is passed over with a warning.
        """
        if expanded_target(target) != self._expanded:
            return None
        found = self._tuning_records(normalise(mod), self._best(mod, _CANDIDATES))
        return next(found, None)

    def query_schedule(self, mod: Any, target: Any, workload_name: str | None = None) -> Any:
        """The schedule of :meth:`query_tuning_record`, or None."""
        record = self.query_tuning_record(mod, target, workload_name)
        return None if record is None else record.as_measure_candidate().sch

    def query_ir_module(self, mod: Any, target: Any, workload_name: str | None = None) -> Any:
        """The scheduled module of :meth:`query_tuning_record`, or None."""
        schedule = self.query_schedule(mod, target, workload_name)
        return None if schedule is None else schedule.mod

    def get_top_k(self, workload: Any, top_k: int) -> list[Any]:
        """The best records of a workload, best first."""
        if top_k < 1:
            return []
        return list(self._tuning_records(workload.mod, self._best(workload.mod, top_k)))

    def get_all_tuning_records(self) -> list[Any]:
        """All valid records of this device, SM count and target. Each trace is replayed, some milliseconds each."""
        from tuner_core.compiler.workload import module_from_body

        modules: dict[str, Any] = {}
        found: list[Any] = []
        for record in self._all():
            if record.workload_digest not in modules:
                workload = self._store.get_workload(record.workload_digest)
                modules[record.workload_digest] = None if workload is None else module_from_body(workload.body)
            if modules[record.workload_digest] is not None:
                found.extend(self._tuning_records(modules[record.workload_digest], [record]))
        return found

    def __len__(self) -> int:
        """How many valid records this device, SM count and target have."""
        return sum(1 for _ in self._all())

    # Commits of TVM: a stock tuning run may use this database

    def commit_workload(self, mod: Any) -> Any:
        """Store a workload."""
        self._store.commit([], [workload_from_module(mod)])
        return ms.database.Workload(normalise(mod))

    def commit_tuning_record(self, record: Any) -> None:
        """Store a record that stock TVM measured on this device.

        Raises:
            UsageError: It was measured for another target.
        """
        if record.target is not None and expanded_target(record.target) != self._expanded:
            raise UsageError("this record was measured for another target than this database's")
        runs_us = tuple(float(run) * 1e6 for run in record.run_secs or ())
        if not runs_us or max(runs_us) >= 1e13:
            return  # stock TVM's mark of a failed run says nothing about why
        workload = workload_from_module(record.workload.mod)
        trace = json.dumps(record.as_json()[0], separators=(",", ":"))
        key = self._key(workload.digest)
        cpu = json.loads(self._expanded).get("kind") == "llvm"
        stored = Record(
            trial_id=trial_id(key, trace, "", False),
            workload_digest=workload.digest,
            trace=trace,
            target_json=self._target_json,
            target_digest=self._target_digest,
            device_model=self._device_model,
            device_arch="",
            sm_percent=self._sm_percent,
            sm_count=self._sm_count,
            partition_kind=PartitionKind.CPU if cpu else PartitionKind.EXCLUSIVE,
            latencies_us=runs_us,
            median_us=statistics.median(runs_us),
            origin=Origin.IMPORT,
        )
        self._store.commit([stored], [workload])

    def _key(self, workload_digest: str) -> RecordKey:
        return RecordKey(workload_digest, self._target_digest, self._device_model, self._sm_count)

    def _filter(self, **changes: Any) -> RecordFilter:
        strict = RecordFilter(device_model=self._device_model, sm_count=self._sm_count, tvm_version=TVM_VERSION)
        return dataclasses.replace(strict, **changes)

    def _same_target(self, record: Record) -> bool:
        if record.target_digest == self._target_digest:
            return True
        with contextlib.suppress(UsageError):
            return expanded_target(record.target_json) == self._expanded
        return False

    def _best(self, mod: Any, limit: int) -> list[Record]:
        digest = digest_of(mod)
        found = self._store.top(self._key(digest), limit)
        if not found:  # the same target in another spelling has another digest
            page = self._store.query(self._filter(workload_digest=digest), limit=1_000, top_per_key=limit)
            found = sorted(filter(self._same_target, page.records), key=_rank)[:limit]
        if not found and not self._strict:
            found = self._near(digest, limit)
        return found

    def _near(self, digest: str, limit: int) -> list[Record]:
        page = self._store.query(RecordFilter(workload_digest=digest), limit=1_000, top_per_key=limit)
        kind = json.loads(self._expanded).get("kind")
        found = [record for record in page.records if json.loads(record.target_json).get("kind") == kind]

        def distance(record: Record) -> tuple[Any, ...]:
            return (
                record.tvm_version != TVM_VERSION,
                record.device_model != self._device_model,
                abs(record.sm_count - self._sm_count),
                _rank(record),
            )

        found.sort(key=distance)
        if found:
            log.warning(
                "%s: no record for %s with %d SMs; nearest: %s with %d SMs, TVM %s",
                found[0].description,
                self._device_model,
                self._sm_count,
                found[0].device_model,
                found[0].sm_count,
                found[0].tvm_version,
            )
        return found[:limit]

    def _all(self) -> Iterator[Record]:
        cursor: str | None = None
        while True:
            page = self._store.query(self._filter(), limit=1_000, cursor=cursor)
            yield from filter(self._same_target, page.records)
            cursor = page.next_cursor
            if cursor is None:
                return

    def _tuning_records(self, mod: Any, records: list[Record]) -> Iterator[Any]:
        workload = ms.database.Workload(mod)
        args_info = [info.as_json() for info in ms.arg_info.ArgInfo.from_entry_func(mod, remove_preproc=False)]
        for record in records:
            runs_s = [us * 1e-6 for us in record.latencies_us or (record.median_us or 0.0,)]
            row = [json.loads(record.trace), runs_s, json.loads(record.target_json), args_info]
            try:
                yield ms.database.TuningRecord.from_json(row, workload)
            except Exception as error:  # whatever TVM raises when it replays a trace that does not fit
                lines = str(error).strip().splitlines() or [type(error).__name__]
                log.warning("record %s does not apply to its workload: %s", record.trial_id[:12], lines[-1][:300])


def _rank(record: Record) -> tuple[Any, ...]:
    return (not record.verified, record.median_us, record.trial_id)


def _json(target: Any) -> str:
    return str(target) if isinstance(target, Target) else json.dumps(dict(target))
